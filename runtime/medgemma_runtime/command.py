"""How every command line of this project ends: an exit code, and for a refusal one sentence."""

import errno
from collections.abc import Sequence

import typer

from medgemma_runtime.errors import EdgeError

__all__ = ["DONE", "CHECK_FAILED", "BAD_REQUEST", "INTERRUPTED", "run_app", "printable"]

DONE = 0
CHECK_FAILED = 1
BAD_REQUEST = 2
INTERRUPTED = 130  # what shells report for Ctrl-C: 128 + SIGINT


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and say how it ended.

    A refusal (EdgeError) and an error of the operating system (a full disk, no permission) are
    printed on stderr as one sentence. Anything else is a defect and keeps its traceback.

    Args:
        app: The commands. They end early with `typer.Exit(code)`.
        arguments: The words after the program's name; None takes those of this process.

    Returns:
        The exit code: `DONE`, `CHECK_FAILED`, `BAD_REQUEST` (a refusal, an unknown option) or
        `INTERRUPTED`.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except SystemExit as end:
        # Typer ends by itself: 0, a command's Exit, 2 for an option it does not know.
        return end.code if isinstance(end.code, int) else DONE
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except EdgeError as error:
        typer.echo(printable(f"error: {error}"), err=True)
    except OSError as error:
        typer.echo(printable(f"error: {_sentence(error)}"), err=True)
    return BAD_REQUEST


def printable(text: str) -> str:
    """Text for a terminal: file names and manifests may hold control sequences, which it obeys."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def _sentence(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; free some space and run the command again"
    return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
