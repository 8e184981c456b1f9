import gc
from itertools import count

import pytest

from medgemma_benchmarks.timing import Distribution, Repetition, distribution, measure, paused_gc


def test_percentiles_are_measured_times() -> None:
    times = [float(ms) for ms in range(100, 0, -1)]
    assert distribution(times) == Distribution(runs=100, min_ms=1, p50_ms=50, p90_ms=90, p99_ms=99)


def test_few_runs_have_their_slowest_as_p99() -> None:
    assert distribution([3.0, 1.0, 2.0]) == Distribution(runs=3, min_ms=1, p50_ms=2, p90_ms=3, p99_ms=3)
    assert distribution([5.0]) == Distribution(runs=1, min_ms=5, p50_ms=5, p90_ms=5, p99_ms=5)
    with pytest.raises(ValueError, match="no times"):
        distribution([])


class Clock:
    """Advances by the duration of each piece of work."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_work_is_warmed_up_and_then_timed_run_by_run() -> None:
    clock = Clock()
    runs: list[int] = []
    durations_ms = count(1)

    def work(run: int) -> None:
        runs.append(run)
        clock.now_ns += next(durations_ms) * 1_000_000

    times = measure(work, Repetition(seconds=0, min_runs=3, warm_up_runs=2), clock_ns=clock)
    assert runs == [0, 1, 0, 1, 2]
    # The warm-up took 1 and 2 ms and counts for nothing.
    assert times == Distribution(runs=3, min_ms=3, p50_ms=4, p90_ms=5, p99_ms=5)


@pytest.mark.parametrize(("seconds", "min_runs", "expected"), [(0.01, 2, 10), (0.002, 7, 7)])
def test_both_minima_hold(seconds: float, min_runs: int, expected: int) -> None:
    clock = Clock()

    def work(_: int) -> None:
        clock.now_ns += 1_000_000

    times = measure(work, Repetition(seconds=seconds, min_runs=min_runs, warm_up_runs=0), clock_ns=clock)
    assert times.runs == expected


def test_garbage_collection_is_off_inside_and_as_it_was_afterwards() -> None:
    seen: list[bool] = []
    measure(lambda _: seen.append(gc.isenabled()), Repetition(seconds=0, min_runs=2, warm_up_runs=0))
    assert seen == [False, False]
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_garbage_collection_comes_back_after_an_error() -> None:
    def fail(_: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure(fail, Repetition(seconds=0, min_runs=1, warm_up_runs=0))
    assert gc.isenabled()


@pytest.mark.parametrize("fields", [{"seconds": -1}, {"min_runs": 0}, {"warm_up_runs": -1}])
def test_impossible_repetitions_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Repetition(**fields)
