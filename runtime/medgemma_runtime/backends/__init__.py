"""The engines that run artifacts, one file for each, imported when an artifact needs it."""

from pathlib import PurePosixPath

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil.arithmetic import Mode
from medgemma_runtime.backends.mil.program import Observer
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.session import Session

__all__ = ["open_session", "open_coreml"]


def open_session(
    artifact: Artifact, component: str, *, threads: int | None = None, arithmetic: Mode | None = None
) -> Session:
    """Load one component with the engine of the artifact's target.

    Args:
        artifact: An opened artifact.
        component: A name from its manifest, such as `image`.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: How much of a Core ML program's fp16 is honoured, where it is evaluated; None for nothing.

    Raises:
        ArtifactError: If there is no such component, or its program cannot be loaded.
        EdgeError: If the target's engine has no such choice, or is not installed.
    """
    if artifact.manifest.target == "coreml":
        return open_coreml(artifact, component, threads, arithmetic or "fp32")
    if arithmetic is not None:
        raise EdgeError(
            f"arithmetic {arithmetic!r} is of Core ML programs, which are evaluated here, and the target "
            f"{artifact.manifest.target!r} runs in an engine of its own; leave it out"
        )
    if artifact.manifest.target == "onnx":
        from medgemma_runtime.backends.ort import OrtSession

        return OrtSession(artifact, component, threads=threads)
    from medgemma_runtime.backends.executorch import ExecutorchSession

    return ExecutorchSession(artifact, component, threads=threads)


def open_coreml(
    artifact: Artifact,
    component: str,
    threads: int | None,
    arithmetic: Mode,
    observe: Observer | None = None,
) -> Session:
    """Load one component of a Core ML artifact with the evaluator.

    Args:
        artifact: An opened artifact of target `coreml`.
        component: A name from its manifest.
        threads: None; the evaluator has no such choice.
        arithmetic: How much of the program's fp16 is honoured.
        observe: Called with every tensor of its programs.

    Raises:
        ArtifactError: If there is no such component, or its program cannot be loaded.
        EdgeError: If `threads` are given.
    """
    from medgemma_runtime.backends.embedding_rows import EmbeddingRows
    from medgemma_runtime.backends.host_decoder import HostDecoder
    from medgemma_runtime.backends.mil_session import MilSession
    from medgemma_runtime.backends.static_decoder import SIZES, StatefulDecoder, StaticDecoderSession

    if threads is not None:
        raise EdgeError(
            "the evaluator of Core ML programs takes as many threads as NumPy does; leave threads out "
            "and set OPENBLAS_NUM_THREADS instead"
        )
    if PurePosixPath(artifact.component(component).program).suffix == ".json":
        if component == "embed":
            return EmbeddingRows(artifact, component)
        return StaticDecoderSession(HostDecoder(artifact, component, mode=arithmetic, observe=observe))
    session = MilSession(artifact, component, mode=arithmetic, observe=observe)
    if SIZES in session.program.metadata:
        return StaticDecoderSession(StatefulDecoder(session))
    return session
