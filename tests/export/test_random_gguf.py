from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from medgemma_export.samples.random_gguf import MEDGEMMA_4B, Shapes, write_random_gguf  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402

TINY = Shapes(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=300,
    sliding_window=8,
)


def test_another_reader_finds_a_gemma_3_of_these_shapes(tmp_path: Path) -> None:
    weights = write_random_gguf(tmp_path / "tiny.gguf", TINY)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert weights == sum(int(tensor.n_elements) for tensor in tensors.values())
    assert len(tensors) == 2 + 13 * 2
    assert reader.fields["general.architecture"].contents() == "gemma3"
    assert reader.fields["gemma3.attention.sliding_window"].contents() == 8
    table = tensors["token_embd.weight"]
    assert (table.tensor_type.name, table.shape.tolist(), table.n_bytes) == (
        "Q4_0",
        [64, 300],
        300 * 64 * 18 // 32,
    )
    for name, inputs in {"token_embd.weight": 64, "blk.1.ffn_down.weight": 96}.items():
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert values.shape[-1] == inputs
        assert values.std() * inputs**0.5 == pytest.approx(1, abs=0.05)
    gains = tensors["blk.0.attn_q_norm.weight"]
    assert (gains.tensor_type.name, gains.shape.tolist()) == ("F32", [32])
    assert np.abs(gains.data - 1).max() < 0.5


def test_a_seed_gives_one_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_gguf(tmp_path / name, TINY, seed=seed)
    a, b, c = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert a == b != c


def test_the_shapes_are_medgemmas() -> None:
    from medgemma_export.samples import random_gguf

    sizes = {name: int(np.prod(shape)) for name, shape in random_gguf._tensors(MEDGEMMA_4B)}
    # 3.88 billion parameters of the released language model, the tied table once.
    assert sum(sizes.values()) == 3_880_263_168


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"blk\.0\.ffn_down\.weight has rows of 100 and Q4_0 takes"):
        write_random_gguf(tmp_path / "odd", replace(TINY, intermediate_size=100))
    (tmp_path / "there").touch()
    with pytest.raises(EdgeError, match="exists already"):
        write_random_gguf(tmp_path / "there", TINY)
