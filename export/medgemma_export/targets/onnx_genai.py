"""Files that let ONNX Runtime GenAI run an artifact, as the sources of its version 0.18 read them.

GenAI gives the decoder neither `image_blocks` nor `local_start`: the tokens of an image see what is before
them only, and the caches of all layers hold the whole conversation.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from medgemma_export.models.spec import ModelSpec
from medgemma_runtime.manifest import ComponentEntry, ImageSpec, PromptSpec

__all__ = ["write_genai_files"]

# Not GenAI's default, processor_config.json: that name is transformers' and transformers.js'.
_IMAGE_STEPS_NAME = "genai_image_processor.json"

# <pad> of Gemma's tokenizer, as config.json of google/gemma-3-4b-it has it.
_PAD_ID = 0

# GenAI allocates the caches of this many tokens before the first, unless its caller names another length.
_LENGTH = 4096

# Kernels of Pillow's under the names that onnxruntime-extensions, which has Pillow's code, gives them.
_KERNELS = {"bilinear": "LINEAR", "bicubic": "CUBIC"}


def write_genai_files(model: ModelSpec, entries: Mapping[str, ComponentEntry], directory: Path) -> None:
    """Write `genai_config.json` and what it names; nothing where there is no `embed` and `decoder`.

    With `vision` the artifact is GenAI's type `gemma3`, without it a `decoder-pipeline`.

    Args:
        model: What was lowered.
        entries: The components that lie in `directory`.
        directory: Of the artifact.
    """
    if model.prompt is None or not {"embed", "decoder"} <= entries.keys():
        return
    if "vision" in entries and model.image is not None:
        parts = _image_parts(entries, directory)
        _write_json(directory / _IMAGE_STEPS_NAME, _image_steps(model.image))
    else:
        parts = _text_parts(entries)
    settings = {
        "model": {**_tokens(model.prompt), **parts},
        "search": {
            "do_sample": False,
            "max_length": min(_LENGTH, model.prompt.context),
            "past_present_share_buffer": True,
        },
    }
    _write_json(directory / "genai_config.json", settings)


def _tokens(prompt: PromptSpec) -> dict[str, object]:
    tokens = {"bos_token_id": prompt.bos_id, "eos_token_id": list(prompt.stop_ids), "pad_token_id": _PAD_ID}
    image = {} if prompt.image_id is None else {"image_token_id": prompt.image_id}
    return {"context_length": prompt.context, **tokens, **image}


def _image_parts(entries: Mapping[str, ComponentEntry], directory: Path) -> dict[str, object]:
    decoder = entries["decoder"]
    return {
        "type": "gemma3",
        "vocab_size": _vocabulary(decoder),
        "vision": {
            "filename": entries["vision"].program,
            "config_filename": _IMAGE_STEPS_NAME,
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": _write_embed_with_features(entries["embed"], directory),
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "decoder": {"filename": decoder.program, **_decoder(decoder)},
    }


def _text_parts(entries: Mapping[str, ComponentEntry]) -> dict[str, object]:
    decoder = entries["decoder"]
    stages = [
        {
            name: {
                "filename": entries[name].program,
                "inputs": [spec.name for spec in entries[name].inputs if spec.default is None],
                "outputs": [spec.name for spec in entries[name].outputs],
            }
        }
        for name in ("embed", "decoder")
    ]
    return {
        "type": "decoder-pipeline",
        "vocab_size": _vocabulary(decoder),
        "decoder": {**_decoder(decoder), "pipeline": stages},
    }


def _decoder(decoder: ComponentEntry) -> dict[str, object]:
    shapes = {spec.name: spec.shape for spec in decoder.inputs}
    _, kv_heads, _, head_width = shapes["past_key_values.0.key"]
    return {
        "hidden_size": shapes["inputs_embeds"][-1],
        "head_size": head_width,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": sum(name.endswith(".key") for name in shapes),
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _vocabulary(decoder: ComponentEntry) -> int | str:
    [logits] = [spec for spec in decoder.outputs if spec.name == "logits"]
    return logits.shape[-1]


def _write_embed_with_features(embed: ComponentEntry, directory: Path) -> str:
    """Write the program `embed` again, with the same weight file, where image features must be given.

    GenAI does not find an input that may be left out, and transformers.js leaves this one out.
    """
    path = PurePosixPath(embed.program)
    program = path.with_name(f"{path.stem}_genai.onnx").as_posix()
    loaded = ir.load(directory / embed.program)
    del loaded.graph.initializers["image_features"]
    ir.save(loaded, directory / program)
    return program


def _image_steps(image: ImageSpec) -> dict[str, object]:
    """What GenAI does to an image file, step by step."""
    steps: list[tuple[str, dict[str, object]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        (
            "Resize",
            {
                "height": image.height,
                "width": image.width,
                "keep_aspect_ratio": 0,
                "interpolation": _KERNELS[image.resample],
            },
        ),
        ("Rescale", {"rescale_factor": image.rescale}),
        ("Normalize", {"mean": list(image.mean), "std": list(image.std)}),
        ("Permute3D", {"dims": [2, 0, 1]}),
    ]
    transforms = [
        {"operation": {"name": kind.lower(), "type": kind, "attrs": settings}} for kind, settings in steps
    ]
    return {"processor": {"name": "gemma3", "transforms": transforms}}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
