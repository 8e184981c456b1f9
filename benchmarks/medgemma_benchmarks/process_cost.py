"""What opening an artifact costs a fresh process: time and memory, of the runtime alone.

A measuring program holds images, plots and other sessions; so each number here comes from a new interpreter
that imports the runtime, opens the named components and runs each once:

    python -m medgemma_benchmarks.process_cost ARTIFACT THREADS COMPONENT...
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry
from medgemma_runtime.session import Session

__all__ = [
    "ProcessCost",
    "measure_process_cost",
    "peak_rss_bytes",
    "peak_rss_bytes_of",
    "rss_bytes",
    "zero_inputs",
]

_WARM_OPENS = 3


@dataclass(frozen=True, kw_only=True)
class ProcessCost:
    """One fresh process.

    Attributes:
        components: What it opened, all at once.
        page_cache_dropped: Whether the operating system was asked to forget the artifact's files first; it
            may keep what other processes use.
        cold_load_ms: First opening, the engine's import included.
        first_run_ms: First run of every component after that.
        warm_load_ms: Median of three further openings in the same process.
        idle_rss_bytes: Resident memory with the runtime imported and nothing opened: what it is then, not the
            highest that importing needed.
        peak_rss_bytes: Highest resident memory up to the end of the first run.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    components: tuple[str, ...]
    page_cache_dropped: bool
    cold_load_ms: float
    first_run_ms: float
    warm_load_ms: float
    idle_rss_bytes: int
    peak_rss_bytes: int


_ADAPTER: TypeAdapter[ProcessCost] = TypeAdapter(ProcessCost)


def measure_process_cost(
    artifact: Artifact, components: Sequence[str], *, threads: int | None
) -> ProcessCost:
    """Open components in a fresh process and report its times and memory.

    Raises:
        EdgeError: If that process fails.
    """
    command = [sys.executable, "-m", "medgemma_benchmarks.process_cost"]
    command += [str(artifact.directory), str(threads or 0), *components]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise EdgeError(f"a fresh process could not open {', '.join(components)}: {last[0]}")
    return _ADAPTER.validate_json(result.stdout, strict=True)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    if (now := _status_bytes("VmRSS")) is not None:
        return now
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far.

    On Linux this is VmHWM, and not `getrusage`: the kernel hands `ru_maxrss` on through fork and exec, so a
    small child of a large parent would report the parent's peak.
    """
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    if sys.platform == "win32":  # which has no `resource`
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def peak_rss_bytes_of(process_id: int) -> int | None:
    """Highest resident memory of another process so far; None on a system that does not tell."""
    return _status_bytes("VmHWM", str(process_id))


def _status_bytes(field: str, process: str = "self") -> int | None:
    """A size of a process that Linux states in kB; None on another system."""
    status = Path("/proc", process, "status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _observe(artifact: Artifact, components: Sequence[str], threads: int | None) -> ProcessCost:
    idle = rss_bytes()
    dropped = _drop_page_cache(artifact)
    start = time.perf_counter()
    sessions = [open_session(artifact, name, threads=threads) for name in components]
    cold = time.perf_counter() - start
    start = time.perf_counter()
    for session in sessions:
        session.run(zero_inputs(session.entry))
    first_run = time.perf_counter() - start
    peak = peak_rss_bytes()
    warm = []
    for _ in range(_WARM_OPENS):
        _close(sessions)
        start = time.perf_counter()
        sessions = [open_session(artifact, name, threads=threads) for name in components]
        warm.append(time.perf_counter() - start)
    _close(sessions)
    return ProcessCost(
        components=tuple(components),
        page_cache_dropped=dropped,
        cold_load_ms=cold * 1e3,
        first_run_ms=first_run * 1e3,
        warm_load_ms=statistics.median(warm) * 1e3,
        idle_rss_bytes=idle,
        peak_rss_bytes=peak,
    )


def _close(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.close()


def zero_inputs(entry: ComponentEntry) -> dict[str, np.ndarray]:
    """Inputs of a component, all zero, with 1 for every free dimension."""
    return {
        spec.name: np.zeros([dim if isinstance(dim, int) else 1 for dim in spec.shape], dtype=spec.dtype)
        for spec in entry.inputs
    }


def _drop_page_cache(artifact: Artifact) -> bool:
    if not hasattr(os, "posix_fadvise"):
        return False
    for entry in artifact.manifest.files:
        descriptor = os.open(artifact.path(entry.path), os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(descriptor)
    return True


if __name__ == "__main__":
    _directory, _threads, *_components = sys.argv[1:]
    _cost = _observe(open_artifact(Path(_directory), check_hashes=False), _components, int(_threads) or None)
    sys.stdout.write(json.dumps(asdict(_cost)))
