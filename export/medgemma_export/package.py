"""Writes an artifact so that it is whole or absent.

Work happens in a hidden sibling of the destination, `.NAME.partial`; the last step renames. An export that
was interrupted finds its integers there and goes on; one of another checkpoint or plan starts afresh.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from medgemma_benchmarks.process_cost import peak_rss_bytes
from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_quantization.weights import rounding_bytes
from medgemma_runtime.artifact import Artifact, sha256_file
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import BuildInfo, FileEntry, Manifest, write_manifest

__all__ = [
    "Package",
    "Needs",
    "open_package",
    "partial_directory",
    "predict_needs",
    "require_absent",
    "require_resources",
    "available_memory_bytes",
]

_TOOLS = ("medgemma-edge", "numpy", "onnx-ir", "transformers")

# Alignment in the weight file, headers and hashes beside the integers, and what a file system rounds up to.
_SLACK_BYTES = 64 << 10
# A tokenizer (Gemma's has 33 MB), the programs themselves, the plan.
_SMALL_FILES_BYTES = 64 << 20
# Graphs, plan and manifest in memory.
_REST_BYTES = 64 << 20
# PyTorch and ExecuTorch's exporter, and what they note of a matrix's surroundings; 270M and 4B were measured.
_EXPORTER_BYTES = 512 << 20
_TRACED_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Package:
    """An artifact in the making.

    Attributes:
        out: Where the finished artifact goes.
        directory: Where its files are written meanwhile.
        weights: Where integers are kept until it is finished.
        started: `time.monotonic()` at the start.
    """

    out: Path
    directory: Path
    weights: Path
    started: float

    def files(self) -> tuple[FileEntry, ...]:
        """Every file written so far, with size and hash."""
        return tuple(
            FileEntry(
                path=path.relative_to(self.directory).as_posix(),
                size_bytes=path.stat().st_size,
                sha256=sha256_file(path),
            )
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        )

    def build_info(self) -> BuildInfo:
        """Tools, seconds and memory so far."""
        return BuildInfo(
            versions={tool: version(tool) for tool in _TOOLS},
            seconds=round(time.monotonic() - self.started, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest and move the artifact to its place."""
        write_manifest(manifest, self.directory)
        self.directory.rename(self.out)
        return Artifact(directory=self.out, manifest=manifest)


@contextmanager
def open_package(out: Path, *, key: str) -> Iterator[Package]:
    """Begin an artifact, or go on with one that was interrupted.

    Args:
        out: Where the finished artifact goes.
        key: What the integers depend on; work left by another key is discarded.

    Raises:
        EdgeError: If `out` exists, or another export is writing it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_directory(out)
    # Not in the directory, which is removed while the lock is held, nor beside it, where it would stay.
    place = hashlib.sha256(str(out.resolve()).encode()).hexdigest()
    lock = FileLock(Path(tempfile.gettempdir()) / f"medgemma-export-{place[:16]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EdgeError(f"another export is writing {out}; wait for it or name another --out") from None
    try:
        require_absent(out)
        partial.mkdir(exist_ok=True)
        key_file = partial / "key"
        if not key_file.exists() or key_file.read_text(encoding="utf-8") != key:
            shutil.rmtree(partial / "weights", ignore_errors=True)
            key_file.write_text(key, encoding="utf-8")
        # Programs are rewritten from the integers each time: that takes seconds, and nothing stale can stay.
        shutil.rmtree(partial / "artifact", ignore_errors=True)
        (partial / "artifact").mkdir()
        yield Package(
            out=out, directory=partial / "artifact", weights=partial / "weights", started=time.monotonic()
        )
        shutil.rmtree(partial)
    finally:
        lock.release()


def partial_directory(out: Path) -> Path:
    """Where the work on `out` is until it is finished, and stays when it is interrupted."""
    return out.parent / f".{out.name}.partial"


def require_absent(out: Path) -> None:
    """Refuse to write over anything, and where nothing can be written: before any work is done.

    Raises:
        EdgeError: If `out` exists, or its directory cannot be made or is read-only.
    """
    if out.exists():
        raise EdgeError(f"{out} exists already and is left alone; name another --out or remove it")
    existing = _existing_parent(out)
    if not existing.is_dir():
        raise EdgeError(f"{out} cannot be written: {existing} is no directory; name another --out")
    if not os.access(existing, os.W_OK):
        raise EdgeError(f"{out} cannot be written: {existing} is read-only; name another --out")


def _existing_parent(out: Path) -> Path:
    return next(parent for parent in (out.parent, *out.resolve().parents) if parent.exists())


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an export takes at its highest point, beyond what this process holds already.

    Attributes:
        disk_bytes: Integers as made and as packed, which are there together before the end.
        memory_bytes: Arrays. Pages of mapped files are not in it: the system takes those back.
        heaviest: The step that needs most memory, for people.
    """

    disk_bytes: int
    memory_bytes: int
    heaviest: str


