"""Real medical images that installed packages carry, for tests, calibration and first runs without data.

Nothing is downloaded: a file is looked up where its package is installed. Each image was looked at, and its
label says what it shows. They are no benchmark: too few, and the models may have seen them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError, missing_package
from medgemma_runtime.images import load_image

__all__ = ["SampleImage", "SAMPLE_IMAGES", "LABELS", "sample_image_path", "load_sample"]

# Distribution: importable package, folder inside it, extra of medgemma-edge that brings it.
_PACKAGES = {
    "pydicom": ("pydicom", "data/test_files", "dicom"),
    "pydicom-data": ("data_store", "data", "sample"),
    "scikit-image": ("skimage", "data", "sample"),
}

LABELS: dict[str, str] = {
    "chest-radiograph": "a chest radiograph",
    "leg-radiograph": "a radiograph of the lower leg and ankle",
    "head-ct": "a CT slice of the head",
    "spine-ct": "a CT slice of the thoracic spine",
    "abdomen-ct": "a CT slice of the abdomen",
    "brain-perfusion-ct": "a color map of brain perfusion from CT",
    "shoulder-mr": "an MR image of the shoulder",
    "abdomen-mr": "an MR image of the abdomen",
    "head-mr": "an MR image of the head",
    "lymph-node-ultrasound": "a color Doppler ultrasound of a lymph node",
    "pelvic-ultrasound": "a pelvic ultrasound",
    "obstetric-ultrasound": "an obstetric ultrasound",
    "echocardiogram": "an echocardiogram",
    "bone-scan": "a whole-body bone scan",
    "fundus": "a fundus photograph of the retina",
    "histology": "an immunohistochemistry slide of colon tissue",
}
"""Label to caption: the captions are the prompts of a zero-shot run over these images."""


@dataclass(frozen=True, kw_only=True)
class SampleImage:
    """One image, or one frame of a multi-frame file.

    Attributes:
        name: Unique name, for command lines and reports.
        package: Distribution on PyPI that carries the file.
        file: File name inside that package's data folder.
        frame: Frame of the file, from 0.
        modality: DICOM code: CR, CT, MR, US, NM, OP (ophthalmic photography) or SM (slide microscopy).
        label: What it shows, a key of `LABELS`.
        licence: Terms of the file, as its package states them.
    """

    name: str
    package: str
    file: str
    frame: int = 0
    modality: str
    label: str
    licence: str


def _pydicom_data(name: str, file: str, modality: str, label: str, frame: int = 0) -> SampleImage:
    return SampleImage(
        name=name,
        package="pydicom-data",
        file=file,
        frame=frame,
        modality=modality,
        label=label,
        licence="MIT",
    )


def _pydicom(name: str, file: str, modality: str, label: str) -> SampleImage:
    return SampleImage(name=name, package="pydicom", file=file, modality=modality, label=label, licence="MIT")


def _scikit_image(name: str, file: str, modality: str, label: str, licence: str) -> SampleImage:
    return SampleImage(
        name=name, package="scikit-image", file=file, modality=modality, label=label, licence=licence
    )


SAMPLE_IMAGES: tuple[SampleImage, ...] = (
    _pydicom_data("chest", "RG1_UNCR.dcm", "CR", "chest-radiograph"),
    _pydicom_data("leg", "RG3_UNCR.dcm", "CR", "leg-radiograph"),
    _pydicom_data("head-ct", "693_UNCR.dcm", "CT", "head-ct"),
    _pydicom("skull-base-ct", "J2K_pixelrep_mismatch.dcm", "CT", "head-ct"),
    _pydicom("spine-ct", "CT_small.dcm", "CT", "spine-ct"),
    _pydicom_data("abdomen-ct", "explicit_VR-UN.dcm", "CT", "abdomen-ct"),
    _pydicom_data("brain-perfusion-ct", "eCT_Supplemental.dcm", "CT", "brain-perfusion-ct"),
    _pydicom_data("shoulder-mr", "MR2_UNCR.dcm", "MR", "shoulder-mr"),
    _pydicom_data("abdomen-mr", "MR-SIEMENS-DICOM-WithOverlays.dcm", "MR", "abdomen-mr"),
    _pydicom_data("head-mr-first", "emri_small.dcm", "MR", "head-mr"),
    _pydicom_data("head-mr-last", "emri_small.dcm", "MR", "head-mr", frame=9),
    _pydicom_data("lymph-node", "US1_UNCR.dcm", "US", "lymph-node-ultrasound"),
    _pydicom_data("pelvis", "gdcm-US-ALOKA-16.dcm", "US", "pelvic-ultrasound"),
    _pydicom_data("obstetric", "OBXXXX1A.dcm", "US", "obstetric-ultrasound"),
    _pydicom_data("heart-first", "color3d_jpeg_baseline.dcm", "US", "echocardiogram"),
    _pydicom_data("heart-middle", "color3d_jpeg_baseline.dcm", "US", "echocardiogram", frame=60),
    _pydicom_data("heart-last", "color3d_jpeg_baseline.dcm", "US", "echocardiogram", frame=119),
    _pydicom_data("aorta", "JPGLosslessP14SV1_1s_1f_8b.dcm", "US", "echocardiogram"),
    _pydicom("whole-body", "JPGExtended.dcm", "NM", "bone-scan"),
    _scikit_image("retina", "retina.jpg", "OP", "fundus", "CC0"),
    _scikit_image("microaneurysms", "microaneurysms.png", "OP", "fundus", "CC0"),
    _scikit_image("colon", "ihc.png", "SM", "histology", "no known copyright restrictions"),
)
"""Ordered; the order is part of the calibration data's identity."""


def sample_image_path(sample: SampleImage) -> Path:
    """Where the file of a sample is installed; its package is not imported.

    Raises:
        EdgeError: If the package is not installed, or its version does not carry the file.
    """
    module, folder, extra = _PACKAGES[sample.package]
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise missing_package(sample.package, extra=extra, purpose=f"load the sample image {sample.name}")
    path = Path(spec.origin).parent / folder / sample.file
    if not path.is_file():
        raise EdgeError(
            f"the sample image {sample.name} needs {sample.file}, which the installed {sample.package} does "
            f"not carry; run: pip install --force-reinstall 'medgemma-edge[{extra}]'"
        )
    return path


def load_sample(sample: SampleImage) -> NDArray[np.uint8]:
    """Decode a sample to RGB, [height, width, 3].

    Raises:
        EdgeError: As `sample_image_path`, and as `load_image`.
    """
    return load_image(sample_image_path(sample), frame=sample.frame)
