"""The sample images are where the table says, and are real and distinct images."""

import importlib.util
import socket
from pathlib import Path

import pytest

from medgemma_runtime import sample_images
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, load_sample, sample_image_path

for package in ("pydicom", "data_store", "skimage"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def no_network(*args: object) -> None:
    raise AssertionError("a sample image was to be downloaded")


def test_the_table_is_consistent() -> None:
    assert len(SAMPLE_IMAGES) >= 14
    assert len({sample.name for sample in SAMPLE_IMAGES}) == len(SAMPLE_IMAGES)
    assert {sample.label for sample in SAMPLE_IMAGES} == set(LABELS)
    assert len(set(LABELS.values())) == len(LABELS)
    assert {sample.modality for sample in SAMPLE_IMAGES} == {"CR", "CT", "MR", "US", "NM", "OP", "SM"}
    assert all(sample.licence for sample in SAMPLE_IMAGES)


def test_every_sample_loads_without_network_and_no_two_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    images = {sample.name: load_sample(sample) for sample in SAMPLE_IMAGES}
    for name, image in images.items():
        assert image.ndim == 3, name
        assert image.shape[2] == 3, name
        assert int(image.max()) - int(image.min()) > 60, f"{name} has hardly any contrast"
    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_dicom_samples_have_the_modality_of_the_table() -> None:
    from pydicom import dcmread

    for sample in SAMPLE_IMAGES:
        if sample.file.endswith(".dcm"):
            dataset = dcmread(sample_image_path(sample), stop_before_pixels=True)
            assert dataset.Modality == sample.modality, sample.name


@pytest.mark.parametrize("sample", SAMPLE_IMAGES[::7], ids=lambda sample: sample.name)
def test_a_missing_package_is_named(
    sample: sample_images.SampleImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_images, "find_spec", lambda name: None)
    extra = "dicom" if sample.package == "pydicom" else "sample"
    with pytest.raises(EdgeError, match=rf"{sample.package} is needed to .*medgemma-edge\[{extra}\]"):
        sample_image_path(sample)


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("empty", tmp_path / "__init__.py")
    monkeypatch.setattr(sample_images, "find_spec", lambda name: spec)
    with pytest.raises(EdgeError, match=r"RG1_UNCR\.dcm, which the installed pydicom-data does not carry"):
        sample_image_path(SAMPLE_IMAGES[0])
