"""Repeats a piece of work and keeps the distribution of its times, not a mean."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import ConfigDict

__all__ = ["Distribution", "PAUSE_SECONDS", "Repetition", "measure", "distribution", "paused_gc"]

PAUSE_SECONDS = 0.1
"""Wait before a run of one program after a run of another.

Twice the time for which ONNX Runtime's threads spin after a run by default, measured at about 50 ms on two
cores: without it, those of one program would slow the next run of the other.
"""


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How often a piece of work is timed.

    Attributes:
        seconds: It is repeated for at least this long.
        min_runs: And at least this often.
        warm_up_runs: Runs before the first one that counts.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    seconds: float = 3.0
    min_runs: int = 20
    warm_up_runs: int = 3

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.min_runs < 1 or self.warm_up_runs < 0:
            raise ValueError(f"seconds and warm-up runs cannot be negative, and runs are at least 1: {self}")

    def is_enough(self, runs: int, seconds: float) -> bool:
        """Whether this many runs in this time satisfy both minima."""
        return runs >= self.min_runs and seconds >= self.seconds


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Times in milliseconds. A percentile is a time that was measured (nearest rank), never interpolated.

    With fewer than 100 runs p99 is the slowest run; `runs` says so.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    runs: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


def distribution(times_ms: Sequence[float]) -> Distribution:
    """Sum up times in milliseconds.

    Raises:
        ValueError: If there are none.
    """
    if not times_ms:
        raise ValueError("no times to sum up")
    ranked = sorted(times_ms)

    def percentile(percent: int) -> float:
        return ranked[-(-percent * len(ranked) // 100) - 1]  # ceil(percent/100 * n), counted from 1

    return Distribution(
        runs=len(ranked),
        min_ms=ranked[0],
        p50_ms=percentile(50),
        p90_ms=percentile(90),
        p99_ms=percentile(99),
    )


@contextmanager
def paused_gc() -> Iterator[None]:
    """Collect garbage now and not again until the end, so that no run pays for another's objects."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(
    work: Callable[[int], object],
    repetition: Repetition,
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Distribution:
    """Time `work(0)`, `work(1)`, ... after warming up.

    Args:
        work: Called with the number of the run, to walk through several inputs.
        repetition: How often.
        clock_ns: A monotonic clock.
    """
    for run in range(repetition.warm_up_runs):
        work(run)
    times_ms: list[float] = []
    with paused_gc():
        begin = clock_ns()
        while True:
            start = clock_ns()
            work(len(times_ms))
            end = clock_ns()
            times_ms.append((end - start) / 1e6)
            if repetition.is_enough(len(times_ms), (end - begin) / 1e9):
                return distribution(times_ms)
