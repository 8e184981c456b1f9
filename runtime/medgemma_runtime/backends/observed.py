"""Opens a component so that the residual stream between its layers can be looked at.

Every target names the same values; how an engine shows them differs. ONNX Runtime gives them as further
outputs of a copy of the program, Core ML's evaluator as it meets them, ExecuTorch's event tracer as what its
calls gave.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil.arithmetic import Mode
from medgemma_runtime.session import Session

__all__ = ["Seen", "open_observed"]

Seen = Callable[[str, NDArray[np.float32]], None]
"""Called with a name and its value, [S, H]; a decoder of fixed sizes shows the rows of its padding too."""


def open_observed(
    artifact: Artifact,
    component: str,
    names: Sequence[str],
    seen: Seen,
    *,
    threads: int | None = None,
    arithmetic: Mode | None = None,
    exact_program: Path | None = None,
) -> Session:
    """Load one component, to be run on one item at a time.

    Args:
        artifact: An opened artifact.
        component: A name from its manifest.
        names: Which values to show, from `medgemma_runtime.layers`. What the engine cannot see is not shown.
        seen: Told each value in every run.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: As `open_session` takes it.
        exact_program: As `OrtSession` takes it, for an ONNX artifact; None for the component's own program.

    Raises:
        ArtifactError: If the program was written before values had names, or cannot be loaded.
        EdgeError: If the target's engine is not installed, or has no such choice.
    """
    wanted = frozenset(names)

    def show(name: str, array: NDArray[Any]) -> None:
        if name in wanted:
            seen(name, _rows(array))

    if artifact.manifest.target == "onnx":
        from medgemma_runtime.backends.ort import OrtSession

        return OrtSession(
            artifact,
            component,
            threads=threads,
            exact_program=exact_program,
            shown=tuple(names),
            show=show,
        )
    if artifact.manifest.target == "coreml":
        from medgemma_runtime.backends import open_coreml

        return open_coreml(
            artifact, component, threads, arithmetic or "fp32", lambda name, _, array: show(name, array)
        )
    from medgemma_runtime.backends.executorch_layers import ObservedExecutorchSession

    return ObservedExecutorchSession(artifact, component, show, threads=threads)


def _rows(array: NDArray[Any]) -> NDArray[np.float32]:
    """[1, S, H], [S, H], or channels first [1, H, 1, S], to [S, H]."""
    flat = array[0, :, 0].T if array.ndim == 4 else array.reshape(array.shape[-2:])
    return np.ascontiguousarray(flat, dtype=np.float32)
