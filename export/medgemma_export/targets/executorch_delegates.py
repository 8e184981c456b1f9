"""Delegates that lower ahead of time on any machine with Python packages alone, beside XNNPACK.

What they do not take is left to ExecuTorch's kernels, attention above all, whose kernel is ExecuTorch's own;
`delegation.json` counts it. Nothing is handed to another delegate.
"""

import importlib
from typing import Any

from medgemma_runtime.errors import EdgeError

__all__ = ["open_partitioner"]

# Turns the bytes of an image into floats, which Core ML's frontend of ExecuTorch has no type for.
_LEFT_TO_KERNELS = ["aten._to_copy.default"]


def open_partitioner(delegate: str) -> Any:
    """What takes a delegate's share of a program, to compute in float32.

    Raises:
        EdgeError: If the delegate's package is not installed.
    """
    return {"coreml": _coreml, "openvino": _openvino}[delegate]()


def _coreml() -> Any:
    coremltools = _import("coremltools", "coreml", "pip install 'medgemma-edge[coreml]'")
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.compiler.coreml_preprocess import (
        MULTIMETHOD_WEIGHT_SHARING_STRATEGY as SHARING,
    )
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT32,
    )
    # Towers share no weights, and to be asked for shared ones they would have to be cut alike.
    specs.append(CoreMLBackend.generate_multimethod_weight_sharing_strategy_compile_spec(SHARING.DISABLED))
    return CoreMLPartitioner(skip_ops_for_coreml_delegation=_LEFT_TO_KERNELS, compile_specs=specs)


def _openvino() -> Any:
    _import("openvino", "openvino", "pip install openvino")
    _import("nncf", "openvino", "pip install nncf")
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    return OpenvinoPartitioner([CompileSpec("device", b"CPU")])


def _import(package: str, delegate: str, remedy: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise EdgeError(
            f"delegate {delegate} lowers with the package {package}, which is not installed; {remedy}"
        ) from None
