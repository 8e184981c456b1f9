"""Writes an artifact so that it is whole or absent.

Work happens in a hidden sibling of the destination, `.NAME.partial`; the last step renames. An export that
was interrupted finds its integers there and goes on; one of another checkpoint or plan starts afresh.
"""

import hashlib
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
from medgemma_runtime.artifact import Artifact, sha256_file
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import BuildInfo, FileEntry, Manifest, write_manifest

__all__ = ["Package", "open_package", "require_absent", "require_free_bytes"]

_TOOLS = ("medgemma-edge", "numpy", "onnx-ir", "transformers")


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
    partial = out.parent / f".{out.name}.partial"
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


def require_absent(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        EdgeError: If `out` exists.
    """
    if out.exists():
        raise EdgeError(f"{out} exists already and is left alone; name another --out or remove it")


def require_free_bytes(out: Path, needed: int) -> None:
    """Refuse an export that the disk cannot hold, before it starts.

    Raises:
        EdgeError: If fewer than `needed` bytes are free where `out` goes.
    """
    existing = next(parent for parent in (out.parent.resolve(), *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise EdgeError(
            f"the export needs about {needed / 1e9:.1f} GB of disk (integers and programs) and "
            f"{free / 1e9:.1f} GB are free at {out.parent}; free some space or name another --out"
        )
