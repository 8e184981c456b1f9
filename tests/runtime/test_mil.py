"""The evaluator of ML Programs without coremltools: the package it wrote once is in `golden`."""

import ast
import importlib.util
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medgemma_runtime.backends import mil
from medgemma_runtime.backends.mil import MilProgram
from medgemma_runtime.backends.mil.program import _held_dtype
from medgemma_runtime.backends.mil.spec import TensorType, read_model
from medgemma_runtime.backends.mil.wire import WireError, fields, floats, integers, message, text
from medgemma_runtime.errors import ArtifactError, EdgeError

GOLDEN = Path(__file__).parent / "golden" / "decoder.mlpackage"
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WIDTH, ROWS, CHUNK = 32, 6, 3


def golden_weights() -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.float16]]:
    """Integers, scales and a table, from which the package was made."""
    rng = np.random.default_rng(11)
    integers = rng.integers(-8, 8, (16, WIDTH)).astype(np.int8)
    return (
        integers,
        rng.uniform(0.01, 0.1, (16, 1)).astype(np.float16),
        rng.normal(size=16).astype(np.float16),
    )


def write_golden(path: Path) -> None:
    """Write the package again: `python -m tests.runtime.test_mil`."""
    from tests.runtime.mil_programs import INT4, mb, write_functions

    data, scale, table = golden_weights()

    def body(v: dict[str, Any]) -> dict[str, Any]:
        data_const = mb.const(val=data.astype(INT4), name="integers")
        scale_const = mb.const(val=scale, name="scales")
        data_const.op.weight_id, scale_const.op.weight_id = "integers", "scales"
        weight = mb.constexpr_blockwise_shift_scale(data=data_const, scale=scale_const, name="weight")
        # Each call appends its rows to the state and looks at all of them.
        begin = mb.concat(values=[v["slot"], np.zeros(1, np.int32)], axis=0)
        end = mb.add(x=begin, y=np.array(v["x"].shape, np.int32))
        rows = mb.slice_update(x=mb.read_state(input=v["rows"]), update=v["x"], begin=begin, end=end)
        rows = mb.coreml_update_state(state=v["rows"], value=rows)
        y = mb.linear(x=mb.add(x=v["x"], y=mb.reduce_sum(x=rows, axes=[0], keep_dims=True)), weight=weight)
        return {"y": mb.cast(x=mb.mul(x=y, y=table), dtype="fp32")}

    functions = {
        name: ({"x": ((count, WIDTH), "fp16"), "slot": ((1,), "int32")}, body)
        for name, count in (("prefill", CHUNK), ("decode", 1))
    }
    shutil.rmtree(path, ignore_errors=True)
    write_functions(path, functions, states={"rows": (ROWS, WIDTH)})


def expected(x: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    data, scale, table = golden_weights()
    weight = data * scale.astype(np.float32)
    return (x + rows.sum(0)) @ weight.T * table.astype(np.float32)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "decoder.mlpackage"))


def replaced(package: Path, old: bytes, new: bytes, *, count: int = 1, last: bool = False) -> Path:
    """The package with bytes of its model replaced by as many others."""
    path = package / MODEL
    content = path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) >= max(count, 1)
    if last:
        head, tail = content.rsplit(old, 1)
        path.write_bytes(head + new + tail)
    else:
        path.write_bytes(content.replace(old, new, count))
    return package


@pytest.mark.parametrize("mode", ["fp32", "fp16", "fp16_accumulate"])
def test_evaluates_functions_that_share_weights_and_a_state(mode: Any) -> None:
    program = MilProgram.open(GOLDEN)
    tolerance = {"fp32": 1e-5, "fp16": 0.02, "fp16_accumulate": 0.1}[mode]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CHUNK + 1, WIDTH), dtype=np.float32)
    state = program.new_state()
    given_ = {"x": x[:CHUNK], "slot": np.array([0], np.int32)}
    y = program.run("prefill", given_, state=state, mode=mode)["y"]
    np.testing.assert_allclose(y, expected(x[:CHUNK], x[:CHUNK]), atol=tolerance)
    given_ = {"x": x[CHUNK:], "slot": np.array([CHUNK], np.int32)}
    y = program.run("decode", given_, state=state, mode=mode)["y"]
    np.testing.assert_allclose(y, expected(x[CHUNK:], x), atol=tolerance)
    np.testing.assert_allclose(state["rows"][: CHUNK + 1], x, atol=0 if mode == "fp32" else 2e-3)
    assert not np.any(state["rows"][CHUNK + 1 :])
    # Another conversation begins from nothing.
    y = program.run("decode", given_, state=program.new_state("decode"), mode=mode)["y"]
    np.testing.assert_allclose(y, expected(x[CHUNK:], x[CHUNK:]), atol=tolerance)


