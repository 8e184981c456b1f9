import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime.errors import CheckpointError

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_export.checkpoint import open_checkpoint  # noqa: E402

HIDDEN, HEADS, HEAD_DIM, MLP, VOCABULARY = 64, 2, 32, 96, 40

# For a reader in a fresh process: how far does its memory grow while it reads 8 rows, and then 16,384?
# VmHWM is this program's own peak; ru_maxrss would begin at that of the process that started it.
_MEASURE_GROWTH = """
import pathlib, re, sys
from medgemma_export.checkpoint import open_checkpoint

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.read("model.norm.weight")
before = peak_kb()
for rows in (8, 16384):
    values = checkpoint.read("model.embed_tokens.weight", rows=slice(1000, 1000 + rows))
    assert values.shape == (rows, 4096) and not values.any()
    print(peak_kb() - before)
"""


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    wide = HEADS * HEAD_DIM
    return {
        f"blk.{layer}.{name}.weight": shape
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "attn_q": (wide, HIDDEN),
            "attn_k": (HEAD_DIM, HIDDEN),
            "attn_v": (HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, wide),
            "attn_q_norm": (HEAD_DIM,),
            "attn_k_norm": (HEAD_DIM,),
            "post_attention_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (MLP, HIDDEN),
            "ffn_up": (MLP, HIDDEN),
            "ffn_down": (HIDDEN, MLP),
            "post_ffw_norm": (HIDDEN,),
        }.items()
    }


def write_metadata(writer: "gguf.GGUFWriter", *, layers: int = 2) -> None:
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(512)
    writer.add_token_list([f"piece {number}" for number in range(VOCABULARY)])
    writer.add_token_scores([0.5] * VOCABULARY)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)


