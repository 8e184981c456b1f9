"""Compressed weights of ML Programs against integers unpacked by hand."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medgemma_runtime.backends.mil import MilProgram, Mode
from medgemma_runtime.backends.mil.arithmetic import to_fp16
from medgemma_runtime.backends.mil.constants import DECOMPRESSIONS
from medgemma_runtime.backends.mil.spec import BITS, unpack_bits
from medgemma_runtime.errors import ArtifactError, EdgeError

pytest.importorskip("tests.runtime.mil_programs", reason="coremltools writes the programs")

from tests.runtime.mil_programs import INT4, inferred, mb, types, unsigned, write_functions, write_program

RNG = np.random.default_rng(3)
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
ONES = {"x": ((1, 1), "fp32")}


def stored_program(path: Path, build: Any) -> MilProgram:
    """A program whose output is a constant: what `build` makes, as float32."""

    def body(v: dict[str, Any]) -> dict[str, Any]:
        return {"y": mb.add(x=mb.cast(x=build(), dtype="fp32"), y=mb.reduce_sum(x=v["x"]))}

    return MilProgram.open(write_program(path, ONES, body))


def evaluate(program: MilProgram, mode: Mode = "fp32") -> NDArray[np.float32]:
    return program.run("main", {"x": np.zeros((1, 1), np.float32)}, mode=mode)["y"]


def by_hand(data: bytes, bits: int, count: int, *, is_signed: bool) -> list[int]:
    """Integers of a few bits, one bit at a time, lowest first."""
    stream = [byte >> place & 1 for byte in data for place in range(8)]
    found = [sum(stream[bits * i + place] << place for place in range(bits)) for i in range(count)]
    return [value - (1 << bits) if is_signed and value >> (bits - 1) else value for value in found]


@settings(max_examples=60)
@given(st.sampled_from(sorted(BITS)), st.binary(min_size=1, max_size=40))
def test_unpacks_bits_as_by_hand(dtype: str, data: bytes) -> None:
    bits = BITS[dtype]
    count = len(data) * 8 // bits
    unpacked = unpack_bits(np.frombuffer(data, np.uint8), dtype, count)
    assert unpacked.tolist() == by_hand(data, bits, count, is_signed=dtype == "int4")
    assert unpacked.dtype == (np.int8 if dtype == "int4" else np.uint8)


def test_int4_blocks_are_the_integers_in_the_file(tmp_path: Path) -> None:
    data = RNG.integers(-8, 8, (6, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (6, 2)).astype(np.float16)
    program = stored_program(
        tmp_path / "p.mlpackage",
        lambda: mb.constexpr_blockwise_shift_scale(data=data.astype(INT4), scale=scale, name="w"),
    )
    stored = program.stored("main", "w")
    np.testing.assert_array_equal(stored["data"], data)
    np.testing.assert_array_equal(stored["scale"], scale)
    # The file, found without any reader: the packed integers are in it as they are.
    packed = bytes((low & 15) | (high & 15) << 4 for low, high in data.reshape(-1, 2).tolist())
    content = (tmp_path / "p.mlpackage" / WEIGHTS).read_bytes()
    assert content.count(packed) == 1
    assert by_hand(packed, 4, data.size, is_signed=True) == data.reshape(-1).tolist()
    exact = data.reshape(6, 2, 32) * scale.astype(np.float32)[..., None]
    np.testing.assert_array_equal(evaluate(program), exact.reshape(6, 64))
    np.testing.assert_array_equal(evaluate(program, "fp16"), to_fp16(exact).reshape(6, 64))
    np.testing.assert_array_equal(evaluate(program), exact.reshape(6, 64))  # and back
    with pytest.raises(EdgeError, match="stores no constant 'v' as it is"):
        program.stored("main", "v")


def test_fifteen_int4_leave_half_a_byte(tmp_path: Path) -> None:
    data = np.arange(15, dtype=np.int8).reshape(3, 5) - 7
    program = stored_program(
        tmp_path / "p.mlpackage",
        lambda: mb.constexpr_blockwise_shift_scale(data=data.astype(INT4), scale=np.ones((1, 1), np.float32)),
    )
    np.testing.assert_array_equal(evaluate(program), data)


@settings(max_examples=30)
@given(st.data())
def test_blocks_of_any_shape_as_coremltools_takes_them_apart(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shape = [count * data.draw(st.integers(1, 3)) for count in counts]
    kind = data.draw(st.sampled_from(["int4", "uint4", "int8", "uint8"]))
    dtype = types.nptype_from_builtin(types.string_to_builtin(kind))
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[kind]
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    values = {
        "data": rng.integers(low, high, shape).astype(dtype),
        "scale": rng.uniform(0.1, 1, counts).astype(np.float32),
    }
    if data.draw(st.booleans()):
        values["offset"] = rng.integers(low, high, counts).astype(dtype)
    actual = DECOMPRESSIONS["constexpr_blockwise_shift_scale"](**values)
    theirs = materialized(lambda: mb.constexpr_blockwise_shift_scale(**values))
    np.testing.assert_allclose(actual, theirs, rtol=1e-6, strict=True)


@settings(max_examples=30)
@given(st.data())
def test_tables_of_any_grouping_as_coremltools_looks_them_up(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = [count * data.draw(st.integers(1, 3)) for count in groups]
    bits, vector = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8])), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    values = {
        "indices": rng.integers(0, 1 << bits, shape).astype(unsigned(bits)),
        "lut": rng.standard_normal((*groups, 1 << bits, vector)).astype(np.float32),
    }
    if vector > 1:
        values["vector_axis"] = np.int32(data.draw(st.integers(-len(shape), len(shape) - 1)))
    actual = DECOMPRESSIONS["constexpr_lut_to_dense"](**values)
    theirs = materialized(lambda: mb.constexpr_lut_to_dense(**values))
    np.testing.assert_array_equal(actual, theirs, strict=True)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_tables_with_indices_of_any_width_from_a_file(tmp_path: Path, bits: int) -> None:
    indices = RNG.integers(0, 1 << bits, (4, 9))
    lut = RNG.standard_normal((2, 1, 1 << bits, 1)).astype(np.float16)
    program = stored_program(
        tmp_path / "p.mlpackage",
        lambda: mb.constexpr_lut_to_dense(indices=indices.astype(unsigned(bits)), lut=lut, name="w"),
    )
    np.testing.assert_array_equal(program.stored("main", "w")["indices"], indices)
    expected = [[lut[row // 2, 0, index, 0] for index in indices[row]] for row in range(4)]
    np.testing.assert_array_equal(evaluate(program), np.array(expected, np.float32))


def test_a_table_that_is_compressed_itself(tmp_path: Path) -> None:
    indices = RNG.integers(0, 16, (4, 6)).astype(unsigned(4))
    lut = RNG.integers(-128, 128, (1, 1, 16, 1)).astype(np.int8)

    def build() -> Any:
        dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut, name="int8")
        return mb.constexpr_blockwise_shift_scale(
            data=dense, scale=np.full((1, 1), 0.5, np.float32), name="w"
        )

    program = stored_program(tmp_path / "p.mlpackage", build)
    np.testing.assert_array_equal(evaluate(program), lut[0, 0, indices.astype(int), 0] * np.float32(0.5))
    with pytest.raises(EdgeError, match="stores no constant 'w' as it is"):
        program.stored("main", "w")


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bool"])
@pytest.mark.parametrize("count", [4, 40])
def test_plain_constants_inline_and_in_the_file(tmp_path: Path, dtype: str, count: int) -> None:
    values = (3 * RNG.standard_normal((2, count // 2))).astype(dtype)
    program = stored_program(tmp_path / "p.mlpackage", lambda: mb.const(val=values, name="w"))
    np.testing.assert_array_equal(evaluate(program), values.astype(np.float32))
    np.testing.assert_array_equal(program.stored("main", "w")["val"], values)


def test_functions_share_constants_in_memory_too(tmp_path: Path) -> None:
    data = RNG.integers(-8, 8, (32, 64)).astype(np.int8)

    def body(v: dict[str, Any]) -> dict[str, Any]:
        integers = mb.const(val=data.astype(INT4), name="integers")
        scale = mb.const(val=np.full((32, 1), 0.5, np.float16), name="scale")
        integers.op.weight_id, scale.op.weight_id = "integers", "scale"
        weight = mb.constexpr_blockwise_shift_scale(data=integers, scale=scale, name="w")
        return {"y": mb.linear(x=v["x"], weight=weight)}

    functions = {"prefill": ({"x": ((3, 64), "fp16")}, body), "decode": ({"x": ((1, 64), "fp16")}, body)}
    package = write_functions(tmp_path / "p.mlpackage", functions)
    program = MilProgram.open(package)
    keys = [program.functions[name].constants["w"].key for name in ("prefill", "decode")]
    assert keys[0] == keys[1]
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    many = program.run("prefill", {"x": x})["y"]
    one = program.run("decode", {"x": x[:1]})["y"]
    np.testing.assert_allclose(one, many[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(many, x @ (data * np.float32(0.5)).T, rtol=1e-5, atol=1e-5)
    # With no memory to keep anything the results are the same.
    np.testing.assert_array_equal(MilProgram.open(package, cache_bytes=0).run("prefill", {"x": x})["y"], many)


def altered(package: Path, place: int, value: bytes) -> Path:
    """The package with some bytes of its weight file replaced."""
    path = package / WEIGHTS
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    return package


@pytest.fixture
def package(tmp_path: Path) -> Path:
    data = RNG.integers(-8, 8, (6, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (6, 2)).astype(np.float16)
    body = lambda v: {  # noqa: E731
        "y": mb.linear(
            x=v["x"],
            weight=mb.constexpr_blockwise_shift_scale(data=data.astype(INT4), scale=scale, name="w"),
        )
    }
    return write_program(tmp_path / "p.mlpackage", {"x": ((2, 64), "fp16")}, body)


# Blobs start at 64 and the constant's data at 128: coremltools writes the scale or the integers first.
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (4, b"\3", "weights/weight.bin is no weight file of version 2"),
        (64, b"\0", "no constant starts there; the offset is wrong or the file is altered"),
        (68, b"\2", "holds .* of fp32; the offset is wrong or the file is altered"),
        (68, b"\x63", "holds .* of type 99"),
        (72, b"\1", r"is .* \[6, .*\] and weights/weight.bin at 64 holds"),
        (72, struct.pack("<QQQ", 193, 128, 8), "weights/weight.bin at 64 holds 193 bytes of int4"),
        (80, struct.pack("<Q", 1 << 40), "from 1099511627776 on and the file has .* cut short or altered"),
        (80, b"\x81", "cut short or altered"),
        (88, b"\4", "the offset is wrong or the file is altered"),
    ],
)
def test_a_byte_of_the_metadata_is_missed(package: Path, place: int, value: bytes, message: str) -> None:
    MilProgram.open(package)
    with pytest.raises(ArtifactError, match=message):
        MilProgram.open(altered(package, place, value))


def test_a_byte_of_a_weight_changes_that_weight_alone(package: Path) -> None:
    """The format has no checksum: the artifact's manifest has, and the integers can be read back."""
    before = MilProgram.open(package).stored("main", "w")
    content = (package / WEIGHTS).read_bytes()
    data = before["data"].reshape(-1, 2)
    start = content.index(bytes((low & 15) | (high & 15) << 4 for low, high in data.tolist()))
    after = MilProgram.open(altered(package, start + 7, bytes([content[start + 7] ^ 0x10]))).stored(
        "main", "w"
    )
    changed = np.argwhere(before["data"] != after["data"])
    assert changed.tolist() == [[0, 15]]
    np.testing.assert_array_equal(before["scale"], after["scale"])


