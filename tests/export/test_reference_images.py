from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgemma_benchmarks.bundle_record import ReferenceLabel
from medgemma_export.reference.images import (
    Labels,
    directory_images,
    read_labels,
    sample_images,
    sample_labels,
)
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES

FORM = """
[labels]
normal = "a normal chest X-ray"
effusion = "a chest X-ray with effusion"
[images]
"b.png" = "normal"
"""
NO_LABELS = Labels(labels=(), of_image={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for name, grey in (("b.png", 10), ("a.png", 20)):
        Image.fromarray(np.full((4, 6), grey, np.uint8)).save(folder / name)
    (folder / ".hidden").write_text("no image")
    return folder


def test_labels_are_read_with_the_images_they_fit(tmp_path: Path) -> None:
    (tmp_path / "labels.toml").write_text(FORM)
    labels = read_labels(tmp_path / "labels.toml")
    assert labels.labels == (
        ReferenceLabel(name="normal", caption="a normal chest X-ray"),
        ReferenceLabel(name="effusion", caption="a chest X-ray with effusion"),
    )
    assert labels.of_image == {"b.png": "normal"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[labels]", "[label]"), "is not to the form; it needs a table"),
        (('"a normal chest X-ray"', "1"), "is not to the form"),
        (('"a normal chest X-ray"', '""'), "is not to the form"),
        (('= "normal"', '= "fracture"'), "the label 'fracture', which"),
        (("[labels]", "[labels"), "is no TOML file"),
    ],
)
def test_faulty_labels_are_refused(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    (tmp_path / "labels.toml").write_text(FORM.replace(*change))
    with pytest.raises(EdgeError, match=words):
        read_labels(tmp_path / "labels.toml")
    with pytest.raises(EdgeError, match="cannot be read"):
        read_labels(tmp_path / "none.toml")


def test_a_directory_is_read_in_name_order(folder: Path) -> None:
    labels = Labels(labels=(), of_image={"b.png": "normal"})
    first, second = directory_images(folder, labels)
    assert (first.name, first.label, first.source) == ("a.png", None, "given by the user")
    assert (second.name, second.label) == ("b.png", "normal")
    np.testing.assert_array_equal(second.rgb, np.full((4, 6, 3), 10))


def test_labels_of_absent_images_and_empty_directories_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"name 'c\.png', which is not in"):
        directory_images(folder, Labels(labels=(), of_image={"c.png": "normal"}))
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(EdgeError, match="has no images"):
            directory_images(nothing, NO_LABELS)


def test_a_file_that_is_no_image_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(EdgeError, match=r"notes\.txt"):
        directory_images(folder, NO_LABELS)


def test_the_samples_bring_images_labels_and_licences() -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("data_store")
    pytest.importorskip("skimage")
    steps: list[tuple[str, int, int]] = []
    images = sample_images(lambda *step: steps.append(step))
    assert [image.name for image in images] == [sample.name for sample in SAMPLE_IMAGES]
    assert {image.label for image in images} == {label.name for label in sample_labels()} == set(LABELS)
    assert all(image.licence and image.rgb.dtype == np.uint8 for image in images)
    assert steps == [("decoding images", i, len(images)) for i in range(len(images))]
