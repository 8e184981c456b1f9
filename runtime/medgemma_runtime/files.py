"""Writes files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from medgemma_runtime.errors import EdgeError

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content takes the place of `path` when the block ends without an error.

    The content waits in a sibling of `path`, which an error removes, so that a full disk or an
    interruption leaves what was there before.

    Raises:
        EdgeError: If `path` is a directory or a device.
        OSError: If it cannot be written; names `path`, not the sibling.
    """
    if path.exists() and not path.is_file():
        raise EdgeError(f"{path} is there already and is no file; give the name of a file to write")
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with sibling.open("wb") as stream:
            yield stream
        sibling.replace(path)
    except OSError as error:
        sibling.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
