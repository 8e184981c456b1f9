"""The checkpoints that need no download, by name.

`sample:medsiglip-tiny` comes with this package; the others are made on first use in the user's cache. With
them every path runs on a machine that has no model. None of them is fit for medical use.
"""

import difflib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from medgemma_runtime.errors import CheckpointError

__all__ = ["SAMPLES", "sample_path", "cache_directory"]

_HERE = Path(__file__).parent


def _medsiglip_tiny() -> Path:
    return _HERE / "medsiglip_tiny"


def _medgemma_tiny() -> Path:
    # Named after the code that makes it, so that a newer version never finds an older one's files.
    source = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))
    directory = cache_directory() / f"medgemma-tiny-{hashlib.sha256(source).hexdigest()[:12]}"
    if directory.is_dir():
        return directory
    from medgemma_export.samples.medgemma_tiny import write

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / directory.name
        written.mkdir()
        write(written)
        try:
            written.rename(directory)
        except OSError:
            # Another process was faster; what it wrote is the same.
            if not directory.is_dir():
                raise
    return directory


def _gemma3_270m() -> Path:
    from medgemma_export.samples.gemma3_270m import assemble

    return assemble(cache_directory())


SAMPLES: dict[str, Callable[[], Path]] = {
    "sample:medsiglip-tiny": _medsiglip_tiny,
    "sample:medgemma-tiny": _medgemma_tiny,
    "sample:gemma3-270m": _gemma3_270m,
}
"""Name to a function that returns the sample's directory or GGUF file, and makes it first where needed."""


def sample_path(name: str) -> Path:
    """The directory or GGUF file of a sample.

    Args:
        name: A key of `SAMPLES`.

    Raises:
        EdgeError: If there is no such sample, or what it is made from is not installed.
    """
    if name not in SAMPLES:
        close = difflib.get_close_matches(name, SAMPLES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CheckpointError(f"there is no {name}; {hint}samples: {', '.join(SAMPLES)}")
    return SAMPLES[name]()


def cache_directory() -> Path:
    """Where samples are made: medgemma-edge in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "medgemma-edge"
