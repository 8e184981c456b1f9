"""Records what the original Gemma 3 predicts, with transformers, as a generative reference bundle.

From decoded pixels and texts on, the model inputs come from the reference's own processor, tokenizer and chat
template, never from our runtime, so that a bundle can find errors in the runtime's too. Every prompt is one
forward without a cache.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle, write_bundle
from medgemma_benchmarks.bundle_record import Producer, ReferencePrompt
from medgemma_benchmarks.layer_parity import MAX_ITEMS, prompt_of_layers
from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.models import load_model
from medgemma_export.reference.layers import layer_states
from medgemma_export.reference.original import (
    ATTENTION,
    Device,
    Dtype,
    compute_in_full,
    describe_processor,
    device_name,
    import_transformers,
    package_versions,
)
from medgemma_export.reference.prompts import PromptText
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import CheckpointError, EdgeError
from medgemma_runtime.manifest import ImageSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "records_text",
    "sees_images",
    "record_text_reference",
    "encode_prompts",
    "EncodedPrompt",
    "open_network",
    "hidden_states",
]

_WITH_IMAGES = "Gemma3ForConditionalGeneration"
_ARCHITECTURES = (_WITH_IMAGES, "Gemma3ForCausalLM")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPrompt:
    """A prompt as the reference's own processor made it.

    Attributes:
        text: What it says.
        ids: [S] int64.
        given_tokens: How many of them come before the first that is predicted.
        pixel_values: [images, 3, H, W] float32; None without images.
        image_id: The id of images' places; None for a model that reads text only.
    """

    text: PromptText
    ids: NDArray[np.int64]
    given_tokens: int
    pixel_values: NDArray[np.float32] | None
    image_id: int | None


def records_text(checkpoint: Checkpoint) -> bool:
    """Whether the reference of a checkpoint is a generative one."""
    return _architecture(checkpoint) in _ARCHITECTURES


def sees_images(checkpoint: Checkpoint) -> bool:
    """Whether such a checkpoint reads images too."""
    return _architecture(checkpoint) == _WITH_IMAGES


def record_text_reference(
    model: str,
    out: Path,
    *,
    prompts: Sequence[PromptText],
    images: Sequence[DecodedImage] = (),
    revision: str | None = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    per_layer: bool = False,
    progress: Progress | None = None,
) -> ReferenceBundle:
    """Run the original model on prompts and keep what went in and what came out.

    The embedding scale is rounded to bfloat16, as the released model computes it; transformers takes the
    dtype that it loads the weights in.

    Args:
        model: What `open_checkpoint` takes; a Gemma3ForConditionalGeneration or Gemma3ForCausalLM.
        out: The directory to create.
        prompts: In the order to record them.
        images: Those that prompts name; others are left out.
        revision: Commit, for a hub id.
        device: Where to run. CUDA computes float32 in full, without TF32.
        dtype: Floating type of weights and activations; the recorded arrays are float32 in any case.
        per_layer: Also keep the residual stream between the layers, of the first images and of a text.
        progress: Called before every step.

    Raises:
        EdgeError: If there is no CUDA device, a package is missing, or `out` exists.
        CheckpointError: If the checkpoint is of another architecture, or lacks a file or a chat template.
    """
    if out.exists():
        raise EdgeError(f"{out} exists; remove it or choose another place for the reference")
    product = device_name(device)
    checkpoint = open_checkpoint(model, revision=revision)
    encoded, image_spec, processor = encode_prompts(checkpoint, prompts, images)
    network = open_network(checkpoint, device=device, dtype=dtype)
    hidden = []
    for number, prompt in enumerate(encoded):
        if progress is not None:
            progress("running prompts", number, len(encoded))
        hidden.append(hidden_states(network, prompt).float().cpu().numpy())
    arrays: dict[str, NDArray[Any]] = {
        "decoder.input_ids": np.concatenate([prompt.ids for prompt in encoded]),
        "decoder.hidden_states": np.concatenate(hidden),
        "decoder.head": network.get_output_embeddings().weight.detach().float().cpu().numpy(),
    }
    seen = {
        name: pixels
        for prompt in encoded
        if prompt.pixel_values is not None
        for name, pixels in zip(prompt.text.images, prompt.pixel_values, strict=True)
    }
    shown = [image for image in images if image.name in seen]
    if shown:
        pixel_values = np.stack([seen[image.name] for image in shown])
        arrays |= {
            "vision.pixel_values": pixel_values,
            "vision.image_features": _image_features(network, pixel_values),
        }
    layers = (
        _record_layers(network, arrays, [_describe_prompt(prompt) for prompt in encoded]) if per_layer else {}
    )
    arrays |= {f"{name}.layers": states for name, states in layers.items()}
    return write_bundle(
        out,
        kind="generative",
        model_id=checkpoint.id,
        revision=checkpoint.revision,
        weights_sha256=checkpoint.weights_sha256(),
        plan_sha256=None,
        producer=Producer(
            device=device,
            device_name=product,
            dtype=dtype,
            attention=ATTENTION,
            image_processor=processor if shown else "none",
            tokenizer=_tokenizer_name(checkpoint),
            versions=package_versions(),
        ),
        image=image_spec if shown else None,
        images=shown,
        labels=(),
        arrays=arrays,
        timings={},
        prompts=[_describe_prompt(prompt) for prompt in encoded],
        embedding_scale=float(network.get_input_embeddings().embed_scale),
        layers=tuple(layers),
    )


def _record_layers(
    network: Any, arrays: Mapping[str, NDArray[Any]], prompts: Sequence[ReferencePrompt]
) -> dict[str, NDArray[np.float32]]:
    """[items, layers + 1, kept tokens, H] by component."""
    import torch

    def on_device(array: NDArray[Any]) -> "torch.Tensor":
        tensor = torch.from_numpy(array).to(network.device)
        return tensor.to(network.dtype) if tensor.is_floating_point() else tensor

    found = {}
    if "vision.pixel_values" in arrays:
        tower = network.model.vision_tower
        found["vision"] = np.stack(
            [
                layer_states(tower, partial(tower, pixel_values=on_device(pixels[None])))
                for pixels in arrays["vision.pixel_values"][:MAX_ITEMS]
            ]
        )
    if (place := prompt_of_layers(prompts)) is not None:
        decoder = network.get_decoder()
        ids = on_device(arrays["decoder.input_ids"][None, slice(*place)])
        found["decoder"] = layer_states(decoder, partial(decoder, input_ids=ids, use_cache=False))[None]
    return found


def encode_prompts(
    checkpoint: Checkpoint, prompts: Sequence[PromptText], images: Sequence[DecodedImage] = ()
) -> tuple[list[EncodedPrompt], ImageSpec | None, str]:
    """Make model inputs with transformers' own tokenizer, processor and chat template.

    Returns:
        The prompts, what the image processor was set to do, and its name.

    Raises:
        CheckpointError: If the checkpoint is of another architecture, or lacks what a prompt needs.
    """
    _check_architecture(checkpoint)
    tokenizer = _open_tokenizer(checkpoint)
    rgb = {image.name: image.rgb for image in images}
    processor = _open_processor(checkpoint, tokenizer) if any(prompt.images for prompt in prompts) else None
    encoded = []
    for prompt in prompts:
        ids = np.array(tokenizer(prompt.text)["input_ids"], np.int64)
        given, pixels = 1, None
        if prompt.question is not None:
            asked, pixels = _ask(checkpoint, tokenizer, processor, prompt, rgb)
            ids, given = np.concatenate((asked, ids[1:])), len(asked)
        encoded.append(
            EncodedPrompt(
                text=prompt,
                ids=ids,
                given_tokens=given,
                pixel_values=pixels,
                image_id=checkpoint.config.get("image_token_index"),  # type: ignore[arg-type]
            )
        )
    if processor is None:
        return encoded, None, "none"
    name = f"transformers {type(processor).__name__} with {type(processor.image_processor).__name__}"
    return encoded, describe_processor(processor.image_processor), name


def open_network(checkpoint: Checkpoint, *, device: Device = "cpu", dtype: Dtype = "float32") -> Any:
    """The original model, its embedding scale as released."""
    import torch

    compute_in_full()
    # transformers draws a bar of its own while it reads a GGUF file.
    with redirect_stderr(io.StringIO()):
        network = getattr(import_transformers(), _architecture(checkpoint)).from_pretrained(
            checkpoint.directory,
            gguf_file=checkpoint.weight_files[0] if _is_gguf(checkpoint) else None,
            dtype=getattr(torch, dtype),
            attn_implementation=ATTENTION,
        )
    _set_released_scale(network.get_input_embeddings())
    return network.eval().to(device)


def _set_released_scale(embedding: Any) -> None:
    import torch

    embedding.embed_scale.fill_(torch.tensor(embedding.embedding_dim**0.5, dtype=torch.bfloat16))


def hidden_states(network: Any, prompt: EncodedPrompt, *, sees_images_whole: bool = True) -> "torch.Tensor":
    """[T, D] after the final norm, from which the logits of each prediction are made.

    Args:
        network: From `open_network`.
        prompt: One prompt.
        sees_images_whole: Whether the tokens of an image see each other, as they do in the original.
    """
    import torch

    read = prompt.ids[None, :-1]  # the last token is only predicted
    inputs = {"input_ids": torch.from_numpy(read).to(network.device)}
    if prompt.pixel_values is not None:
        pixels = torch.from_numpy(prompt.pixel_values).to(network.device, network.dtype)
        kinds = (read == prompt.image_id) * np.int64(sees_images_whole)
        inputs |= {"pixel_values": pixels, "token_type_ids": torch.from_numpy(kinds).to(network.device)}
    with torch.inference_mode():
        states: torch.Tensor = network.model(**inputs, use_cache=False).last_hidden_state
    return states[0, prompt.given_tokens - 1 :]


def _describe_prompt(prompt: EncodedPrompt) -> ReferencePrompt:
    text = prompt.text
    return ReferencePrompt(
        name=text.name,
        images=text.images,
        question=text.question,
        text=text.text,
        source=text.source,
        licence=text.licence,
        tokens=len(prompt.ids),
        given_tokens=prompt.given_tokens,
        is_sample=text.is_sample,
    )


def _image_features(network: Any, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[images * tokens, D], one image at a time."""
    import torch

    rows = []
    with torch.inference_mode():
        for pixels in pixel_values:
            tensor = torch.from_numpy(pixels[None]).to(network.device, network.dtype)
            rows.append(network.model.get_image_features(tensor).pooler_output.flatten(0, 1))
    return torch.cat(rows).float().cpu().numpy()


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _check_architecture(checkpoint: Checkpoint) -> None:
    if _architecture(checkpoint) not in _ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.id} is {checkpoint.config.get('architectures')} and a generative reference is "
            f"recorded of {' and '.join(_ARCHITECTURES)}; give a MedGemma or Gemma 3 checkpoint"
        )
    load_model(checkpoint)  # refuses what logits need beside the head, such as soft-capping


