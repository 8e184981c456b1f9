"""Side by side with another ONNX program of the same image tower: same pixels, threads, engine, in turns.

The peer runs as whoever made it would run it: with ONNX Runtime's default session options, of which only the
threads and the log level are set. The artifact runs with the runtime's own options.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from medgemma_benchmarks.metrics import cosine
from medgemma_benchmarks.timing import PAUSE_SECONDS, Distribution, Repetition, distribution, paused_gc
from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec
from medgemma_runtime.session import Session, check_inputs

__all__ = ["PeerModel", "PeerComparison", "PeerSession", "parse_peer", "open_peer", "compare_with_peer"]

# What exporters call the pooled output of a SigLIP tower; `image_embeds` is the same at unit length.
_OUTPUTS = ("pooler_output", "image_embeds")

_METHOD = (
    "In one process, on the same images, with as many threads. Peer: ONNX Runtime's default session options, "
    "only threads and log level set; artifact: the runtime's own. Each goes first in every other pair (A B, "
    f"B A, ...), and {PAUSE_SECONDS * 1e3:.0f} ms pass before every run, so that spinning threads of one do "
    "not slow the other."
)


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """An ONNX file of the image tower, made by somebody else, and a name for the report."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class PeerComparison:
    """The artifact and a peer, run in turns (A B, B A, ...), so that heat and neighbours hit both.

    Attributes:
        method: How they were run, for the reader.
        name: Of the peer.
        sha256: Of the peer's .onnx file.
        size_bytes: Of that file and of the external data beside it with its name.
        ours: Times of the artifact's image component.
        theirs: Times of the peer.
        ratio_median: Median over pairs of the peer's time by ours: above 1 we are faster.
        ratio_min: Lowest of a pair.
        ratio_max: Highest of a pair.
        cosine_min: Lowest cosine of the two outputs over the images.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: str
    name: str
    sha256: str
    size_bytes: int
    ours: Distribution
    theirs: Distribution
    ratio_median: float
    ratio_min: float
    ratio_max: float
    cosine_min: float


def parse_peer(text: str) -> PeerModel:
    """Read `NAME=PATH` of the command line.

    Raises:
        EdgeError: If it is not of that form or there is no such .onnx file.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise EdgeError(f"--against {text!r} is not NAME=PATH; give it as optimum=path/to/model.onnx")
    if not path.endswith(".onnx") or not Path(path).is_file():
        raise EdgeError(f"--against {name}: {path} is no .onnx file; give the file of an image tower")
    return PeerModel(name=name, path=Path(path))


