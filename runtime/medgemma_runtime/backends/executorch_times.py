"""Adds up what an ExecuTorch profile (ETDump) says: time by kind of operator, XNNPACK's own included."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medgemma_runtime.errors import EdgeError

__all__ = ["operator_times", "open_inspector"]

_RUNS = "Execute"
_CALLS_OF_DELEGATES = "DELEGATE_CALL"
_KERNEL = "native_call_"
_AROUND = ("OPERATOR_CALL", "Method::", "Program::")  # they hold others


def operator_times(dump: Path) -> list[dict[str, tuple[float, float]]]:
    """Milliseconds and calls by kind of operator, of every run.

    What calls of a delegate took beyond its operators is under `delegate, the rest`.

    Args:
        dump: What `ExecutorchSession` left, of one component that ran at least once.

    Raises:
        EdgeError: If ExecuTorch's developer tools are not installed, or its runtime recorded no operator.
    """
    inspector = open_inspector(dump)
    events = [event for block in inspector.event_blocks if block.name == _RUNS for event in block.events]
    runs = max((len(event.perf_data.raw) for event in events if event.perf_data is not None), default=0)
    times = [_added(events, run) for run in range(runs)]
    if not any(times):
        raise EdgeError(
            "this ExecuTorch records no operators: it was built without EXECUTORCH_ENABLE_EVENT_TRACER; "
            "use PyPI's, or measure without --profile"
        )
    return times


def open_inspector(dump: Path, values: Path | None = None) -> Any:
    """ExecuTorch's reader of what a run recorded, and of the tensors' values where these were recorded too.

    Raises:
        EdgeError: If ExecuTorch's developer tools are not installed.
    """
    try:
        from executorch.devtools import Inspector
    except ImportError as error:
        raise EdgeError(
            f"ExecuTorch's developer tools cannot be imported ({error}); install them: "
            "pip install 'medgemma-edge[executorch]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no values of tensors were recorded, which take much memory
        return Inspector(etdump_path=str(dump), debug_buffer_path=None if values is None else str(values))


def _added(events: Iterable[Any], run: int) -> dict[str, tuple[float, float]]:
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    rest = 0.0
    for event in events:
        if event.perf_data is None:
            continue
        taken = float(event.perf_data.raw[run])
        if event.is_delegated_op:
            kind = re.sub(r" #\d+$", "", event.name)
            rest -= taken
        elif event.name == _CALLS_OF_DELEGATES:
            rest += taken
            continue
        elif event.name.startswith(_AROUND):
            continue
        else:
            kind = event.name.removeprefix(_KERNEL)
        times[kind] += taken
        calls[kind] += 1
    if times and rest > 0:
        times["delegate, the rest"], calls["delegate, the rest"] = rest, 1
    return {kind: (times[kind], calls[kind]) for kind in times}
