"""Writes files that are whole or not there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from medgemma_runtime.errors import EdgeError

__all__ = ["replacing", "check_destination"]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content takes the place of `path` when the block ends without an error.

    The content waits in a sibling of `path`, which an error removes, so that a full disk or an
    interruption leaves what was there before.

    Raises:
        EdgeError: As `check_destination`.
        OSError: If it cannot be written; names `path`, not the sibling.
    """
    check_destination(path)
    # A name that nobody can foresee, and mode x, which follows no link: the directory may be open to others.
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with sibling.open("xb") as stream, _removed_on_error(sibling):
            yield stream
            stream.close()
            sibling.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def check_destination(path: Path) -> None:
    """Refuse a place where no file can be written: before the work whose result would go there.

    Raises:
        EdgeError: If `path` is a directory or a device, or its directory is absent or read-only.
    """
    if path.exists() and not path.is_file():
        raise EdgeError(f"{path} is there already and is no file; give the name of a file to write")
    if not path.parent.is_dir():
        raise EdgeError(f"{path} cannot be written: {path.parent} is no directory; make it first")
    if not os.access(path.parent, os.W_OK):
        raise EdgeError(f"{path} cannot be written: {path.parent} is read-only; give another place")