def test_describes_itself() -> None:
    program = MilProgram.open(GOLDEN)
    assert set(program.functions) == {"prefill", "decode"}
    assert program.default_function == "prefill"
    function = program.functions["prefill"]
    assert {name: str(kind) for name, kind in function.inputs.items()} == {
        "x": f"fp16 [{CHUNK}, {WIDTH}]",
        "slot": "int32 [1]",
    }
    assert {name: str(kind) for name, kind in function.states.items()} == {"rows": f"fp16 [{ROWS}, {WIDTH}]"}
    assert {name: str(kind) for name, kind in function.outputs.items()} == {"y": f"fp32 [{CHUNK}, 16]"}
    assert function.operators["constexpr_blockwise_shift_scale"] == 1
    np.testing.assert_array_equal(program.stored("decode", "weight")["data"], golden_weights()[0])


def test_a_failed_run_leaves_the_state_as_it_was() -> None:
    program = MilProgram.open(GOLDEN)
    state = program.new_state()
    given_ = {"x": np.ones((CHUNK, WIDTH), np.float32), "slot": np.array([ROWS - 1], np.int32)}
    with pytest.raises(
        ArtifactError, match=r"slice_update .* an update of shape \[3, 32\] for a slice of \[1, 32\]"
    ):
        program.run("prefill", given_, state=state)
    assert not np.any(state["rows"])


def test_observes_every_tensor() -> None:
    program = MilProgram.open(GOLDEN)
    seen: list[tuple[str, str]] = []
    given_ = {"x": np.ones((1, WIDTH), np.float32), "slot": np.array([0], np.int32)}
    program.run(
        "decode",
        given_,
        state=program.new_state(),
        observe=lambda name, operator, _: seen.append((name, operator)),
    )
    assert seen[:2] == [("x", "input"), ("slot", "input")]
    assert [operator for _, operator in seen].count("slice_update") == 1
    assert seen[-1] == ("y", "identity")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("infer", {}, "no function 'infer'; the program has decode, prefill"),
        (
            "decode",
            {"x": np.ones((2, WIDTH), np.float32)},
            r"'x' must be fp16 \[1, 32\] and is float32 \[2, 32\]",
        ),
        ("decode", {"x": np.ones((1, WIDTH))}, "'x' must be fp16 .* and is float64"),
        ("decode", {"slot": np.zeros(1, np.int64)}, "'slot' must be int32 .* and is int64"),
        ("decode", {"y": np.zeros(1)}, r"takes \['slot', 'x'\] and was given \['slot', 'x', 'y'\]"),
    ],
)
def test_checks_its_inputs(function: str, changes: dict[str, Any], message: str) -> None:
    program = MilProgram.open(GOLDEN)
    given_ = {"x": np.ones((1, WIDTH), np.float32), "slot": np.zeros(1, np.int32)} | changes
    with pytest.raises(EdgeError, match=message):
        program.run(function, given_, state=program.new_state())


def test_needs_the_state_of_the_function() -> None:
    program = MilProgram.open(GOLDEN)
    given_ = {"x": np.ones((1, WIDTH), np.float32), "slot": np.zeros(1, np.int32)}
    with pytest.raises(
        EdgeError, match="reads the state 'rows' and was given no state; make one with new_state"
    ):
        program.run("decode", given_)
    with pytest.raises(EdgeError, match=r"reads the state 'rows' and was given a state of \['columns'\]"):
        program.run("decode", given_, state={"columns": np.zeros((ROWS, WIDTH), np.float32)})
    with pytest.raises(EdgeError, match=r"state 'rows' must be fp16 \[6, 32\] and is float32 \[5, 32\]"):
        program.run("decode", given_, state={"rows": np.zeros((5, WIDTH), np.float32)})


def test_a_function_that_is_described_and_missing(package: Path) -> None:
    replaced(package, b"decode", b"encode")
    with pytest.raises(
        ArtifactError, match=r"describes the functions .* and has .*: 'decode' is missing on one side"
    ):
        MilProgram.open(package)


