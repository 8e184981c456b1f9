"""What the tokenizers package raises about a file that it cannot use, as an error that a user can read."""

from collections.abc import Iterator
from contextlib import contextmanager

from medgemma_runtime.errors import TextError

__all__ = ["tokenizer_faults"]


@contextmanager
def tokenizer_faults(finding: str) -> Iterator[None]:
    """Make a TextError of whatever the block raises, but for interruptions.

    The package raises Exception itself. Where its Rust code gives up in a panic, it raises no Exception but a
    BaseException, of a class that cannot be imported.

    Args:
        finding: The beginning of the message: which file, and what cannot be done with it.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TextError(f"{finding} ({error}); export the model again") from None
