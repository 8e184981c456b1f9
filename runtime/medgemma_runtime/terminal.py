"""What the commands of `medgemma-run` share: arguments, an opened artifact, texts, JSON and progress."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from medgemma_runtime.artifact import Artifact, verify
from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import read_manifest

__all__ = ["ArtifactPath", "AsJson", "Threads", "open_whole", "read_text", "print_json", "counting_bar"]

ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory that medgemma-export wrote.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for one operator; the engine chooses if unset.")
]


def open_whole(directory: Path) -> Artifact:
    """Open an artifact and check its hashes, with progress: a large one takes seconds.

    Raises:
        ArtifactError: If it is not whole.
    """
    artifact = Artifact(directory=directory.resolve(), manifest=read_manifest(directory))
    with counting_bar("checking", artifact.size_bytes) as advance:
        verify(artifact, progress=advance)
    return artifact


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with or without byte order mark.

    Raises:
        TextError: If it is not UTF-8.
        OSError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TextError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def print_json(content: dict[str, object]) -> None:
    """Print JSON on stdout; NaN, which JSON lacks, is a defect."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def counting_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs, where stderr is a terminal; yields what advances it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
