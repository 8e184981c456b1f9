"""Opens an artifact directory and proves that it is whole."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medgemma_runtime.errors import ArtifactError
from medgemma_runtime.manifest import (
    MANIFEST_NAME,
    ComponentEntry,
    FileEntry,
    Manifest,
    read_manifest,
)

__all__ = ["Artifact", "open_artifact", "verify", "sha256_file"]

_CHUNK_BYTES = 1 << 20
_HUB_FILES = ("LICENSE", "README.md")  # what a hub adds at the top of a model


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A directory and its manifest."""

    directory: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """The location of a file that the manifest lists.

        Raises:
            ArtifactError: If the manifest does not list it.
        """
        if all(entry.path != relative for entry in self.manifest.files):
            raise ArtifactError(f"{self.directory.name} lists no file {relative!r}")
        return self.directory / relative

    def component(self, name: str) -> ComponentEntry:
        """The component of that name.

        Raises:
            ArtifactError: If there is none.
        """
        entries = self.manifest.components
        if name not in entries:
            raise ArtifactError(
                f"{self.directory.name} has no component {name!r}; it has {', '.join(sorted(entries))}"
            )
        return entries[name]

    @property
    def size_bytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(entry.size_bytes for entry in self.manifest.files)

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest, which states every other file's: the artifact's identity."""
        return sha256_file(self.directory / MANIFEST_NAME)


def open_artifact(directory: Path, *, check_hashes: bool = True) -> Artifact:
    """Read the manifest and check the files it lists.

    Args:
        directory: What `medgemma-export` wrote.
        check_hashes: Also compare every file's SHA-256 (a second or so for each GB).

    Raises:
        ArtifactError: As `verify`.
    """
    artifact = Artifact(directory=directory.resolve(), manifest=read_manifest(directory))
    verify(artifact, check_hashes=check_hashes)
    return artifact


def verify(
    artifact: Artifact, *, check_hashes: bool = True, progress: Callable[[int], None] | None = None
) -> None:
    """Hold every file against the manifest, and refuse files that it does not list.

    An unlisted file is refused because a program may read it: nothing vouches for it. What systems and hubs
    leave beside an artifact is no part of it and is not looked at: names that start with a dot, with all
    below them, and README.md and LICENSE at the top.

    A listed file may be a link to a file anywhere, as in the cache of Hugging Face, if its content is
    compared: the hash then vouches for it wherever it lies.

    Args:
        artifact: The artifact to check.
        check_hashes: Compare SHA-256, not only sizes.
        progress: Called with the bytes read since the last call.

    Raises:
        ArtifactError: Naming the first file that is absent, unlisted, no regular file, of another size or
            hash, or, without `check_hashes`, a link.
    """
    root = artifact.directory.resolve()
    try:
        for entry in artifact.manifest.files:
            _verify_file(root, entry, check_hash=check_hashes, progress=progress)
        listed = {entry.path for entry in artifact.manifest.files} | {MANIFEST_NAME}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if name in listed or _is_no_part(name):
                continue
            # A link is never a plain directory: rglob does not look behind it, a program could.
            if path.is_symlink() or not path.is_dir():
                raise ArtifactError(f"{name} is in {root.name} and not in its manifest; remove it")
    except OSError as error:
        raise ArtifactError(f"{error.filename} cannot be read ({error.strerror})") from None


def sha256_file(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def _is_no_part(name: str) -> bool:
    """Whether an unlisted file is one that systems and hubs add."""
    return name in _HUB_FILES or any(part.startswith(".") for part in name.split("/"))


def _verify_file(
    root: Path, entry: FileEntry, *, check_hash: bool, progress: Callable[[int], None] | None
) -> None:
    path = root / entry.path
    if not check_hash and path.resolve() != path:
        raise ArtifactError(
            f"{entry.path} is a link, which only its SHA-256 can vouch for; check the hashes or copy the "
            f"file itself into {root.name}"
        )
    if not path.is_file():
        raise ArtifactError(f"{entry.path} is missing from {root.name}; copy it or export again")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise ArtifactError(
            f"{entry.path} has {size_bytes} bytes and the manifest says {entry.size_bytes}; "
            "the copy is incomplete or altered: copy it again or export again"
        )
    if check_hash and sha256_file(path, progress=progress) != entry.sha256:
        raise ArtifactError(
            f"{entry.path} does not have the SHA-256 that the manifest states; "
            "its content was altered or damaged: copy it again or export again"
        )
