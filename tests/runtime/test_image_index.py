import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medgemma_runtime import image_index
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.embed import Embedder
from medgemma_runtime.errors import EdgeError, ImageError
from medgemma_runtime.image_index import ImageIndex, folder_files, index_folder
from tests.runtime.tiny_artifact import write_images, write_tiny_artifact


@pytest.fixture
def embedder(tmp_path: Path) -> Iterator[Embedder]:
    artifact = open_artifact(write_tiny_artifact(tmp_path / "artifact"))
    with Embedder(artifact, threads=1) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def small_index(**changes: Any) -> ImageIndex:
    fields: dict[str, Any] = {
        "artifact": "a" * 64,
        "names": ("x.png", "sub/ü.png"),
        "sha256": ("0" * 64, "1" * 64),
        "embeddings": np.eye(2, 5, dtype=np.float32),
    }
    return ImageIndex(**(fields | changes))


def raw(index: ImageIndex, **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": np.int64(1),
        "artifact": np.array(index.artifact),
        "names": np.array(index.names),
        "sha256": np.array(index.sha256),
        "embeddings": index.embeddings,
    } | changes


def test_indexes_a_folder_by_sorted_relative_names(embedder: Embedder, folder: Path) -> None:
    (folder / "sub").mkdir()
    Image.new("RGB", (8, 8), (255, 255, 0)).save(folder / "sub" / "yellow.png")
    (folder / ".DS_Store").write_bytes(b"no image")
    seen: list[int] = []
    report = index_folder(embedder, folder, progress=seen.append)
    index = report.index
    assert index.names == ("blue.png", "green.png", "red.png", "sub/yellow.png")
    assert index.artifact == embedder.artifact.manifest_sha256
    assert (report.embedded, report.reused, report.skipped) == (4, 0, ())
    assert sum(seen) == 4
    red = embedder.embed_texts(["red"])[0]
    assert int(np.argmax(index.embeddings @ red)) == 2


def test_saves_and_loads_exactly(tmp_path: Path) -> None:
    index = small_index()
    index.save(tmp_path / "index.npz")
    loaded = ImageIndex.load(tmp_path / "index.npz")
    assert (loaded.artifact, loaded.names, loaded.sha256) == (
        index.artifact,
        index.names,
        index.sha256,
    )
    np.testing.assert_array_equal(loaded.embeddings, index.embeddings)
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


