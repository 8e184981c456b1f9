"""Writes checkpoints of the real models' exact shapes with random weights: for memory, time and size.

    python -m medgemma_export.samples.random_checkpoint medsiglip-448 --out DIR
    python -m medgemma_export.samples.random_checkpoint medgemma-4b --out DIR
    python -m medgemma_export.samples.random_checkpoint medgemma-27b --out DIR

The files are laid out as on the hub, in shards, so that everything that reads a real checkpoint reads them.
Values are drawn so that activations keep a sane range through all layers; they mean nothing.

27B is 54 GB, of which most is not there: only the first layers have values, the others are holes in sparse
files, which read as zeros and take no room. Every byte is read, hashed, rounded and packed all the same, and
zeros take as long to round as anything; but such a model says nothing of quality, and its files shrink to
little where a disk or an archive compresses.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track

from medgemma_export.safetensors_checkpoint import INDEX_NAME
from medgemma_export.samples.captions import CAPTIONS
from medgemma_export.samples.medgemma_tiny import (
    build_gemma_tokenizer,
    gemma_distribution,
    write_gemma_files,
)
from medgemma_export.samples.siglip_files import build_siglip_tokenizer, write_siglip_files
from medgemma_runtime.errors import EdgeError

__all__ = ["MODELS", "RandomModel", "siglip_distribution", "write_random_checkpoint", "main"]

SHARD_BYTES = 512 << 20
# At most this many values are drawn at a time, so that no tensor has to fit in memory.
_CHUNK_VALUES = 1 << 23
_DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}

Shapes = dict[str, tuple[int, ...]]

_LAYER = re.compile(r"\.layers\.(\d+)\.")

# What the text decoders of 4B and 27B share.
_GEMMA_TEXT = {
    "vocab_size": 262208,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def _medsiglip_448(directory: Path) -> Shapes:
    """google/medsiglip-448: everything but its weights."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    width = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
    config = SiglipConfig(
        text_config={
            **width,
            "vocab_size": 32000,
            "max_position_embeddings": 64,
            "projection_size": 1152,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        vision_config={**width, "image_size": 448, "patch_size": 14},
        architectures=["SiglipModel"],
    )
    config.save_pretrained(directory)
    tokenizer = build_siglip_tokenizer(text for texts in CAPTIONS.values() for text in texts)
    write_siglip_files(directory, tokenizer, image_size=448)
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in SiglipModel(config).state_dict().items()}


def _medgemma_4b(directory: Path) -> Shapes:
    """google/medgemma-4b-it: everything but its weights, with a small tokenizer's ids for control tokens."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = build_gemma_tokenizer(text for texts in CAPTIONS.values() for text in texts)
    config = Gemma3Config(
        text_config={
            **_GEMMA_TEXT,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=256,
        boi_token_index=tokenizer.token_to_id("<start_of_image>"),
        eoi_token_index=tokenizer.token_to_id("<end_of_image>"),
        image_token_index=tokenizer.token_to_id("<image_soft_token>"),
        eos_token_id=[1, tokenizer.token_to_id("<end_of_turn>")],
        architectures=["Gemma3ForConditionalGeneration"],
    )
    config.save_pretrained(directory)
    write_gemma_files(directory, tokenizer, image_size=896, image_tokens=256)
    with torch.device("meta"):
        state = Gemma3ForConditionalGeneration(config).state_dict()
    # The head is the embedding's table, and checkpoints hold that once.
    return {name: tuple(value.shape) for name, value in state.items() if name != "lm_head.weight"}


def _medgemma_27b(directory: Path) -> Shapes:
    """google/medgemma-27b-text-it: everything but its weights, as `_medgemma_4b`."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = build_gemma_tokenizer(text for texts in CAPTIONS.values() for text in texts)
    config = Gemma3TextConfig(
        **_GEMMA_TEXT,
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        eos_token_id=[1, tokenizer.token_to_id("<end_of_turn>")],
        architectures=["Gemma3ForCausalLM"],
    )
    config.save_pretrained(directory)
    write_gemma_files(directory, tokenizer, image_size=896, image_tokens=256)
    (directory / "preprocessor_config.json").unlink()  # it sees no images
    with torch.device("meta"):
        state = Gemma3ForCausalLM(config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if name != "lm_head.weight"}


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A model whose shapes can be written.

    Attributes:
        write_files: Writes its small files and returns its tensors' shapes.
        distribution: Mean and standard deviation of a tensor's values, by name and shape.
        filled_layers: How many of its layers have values; those of the others are holes. None for all.
    """

    write_files: Callable[[Path], Shapes]
    distribution: Callable[[str, tuple[int, ...]], tuple[float, float]]
    filled_layers: int | None = None

    def is_hole(self, name: str) -> bool:
        """Whether a tensor has no values."""
        layer = _LAYER.search(name)
        return self.filled_layers is not None and layer is not None and int(layer[1]) >= self.filled_layers


def siglip_distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep a pre-norm transformer's activations near one."""
    if name == "logit_scale":
        return math.log(10.0), 0.0
    if name == "logit_bias":
        return -10.0, 0.0
    if name.endswith("bias"):
        return 0.0, 0.02
    if "norm" in name:
        return 1.0, 0.1
    if "embedding" in name and "patch" not in name:
        return 0.0, 0.5
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    # The two linears that end in the residual stream are smaller, so that it does not grow with depth.
    shrink = 0.2 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
    return 0.0, shrink / math.sqrt(fan_in)


