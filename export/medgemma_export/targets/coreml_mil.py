"""The parts of coremltools that the Core ML target uses, imported in the one way that disturbs nothing.

coremltools imports every framework that it could convert from and that is installed: seconds of waiting,
warnings of theirs, and log lines about versions. We author programs and convert nothing, so they are hidden
while it loads. The parts below `converters.mil` are internal: the version is pinned.
"""

import logging
import sys

__all__ = [
    "mb",
    "types",
    "proto",
    "Program",
    "Function",
    "Var",
    "Placeholder",
    "StateTensorPlaceholder",
    "Exporter",
    "file_value",
    "immediate_value",
    "load_program",
    "new_function",
    "PACKED_DTYPES",
    "OPSET",
    "SPECIFICATION_VERSION",
    "COREMLTOOLS_VERSION",
]

_FRAMEWORKS = ("executorch", "sklearn", "tensorflow", "torchao", "xgboost")

logging.getLogger("coremltools").setLevel(logging.CRITICAL)
_hidden = [name for name in _FRAMEWORKS if name not in sys.modules]
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]
try:
    from coremltools import __version__ as COREMLTOOLS_VERSION  # noqa: N812
    from coremltools import proto, target
    from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor as file_value
    from coremltools.converters.mil.backend.mil.helper import create_immediate_value as immediate_value
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter as Exporter
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import Function, Program, Var, types
    from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
    from coremltools.converters.mil.mil.types import np_int4_dtype, np_uint4_dtype, np_uint6_dtype
finally:
    for _name in _hidden:
        del sys.modules[_name]

PACKED_DTYPES = {"int4": np_int4_dtype, "uint4": np_uint4_dtype, "uint6": np_uint6_dtype}
"""numpy's types of integers that are packed, as coremltools tells them apart."""

OPSET = target.iOS18
"""iOS 18 and macOS 15: the first with states, functions and int4 blocks."""

SPECIFICATION_VERSION = int(OPSET)


def new_function(placeholders: dict[str, Placeholder]) -> Function:
    """A function to build. Its names are its own: coremltools counts them through the whole process."""
    mb.name_count.clear()
    return Function(placeholders, opset_version=OPSET)
