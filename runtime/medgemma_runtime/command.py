"""What every command line of this project shares: a progress bar, an exit code, a sentence for a refusal."""

import errno
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from medgemma_runtime.errors import EdgeError

__all__ = [
    "DONE",
    "CHECK_FAILED",
    "BAD_REQUEST",
    "DEFECT",
    "INTERRUPTED",
    "READER_GONE",
    "Progress",
    "progress_bar",
    "run_app",
    "printable",
]

# Called with what is being done, steps done, and steps in all.
Progress = Callable[[str, int, int], None]

DONE = 0
CHECK_FAILED = 1
BAD_REQUEST = 2
DEFECT = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 would read as a failed check
INTERRUPTED = 130  # what shells report for Ctrl-C: 128 + SIGINT
READER_GONE = 141  # what shells report for `| head`: 128 + SIGPIPE

# ExecuTorch brings torchao, which warns about kernels for GPUs that it could not load, and PyTorch about
# torchao's enumerations.
_LOGGERS_OF_OTHERS = ("torchao", "torch.utils._pytree")


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and say how it ended.

    A refusal (EdgeError) and an error of the operating system (a full disk, no permission) are
    printed on stderr as one sentence. Where the reader of a pipe has gone, as `head` does, it ends
    without a word. Anything else is a defect of ours and prints its traceback. Of other packages' warnings
    those that no user can act on are not shown.

    Args:
        app: The commands. They end early with `typer.Exit(code)`.
        arguments: The words after the program's name; None takes those of this process.

    Returns:
        The exit code: `DONE`, `CHECK_FAILED`, `BAD_REQUEST` (a refusal, an unknown option), `DEFECT`,
        `INTERRUPTED` or `READER_GONE`.
    """
    for name in _LOGGERS_OF_OTHERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(args=None if arguments is None else list(arguments))
    except SystemExit as end:
        # Typer and rich turn it into 1, which would read as a failed check. The signal's own default is no
        # way out: it would also end a download whose connection breaks.
        if isinstance(end.__context__, BrokenPipeError):
            return READER_GONE
        if end.code == INTERRUPTED:  # Typer takes Ctrl-C itself and says nothing
            typer.echo("interrupted", err=True)
        # Typer ends by itself: 0, a command's Exit, 2 for an option it does not know.
        return end.code if isinstance(end.code, int) else DONE
    except EdgeError as error:
        typer.echo(printable(f"error: {error}"), err=True)
    except OSError as error:
        typer.echo(printable(f"error: {_sentence(error)}"), err=True)
    except Exception:
        traceback.print_exc()
        return DEFECT
    return BAD_REQUEST


@contextmanager
def progress_bar(first: str) -> Iterator[Progress]:
    """A bar on stderr while the block runs, where stderr is a terminal.

    Args:
        first: What is being done until the first call.

    Yields:
        What moves the bar. A total of 0 is not known: the bar then shows only that work goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    # A narrow terminal keeps room for the bar and the time.
    width = min(40, console.width // 2)
    description = TextColumn(f"{{task.description:<{width}.{width}}}", markup=False)
    columns = (description, BarColumn(None), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(printable(first), total=None)
        yield lambda what, done, total: bar.update(
            task, description=printable(what), completed=done, total=total or None
        )


def printable(text: str) -> str:
    """Text for a terminal: file names and manifests may hold control sequences, which it obeys."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def _sentence(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; free some space and run the command again"
    return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
