import dataclasses
import hashlib
import os
from pathlib import Path

import pytest

from medgemma_runtime.artifact import open_artifact, sha256_file, verify
from medgemma_runtime.embed import Embedder
from medgemma_runtime.errors import ArtifactError
from medgemma_runtime.manifest import MANIFEST_NAME, write_manifest
from tests.runtime.tiny_artifact import FILES, WIDTH, file_entry, tiny_manifest, write_tiny_artifact


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_artifact(tmp_path / "artifact")


def test_a_whole_artifact_opens(directory: Path) -> None:
    artifact = open_artifact(directory)
    assert artifact.manifest == tiny_manifest(directory)
    assert artifact.size_bytes == sum((directory / name).stat().st_size for name in FILES)


def test_opens_by_a_relative_path_and_survives_a_change_of_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    artifact = open_artifact(Path("artifact"))
    monkeypatch.chdir("/")
    assert artifact.path("text.onnx").is_file()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit_is_seen(directory: Path, name: str, place: float) -> None:
    path = directory / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0b100
    path.write_bytes(content)
    open_artifact(directory, check_hashes=False)  # the size alone does not show it
    with pytest.raises(ArtifactError, match=f"{name} does not have the SHA-256"):
        open_artifact(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_seen_by_its_size(directory: Path, name: str) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has .* the copy is incomplete"):
        open_artifact(directory, check_hashes=False)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_artifact(directory)


def test_a_directory_in_place_of_a_file_is_no_file(directory: Path) -> None:
    (directory / "text.onnx").unlink()
    (directory / "text.onnx").mkdir()
    with pytest.raises(ArtifactError, match=r"text\.onnx is missing"):
        open_artifact(directory)


@pytest.mark.parametrize("name", ["extra.bin", "deep/er/extra.bin", "README.txt", "deep/LICENSE"])
def test_an_unlisted_file_is_refused(directory: Path, name: str) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=f"{name} is in artifact and not in its manifest"):
        open_artifact(directory)


@pytest.mark.parametrize("kind", ["directory", "nothing", "pipe"])
def test_what_is_neither_file_nor_directory_is_refused(directory: Path, kind: str) -> None:
    extra = directory / "extra"
    if kind == "directory":
        extra.symlink_to(directory.parent)
    elif kind == "nothing":
        extra.symlink_to("absent")
    else:
        os.mkfifo(extra)
    with pytest.raises(ArtifactError, match="extra is in artifact and not in its manifest"):
        open_artifact(directory)


@pytest.mark.parametrize("name", [".DS_Store", ".git/config", "deep/.cache/x.bin", "README.md", "LICENSE"])
def test_what_systems_and_hubs_add_is_not_looked_at(directory: Path, name: str) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("absent")
    open_artifact(directory)


@pytest.mark.parametrize("name", [".plan.json", "README.md"])
def test_what_is_listed_is_checked_whatever_its_name(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"whole")
    manifest = tiny_manifest(directory)
    files = (*manifest.files, file_entry(directory, name))
    write_manifest(dataclasses.replace(manifest, files=files), directory)
    open_artifact(directory)
    (directory / name).write_bytes(b"other")
    with pytest.raises(ArtifactError, match=f"{name} does not have the SHA-256"):
        open_artifact(directory)


def test_the_cache_of_a_hub_is_opened(directory: Path) -> None:
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    names = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    for number, name in enumerate(names):
        (directory / name).rename(blobs / str(number))
        (directory / name).symlink_to(blobs / str(number))
    with Embedder(open_artifact(directory), threads=1) as embedder:
        assert embedder.embed_texts(["red"]).shape == (1, WIDTH)
    with pytest.raises(ArtifactError, match="is a link, which only its SHA-256 can vouch for"):
        open_artifact(directory, check_hashes=False)
    blob = blobs / str(names.index(Path("text.onnx")))
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"text\.onnx does not have the SHA-256"):
        open_artifact(directory)
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(ArtifactError, match=r"text\.onnx is missing"):
        open_artifact(directory)


def test_a_linked_directory_is_no_way_out(directory: Path) -> None:
    outside = directory.parent / "outside"
    outside.mkdir()
    (outside / "weights.bin").write_bytes(b"weights")
    (directory / "deep").symlink_to(outside)
    manifest = tiny_manifest(directory)
    files = (*manifest.files, file_entry(directory, "deep/weights.bin"))
    write_manifest(dataclasses.replace(manifest, files=files), directory)
    with pytest.raises(ArtifactError, match="deep is in artifact and not in its manifest"):
        open_artifact(directory)
    with pytest.raises(ArtifactError, match=r"deep/weights\.bin is a link"):
        open_artifact(directory, check_hashes=False)


def test_a_link_within_the_directory_is_taken(directory: Path) -> None:
    (directory / "text.onnx").rename(directory / "same")
    (directory / "text.onnx").symlink_to("same")
    manifest = tiny_manifest(directory)
    files = (*manifest.files, file_entry(directory, "same"))
    write_manifest(dataclasses.replace(manifest, files=files), directory)
    open_artifact(directory)


def test_progress_counts_every_byte_once(directory: Path) -> None:
    artifact = open_artifact(directory)
    seen: list[int] = []
    verify(artifact, progress=seen.append)
    assert sum(seen) == artifact.size_bytes


def test_sizes_alone_read_nothing(directory: Path) -> None:
    seen: list[int] = []
    verify(open_artifact(directory), check_hashes=False, progress=seen.append)
    assert seen == []


def test_path_and_component_name_what_there_is(directory: Path) -> None:
    artifact = open_artifact(directory)
    assert artifact.component("text").program == "text.onnx"
    with pytest.raises(ArtifactError, match="no component 'vision'; it has image, text"):
        artifact.component("vision")
    with pytest.raises(ArtifactError, match=r"lists no file '\.\./x'"):
        artifact.path("../x")


def test_the_identity_changes_with_any_file(directory: Path) -> None:
    before = open_artifact(directory).manifest_sha256
    assert before == hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()
    (directory / "quant_plan.json").write_text('{"rows": [1]}')
    write_manifest(tiny_manifest(directory), directory)
    assert open_artifact(directory).manifest_sha256 != before


def test_sha256_file_reads_across_its_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