def test_a_state_renamed_in_the_description(package: Path) -> None:
    replaced(package, b"rows", b"cols")
    with pytest.raises(ArtifactError, match="lacks the state 'cols' and the model's description has it"):
        MilProgram.open(package)


def test_a_state_renamed_where_it_is_read(package: Path) -> None:
    replaced(package, b"rows", b"cols", last=True)
    with pytest.raises(
        ArtifactError, match=r"takes the state 'cols' as 'input' and the states are \['rows'\]"
    ):
        MilProgram.open(package)


def test_an_operator_that_is_not_evaluated_is_named(package: Path) -> None:
    replaced(package, b"\x0a\x0areduce_sum", b"\x0a\x0areduce_max", count=-1)
    MilProgram.open(package)
    replaced(package, b"\x0a\x0areduce_max", b"\x0a\x0areduce_MAX", count=-1)
    with pytest.raises(
        EdgeError, match=r"operator 'reduce_MAX' of .* is not evaluated \(first at 'reduce_sum"
    ):
        MilProgram.open(package)


def test_a_parameter_that_is_not_evaluated_is_named(package: Path) -> None:
    program = MilProgram.open(replaced(package, b"\x0a\x09keep_dims", b"\x0a\x09keep_dimz", count=-1))
    given_ = {"x": np.ones((1, WIDTH), np.float32), "slot": np.zeros(1, np.int32)}
    with pytest.raises(
        ArtifactError, match=r"reduce_sum .* its parameters \['keep_dimz'\] are not evaluated"
    ):
        program.run("decode", given_, state=program.new_state())


def test_a_tensor_that_nothing_computes(package: Path) -> None:
    name = b"slice_update_0"
    content = (package / MODEL).read_bytes()
    assert content.count(name) >= 3
    replaced(package, name, b"slice_update_9")
    with pytest.raises(
        ArtifactError, match=r"takes 'slice_update_.' as 'data' and nothing before it has that name"
    ):
        MilProgram.open(package)


def test_a_wrong_offset(package: Path) -> None:
    """The constants that name the first blob are made to name other places."""
    content = (package / MODEL).read_bytes()
    path = b"@model_path/weights/weight.bin"
    first = path + b"\x10\x40"
    assert first in content
    replaced(package, first, path + b"\x10\x41", count=2)
    with pytest.raises(
        ArtifactError, match=r"should be in weights/weight.bin at 65 and no constant starts there"
    ):
        MilProgram.open(package)
    replaced(package, path + b"\x10\x41", path + b"\x10\x01", count=2)
    with pytest.raises(ArtifactError, match=r"weights/weight.bin at 1 and .* the offset is wrong"):
        MilProgram.open(package)


def test_a_weight_file_outside_the_package(package: Path) -> None:
    replaced(package, b"@model_path/weights/weight.bin", b"@model_path/../../../../s3cret", count=-1)
    with pytest.raises(ArtifactError, match=r"is in '@model_path/\.\./.*', which is no file of the package"):
        MilProgram.open(package)


def test_an_opset_of_another_ios(package: Path) -> None:
    replaced(package, b"CoreML8", b"CoreML7", count=-1)
    with pytest.raises(EdgeError, match="is of opset 'CoreML7' and this evaluates CoreML8 and CoreML9"):
        MilProgram.open(package)


@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000, -1])
def test_a_truncated_model(package: Path, size: int) -> None:
    path = package / MODEL
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"the model is damaged|holds no ML Program"):
        MilProgram.open(package)


def test_no_byte_of_the_model_makes_it_fail_in_another_way(package: Path) -> None:
    """Any one byte changed is refused with a sentence, or means another program: never a traceback."""
    path = package / MODEL
    content = path.read_bytes()
    places = np.random.default_rng(5).integers(0, len(content), 300)
    refused = 0
    for place in places.tolist():
        altered = bytearray(content)
        altered[place] ^= 0xFF
        path.write_bytes(altered)
        try:
            MilProgram.open(package)
        except EdgeError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("parameter", "operator"),
    [
        (b"data", "constexpr_blockwise_shift_scale"),
        (b"scale", "constexpr_blockwise_shift_scale"),
        (b"input", "read_state"),
        (b"x", "slice_update"),
    ],
)
def test_an_operation_without_what_it_needs(package: Path, parameter: bytes, operator: str) -> None:
    key = bytes((0x0A, len(parameter))) + parameter  # field 1 of a map's entry: its key
    path = package / MODEL
    path.write_bytes(path.read_bytes().replace(key, key[:-1] + b"_"))
    with pytest.raises(
        ArtifactError, match=rf"{operator} .* of function .* needs one {parameter.decode()!r}"
    ):
        MilProgram.open(package)


