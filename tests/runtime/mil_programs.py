"""Small ML Programs that coremltools writes, for the tests of the evaluator that does without it."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ct", "mb", "types", "proto", "write_program", "write_functions", "inferred", "unsigned", "INT4"]

# coremltools imports every framework it could convert from, with their warnings, and logs about versions.
_FRAMEWORKS = ("executorch", "sklearn", "tensorflow", "torchao", "xgboost")
logging.getLogger("coremltools").setLevel(logging.CRITICAL)
_hidden = [name for name in _FRAMEWORKS if name not in sys.modules]
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct
        from coremltools import proto
        from coremltools.converters.mil import Builder as mb  # noqa: N813
        from coremltools.converters.mil.backend.mil.load import MILProtoExporter
        from coremltools.converters.mil.mil import Function, Program, types
        from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
finally:
    for _name in _hidden:
        del sys.modules[_name]

INT4 = types.np_int4_dtype
Var = Any
Body = Callable[[dict[str, Var]], Mapping[str, Var]]
Inputs = Mapping[str, tuple[tuple[int, ...], str]]

_DTYPES = {"fp16": types.fp16, "fp32": types.fp32, "int32": types.int32}
_OPSET = ct.target.iOS18
_KEY = "model"


def write_program(
    path: Path,
    inputs: Inputs,
    body: Body,
    *,
    states: Mapping[str, tuple[int, ...]] | None = None,
    images: Mapping[str, str] | None = None,
) -> Path:
    """Write a package whose function `main` is as built, without any pass over it.

    Args:
        path: The .mlpackage to write.
        inputs: Shape and type by name.
        body: From the inputs' and states' variables to the results by name.
        states: Shapes by name; they are fp16.
        images: Color spaces, such as `RGB`, of the inputs that are images.
    """
    return write_functions(path, {"main": (inputs, body)}, states=states, images=images)


def write_functions(
    path: Path,
    functions: Mapping[str, tuple[Inputs, Body]],
    *,
    states: Mapping[str, tuple[int, ...]] | None = None,
    images: Mapping[str, str] | None = None,
) -> Path:
    """The same for several functions that share states, and constants of equal `weight_id`."""
    program = Program()
    for name, (inputs, body) in functions.items():
        placeholders = {
            key: Placeholder(shape, dtype=_DTYPES[dtype]) for key, (shape, dtype) in inputs.items()
        }
        for key, shape in (states or {}).items():
            placeholders[key] = StateTensorPlaceholder(shape, dtype=types.fp16)
        function = Function(placeholders, opset_version=_OPSET)
        with function:
            results = body(dict(function.inputs))
            function.set_outputs([mb.identity(x=result, name=key) for key, result in results.items()])
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    data = path / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    exported = MILProtoExporter(program, str(data / "weights"), int(_OPSET)).export()
    model = proto.Model_pb2.Model(specificationVersion=int(_OPSET), mlProgram=exported)
    for name, function in program.functions.items():
        described = model.description.functions.add(name=name) if len(functions) > 1 else model.description
        for key in function.inputs:
            if key in (states or {}):
                described.state.add(name=key).type.stateType.SetInParent()
            elif key in (images or {}):
                image = described.input.add(name=key).type.imageType
                image.height, image.width = functions[name][0][key][0][-2:]
                image.colorSpace = image.ColorSpace.Value((images or {})[key])
            else:
                described.input.add(name=key).type.multiArrayType.SetInParent()
        for output in function.outputs:
            described.output.add(name=output.name).type.multiArrayType.SetInParent()
    if len(functions) > 1:
        model.description.defaultFunctionName = program.default_function_name
    (data / "model.mlmodel").write_bytes(model.SerializeToString())
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {_KEY: {"path": "com.apple.CoreML/model.mlmodel"}},
        "rootModelIdentifier": _KEY,
    }
    (path / "Manifest.json").write_text(json.dumps(manifest))
    return path


def inferred(build: Callable[[], Var]) -> list[NDArray[Any] | None]:
    """What coremltools itself computes for an operator of constants; None where it cannot."""
    with Function({}, opset_version=_OPSET):
        result = build()
    results = result if isinstance(result, (list, tuple)) else [result]
    return [None if item.val is None else np.asarray(item.val) for item in results]


def unsigned(bits: int) -> Any:
    """coremltools' numpy type of unsigned integers of a few bits."""
    return types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
