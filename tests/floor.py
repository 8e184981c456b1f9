"""Fails when the thin runtime's environment holds a package that it must do without."""

import sys
from importlib.util import find_spec

FORBIDDEN = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "safetensors",
    "pydicom",
    "matplotlib",
    "coremltools",
)

found = [name for name in FORBIDDEN if find_spec(name) is not None]
if found:
    sys.exit(f"the base dependencies brought {', '.join(found)}; the runtime must run without them")
