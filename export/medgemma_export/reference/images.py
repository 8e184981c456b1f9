"""The images and labels of a reference: the built-in ones, or a directory and a file of the user's."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from medgemma_benchmarks.bundle import DecodedImage
from medgemma_benchmarks.bundle_record import ReferenceLabel
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.images import load_image
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, load_sample

__all__ = ["Labels", "sample_images", "sample_labels", "directory_images", "read_labels"]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Zero-shot labels, and where known the label of each image.

    Attributes:
        labels: Names and captions.
        of_image: Label name by image name.
    """

    labels: tuple[ReferenceLabel, ...]
    of_image: dict[str, str]


def sample_images(progress: Progress | None = None) -> tuple[DecodedImage, ...]:
    """The built-in images, from the packages that carry them."""
    images = []
    for index, sample in enumerate(SAMPLE_IMAGES):
        if progress is not None:
            progress("decoding images", index, len(SAMPLE_IMAGES))
        images.append(
            DecodedImage(
                name=sample.name,
                modality=sample.modality,
                label=sample.label,
                source=f"{sample.package} {sample.file}",
                licence=sample.licence,
                rgb=load_sample(sample),
                is_sample=True,
            )
        )
    return tuple(images)


def sample_labels() -> tuple[ReferenceLabel, ...]:
    """The captions that go with the built-in images."""
    return tuple(ReferenceLabel(name=name, caption=caption) for name, caption in LABELS.items())


def directory_images(
    directory: Path, labels: Labels, *, licence: str = "not stated", progress: Progress | None = None
) -> tuple[DecodedImage, ...]:
    """Every file of a directory as an image, in name order; files whose name starts with a dot are left out.

    Raises:
        EdgeError: If there is no image, a file is none, or the labels name an image that is not there.
    """
    paths = sorted(p for p in directory.glob("*") if p.is_file() and not p.name.startswith("."))
    if not paths:
        raise EdgeError(f"{directory} has no images; give a directory of PNG, JPEG or DICOM files")
    if strangers := sorted(set(labels.of_image) - {path.name for path in paths}):
        raise EdgeError(f"the labels name {strangers[0]!r}, which is not in {directory}; correct its name")
    images = []
    for index, path in enumerate(paths):
        if progress is not None:
            progress("decoding images", index, len(paths))
        images.append(
            DecodedImage(
                name=path.name,
                modality="not stated",
                label=labels.of_image.get(path.name),
                source="given by the user",
                licence=licence,
                rgb=load_image(path),
            )
        )
    return tuple(images)


def read_labels(path: Path) -> Labels:
    """Read labels from a TOML file.

    Its table `labels` gives a caption to each name; its table `images`, if any, gives a label to file names:

        [labels]
        pneumonia = "a chest X-ray with pneumonia"
        normal = "a normal chest X-ray"
        [images]
        "0001.png" = "normal"

    Raises:
        EdgeError: If the file is absent, no TOML, or not to this form.
    """
    form = "it needs a table [labels] of name = caption, and may have [images] of file name = label name"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"labels {path} cannot be read: {error.strerror}; {form}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeError(f"labels {path} is no TOML file: {error}; {form}") from None
    labels, images = data.pop("labels", None), data.pop("images", {})
    tables = (labels, images)
    if data or not labels or not all(_is_text_table(table) for table in tables):
        raise EdgeError(f"labels {path} is not to the form; {form}")
    if strangers := sorted(set(images.values()) - set(labels)):
        raise EdgeError(
            f"labels {path} gives an image the label {strangers[0]!r}, which [labels] lacks; add it"
        )
    return Labels(
        labels=tuple(ReferenceLabel(name=name, caption=caption) for name, caption in labels.items()),
        of_image=images,
    )


def _is_text_table(table: object) -> bool:
    return isinstance(table, dict) and all(isinstance(value, str) and value for value in table.values())