def predict_needs(plan: QuantPlan, *, calibration_bytes: int | None = None, is_traced: bool = False) -> Needs:
    """From the plan alone; held against measurements in tests/export/test_package.py.

    Args:
        plan: How every weight is stored.
        calibration_bytes: Memory for activations where there are calibration samples; None for none. What of
            them goes to the disk depends on the samples and is not counted.
        is_traced: Whether the whole program is traced with PyTorch, as ExecuTorch's exporter does it: scales
            and tables are then held, matrices are not.
    """
    disk_bytes = sum(_made_bytes(row) + row.stored_bits // 8 + _SLACK_BYTES for row in plan.rows)
    steps = [(rounding_bytes(row), f"to round {row.name}") for row in plan.rows]
    steps += [(_lowering_bytes(row), f"to lower {row.name}") for row in plan.rows]
    if calibration_bytes is not None:
        steps += [
            (calibration_bytes + _calibrating_bytes(row), f"to calibrate {row.name}")
            for row in plan.rows
            if not row.storage.is_float
        ]
    if is_traced:
        tables = sum(row.stored_bits // 8 for row in plan.rows if row.role == "table")
        # As float32, as bfloat16 or float16, and zeros of one byte.
        scales = 8 * sum(row.scale_count for row in plan.rows if not row.storage.is_float)
        traced = _TRACED_BYTES * sum(row.role == "linear" for row in plan.rows)
        steps.append((_EXPORTER_BYTES + traced + scales + tables, "to trace and lower the program"))
        # The program before its weights are written.
        disk_bytes += scales + tables
    memory_bytes, heaviest = max(steps)
    return Needs(
        disk_bytes=disk_bytes + _SMALL_FILES_BYTES,
        memory_bytes=memory_bytes + _REST_BYTES,
        heaviest=heaviest,
    )


def require_resources(out: Path, needs: Needs) -> None:
    """Refuse, before it starts, an export that disk or memory cannot hold.

    Raises:
        EdgeError: If less is free than is needed.
    """
    # What an interrupted export left is taken over or removed.
    left = sum(path.stat().st_size for path in partial_directory(out).rglob("*") if path.is_file())
    free = shutil.disk_usage(_existing_parent(out)).free + left
    if free < needs.disk_bytes:
        raise EdgeError(
            f"the export needs about {needs.disk_bytes / 1e9:.1f} GB of disk (integers and programs) and "
            f"{free / 1e9:.1f} GB are free at {out.parent}; free some space or name another --out"
        )
    available = available_memory_bytes()
    if available < needs.memory_bytes:
        raise EdgeError(
            f"the export needs about {needs.memory_bytes / 1e9:.1f} GB of memory ({needs.heaviest}) and "
            f"{available / 1e9:.1f} GB are available; close other programs, choose a lower --precision, "
            "fewer --components or a smaller --calibration-memory, or use a machine with more memory"
        )


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping: of the machine, or of this process's control group if less.

    Args:
        root: Where the file systems `proc` and `sys` of Linux are; other systems have none.
    """
    import psutil

    free = [int(psutil.virtual_memory().available)]
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            group, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            group = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = group / path.lstrip("/")
        # A limit of any group above holds too; inside a container only the innermost may be visible.
        groups = [inner, *(parent for parent in inner.parents if parent.is_relative_to(group))]
        free += [bytes_ for place in groups if (bytes_ := _group_bytes(place, *names)) is not None]
    return min(free)


def _group_bytes(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What a control group may still take; None where it has no limit."""
    if not (group / limit).is_file() or (stated := (group / limit).read_text().strip()) == "max":
        return None
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / usage).read_text()) - int(statistics.get(reclaimable, 0))
    return max(0, int(stated) - used)


def _made_bytes(row: PlanRow) -> int:
    """On disk, until the artifact is finished: integers as made, with scales as float32."""
    if row.storage.is_float:
        return 0
    return math.prod(row.stored_shape) * row.storage.bits // 8 + row.scale_count * 4 + _SLACK_BYTES


def _calibrating_bytes(row: PlanRow) -> int:
    """In memory while a weight is rounded by what its inputs were, activations apart.

    For n inputs, in bytes: their exact second moment 8 n², the drift 16 n², a factor of the moment 8 n² and
    that of its inverse 4 n²; then strips of 1024 inputs, the weights of one operation in both models, four of
    this size at most, and one that is being rounded.
    """
    outputs, inputs = row.stored_shape
    moments = 36 * inputs**2 + 4 * 8 * inputs * min(inputs, 1024)
    if row.role == "table":
        return moments + rounding_bytes(row)
    return moments + 4 * 4 * outputs * inputs + rounding_bytes(row)


def _lowering_bytes(row: PlanRow) -> int:
    """In memory while a target packs a weight: its copies, as measured with the ONNX target."""
    values = math.prod(row.stored_shape)
    if row.storage.bits == 32:
        return values * (8 if row.role == "linear" else 6)
    if row.storage.is_float:
        return values * 10
    if not row.storage.block:
        return values * 6
    return values * row.storage.bits // 8 * 2 + row.scale_count * 8
