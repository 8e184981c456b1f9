"""What is found out about a function before it runs: which states change in place, and what leads where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.backends.mil import MilProgram
from tests.runtime.test_mil import CHUNK, GOLDEN, WIDTH

ROWS = 4


def updates(program: MilProgram, function: str = "main") -> list[bool]:
    steps = program.functions[function].steps
    return [step.is_in_place for step in steps if step.operation.type == "slice_update"]


def test_a_cache_changes_in_place_and_an_observer_sees_it_as_it_was() -> None:
    program = MilProgram.open(GOLDEN)
    assert updates(program, "prefill") == updates(program, "decode") == [True]
    x = np.random.default_rng(2).standard_normal((CHUNK, WIDTH), dtype=np.float32)
    inputs = {"x": x, "slot": np.array([1], np.int32)}
    states = [program.new_state(), program.new_state()]
    seen: dict[str, Any] = {}
    quick = program.run("prefill", inputs, state=states[0])["y"]
    shown = program.run(
        "prefill", inputs, state=states[1], observe=lambda name, _, value: seen.update({name: value})
    )["y"]
    assert (quick == shown).all()
    assert (states[0]["rows"] == states[1]["rows"]).all()
    [before] = [seen[name] for name in seen if name.startswith("read_state")]
    assert not before.any()


def test_a_run_that_fails_leaves_the_state() -> None:
    program = MilProgram.open(GOLDEN)
    state = program.new_state()
    # The rows are written before their product leaves the range.
    x = np.full((CHUNK, WIDTH), 60000, np.float32)
    with pytest.raises(Exception, match="not finite in its format"):
        program.run("prefill", {"x": x, "slot": np.array([0], np.int32)}, state=state, mode="fp16")
    assert not state["rows"].any()


def updated(v: dict[str, Any], x: Any, row: int) -> Any:
    from tests.runtime.mil_programs import mb

    begin, end = np.array([row, 0], np.int32), np.array([row + 1, WIDTH], np.int32)
    return mb.slice_update(x=x, update=v["x"], begin=begin, end=end)


def twice(v: dict[str, Any]) -> dict[str, Any]:
    """Two rows, as the caches of two layers; what is read between has ended."""
    from tests.runtime.mil_programs import mb

    rows = mb.read_state(input=v["rows"])
    rows = mb.coreml_update_state(state=v["rows"], value=updated(v, rows, 1))
    first = mb.reduce_sum(x=mb.slice_by_size(x=rows, begin=[1, 0], size=[1, WIDTH]), axes=[0])
    rows = mb.coreml_update_state(state=v["rows"], value=updated(v, rows, 2))
    return {"y": mb.add(x=first, y=mb.reduce_sum(x=rows, axes=[0]))}


def looked_at_again(v: dict[str, Any]) -> dict[str, Any]:
    """A view of the state as it was is used after the update."""
    from tests.runtime.mil_programs import mb

    rows = mb.read_state(input=v["rows"])
    view = mb.reshape(x=mb.slice_by_size(x=rows, begin=[1, 0], size=[1, WIDTH]), shape=[WIDTH])
    rows = mb.coreml_update_state(state=v["rows"], value=updated(v, rows, 1))
    return {"y": mb.add(x=view, y=mb.reduce_sum(x=rows, axes=[0]))}


def never_written(v: dict[str, Any]) -> dict[str, Any]:
    """The result is looked at and the state stays."""
    from tests.runtime.mil_programs import mb

    changed = updated(v, mb.read_state(input=v["rows"]), 1)
    return {"y": mb.reduce_sum(x=mb.add(x=changed, y=mb.read_state(input=v["rows"])), axes=[0])}


@pytest.mark.parametrize(
    ("body", "in_place", "y", "row_1"),
    [(twice, [True, True], 3, 1), (looked_at_again, [False], 1.5, 1), (never_written, [False], 1.5, 0.5)],
)
def test_only_what_nothing_needs_is_overwritten(
    tmp_path: Path,
    body: Callable[[dict[str, Any]], dict[str, Any]],
    in_place: list[bool],
    y: float,
    row_1: float,
) -> None:
    programs = pytest.importorskip("tests.runtime.mil_programs", reason="coremltools writes the program")
    package = programs.write_program(
        tmp_path / "p.mlpackage", {"x": ((1, WIDTH), "fp16")}, body, states={"rows": (ROWS, WIDTH)}
    )
    program = MilProgram.open(package)
    assert updates(program) == in_place
    state = program.new_state()
    state["rows"][1] = 0.5
    x = np.ones((1, WIDTH), np.float32)
    assert (program.run("main", {"x": x}, state=state)["y"] == y).all()
    assert (state["rows"][1] == row_1).all()


def test_a_state_that_is_given_another_ones_rows_keeps_its_own_memory(tmp_path: Path) -> None:
    programs = pytest.importorskip("tests.runtime.mil_programs", reason="coremltools writes the program")
    mb = programs.mb

    def body(v: dict[str, Any]) -> dict[str, Any]:
        rows = mb.read_state(input=v["rows"])
        mb.coreml_update_state(state=v["copy"], value=rows)
        rows = mb.coreml_update_state(state=v["rows"], value=updated(v, rows, 0))
        return {"y": mb.reduce_sum(x=rows, axes=[0])}

    states = {"rows": (ROWS, WIDTH), "copy": (ROWS, WIDTH)}
    package = programs.write_program(
        tmp_path / "p.mlpackage", {"x": ((1, WIDTH), "fp16")}, body, states=states
    )
    program = MilProgram.open(package)
    assert updates(program) == [True]
    state = program.new_state()
    program.run("main", {"x": np.ones((1, WIDTH), np.float32)}, state=state)
    assert state["rows"].sum() == WIDTH
    assert not state["copy"].any()


def test_the_weight_before_a_tensor_is_found_through_what_has_none() -> None:
    function = MilProgram.open(GOLDEN).functions["prefill"]
    names = {step.operation.type: step.operation.name for step in function.steps}
    assert function.nearest_weight(names["linear"]) == "weight"
    assert function.nearest_weight(names["reduce_sum"]) is None
    assert function.nearest_weight("x") is None
    assert function.nearest_weight("y") not in (None, "weight")  # the table that comes after it
