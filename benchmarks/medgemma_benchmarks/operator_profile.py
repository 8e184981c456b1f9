"""Where an engine's time goes, by kind of operator: in an encoder, a decoder's prefill and its steps."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from medgemma_benchmarks.process_cost import zero_inputs
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.session import Session

__all__ = ["OperatorShare", "profile_encoder", "profile_decoder", "runs_by_operator"]

_RUNS = 5

_Run = Mapping[str, tuple[float, float]]
"""By kind of operator: milliseconds and calls of one run."""


@dataclass(frozen=True, kw_only=True)
class OperatorShare:
    """One kind of operator in one component: calls and time per run, and its share of all operators' time."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    operator: str
    calls: float
    ms: float
    share: float


def profile_encoder(artifact: Artifact, component: str, threads: int | None) -> tuple[OperatorShare, ...]:
    """Run one component a few times with its engine's profiler on; the most expensive operator first.

    Raises:
        EdgeError: If the engine has no profiler.
    """

    def drive(session: Session) -> None:
        for _ in range(_RUNS):
            session.run(zero_inputs(session.entry))

    return _shares(_profiled(artifact, component, threads, drive))


def profile_decoder(
    artifact: Artifact, ids: Sequence[int], *, steps: int, threads: int | None
) -> dict[str, tuple[OperatorShare, ...]]:
    """Read a prompt and decode after it with the engine's profiler on.

    Args:
        artifact: With the components `embed` and `decoder`, and a prompt spec.
        ids: The prompt.
        steps: Tokens decoded after it, each the most probable one.
        threads: Threads for one operator; None leaves the choice to the engine.

    Returns:
        `prefill`: of the whole prompt. `decode`: of one token, a mean.

    Raises:
        EdgeError: If the engine has no profiler.
    """
    spec = artifact.manifest.prompt
    assert spec is not None  # whoever asks has read the prompt

    def drive(session: Session) -> None:
        with closing(open_session(artifact, "embed", threads=threads)) as embed:
            decoder = Decoder(embed, session, spec)
            decoder.read(decoder.new_cache(len(ids)), np.array(ids, np.int64))  # warms up
            cache = decoder.new_cache(len(ids) + steps)
            token = decoder.read(cache, np.array(ids, np.int64)).argmax()
            for _ in range(steps):
                token = decoder.read(cache, np.array([token], np.int64)).argmax()

    runs = _profiled(artifact, "decoder", threads, drive)
    # A long prompt is read in several runs, the same number both times.
    prefill = (len(runs) - steps) // 2
    return {
        "prefill": _shares(runs[prefill : 2 * prefill], of=1),
        "decode": _shares(runs[2 * prefill :]),
    }


def runs_by_operator(trace: Sequence[dict[str, object]]) -> list[_Run]:
    """Add up an ONNX Runtime profile by run and kind of operator.

    Args:
        trace: Events of Chrome's trace format, times in microseconds; a run is `model_run`, a kernel has
            `cat` "Node", a name that ends in `_kernel_time`, and the operator's kind.

    Raises:
        EdgeError: If there is no kernel in it.
    """
    runs = sorted((_span(event) for event in trace if event["name"] == "model_run"), key=lambda span: span[0])
    kernels = [
        event for event in trace if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
    ]
    if not kernels or not runs:
        raise EdgeError("the engine's profile holds no operator's time; measure without --profile")
    starts = np.array([start for start, _ in runs])
    found: list[dict[str, tuple[float, float]]] = [{} for _ in runs]
    for event in kernels:
        start, end = _span(event)
        run = found[max(int(np.searchsorted(starts, start, side="right")) - 1, 0)]
        kind = str(event["args"]["op_name"])  # type: ignore[index]
        ms, calls = run.get(kind, (0.0, 0.0))
        run[kind] = ms + (end - start) / 1e3, calls + 1
    return list(found)


def _span(event: dict[str, object]) -> tuple[float, float]:
    start = float(event["ts"])  # type: ignore[arg-type]
    return start, start + float(event["dur"])  # type: ignore[arg-type]


def _profiled(
    artifact: Artifact, component: str, threads: int | None, drive: Callable[[Session], None]
) -> list[_Run]:
    """Every run of one component while something drives it."""
    target = artifact.manifest.target
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "profile"
        if target == "executorch":
            from medgemma_runtime.backends.executorch import ExecutorchSession
            from medgemma_runtime.backends.executorch_times import operator_times

            with closing(ExecutorchSession(artifact, component, threads=threads, profile_to=trace)) as method:
                drive(method)
            return list(operator_times(trace))
        if target != "onnx":
            raise EdgeError(
                f"--profile was asked for and {target} programs are evaluated here, which tells nothing of "
                "their engine; profile on the device, with Instruments"
            )
        from medgemma_runtime.backends.ort import OrtSession

        with closing(OrtSession(artifact, component, threads=threads, profile_to=trace)) as session:
            drive(session)
        return runs_by_operator(json.loads(trace.read_text(encoding="utf-8")))


def _shares(runs: Sequence[_Run], *, of: int | None = None) -> tuple[OperatorShare, ...]:
    """Operators of all runs together, divided by a count: that of the runs if none is given."""
    ms: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for run in runs:
        for kind, (taken, count) in run.items():
            ms[kind] += taken
            calls[kind] += count
    count, everything = of or len(runs), sum(ms.values())
    return tuple(
        OperatorShare(
            operator=kind, calls=calls[kind] / count, ms=ms[kind] / count, share=ms[kind] / everything
        )
        for kind in sorted(ms, key=lambda kind: -ms[kind])
    )
