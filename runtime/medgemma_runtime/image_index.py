"""A folder's images as embeddings in one file, to search by image or by text."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.embed import Embedder
from medgemma_runtime.errors import EdgeError, ImageError
from medgemma_runtime.files import replacing
from medgemma_runtime.images import load_image

__all__ = ["ImageIndex", "IndexReport", "index_folder", "folder_files"]

_SCHEMA_VERSION = 1

# Cosines of float32 unit vectors are off by about this much; more means a damaged file.
_UNIT_LENGTH_TOLERANCE = 1e-3

# Half a minute of work on a slow CPU; writing the embeddings takes far less.
_IMAGES_BETWEEN_KEEPING = 50


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """Embeddings of the images of a folder.

    Attributes:
        artifact: SHA-256 of the manifest of the artifact that made them. Embeddings of two
            artifacts, even of one model, are not comparable to the last digit, so they never mix.
        names: Paths relative to the folder, with forward slashes, sorted.
        sha256: SHA-256 of each file, by which a file is known again under any name.
        embeddings: `[N, D]` float32, unit length, row by row as `names`.
    """

    artifact: str
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.sha256) == len(self.embeddings):
            raise ValueError("names, sha256 and embeddings differ in length")
        lengths = np.linalg.norm(self.embeddings, axis=1)
        # Written so that NaN fails too.
        is_unit = (np.abs(lengths - 1) < _UNIT_LENGTH_TOLERANCE).all()
        if self.embeddings.dtype != np.float32 or not is_unit:
            raise ValueError("the embeddings are not of unit length in float32")

    def check_artifact(self, artifact: str) -> None:
        """Refuse to be used with another artifact than the one that made it.

        Raises:
            EdgeError: If `artifact`, a manifest's SHA-256, is another.
        """
        if artifact != self.artifact:
            raise EdgeError(
                f"the index was made by the artifact {self.artifact[:12]} and this one is "
                f"{artifact[:12]}; use that artifact, or index the folder again into another file"
            )

    def save(self, path: Path) -> None:
        """Write the index; an existing file is replaced only when the new one is complete."""
        with replacing(path) as stream:
            np.savez(
                stream,
                schema_version=np.int64(_SCHEMA_VERSION),
                artifact=np.array(self.artifact),
                names=np.array(self.names, dtype=np.str_),
                sha256=np.array(self.sha256, dtype=np.str_),
                embeddings=self.embeddings,
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an index. Nothing in the file is executed: pickled content is refused.

        Raises:
            EdgeError: If it is absent, damaged, or of an unknown version.
        """
        try:
            # numpy leaves a file open that it opened itself and could not read.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                version = content["schema_version"].item()
                if version == _SCHEMA_VERSION:
                    return cls(
                        artifact=str(content["artifact"]),
                        names=tuple(content["names"].tolist()),
                        sha256=tuple(content["sha256"].tolist()),
                        embeddings=content["embeddings"],
                    )
        except FileNotFoundError:
            raise EdgeError(f"there is no index {path}; make it with: medgemma-run index") from None
        except Exception as error:
            # A file that is no index fails in numpy, zipfile, zlib or above, each with its own error.
            raise EdgeError(f"{path} is no index ({error}); index the folder again") from None
        raise EdgeError(
            f"{path} has index version {version!r} and this runtime reads version "
            f"{_SCHEMA_VERSION}; index the folder again"
        )


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What `index_folder` did.

    Attributes:
        index: The new index.
        embedded: Files that were run through the encoder.
        reused: Files whose embedding was known, from the earlier index or an equal file.
        skipped: Files that are no image, each with the reason.
    """

    index: ImageIndex
    embedded: int
    reused: int
    skipped: tuple[tuple[str, str], ...]


def folder_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by its path; names that start with a dot are left out.

    Raises:
        EdgeError: If there is no such folder, or no file in it.
    """
    if not folder.is_dir():
        raise EdgeError(f"{folder} is not a folder; give the folder that holds the images")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise EdgeError(f"{folder} holds no file; give the folder that holds the images")
    return files


def index_folder(
    embedder: Embedder,
    folder: Path,
    *,
    earlier: Sequence[ImageIndex] = (),
    skip_bad: bool = False,
    keep: Callable[[ImageIndex], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> IndexReport:
    """Embed every image below a folder, each content once. Of a DICOM file the first frame counts.

    Args:
        embedder: The artifact at work.
        folder: Searched with its subfolders.
        earlier: Indexes of the same artifact; files they know by content are not embedded again.
        skip_bad: Leave out files that are no image, and report them, instead of refusing.
        keep: Given all embeddings known so far, those of `earlier` among them, from time to time and before
            an error or an interruption ends the work: as `earlier` of the next call they save doing it again.
        progress: Called with the number of files done since the last call.

    Raises:
        EdgeError: If the folder is empty, or one of `earlier` is of another artifact.
        ImageError: If a file is no image and `skip_bad` is not set; every such file is named.
    """
    artifact = embedder.artifact.manifest_sha256
    known: dict[str, _Row] = {}
    for index in earlier:
        index.check_artifact(artifact)
        for name, sha256, embedding in zip(index.names, index.sha256, index.embeddings, strict=True):
            known[sha256] = _Row(name=name, sha256=sha256, embedding=embedding)
    rows: list[_Row] = []
    skipped: list[tuple[str, str]] = []
    embedded = kept = 0
    try:
        for path in folder_files(folder):
            name = path.relative_to(folder).as_posix()
            try:
                sha256 = _identify(path)
                if sha256 not in known:
                    embedding = embedder.embed_images([load_image(path)])[0]
                    known[sha256] = _Row(name=name, sha256=sha256, embedding=embedding)
                    embedded += 1
                rows.append(_Row(name=name, sha256=sha256, embedding=known[sha256].embedding))
            except ImageError as error:
                skipped.append((name, str(error)))
            if keep is not None and embedded - kept >= _IMAGES_BETWEEN_KEEPING:
                keep(_index_of(artifact, known.values()))
                kept = embedded
            if progress is not None:
                progress(1)
        _check_skipped(folder, skipped, skip_bad=skip_bad, n_images=len(rows))
    except BaseException:
        if keep is not None and embedded > kept:
            keep(_index_of(artifact, known.values()))
        raise
    return IndexReport(
        index=_index_of(artifact, rows),
        embedded=embedded,
        reused=len(rows) - embedded,
        skipped=tuple(skipped),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    name: str
    sha256: str
    embedding: NDArray[np.float32]


def _index_of(artifact: str, rows: Collection[_Row]) -> ImageIndex:
    return ImageIndex(
        artifact=artifact,
        names=tuple(row.name for row in rows),
        sha256=tuple(row.sha256 for row in rows),
        embeddings=np.stack([row.embedding for row in rows]),
    )


def _check_skipped(
    folder: Path, skipped: Sequence[tuple[str, str]], *, skip_bad: bool, n_images: int
) -> None:
    if skipped and not skip_bad:
        reasons = "\n".join(f"  {reason}" for _, reason in skipped)
        raise ImageError(
            f"{len(skipped)} of the files in {folder} are no images that can be read; remove them, "
            f"or index without them by --skip-bad:\n{reasons}"
        )
    if not n_images:
        raise ImageError(f"none of the files in {folder} is an image that can be read")


def _identify(path: Path) -> str:
    try:
        os.fsencode(path.name).decode("utf-8")
        return sha256_file(path)
    except UnicodeDecodeError:
        raise ImageError(f"{path!r} has a name that is not UTF-8; rename it") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror})") from None