def test_a_weight_that_is_no_number_is_refused_when_it_is_used(tmp_path: Path) -> None:
    weight = RNG.standard_normal((6, 64)).astype(np.float16)
    body = lambda v: {"y": mb.linear(x=v["x"], weight=mb.const(val=weight, name="w"))}  # noqa: E731
    package = write_program(tmp_path / "p.mlpackage", {"x": ((2, 64), "fp16")}, body)
    content = (package / WEIGHTS).read_bytes()
    program = MilProgram.open(altered(package, content.index(weight.tobytes()), struct.pack("<e", np.inf)))
    with pytest.raises(ArtifactError, match="constant 'w' holds infinite values or NaN"):
        program.run("main", {"x": np.zeros((2, 64), np.float32)})


def test_a_truncated_or_absent_weight_file(package: Path) -> None:
    path = package / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="it is cut short or altered"):
        MilProgram.open(package)
    path.write_bytes(content[:80])
    with pytest.raises(ArtifactError, match="has 80 bytes; it is cut short or the offset is wrong"):
        MilProgram.open(package)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"weights/weight.bin is missing or empty and constant 'w\."):
        MilProgram.open(package)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing or empty"):
        MilProgram.open(package)


def materialized(build: Any) -> NDArray[Any]:
    """coremltools' own decompression."""
    found = []

    def build_and_note() -> Any:
        found.append(build())
        return found[0]

    inferred(build_and_note)
    return np.asarray(found[0].op.materialized_val_inference())
