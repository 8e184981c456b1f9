"""Warnings of image decoders: which of them are errors."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["warnings_decided"]

_lock = threading.RLock()


@contextmanager
def warnings_decided(*doubts: str, ignored: type[Warning]) -> Iterator[None]:
    """Warnings that put the pixels in doubt become exceptions while the block runs.

    Python keeps one list of filters for all threads. Two blocks at once would take away each other's, so that
    a damaged image passes, and leave some behind for good: threads that decode take turns.

    Args:
        doubts: Regular expressions for the beginning of the messages that become exceptions.
        ignored: What is dropped of the others.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", ignored)
        for message in doubts:
            warnings.filterwarnings("error", message=message)
        yield