def _is_gguf(checkpoint: Checkpoint) -> bool:
    return all(name.endswith(".gguf") for name in checkpoint.weight_files)


def _open_tokenizer(checkpoint: Checkpoint) -> Any:
    transformers = import_transformers()
    if _is_gguf(checkpoint):
        [file] = checkpoint.weight_files
        return transformers.GemmaTokenizer.from_pretrained(checkpoint.directory, gguf_file=file)
    checkpoint.file("tokenizer.json")
    return transformers.AutoTokenizer.from_pretrained(checkpoint.directory)


def _tokenizer_name(checkpoint: Checkpoint) -> str:
    file = checkpoint.weight_files[0] if _is_gguf(checkpoint) else "tokenizer.json"
    return f"transformers ({file})"


def _open_processor(checkpoint: Checkpoint, tokenizer: Any) -> Any:
    transformers = import_transformers()
    checkpoint.file("preprocessor_config.json")
    # The Pillow class by name: the torchvision one resizes with other arithmetic.
    images = transformers.Gemma3ImageProcessorPil.from_pretrained(checkpoint.directory)
    return transformers.Gemma3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=transformers.Gemma3Config.from_dict(dict(checkpoint.config)).mm_tokens_per_image,
    )


def _ask(
    checkpoint: Checkpoint,
    tokenizer: Any,
    processor: Any,
    prompt: PromptText,
    rgb: dict[str, NDArray[np.uint8]],
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """The ids up to where the answer begins, and the pixels of the images."""
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{checkpoint.id} has no chat template and {prompt.name!r} is a question; copy "
            "chat_template.jinja from the model's repository, or record texts alone"
        )
    from PIL import Image

    content: list[dict[str, Any]] = [
        {"type": "image", "image": Image.fromarray(rgb[name])} for name in prompt.images
    ]
    content.append({"type": "text", "text": prompt.question})
    made = (processor or tokenizer).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    pixels = made["pixel_values"].astype(np.float32) if prompt.images else None
    return made["input_ids"][0].astype(np.int64), pixels
