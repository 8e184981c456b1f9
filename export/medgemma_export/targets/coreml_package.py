"""Writes an .mlpackage: the weight file tensor by tensor, then the program, then what lists both.

coremltools would hold every weight of a program until it writes them, int4 at a byte each. Here each tensor
goes to the file when the model asks for it, packed as it lies on disk already, and the program holds a
stand-in of the same type and shape that takes no memory.
"""

import json
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from numpy.typing import NDArray

from medgemma_export.targets.coreml_features import Feature, FunctionFeatures
from medgemma_export.targets.coreml_mil import (
    SPECIFICATION_VERSION,
    Exporter,
    Program,
    Var,
    file_value,
    immediate_value,
    proto,
    types,
)

__all__ = ["WeightFile", "write_package", "WEIGHTS_PATH", "MODEL_PATH"]

_INNER = "com.apple.CoreML"
MODEL_PATH = f"Data/{_INNER}/model.mlmodel"
WEIGHTS_PATH = f"Data/{_INNER}/weights/weight.bin"
_PROGRAM_WEIGHTS = "@model_path/weights/weight.bin"

# The layout of MIL's blob storage, version 2, as coremltools' own writer leaves it: a header, then for each
# tensor a record and its data, both aligned.
_ALIGNMENT = 64
_HEADER = struct.Struct("<II56x")
_RECORD = struct.Struct("<IIQQQ32x")
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_BLOB_TYPES = {"float16": 1, "float32": 2, "int8": 4, "int4": 8, "uint4": 11, "uint6": 13}

_AUTHOR = "medgemma-edge"


class WeightFile:
    """A `weight.bin` in the making.

    Attributes:
        offsets: For each tensor the place of its record, by which a program refers to it.
        starts: Where the values of each tensor begin.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True)
        self.offsets: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self._file: IO[bytes] = path.open("wb")
        self._file.write(_HEADER.pack(0, _VERSION))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.seek(0)
        self._file.write(_HEADER.pack(len(self.offsets), _VERSION))
        self._file.close()

    def add(self, name: str, kind: str, array: NDArray[Any]) -> None:
        """Append a tensor, unless there is one of this name: functions share their weights.

        Args:
            name: What the program calls it.
            kind: `float16`, `float32`, `int8`, or `int4`, `uint4` and `uint6` for bytes that hold several,
                the first in the lowest bits.
            array: Its values.
        """
        if name not in self.offsets:
            self.add_pieces(name, kind, array, {name: 0})

    def add_pieces(self, name: str, kind: str, array: NDArray[Any], pieces: Mapping[str, int]) -> None:
        """Append a tensor that a program knows as several: their records, and then the values once.

        Args:
            name: By which `starts` knows the whole.
            kind: As `add` takes it.
            array: Its values.
            pieces: What the program calls each, and its first row; it ends where the next begins.

        Raises:
            ValueError: If a piece does not begin where the format lets one begin.
        """
        self._align()
        offset = self._file.tell()
        values = offset + len(pieces) * _RECORD.size
        ends = [*list(pieces.values())[1:], len(array)]
        row_bytes = array.nbytes // len(array)
        for (piece, first), end in zip(pieces.items(), ends, strict=True):
            if first * row_bytes % _ALIGNMENT:
                raise ValueError(f"{piece} begins at byte {first * row_bytes}, no multiple of {_ALIGNMENT}")
            size, start = (end - first) * row_bytes, values + first * row_bytes
            self.offsets[piece] = self._file.tell()
            self._file.write(_RECORD.pack(_SENTINEL, _BLOB_TYPES[kind], size, start, 0))
        array.tofile(self._file)
        self.starts[name] = values

    def _align(self) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))


class _StreamedExporter(Exporter):  # type: ignore[misc]  # coremltools has no types
    """Refers to tensors that are in the weight file already; whatever else is constant goes inline."""

    def __init__(self, program: Program, weights: WeightFile) -> None:
        super().__init__(program, weights_dir="", specification_version=SPECIFICATION_VERSION)
        self._weights = weights

    def get_milproto_value(self, var: Var) -> Any:
        offset = self._weights.offsets.get(var.op.weight_id)
        if offset is None:
            return immediate_value(var)
        primitive = types.BUILTIN_TO_PROTO_TYPES[var.sym_type.get_primitive()]
        return file_value(_PROGRAM_WEIGHTS, offset, var.shape, primitive)


def write_package(
    directory: Path,
    program: Program,
    weights: WeightFile,
    functions: Mapping[str, FunctionFeatures],
    *,
    summary: str,
    licence: str,
    version: str,
    facts: Mapping[str, str],
) -> None:
    """Finish a package whose weight file is written.

    Args:
        directory: The package; `WEIGHTS_PATH` in it holds `weights`.
        program: With the functions of the same names; if it has one only, that is `main`.
        weights: What the program's constants refer to.
        functions: What each function takes and gives.
        summary: One paragraph for people.
        licence: Of the weights.
        version: Of the exporter.
        facts: What programs that run the package need to know, by key; Core ML hands these out as the
            model's creator-defined metadata.
    """
    description = proto.Model_pb2.ModelDescription()
    if list(functions) == [program.default_function_name]:
        _describe(description, functions[program.default_function_name])
    else:
        description.defaultFunctionName = program.default_function_name
        for name, features in functions.items():
            _describe(description.functions.add(name=name), features)
    metadata = description.metadata
    metadata.shortDescription, metadata.license = summary, licence
    metadata.author, metadata.versionString = _AUTHOR, version
    metadata.userDefined.update(facts)
    model = proto.Model_pb2.Model(
        specificationVersion=SPECIFICATION_VERSION,
        description=description,
        mlProgram=_StreamedExporter(program, weights).export(),
    )
    # Maps have no order of their own: equal builds must be equal files.
    (directory / MODEL_PATH).write_bytes(model.SerializeToString(deterministic=True))
    (directory / "Manifest.json").write_text(_package_manifest(), encoding="utf-8")


def _describe(description: Any, features: FunctionFeatures) -> None:
    for target, group in ((description.input, features.inputs), (description.output, features.outputs)):
        for feature in group:
            _set_type(target.add(name=feature.name, shortDescription=feature.description).type, feature)
    for feature in features.states:
        state = description.state.add(name=feature.name, shortDescription=feature.description)
        _set_array(state.type.stateType.arrayType, feature)


def _set_type(feature_type: Any, feature: Feature) -> None:
    if feature.kind == "image":
        image = feature_type.imageType
        image.height, image.width = feature.shape[-2:]
        image.colorSpace = proto.FeatureTypes_pb2.ImageFeatureType.RGB
    else:
        _set_array(feature_type.multiArrayType, feature)


def _set_array(array: Any, feature: Feature) -> None:
    array.shape.extend(feature.shape)
    array.dataType = proto.FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Value(feature.kind.upper())


def _package_manifest() -> str:
    """The file by which Core ML finds the parts of a package; identifiers are made from their paths."""
    parts = {"Specification": "model.mlmodel", "Weights": "weights"}
    keys = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_INNER}/{name}")).upper() for name in parts.values()}
    entries = {
        keys[name]: {
            "author": _INNER,
            "description": f"CoreML Model {what}",
            "name": name,
            "path": f"{_INNER}/{name}",
        }
        for what, name in parts.items()
    }
    content = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": keys["model.mlmodel"],
    }
    return json.dumps(content, indent=4) + "\n"