def test_only_new_content_is_embedded_again(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = index_folder(embedder, folder).index
    (folder / "red.png").rename(folder / "renamed.png")
    shutil.copy(folder / "blue.png", folder / "copy.png")
    Image.new("RGB", (8, 8), (9, 200, 90)).save(folder / "green.png")
    loaded: list[str] = []
    real = image_index.load_image
    monkeypatch.setattr(image_index, "load_image", lambda path: loaded.append(path.name) or real(path))
    second = index_folder(embedder, folder, earlier=[first])
    assert loaded == ["green.png"]
    assert (second.embedded, second.reused) == (1, 3)
    assert second.index.names == ("blue.png", "copy.png", "green.png", "renamed.png")
    fresh = index_folder(embedder, folder).index
    np.testing.assert_array_equal(second.index.embeddings, fresh.embeddings)
    assert second.index.sha256 == fresh.sha256


class Stopping:
    """Stands in for `load_image`: counts, and stops the work at the file `at`."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at, self.error = at, error
        self.loaded: list[str] = []
        self._real = image_index.load_image

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        if path.name == self.at:
            raise self.error
        self.loaded.append(path.name)
        return self._real(path)


@pytest.mark.parametrize("error", [ImageError("bad"), KeyboardInterrupt(), EdgeError("not finite")])
def test_work_that_stops_keeps_what_it_made(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    kept: list[ImageIndex] = []
    stopping = Stopping("green.png", error)
    monkeypatch.setattr(image_index, "load_image", stopping)
    with pytest.raises(type(error)):
        index_folder(embedder, folder, keep=kept.append)
    (made,) = kept
    assert made.names == tuple(stopping.loaded)
    with pytest.raises(type(error)):
        index_folder(embedder, folder, earlier=kept, keep=kept.append)
    done = set(stopping.loaded)
    stopping.at = ""
    stopping.loaded.clear()
    report = index_folder(embedder, folder, earlier=kept)
    assert set(stopping.loaded) == {"blue.png", "green.png", "red.png"} - done
    assert report.index.names == ("blue.png", "green.png", "red.png")
    np.testing.assert_array_equal(report.index.embeddings, index_folder(embedder, folder).index.embeddings)


def test_work_is_kept_from_time_to_time(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_index, "_IMAGES_BETWEEN_KEEPING", 2)
    for level in (1, 2):
        Image.new("RGB", (8, 8), (level, 90, 0)).save(folder / f"z{level}.png")
    kept: list[ImageIndex] = []
    first = index_folder(embedder, folder, keep=kept.append).index
    assert [len(made.names) for made in kept] == [2, 4]
    kept.clear()
    index_folder(embedder, folder, earlier=[first], keep=kept.append)
    assert kept == []


def test_equal_files_are_embedded_once(embedder: Embedder, folder: Path) -> None:
    shutil.copy(folder / "blue.png", folder / "copy.png")
    report = index_folder(embedder, folder)
    assert (report.embedded, report.reused) == (3, 1)


def test_an_index_of_another_artifact_is_refused(embedder: Embedder, folder: Path) -> None:
    with pytest.raises(EdgeError, match="was made by the artifact aaaaaaaaaaaa and this one is"):
        index_folder(embedder, folder, earlier=[small_index()])


def test_every_bad_file_is_named_and_nothing_is_indexed(embedder: Embedder, folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    with pytest.raises(ImageError, match="2 of the files") as caught:
        index_folder(embedder, folder)
    assert "notes.txt" in str(caught.value)
    assert "broken.png" in str(caught.value)
    assert "red.png" not in str(caught.value).replace(str(folder / "broken.png"), "")


def test_bad_files_are_skipped_only_when_asked_and_reported(embedder: Embedder, folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    report = index_folder(embedder, folder, skip_bad=True)
    assert report.index.names == ("blue.png", "green.png", "red.png")
    ((name, reason),) = report.skipped
    assert name == "notes.txt"
    assert "notes.txt" in reason


def test_a_name_that_is_no_text_is_a_bad_file(embedder: Embedder, folder: Path) -> None:
    try:
        (folder / "\udcff.png").write_bytes((folder / "red.png").read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ImageError, match="has a name that is not UTF-8"):
        index_folder(embedder, folder)


def test_a_folder_without_images_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="is not a folder"):
        folder_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_bytes(b"")
    with pytest.raises(EdgeError, match="holds no file"):
        folder_files(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match="none of the files"):
        index_folder(embedder, tmp_path / "empty", skip_bad=True)


def test_an_absent_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"there is no index .*absent\.npz"):
        ImageIndex.load(tmp_path / "absent.npz")


def test_pickled_content_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "index.npz"
    np.savez(path, **raw(small_index(), names=np.array([Trap(), Trap()], dtype=object)))
    with pytest.raises(EdgeError, match="is no index"):
        ImageIndex.load(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    small_index().save(path)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:-40], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(EdgeError, match="is no index"):
            ImageIndex.load(path)
    np.save(tmp_path / "array.npy", np.eye(2))
    with pytest.raises(EdgeError, match="is no index"):
        ImageIndex.load(tmp_path / "array.npy")
    with pytest.raises(EdgeError, match="is no index"):
        ImageIndex.load(tmp_path)


def test_a_flipped_bit_in_an_embedding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    index = small_index()
    index.save(path)
    content = path.read_bytes()
    place = content.index(index.embeddings.tobytes())
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(EdgeError, match="CRC"):
        ImageIndex.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"embeddings": np.eye(2, 5)},
        {"embeddings": np.full((2, 5), np.nan, np.float32)},
        {"embeddings": np.ones((2, 5), np.float32)},
        {"embeddings": np.eye(3, 5, dtype=np.float32)},
        {"embeddings": np.ones(2, np.float32)},
        {"names": np.array(["x"])},
        {"sha256": np.array(["0" * 64])},
        {"names": np.array("x")},
    ],
    ids=str,
)
def test_contents_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    np.savez(tmp_path / "index.npz", **raw(small_index(), **changes))
    with pytest.raises(EdgeError, match="is no index"):
        ImageIndex.load(tmp_path / "index.npz")


def test_another_version_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "index.npz", **raw(small_index(), schema_version=np.int64(2)))
    with pytest.raises(EdgeError, match="has index version 2 and this runtime reads version 1"):
        ImageIndex.load(tmp_path / "index.npz")
