"""Copies of artifacts with something wrong in them, and manifests that are true of the copies."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact, open_artifact, sha256_file
from medgemma_runtime.manifest import write_manifest

__all__ = ["rewritten", "with_scaled_weight", "with_wrong_weight"]


def rewritten(artifact: Artifact, directory: Path, change: Callable[[Path], None]) -> Artifact:
    """A copy whose files `change` has altered, and a manifest that is true of them."""
    shutil.copytree(artifact.directory, directory)
    change(directory)
    files = tuple(
        replace(entry, sha256=sha256_file(path), size_bytes=path.stat().st_size)
        for entry in artifact.manifest.files
        if (path := directory / entry.path).is_file()
    )
    write_manifest(replace(artifact.manifest, files=files), directory)
    return open_artifact(directory)


def with_scaled_weight(artifact: Artifact, directory: Path, stored: NDArray[Any], factor: float) -> Artifact:
    """A copy in which one array, stored as it is or transposed, is multiplied."""
    return with_wrong_weight(artifact, directory, stored, stored * stored.dtype.type(factor))


def with_wrong_weight(
    artifact: Artifact, directory: Path, stored: NDArray[Any], wrong: NDArray[Any]
) -> Artifact:
    """A copy in which another array stands for one, stored as it is or transposed."""
    changed = 0

    def put(directory: Path) -> None:
        nonlocal changed
        for path in (path for path in directory.rglob("*") if path.is_file()):
            data = path.read_bytes()
            for form, other in ((stored, wrong), (stored.T, wrong.T))[: stored.ndim]:
                content = np.ascontiguousarray(form).tobytes()
                changed += data.count(content)
                data = data.replace(content, np.ascontiguousarray(other).tobytes())
            path.write_bytes(data)

    broken = rewritten(artifact, directory, put)
    assert changed == 1
    return broken
