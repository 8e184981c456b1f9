"""Core ML inside an ExecuTorch program: lowered on any machine, by coremltools.

What it does not take is left to ExecuTorch's kernels, attention above all, whose kernel is ExecuTorch's own;
`delegation.json` counts it. Nothing is handed to another delegate.
"""

from typing import Any

from medgemma_runtime.errors import missing_package

__all__ = ["coreml_partitioner"]

# Turns the bytes of an image into floats, which Core ML's frontend of ExecuTorch has no type for.
_LEFT_TO_KERNELS = ["aten._to_copy.default"]


def coreml_partitioner() -> Any:
    """What takes Core ML's share of a program, to compute in float32.

    Raises:
        EdgeError: If coremltools is not installed.
    """
    try:
        import coremltools
    except ImportError:
        raise missing_package("coremltools", extra="coreml", purpose="lower to Core ML") from None
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