def test_a_tensor_of_what_only_constants_are() -> None:
    with pytest.raises(EdgeError, match="tensors of uint6 are not evaluated"):
        _held_dtype(TensorType(dtype="uint6", shape=(1,)))


@pytest.mark.parametrize(
    ("text_", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "names no root model"),
        (
            '{"fileFormatVersion": "1.0.0", "itemInfoEntries": {}, "rootModelIdentifier": "x"}',
            "names no root model",
        ),
        (
            '{"fileFormatVersion": "2", "itemInfoEntries": {"x": {"path": "a"}}, "rootModelIdentifier": "x"}',
            "is of format '2' and this reads '1.0.0'",
        ),
        (
            '{"fileFormatVersion": "1.0.0", "itemInfoEntries": {"x": {"path": "a"}}, '
            '"rootModelIdentifier": "x"}',
            "has no file 'a' in Data, its model",
        ),
        (
            '{"fileFormatVersion": "1.0.0", "itemInfoEntries": {"x": {"path": "../Manifest.json"}}, '
            '"rootModelIdentifier": "x"}',
            r"has no file '\.\./Manifest.json' in Data",
        ),
    ],
)
def test_a_package_manifest_that_leads_nowhere(package: Path, text_: str, message: str) -> None:
    (package / "Manifest.json").write_text(text_)
    with pytest.raises(ArtifactError, match=message):
        MilProgram.open(package)


def test_a_directory_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no Manifest.json, so it is no .mlpackage"):
        MilProgram.open(tmp_path)


def test_needs_numpy_and_nothing_else() -> None:
    """So that the package can be taken out and used alone."""
    sources = sorted(Path(mil.__path__[0]).glob("*.py"))
    assert len(sources) > 8
    imported = {
        node.module or ""
        for source in sources
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    ours = {name for name in imported if name.startswith("medgemma_runtime")}
    others = {name.split(".")[0] for name in imported - ours} - set(sys.stdlib_module_names)
    assert {name for name in ours if not name.startswith(mil.__name__)} == {"medgemma_runtime.errors"}
    assert others == {"numpy"}


def encode(number: int, kind: int, content: bytes) -> bytes:
    return bytes([number << 3 | kind]) + content


def test_reads_every_kind_of_field() -> None:
    data = (
        encode(1, 0, b"\xac\x02")  # 300, the example of the format's own documentation
        + encode(2, 2, b"\x07testing")
        + encode(3, 5, struct.pack("<f", 1.5))
        + encode(4, 1, struct.pack("<d", -2.5))
        + encode(5, 0, b"\xff" * 9 + b"\x01")
        + encode(6, 2, b"\x04\x01\xac\x02\x00")
    )
    found = dict(fields(memoryview(data)))
    assert found[1] == 300
    assert text(found[2]) == "testing"
    assert floats([found[3]], 4).tolist() == [1.5]
    assert floats([found[4]], 8).tolist() == [-2.5]
    assert integers([found[5], found[6], 7]) == [-1, 1, 300, 0, 7]


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # a tag and nothing
        b"\x08\xff",  # an integer that goes on
        b"\x08" + b"\xff" * 9 + b"\x02",  # 65 bits
        b"\x12\x05abc",  # five bytes of three
        b"\x0d\x00\x00",  # four bytes of two
        b"\x0b",  # a group
        b"\x00\x01",  # field 0
    ],
)
def test_refuses_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(WireError):
        assert all(isinstance(content, int) or len(content) for _, content in fields(memoryview(data)))
    with pytest.raises(ArtifactError, match="the model is damaged"):
        read_model(memoryview(data))


def test_an_integer_is_no_message() -> None:
    with pytest.raises(WireError, match="an integer where a message is due"):
        message(3)
    with pytest.raises(WireError, match="5 bytes of numbers of 4"):
        floats([memoryview(b"12345")], 4)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_integers_survive_packing(numbers: list[int]) -> None:
    packed = b"".join(varint(number & (1 << 64) - 1) for number in numbers)
    assert integers([memoryview(packed)]) == numbers


def varint(number: int) -> bytes:
    data = b""
    while number >= 0x80:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


if __name__ == "__main__":
    if importlib.util.find_spec("coremltools") is None:
        sys.exit("coremltools writes the package; install it first")
    write_golden(GOLDEN)