def write_model(
    path: Path, *, architecture: str = "gemma3", extra: dict[str, object] | None = None, untied: bool = False
) -> Path:
    """Two layers in every kind of storage that the gguf package can write."""
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint16(key, value)
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if untied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    for number, (name, shape) in enumerate((shapes | layer_shapes(0) | layer_shapes(1)).items()):
        values = rng.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType[kinds[number % len(kinds)] if len(shape) == 2 else "F32"]
        if kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_with_transformers(path: Path) -> dict[str, np.ndarray]:
    """The independent truth: transformers' own loader, names and norms included."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    text = load_gguf_checkpoint(str(path))["config"]
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**text))
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return {name: value.numpy() for name, value in loaded.items()}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_every_tensor_equals_transformers_own_reading(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path))
    expected = read_with_transformers(path)
    assert set(checkpoint.tensors) == set(expected)
    assert {info.dtype for info in checkpoint.tensors.values()} == {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q5_0",
        "Q4_0",
    }
    for name, values in expected.items():
        actual = checkpoint.read(name)
        assert actual.dtype == np.float32 and actual.flags.c_contiguous and actual.flags.writeable
        assert actual.shape == checkpoint.tensors[name].shape
        np.testing.assert_array_equal(actual, values.astype(np.float32), err_msg=name)
        for rows in (slice(3, 7), slice(-2, None), slice(5, 5)):
            np.testing.assert_array_equal(checkpoint.read(name, rows=rows), actual[rows], err_msg=name)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_the_config_is_what_transformers_makes_of_the_same_file(tmp_path):
    from transformers import Gemma3TextConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_model(tmp_path / "tiny.gguf")
    config = open_checkpoint(str(path)).config
    theirs = load_gguf_checkpoint(str(path))["config"]
    assert config["model_type"] == theirs.pop("model_type")
    ours = Gemma3TextConfig(**config)
    reference = Gemma3TextConfig(**theirs)
    for key in ("architectures", "_model_name_or_path", "rms_norm_eps", "rope_theta"):
        theirs.pop(key, None)
    for key in theirs:
        assert getattr(ours, key) == getattr(reference, key), key
    assert ours.rms_norm_eps == 1e-6  # theirs is the float32 nearest to it
    assert ours.query_pre_attn_scalar == HEAD_DIM  # theirs stays at the class's default
    assert ours.layer_types == reference.layer_types
    assert ours.rope_parameters == reference.rope_parameters
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (2, 1, 0)


def test_metadata_that_larger_models_have(tmp_path):
    extra = {
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.rope.freq_base_swa": 20000.0,
        "test.nested": [[1, 2], [3]],
        "test.flags": [True, False],
    }
    checkpoint = open_checkpoint(str(write_model(tmp_path / "tiny.gguf", extra=extra, untied=True)))
    assert checkpoint.config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.read("lm_head.weight").shape == (VOCABULARY, HIDDEN)


def test_a_model_of_62_layers_scales_attention_by_hidden_over_heads(tmp_path):
    from medgemma_export.gguf_checkpoint import _Entry, _make_config

    metadata = {
        f"gemma3.{key}": value
        for key, value in {
            "block_count": 62,
            "embedding_length": 5376,
            "attention.head_count": 32,
            "attention.head_count_kv": 16,
            "attention.key_length": 128,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.sliding_window": 1024,
            "feed_forward_length": 21504,
            "context_length": 131072,
            "rope.freq_base": 1e6,
        }.items()
    }
    table = _Entry(shape=(262144, 5376), kind=gguf.GGMLQuantizationType.F32, offset=0)
    config = _make_config(metadata, {"model.embed_tokens.weight": table}, "27b.gguf")
    assert config["query_pre_attn_scalar"] == 168
    assert config["layer_types"].count("full_attention") == 10


def test_norms_hold_w_and_not_one_plus_w(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    checkpoint = open_checkpoint(str(path))
    for ours, theirs in (
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.self_attn.k_norm.weight", "blk.1.attn_k_norm.weight"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.read(ours), stored[theirs] - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_rows_of_a_table_of_4_gb_takes_little_memory(tmp_path):
    path = tmp_path / "large.gguf"
    rows, width = 1 << 20, 4096
    kind = gguf.GGMLQuantizationType.Q8_0
    row_bytes = width // 32 * 34
    writer = gguf.GGUFWriter(path, "gemma3")
    write_metadata(writer, layers=1)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight"):
        writer.add_tensor_info(name, (width,), np.dtype(np.float32), width * 4)
    writer.add_tensor_info(
        "token_embd.weight", (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + rows * row_bytes + (1 << 20))  # sparse zeros
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE_GROWTH, str(path)], capture_output=True, text=True, check=True
    )
    few, many = map(int, result.stdout.split())
    assert few < 32_000  # kB; the tensor has 4,456,448
    assert many >= 262_144  # what these rows have as float32: the measurement sees what is read


@pytest.mark.parametrize("kept", [0, 3, 8, 24, 200, 1000])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path, kept):
    path = write_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be read as GGUF"):
        open_checkpoint(str(path))


def test_a_file_cut_off_in_its_values_is_refused(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf ends before blk\.1\.post_ffw_norm\.weight"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused(tmp_path, version):
    path = write_model(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="versions 2 and 3 are read"):
        open_checkpoint(str(path))


def test_sizes_beyond_all_reason_are_refused(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    content[24:32] = struct.pack("<Q", 1 << 62)  # the length of the first key
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(str(path))


def replaced(path: Path, before: bytes, at: int, number: int, layout: str) -> Path:
    """Put a number into a file, so many bytes after the end of what is found."""
    content = bytearray(path.read_bytes())
    start = content.index(before) + len(before) + at
    content[start : start + struct.calcsize(layout)] = struct.pack(layout, number)
    path.write_bytes(content)
    return path


# What follows a tensor's name: the number of its axes, 4 bytes; their sizes, 8 each; its kind, 4; its place.
@pytest.mark.parametrize(
    ("before", "at", "number", "layout", "says"),
    [
        (b"gemma3.block_count", 4, 1 << 31, "<I", "states 2147483648 layers and holds tensors of 2"),
        (b"gemma3.attention.head_count", 4, 0, "<I", "head_count 0, which is no count"),
        (b"tokenizer.ggml.scores", 8, 1 << 62, "<Q", "ends inside its header"),
        (b"blk.0.attn_q.weight", 4, 0, "<Q", r"attn_q\.weight of shape \[64, 0\]"),
        (b"blk.0.attn_q.weight", 12, 0, "<Q", r"attn_q\.weight of shape \[0, 64\]"),
        (b"blk.0.attn_norm.weight", 12, 8, "<I", r"attn_norm\.weight of shape \[64\] is stored as Q8_0"),
        (b"blk.0.attn_q.weight", 24, 0, "<Q", r"attn_q\.weight is said to begin at byte 0 of the data"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, before, at, number, layout, says):
    path = replaced(write_model(tmp_path / "tiny.gguf"), before, at, number, layout)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(path))


def test_lists_of_lists_without_end_are_refused(tmp_path):
    path = tmp_path / "deep.gguf"
    key, a_list = b"general.tags", struct.pack("<IQ", gguf.GGUFValueType.ARRAY, 1)
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key
    path.write_bytes(header + struct.pack("<I", gguf.GGUFValueType.ARRAY) + a_list * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(str(path))


def test_other_architectures_and_parts_of_models_are_refused(tmp_path):
    path = write_model(tmp_path / "other.gguf", architecture="clip")
    with pytest.raises(CheckpointError, match="architecture 'clip'; only 'gemma3'"):
        open_checkpoint(str(path))
    path = write_model(tmp_path / "part.gguf", extra={"split.count": 3})
    with pytest.raises(CheckpointError, match="one of 3 parts; join them"):
        open_checkpoint(str(path))


def test_a_tensor_that_no_gemma_has_is_refused(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_z\.weight, which is no tensor of a Gemma 3"):
        open_checkpoint(str(path))


def test_metadata_that_is_missing_is_named(tmp_path):
    path = write_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"gemma3.context_length", b"gemma3.kontext_length"))
    with pytest.raises(CheckpointError, match=r"does not state gemma3\.context_length"):
        open_checkpoint(str(path))


def test_storage_that_cannot_be_dequantized_is_refused_when_read(tmp_path, monkeypatch):
    path = write_model(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path))
    name = next(info.name for info in checkpoint.tensors.values() if info.dtype == "Q5_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(CheckpointError, match="stored as Q5_0, which the gguf package cannot dequantize"):
        checkpoint.read(name)