MODELS: dict[str, RandomModel] = {
    "medsiglip-448": RandomModel(write_files=_medsiglip_448, distribution=siglip_distribution),
    "medgemma-4b": RandomModel(write_files=_medgemma_4b, distribution=gemma_distribution),
    # Five local layers and a global one, and the table: 7.8 GB on disk.
    "medgemma-27b": RandomModel(write_files=_medgemma_27b, distribution=gemma_distribution, filled_layers=6),
}
"""The models whose shapes can be written, by name."""


def write_random_checkpoint(model: str, directory: Path, *, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Write a checkpoint, one chunk of one tensor at a time.

    Args:
        model: A key of `MODELS`.
        directory: Where to; must not exist.
        dtype: bfloat16, float16 or float32.
        seed: Of all values; each tensor's depend only on it and on the tensor's name.

    Returns:
        The number of parameters.

    Raises:
        EdgeError: If the model or dtype is unknown, or the directory exists.
    """
    if model not in MODELS or dtype not in _DTYPES:
        raise EdgeError(
            f"there is no random {model} in {dtype}; models: {', '.join(MODELS)}; "
            f"dtypes: {', '.join(_DTYPES)}"
        )
    if directory.exists():
        raise EdgeError(f"{directory} exists already; remove it or name another")
    directory.mkdir(parents=True)
    wanted = MODELS[model]
    shapes = wanted.write_files(directory)
    itemsize = _DTYPES[dtype][1].itemsize
    shards = list(_split(shapes, itemsize))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(track(shards, description=f"Writing {model}"), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        draw = partial(_draw, seed=seed, distribution=wanted.distribution)
        _write_shard(directory / file, shard, dtype=dtype, draw=draw, is_hole=wanted.is_hole)
        weight_map |= dict.fromkeys(shard, file)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": parameters * itemsize}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return parameters


def _split(shapes: Shapes, itemsize: int) -> Iterator[Shapes]:
    """Cut a model into shards of at most `SHARD_BYTES`, or of one larger tensor."""
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * itemsize
        if shard and size + tensor_bytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += tensor_bytes
    yield shard


def _write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    draw: Callable[[str, tuple[int, ...]], Iterator[NDArray[np.float32]]],
    is_hole: Callable[[str], bool],
) -> None:
    """The safetensors format, by hand: its library wants every tensor of a file in memory at once."""
    label, stored = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * stored.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # values begin at a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            if is_hole(name):
                stream.seek(math.prod(shape) * stored.itemsize, os.SEEK_CUR)
                continue
            for chunk in draw(name, shape):
                stream.write(chunk.astype(stored).tobytes())
        stream.truncate()  # a hole at the end is part of the file


def _draw(
    name: str,
    shape: tuple[int, ...],
    *,
    seed: int,
    distribution: Callable[[str, tuple[int, ...]], tuple[float, float]],
) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    mean, deviation = distribution(name, shape)
    remaining = math.prod(shape)
    while remaining:
        count = min(remaining, _CHUNK_VALUES)
        yield rng.standard_normal(count, dtype=np.float32) * np.float32(deviation) + np.float32(mean)
        remaining -= count


def main(
    model: Annotated[str, typer.Argument(help="One of: " + ", ".join(MODELS))],
    out: Annotated[Path, typer.Option(help="A directory that does not exist yet.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of all values.")] = 0,
) -> None:
    """Write a checkpoint of a real model's shapes with random weights."""
    try:
        parameters = write_random_checkpoint(model, out, dtype=dtype, seed=seed)
    except EdgeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{out}: {parameters:,} parameters of {model} in {dtype}, random")


if __name__ == "__main__":
    typer.run(main)
