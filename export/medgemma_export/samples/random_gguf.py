"""Writes MedGemma 4B's language model with random weights as a GGUF file in Q4_0, to time llama.cpp with it.

    python -m medgemma_export.samples.random_gguf --out medgemma-4b-q4_0.gguf

Q4_0 is int4 in blocks of 32 with one fp16 scale: 4.5 bits a weight, as many as ours. The embedding's table,
which is the head too, has as many. There is no tokenizer in it: a benchmark gives token ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError

__all__ = ["MEDGEMMA_4B", "Shapes", "write_random_gguf", "main"]

_BLOCK, _BLOCK_BYTES = 32, 18  # 16 bits of scale and 32 times 4
# Standard deviation of the integers -8 to 7, all of them as likely.
_INTEGER_DEVIATION = ((16**2 - 1) / 12) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a Gemma 3 decoder, by the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int


MEDGEMMA_4B = Shapes(
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=34,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=262208,
    sliding_window=1024,
)
"""Of google/medgemma-4b-it's config.json."""


def write_random_gguf(path: Path, shapes: Shapes, *, seed: int = 0) -> int:
    """Write the file, one tensor at a time.

    Args:
        path: Must not exist.
        shapes: Of the decoder.
        seed: Of all values.

    Returns:
        The number of weights.

    Raises:
        EdgeError: If the file exists, or rows are no multiple of 32.
    """
    if path.exists():
        raise EdgeError(f"{path} exists already; remove it or name another")
    tensors = dict(_tensors(shapes))
    if odd := [name for name, shape in tensors.items() if shape[-1] % _BLOCK]:
        raise EdgeError(f"{odd[0]} has rows of {tensors[odd[0]][-1]} and Q4_0 takes blocks of {_BLOCK}")
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(131072)
    writer.add_embedding_length(shapes.hidden_size)
    writer.add_feed_forward_length(shapes.intermediate_size)
    writer.add_block_count(shapes.num_hidden_layers)
    writer.add_head_count(shapes.num_attention_heads)
    writer.add_head_count_kv(shapes.num_key_value_heads)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_sliding_window(shapes.sliding_window)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.add_vocab_size(shapes.vocab_size)
    writer.add_tokenizer_model("none")
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), shape[0] * 4)
        else:
            row = (shape[0], shape[1] // _BLOCK * _BLOCK_BYTES)
            kind = GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, row, np.dtype(np.uint8), row[0] * row[1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for shape in tensors.values():
        writer.write_tensor_data(_norm(rng, shape[0]) if len(shape) == 1 else _blocks(rng, *shape))
    writer.close()
    return sum(int(np.prod(shape)) for shape in tensors.values())


def _tensors(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """llama.cpp's names of Gemma 3 (gguf-py, tensor_mapping.py), and shapes with the inputs last."""
    width, mlp = shapes.hidden_size, shapes.intermediate_size
    queries, keys = (
        heads * shapes.head_dim for heads in (shapes.num_attention_heads, shapes.num_key_value_heads)
    )
    yield "token_embd.weight", (shapes.vocab_size, width)
    yield "output_norm.weight", (width,)
    for layer in range(shapes.num_hidden_layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_q_norm": (shapes.head_dim,),
            "attn_k_norm": (shapes.head_dim,),
            "attn_output": (width, queries),
            "post_attention_norm": (width,),
            "ffn_norm": (width,),
            "ffn_gate": (mlp, width),
            "ffn_up": (mlp, width),
            "ffn_down": (width, mlp),
            "post_ffw_norm": (width,),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape


def _norm(rng: np.random.Generator, width: int) -> NDArray[np.float32]:
    """Gains near one; GGUF files hold Gemma's with the 1 added."""
    return 1 + np.float32(0.1) * rng.standard_normal(width, dtype=np.float32)


def _blocks(rng: np.random.Generator, rows: int, inputs: int) -> NDArray[np.uint8]:
    """[rows, bytes] whose values have the variance 1/inputs, which keeps activations near one."""
    blocks = rng.integers(0, 256, (rows, inputs // _BLOCK, _BLOCK_BYTES), dtype=np.uint8)
    scale = np.array(1 / (_INTEGER_DEVIATION * inputs**0.5), np.dtype("<f2"))
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def main(
    out: Annotated[Path, typer.Option(help="A file that does not exist yet.")],
    seed: Annotated[int, typer.Option(help="Of all values.")] = 0,
) -> None:
    """Write MedGemma 4B's language model in Q4_0 with random weights."""
    try:
        weights = write_random_gguf(out, MEDGEMMA_4B, seed=seed)
    except EdgeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{out}: {weights:,} weights in Q4_0, random")


if __name__ == "__main__":
    typer.run(main)
