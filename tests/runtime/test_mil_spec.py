"""The reader of Core ML's messages against the classes that protobuf's compiler made of their schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgemma_runtime.backends.mil.spec import BITS, DTYPES, BlobReference, Operation, Value, read_model
from medgemma_runtime.backends.mil.wire import Field, fields, floats, integers, message
from tests.runtime.test_mil import GOLDEN, MODEL

pytest.importorskip("tests.runtime.mil_programs", reason="coremltools has the classes")

from tests.runtime.mil_programs import INT4, mb, proto, unsigned, write_program

RNG = np.random.default_rng(2)


def many_constants(v: dict[str, Any]) -> dict[str, Any]:
    """Constants of every type that a program can hold, inline and in the file."""
    total = v["x"]
    for count in (2, 20):
        for dtype in ("float16", "float32", "int32", "bool"):
            value = mb.const(val=(3 * RNG.standard_normal(count)).astype(dtype))
            total = mb.add(x=total, y=mb.reduce_sum(x=mb.cast(x=value, dtype="fp32")))
        for data in (
            RNG.integers(-8, 8, count).astype(INT4),
            RNG.integers(0, 16, count).astype(unsigned(4)),
            RNG.integers(-128, 128, count).astype(np.int8),
            RNG.integers(0, 256, count).astype(np.uint8),
        ):
            value = mb.constexpr_blockwise_shift_scale(data=data, scale=np.ones(1, np.float32))
            total = mb.add(x=total, y=mb.reduce_sum(x=value))
    return {"y": mb.gelu(x=mb.concat(values=[total, total], axis=0), mode="TANH_APPROXIMATION")}


@pytest.fixture(params=["golden", "constants"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "golden":
        return GOLDEN / MODEL
    return write_program(tmp_path / "p.mlpackage", {"x": ((1,), "fp32")}, many_constants) / MODEL


def test_reads_what_protobuf_reads(model: Path) -> None:
    content = model.read_bytes()
    theirs = proto.Model_pb2.Model.FromString(content)
    ours = read_model(memoryview(content))
    assert ours.functions.keys() == theirs.mlProgram.functions.keys()
    assert ours.default_function == (theirs.description.defaultFunctionName or "main")
    constants = 0
    for name, function in ours.functions.items():
        reference = theirs.mlProgram.functions[name]
        block = reference.block_specializations[reference.opset]
        assert function.opset == reference.opset
        assert [item.name for item in function.inputs] == [item.name for item in reference.inputs]
        assert [item.is_state for item in function.inputs] == [
            item.type.HasField("stateType") for item in reference.inputs
        ]
        assert function.outputs == tuple(block.outputs)
        for operation, operator in zip(function.operations, block.operations, strict=True):
            same_operation(operation, operator)
            constants += operation.value is not None
    assert constants > 10


def same_operation(ours: Operation, theirs: Any) -> None:
    assert ours.type == theirs.type
    assert [output.name for output in ours.outputs] == [output.name for output in theirs.outputs]
    for output, reference in zip(ours.outputs, theirs.outputs, strict=True):
        same_type(output.type, reference.type.tensorType)
    assert ours.inputs.keys() == set(theirs.inputs)
    for name, bound in ours.inputs.items():
        for item, binding in zip(bound, theirs.inputs[name].arguments, strict=True):
            if isinstance(item, Value):
                same_value(item, binding.value)
            else:
                assert item == binding.name
    assert (ours.value is not None) == ("val" in theirs.attributes)
    if ours.value is not None:
        same_value(ours.value, theirs.attributes["val"])


def same_type(ours: Any, theirs: Any) -> None:
    assert ours.dtype == DTYPES[theirs.dataType]
    assert ours.dtype == proto.MIL_pb2.DataType.Name(theirs.dataType).lower().replace("float", "fp")
    assert list(ours.shape) == [dimension.constant.size for dimension in theirs.dimensions]


def same_value(ours: Value, theirs: Any) -> None:
    same_type(ours.type, theirs.type.tensorType)
    if isinstance(ours.content, BlobReference):
        blob = theirs.blobFileValue
        assert (ours.content.file, ours.content.offset) == (blob.fileName, blob.offset)
        return
    tensor = theirs.immediateValue.tensor
    held = getattr(tensor, tensor.WhichOneof("value")).values
    if isinstance(held, bytes):
        width = BITS.get(ours.type.dtype, ours.content.itemsize * 8)
        assert len(held) == -(-ours.content.size * width // 8)
        if ours.type.dtype not in BITS:
            assert ours.content.tobytes() == held
    else:
        assert ours.content.reshape(-1).tolist() == list(held)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_integers_as_protobuf_packs_them(numbers: list[int]) -> None:
    data = proto.MIL_pb2.TensorValue.RepeatedLongInts(values=numbers).SerializeToString()
    assert integers(contents(data)) == numbers


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_as_protobuf_packs_them(numbers: list[float]) -> None:
    data = proto.MIL_pb2.TensorValue.RepeatedFloats(values=numbers).SerializeToString()
    assert floats(contents(data), 4).tolist() == numbers


def contents(data: bytes) -> list[Field]:
    return [content for _, content in walk(memoryview(data))]


def walk(data: memoryview) -> Iterator[tuple[int, Field]]:
    for number, content in fields(data):
        assert number == 1
        yield number, message(content)


def test_every_element_type_has_the_schemas_number() -> None:
    names = {number: name.lower().replace("float", "fp") for name, number in proto.MIL_pb2.DataType.items()}
    assert {number: names[number] for number in DTYPES} == DTYPES