class PeerSession:
    """A peer's program; runs and closes as a `Session` does."""

    def __init__(self, peer: PeerModel, *, threads: int | None) -> None:
        import onnxruntime

        # Official builds report usage to Microsoft unless told otherwise.
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        if threads is not None:
            options.intra_op_num_threads = threads
        started = time.perf_counter()
        try:
            self._session = onnxruntime.InferenceSession(
                str(peer.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise EdgeError(f"ONNX Runtime cannot load the peer {peer.name}: {error}") from None
        self.load_seconds = time.perf_counter() - started
        self.entry = _signature(peer, self._session)
        self._name = peer.name

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """As `Session.run`."""
        check_inputs(self.entry, inputs)
        names = [spec.name for spec in self.entry.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise EdgeError(f"the peer {self._name} failed while running: {error}") from None

    def close(self) -> None:
        """As `Session.close`."""
        self._session = None


def open_peer(peer: PeerModel, *, threads: int | None) -> PeerSession:
    """Open a peer with ONNX Runtime's default session options; only threads and log level are set.

    The session's first output is the pooled one.

    Raises:
        EdgeError: If ONNX Runtime cannot load it, or it is not an image tower.
    """
    return PeerSession(peer, threads=threads)


def _signature(peer: PeerModel, session: Any) -> ComponentEntry:
    """What a peer's program takes and gives."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in inputs)
        raise EdgeError(
            f"the peer {peer.name} takes {found} and a comparable image tower takes one float32 "
            "[batch, 3, height, width]; export its image tower alone"
        )
    pooled = [node for node in outputs if node.name in _OUTPUTS] or outputs[:1]
    if len(outputs) > 1 and pooled[0].name not in _OUTPUTS:
        raise EdgeError(
            f"the peer {peer.name} has the outputs {', '.join(node.name for node in outputs)} and none is "
            f"called {' or '.join(_OUTPUTS)}; export it with one of these names"
        )
    if any(node.type != "tensor(float)" for node in outputs):
        raise EdgeError(
            f"the peer {peer.name} has outputs that are not float32; export it with float32 outputs"
        )
    # The pooled output first: whoever runs a peer reads that one.
    ordered = pooled[:1] + [node for node in outputs if node.name != pooled[0].name]
    return ComponentEntry(
        program=peer.path.name,
        inputs=tuple(_spec(node) for node in inputs),
        outputs=tuple(_spec(node) for node in ordered),
    )


def _spec(node: Any) -> TensorSpec:
    # An axis that an exporter left unnamed is free.
    shape = tuple(dim if dim else f"axis{axis}" for axis, dim in enumerate(node.shape))
    return TensorSpec(name=node.name, dtype="float32", shape=shape, description="of a peer")


def compare_with_peer(
    ours: Session,
    theirs: PeerSession,
    peer: PeerModel,
    pixels: Sequence[NDArray[np.float32]],
    *,
    repetition: Repetition,
) -> PeerComparison:
    """Run both in turns on the same images.

    Args:
        ours: The artifact's opened image component.
        theirs: The peer, opened by `open_peer` with as many threads.
        peer: Its name and file.
        pixels: Model inputs, each [1, 3, H, W].
        repetition: How many pairs, counted as runs and rounded up to an even number.

    Raises:
        EdgeError: If the peer is no image tower for these pixels, or its embeddings have another width.
    """
    similarity = []
    for image in pixels:
        actual, reference = _run(ours, image), _run(theirs, image)
        similarity.append(float(cosine(actual=actual, reference=reference)[0]))
    for run in range(repetition.warm_up_runs):
        _run(ours, pixels[run % len(pixels)])
        _run(theirs, pixels[run % len(pixels)])
    ours_ms: list[float] = []
    theirs_ms: list[float] = []
    with paused_gc():
        begin = time.perf_counter()
        pairs = 0
        # An even number of pairs: each goes first as often as the other.
        while pairs % 2 or not repetition.is_enough(pairs, time.perf_counter() - begin):
            image = pixels[pairs % len(pixels)]
            turns: list[tuple[Session | PeerSession, list[float]]] = [(ours, ours_ms), (theirs, theirs_ms)]
            for session, times_ms in turns if pairs % 2 == 0 else turns[::-1]:
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter_ns()
                _run(session, image)
                times_ms.append((time.perf_counter_ns() - start) / 1e6)
            pairs += 1
    ratios = np.array(theirs_ms) / np.array(ours_ms)
    return PeerComparison(
        method=_METHOD,
        name=peer.name,
        sha256=sha256_file(peer.path),
        size_bytes=sum(
            path.stat().st_size
            for path in peer.path.parent.iterdir()
            if path.is_file() and path.name.startswith(peer.path.name)
        ),
        ours=distribution(ours_ms),
        theirs=distribution(theirs_ms),
        ratio_median=float(np.median(ratios)),
        ratio_min=float(ratios.min()),
        ratio_max=float(ratios.max()),
        cosine_min=min(similarity),
    )


def _run(session: Session | PeerSession, pixels: NDArray[np.float32]) -> NDArray[Any]:
    """[1, 3, H, W] to the session's first output, [1, D]."""
    entry = session.entry
    return session.run({entry.inputs[0].name: pixels})[entry.outputs[0].name]
