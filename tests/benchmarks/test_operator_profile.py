"""Profiles are split into runs and added up by operator."""

import pytest

from medgemma_benchmarks.operator_profile import profile_encoder, runs_by_operator
from medgemma_runtime.errors import EdgeError
from tests.benchmarks.tiny_bundle import tiny_opened


def event(name: str, ts: int, dur: int, operator: str = "", cat: str = "Node") -> dict[str, object]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"op_name": operator}}


TRACE = [
    event("x_kernel_time", 1010, 300, "MatMul"),
    event("y_kernel_time", 1400, 100, "Add"),
    event("z_kernel_time", 1500, 200, "MatMul"),
    event("model_run", 1000, 800, cat="Session"),
    event("x_kernel_time", 5010, 700, "MatMul"),
    event("x_fence_before", 5000, 9999, "MatMul"),
    event("model_run", 5000, 900, cat="Session"),
]


def test_kernels_are_added_up_in_the_run_that_they_belong_to() -> None:
    assert runs_by_operator(TRACE) == [{"MatMul": (0.5, 2), "Add": (0.1, 1)}, {"MatMul": (0.7, 1)}]


def test_a_trace_without_kernels_is_no_profile() -> None:
    with pytest.raises(EdgeError, match="no operator's time"):
        runs_by_operator(TRACE[-2:])


def test_what_is_evaluated_here_has_no_profile(tmp_path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", target="coreml")
    with pytest.raises(EdgeError, match="profile on the device"):
        profile_encoder(artifact, "image", None)
