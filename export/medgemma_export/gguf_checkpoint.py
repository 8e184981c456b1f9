"""Reads Gemma 3 language models from GGUF files under their Hugging Face names.

The table of contents is read here rather than with the gguf package's own reader, which turns each of a
tokenizer's 262,144 entries into several arrays: tens of seconds and 0.7 GB before the first weight.
The format's specification is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from numpy.typing import NDArray

from medgemma_export.checkpoint import Checkpoint, TensorInfo
from medgemma_export.gguf_tokenizer import TOKENIZER_FILES, convert_tokenizer
from medgemma_runtime.errors import CheckpointError

__all__ = ["open_gguf"]

_ARCHITECTURE = "gemma3"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# llama.cpp's names of Gemma 3 (gguf-py, tensor_mapping.py): ffn_norm is the norm before the MLP.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYERS = "model.layers."


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One line of the file's table of contents.

    Attributes:
        shape: Outermost axis first.
        kind: How values are stored.
        offset: Where they begin, in bytes after the alignment of the data section.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        elements, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape[1:]) * int(size) // int(elements)

    @property
    def size_bytes(self) -> int:
        """Bytes of all values."""
        return self.shape[0] * self.row_bytes


def open_gguf(path: Path, *, id: str) -> Checkpoint:
    """Read a GGUF file's metadata and table of contents.

    Args:
        path: A Gemma 3 language model in one GGUF file.
        id: What the checkpoint is called.

    Raises:
        CheckpointError: If it is damaged, split over several files, or not a Gemma 3 language model.
    """
    try:
        with path.open("rb") as stream:
            metadata, entries = _read_header(stream)
    except (struct.error, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as GGUF ({error}); the download is incomplete or the file "
            "is damaged: get it again"
        ) from error
    _check_kind(metadata, path.name)
    size = path.stat().st_size
    stored: dict[str, _Entry] = {}
    for gguf_name, entry in entries.items():
        if entry.offset + entry.size_bytes > size:
            raise CheckpointError(
                f"{path.name} ends before {gguf_name} does; the download is incomplete: get it again"
            )
        stored[_hugging_face_name(gguf_name, path.name)] = entry

    _check_layers(metadata, stored, path.name)

    def read(info: TensorInfo, rows: slice | None) -> NDArray[np.float32]:
        return _read_rows(path, info, stored[info.name], slice(0, info.shape[0]) if rows is None else rows)

    config = _make_config(metadata, stored, path.name)
    tokenizer = functools.cache(convert_tokenizer)

    def make(name: str) -> bytes:
        return json.dumps(config, indent=2).encode() if name == "config.json" else tokenizer(path)[name]

    return Checkpoint(
        id=id,
        revision=None,
        config=config,
        tensors={
            name: TensorInfo(name=name, shape=entry.shape, dtype=entry.kind.name, file=path.name)
            for name, entry in stored.items()
        },
        directory=path.parent,
        reader=read,
        made={name: functools.partial(make, name) for name in ("config.json", *TOKENIZER_FILES)},
    )


def _read_rows(path: Path, info: TensorInfo, entry: _Entry, rows: slice) -> NDArray[np.float32]:
    count = rows.stop - rows.start
    if not count:  # which dequantize cannot shape
        return np.empty((0, *entry.shape[1:]), np.float32)
    raw = np.fromfile(
        path, np.uint8, count=count * entry.row_bytes, offset=entry.offset + rows.start * entry.row_bytes
    )
    try:
        values: NDArray[np.float32] = dequantize(raw.reshape(count, entry.row_bytes), entry.kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{info.name} in {info.file} is stored as {info.dtype}, which the gguf package cannot "
            "dequantize; use a file in F16, BF16, Q8_0 or a K-quant"
        ) from error
    values = values.reshape(count, *entry.shape[1:])
    # llama.cpp stores Gemma's norms as 1 + w; Hugging Face's tensors, and the models here, hold w.
    return values - np.float32(1) if info.name.endswith("norm.weight") else values


def _hugging_face_name(gguf_name: str, file: str) -> str:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    found = _LAYER_TENSOR.fullmatch(gguf_name)
    if found is None or found[2] not in _LAYER_NAMES:
        raise CheckpointError(
            f"{file} holds {gguf_name}, which is no tensor of a Gemma 3 language model; "
            "use a GGUF file as llama.cpp's converter writes it"
        )
    return f"{_LAYERS}{found[1]}.{_LAYER_NAMES[found[2]]}.weight"


def _check_kind(metadata: Mapping[str, object], file: str) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise CheckpointError(
            f"{file} holds a model of architecture {architecture!r}; only {_ARCHITECTURE!r}, the language "
            "model of Gemma 3 and MedGemma, is read from GGUF: use the safetensors checkpoint"
        )
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"{file} is one of {parts} parts; join them first with llama.cpp's llama-gguf-split --merge"
        )


def _check_layers(metadata: Mapping[str, object], stored: Mapping[str, _Entry], file: str) -> None:
    """Before a list is made that is as long as the file says."""
    stated = metadata.get(f"{_ARCHITECTURE}.block_count")
    held = len({name.split(".")[2] for name in stored if name.startswith(_LAYERS)})
    if stated != held:
        raise CheckpointError(
            f"{file} states {stated} layers and holds tensors of {held}; get the file again"
        )


def _make_config(
    metadata: Mapping[str, object], stored: Mapping[str, _Entry], file: str
) -> dict[str, object]:
    """The config.json of the same model, as transformers' Gemma3TextConfig reads it.

    What GGUF leaves out is fixed in llama.cpp for this architecture (llama-model.cpp, LLM_ARCH_GEMMA3): every
    sixth layer is global, local layers use a RoPE base of 10,000, and only the 27B model, known by its 62
    layers, scales attention by hidden / heads instead of the head width.
    """

    def number(key: str) -> int | float:
        value = metadata.get(f"{_ARCHITECTURE}.{key}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{file} does not state {_ARCHITECTURE}.{key}; convert the model again")
        return value

    def count(key: str) -> int:
        value = number(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{file} has {_ARCHITECTURE}.{key} {value}, which is no count; convert the model again"
            )
        return value

    def optional(key: str, default: float) -> int | float:
        return number(key) if f"{_ARCHITECTURE}.{key}" in metadata else default

    if "model.embed_tokens.weight" not in stored:
        raise CheckpointError(f"{file} has no token_embd.weight; get the file again")
    layers, hidden, heads = count("block_count"), count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length")
    full_rope: dict[str, object] = {"rope_type": "default", "rope_theta": number("rope.freq_base")}
    if metadata.get(f"{_ARCHITECTURE}.rope.scaling.type", "none") != "none":
        full_rope |= {
            "rope_type": metadata[f"{_ARCHITECTURE}.rope.scaling.type"],
            "factor": number("rope.scaling.factor"),
        }
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": stored["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": count("context_length"),
        # GGUF keeps it as float32; the shortest decimal that float32 rounds to it is what was meant.
        "rms_norm_eps": float(str(np.float32(number("attention.layer_norm_rms_epsilon")))),
        "sliding_window": count("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)
        ],
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": optional("rope.freq_base_swa", 10_000.0),
            },
        },
        "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _read_header(stream: BinaryIO) -> tuple[dict[str, object], dict[str, _Entry]]:
    """Metadata (scalars and strings; arrays are passed over) and the table of contents by GGUF name."""
    if _take(stream, 4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = _unpack(stream, "<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, or written on a big-endian machine; versions 2 and 3 are read")
    n_tensors, n_keys = _unpack(stream, "<Q"), _unpack(stream, "<Q")
    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        key = _read_string(stream)
        kind = GGUFValueType(_unpack(stream, "<I"))
        if kind == GGUFValueType.ARRAY:
            _skip_array(stream)
        else:
            metadata[key] = _read_value(stream, kind)
    entries: dict[str, _Entry] = {}
    for _ in range(n_tensors):
        name = _read_string(stream)
        # GGUF counts axes from the innermost.
        shape = tuple(_unpack(stream, "<Q") for _ in range(_unpack(stream, "<I")))[::-1]
        kind = GGMLQuantizationType(_unpack(stream, "<I"))
        elements = int(GGML_QUANT_SIZES[kind][0])
        # Rows are what is read, so a vector is never in blocks.
        in_rows = len(shape) > 1 or (bool(shape) and elements == 1)
        if not in_rows or min(shape) < 1 or shape[-1] % elements or name in entries:
            raise ValueError(f"{name} of shape {list(shape)} is stored as {kind.name} or listed twice")
        entries[name] = _Entry(shape=shape, kind=kind, offset=_unpack(stream, "<Q"))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    _check_layout(entries, alignment)
    data_start = -(-stream.tell() // alignment) * alignment
    return metadata, {
        name: replace(entry, offset=data_start + entry.offset) for name, entry in entries.items()
    }


def _check_layout(entries: Mapping[str, _Entry], alignment: int) -> None:
    """Tensors lie in their order and without gaps, as llama.cpp demands too: a wrong offset is seen here."""
    end = 0
    for name, entry in entries.items():
        if entry.offset != end:
            raise ValueError(f"{name} is said to begin at byte {entry.offset} of the data and not at {end}")
        end += -(-entry.size_bytes // alignment) * alignment


def _read_value(stream: BinaryIO, kind: GGUFValueType) -> object:
    return _read_string(stream) if kind == GGUFValueType.STRING else _unpack(stream, _SCALAR_FORMATS[kind])


def _skip_array(stream: BinaryIO) -> None:
    kind = GGUFValueType(_unpack(stream, "<I"))
    count = _unpack(stream, "<Q")
    if kind in _SCALAR_FORMATS:
        end = stream.tell() + count * struct.calcsize(_SCALAR_FORMATS[kind])
        if end > os.fstat(stream.fileno()).st_size:
            raise ValueError("it ends inside its header")
        stream.seek(end)
        return
    for _ in range(count):
        if kind == GGUFValueType.STRING:
            _take(stream, _unpack(stream, "<Q"))
        else:
            _skip_array(stream)


def _read_string(stream: BinaryIO) -> str:
    return _take(stream, _unpack(stream, "<Q")).decode("utf-8")


def _unpack(stream: BinaryIO, layout: str) -> int:
    """One number; floats and booleans too, which callers that need an int never ask for."""
    value: int = struct.unpack(layout, _take(stream, struct.calcsize(layout)))[0]
    return value


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ValueError("it ends inside its header")
    return data
