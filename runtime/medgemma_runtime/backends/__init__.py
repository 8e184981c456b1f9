"""The engines that run artifacts, one file for each, imported when an artifact needs it."""

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.session import Session

__all__ = ["open_session"]


def open_session(artifact: Artifact, component: str, *, threads: int | None = None) -> Session:
    """Load one component with the engine of the artifact's target.

    Args:
        artifact: An opened artifact.
        component: A name from its manifest, such as `image`.
        threads: Threads for one operator; None leaves the choice to the engine.

    Raises:
        ArtifactError: If there is no such component, or its program cannot be loaded.
        EdgeError: If this machine has no engine for the target.
    """
    if artifact.manifest.target == "onnx":
        from medgemma_runtime.backends.ort import OrtSession

        return OrtSession(artifact, component, threads=threads)
    if artifact.manifest.target == "coreml":
        from medgemma_runtime.backends.mil_session import MilSession

        if threads is not None:
            raise EdgeError(
                "the evaluator of Core ML programs takes as many threads as NumPy does; leave threads out "
                "and set OPENBLAS_NUM_THREADS instead"
            )
        return MilSession(artifact, component)
    if artifact.manifest.target == "executorch":
        from medgemma_runtime.backends.executorch import ExecutorchSession

        return ExecutorchSession(artifact, component, threads=threads)
    raise EdgeError(
        f"target {artifact.manifest.target!r} has no engine in this version of the runtime; "
        "export the model with --target onnx"
    )
