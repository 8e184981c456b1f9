"""The samples that quantization is calibrated on: ordered, hashed, with modality, source and licence.

A set is a directory, a manifest file, or the built-in one. All of it is read and decoded before anything is
computed; what cannot be used is listed and the set refused, since a set with silent gaps is another set.
Images are decoded by the runtime's own code, exactly as on the device. An artifact gets the set's hash and
counts, never a name, a text or a pixel.

A manifest is a TOML file:

    licence = "CC-BY-4.0"
    source = "chest radiographs of our archive"
    [[sample]]
    image = "0001.dcm"
    modality = "CR"
    prompt = "Describe this radiograph."
    answer = "No acute findings."
    [[sample]]
    text = "0001.txt"

Paths are relative to it. A sample has an image, a text (a file), or both prompt and image; `frame` counts
from 0; `modality`, `source` and `licence` of a sample override those of the set.
"""

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.images import load_image
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, SampleImage, sample_image_path
from medgemma_runtime.sample_notes import NOTES_LICENCE, SAMPLE_NOTES, load_note

__all__ = [
    "CalibrationSet",
    "CalibrationSample",
    "open_set",
    "held_out_set",
    "is_held_out",
    "BUILTIN",
]

BUILTIN: Final = "builtin"

_MANIFEST_NAME = "calibration.toml"
_SET_KEYS = {"modality", "source", "licence"}
_SAMPLE_KEYS = {"image", "frame", "text", "prompt", "answer", *_SET_KEYS}
_NOT_STATED = "not stated"
_QUESTION = "Describe this image."
_SHOWN = 20

# Files whose images measurements use and calibration never does: one of each kind of which there are two.
_HELD_OUT_FILES = frozenset(
    {
        "RG3_UNCR.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "MR-SIEMENS-DICOM-WithOverlays.dcm",
        "gdcm-US-ALOKA-16.dcm",
        "JPGLosslessP14SV1_1s_1f_8b.dcm",
        "microaneurysms.png",
    }
)


_HELD_OUT_NOTES = frozenset(note.sha256 for note in SAMPLE_NOTES if note.split == "held_out")


@dataclass(frozen=True, kw_only=True)
class CalibrationSample:
    """An image, a text, or an image with what is said about it.

    Attributes:
        name: For messages only.
        image: Its file, or None.
        frame: Frame of the file, from 0.
        prompt: What is asked about the image, or None.
        text: A text by itself, or the answer to the prompt, or None.
        modality: DICOM code of the image, or `text`.
        source: Where it comes from.
        licence: Its terms.
        sha256: Of image file, frame, prompt and text.
    """

    name: str
    image: Path | None
    frame: int
    prompt: str | None
    text: str | None
    modality: str
    source: str
    licence: str
    sha256: str

    def pixels(self) -> NDArray[np.uint8]:
        """The decoded image, [height, width, 3].

        Raises:
            EdgeError: If it cannot be decoded.
        """
        if self.image is None:
            raise ValueError(f"{self.name} is a text and has no pixels")
        return load_image(self.image, frame=self.frame)


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Samples in order; the order is part of the set's identity."""

    samples: tuple[CalibrationSample, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash over the samples' hashes and descriptions, in order."""
        facts = [
            {key: value for key, value in asdict(sample).items() if key not in ("name", "image")}
            for sample in self.samples
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """What an artifact says about the set: hash and counts."""
        counts = Counter(sample.modality for sample in self.samples)
        listed = ", ".join(f"{count} {modality}" for modality, count in sorted(counts.items()))
        return f"{len(self.samples)} samples ({listed}), sha256 {self.sha256}"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What a directory or a manifest says about a sample; `text` is a path where it is in a file."""

    name: str
    image: Path | None = None
    frame: int = 0
    prompt: str | None = None
    text: str | Path | None = None
    modality: str = _NOT_STATED
    source: str = _NOT_STATED
    licence: str = _NOT_STATED


def open_set(place: str, *, images: bool, texts: bool) -> CalibrationSet:
    """The built-in set, or one of the user's.

    Args:
        place: `builtin`, a directory, or a manifest file. A directory that has a calibration.toml is
            described by it; of any other, every .txt file is a text and every other file an image.
        images: Whether the model sees images.
        texts: Whether it reads texts.

    Raises:
        EdgeError: If the set is empty, or samples of it cannot be used: all of them are listed.
    """
    path = Path(place)
    if place == BUILTIN:
        entries = _builtin_entries(images=images, texts=texts)
    elif path.is_dir() and not (path / _MANIFEST_NAME).is_file():
        entries = _directory_entries(path)
    elif path.exists():
        entries = _manifest_entries(path / _MANIFEST_NAME if path.is_dir() else path)
    else:
        raise EdgeError(
            f"the calibration set {place} does not exist; name a directory, a manifest file, or {BUILTIN}"
        )
    samples: list[CalibrationSample] = []
    problems: list[str] = []
    for name, entry in entries:
        try:
            sample = _read_sample(entry) if isinstance(entry, _Entry) else _raise(entry)
            _check_use(sample, samples, images=images, texts=texts)
            samples.append(sample)
        except EdgeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise EdgeError(
            f"{len(problems)} of {len(entries)} samples of the calibration set {place} cannot be used; "
            f"mend or remove them:\n{shown}{more}"
        )
    if not samples:
        raise EdgeError(f"the calibration set {place} is empty; give it images or texts")
    return CalibrationSet(samples=tuple(samples))


def held_out_set(*, images: bool, texts: bool) -> CalibrationSet:
    """The built-in images and notes that `open_set` refuses: what quality is measured on.

    Args:
        images: Whether to take the images, each with what it shows.
        texts: Whether to take the notes.
    """
    entries = _sample_entries(is_measured=True, images=images, texts=texts)
    return CalibrationSet(samples=tuple(_read_sample(entry) for entry in entries))


def is_held_out(sample: SampleImage) -> bool:
    """Whether a built-in image is measured on, and so never calibrated on."""
    return sample.file in _HELD_OUT_FILES


_Entries = list[tuple[str, _Entry | EdgeError]]


def _builtin_entries(*, images: bool, texts: bool) -> _Entries:
    """Images that installed packages carry and the project's own notes, none of which is measured on."""
    entries = _sample_entries(is_measured=False, images=images, texts=texts)
    return [(entry.name, entry) for entry in entries]


def _sample_entries(*, is_measured: bool, images: bool, texts: bool) -> list[_Entry]:
    shown = [
        _Entry(
            name=sample.name,
            image=sample_image_path(sample),
            frame=sample.frame,
            prompt=_QUESTION,
            text=f"This is {LABELS[sample.label]}.",
            modality=sample.modality,
            source=f"{sample.package} {sample.file}",
            licence=sample.licence,
        )
        for sample in SAMPLE_IMAGES
        if images and is_held_out(sample) == is_measured
    ]
    split = "held_out" if is_measured else "calibration"
    read = [
        _Entry(name=note.name, text=load_note(note), source="medgemma-edge", licence=NOTES_LICENCE)
        for note in SAMPLE_NOTES
        if texts and note.split == split
    ]
    return [*shown, *read]


def _directory_entries(directory: Path) -> _Entries:
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name[0] != ".")
    return [
        (
            path.name,
            _Entry(name=path.name, text=path)
            if path.suffix == ".txt"
            else _Entry(name=path.name, image=path, prompt=_QUESTION),
        )
        for path in paths
    ]


def _manifest_entries(path: Path) -> _Entries:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"the calibration set {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeError(f"the calibration set {path} is no TOML file: {error}") from None
    tables = data.pop("sample", [])
    is_list = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if not is_list or data.keys() - _SET_KEYS:
        raise EdgeError(
            f"the calibration set {path} is not to the form: it has [[sample]] tables and may have "
            f"{', '.join(sorted(_SET_KEYS))} above them"
        )
    entries: _Entries = []
    for number, table in enumerate(tables, start=1):
        name = f"sample {number}"
        try:
            entries.append((name, _manifest_entry(name, data | table, path.parent)))
        except EdgeError as error:
            entries.append((name, error))
    return entries


def _manifest_entry(name: str, table: dict[str, Any], directory: Path) -> _Entry:
    if strangers := sorted(table.keys() - _SAMPLE_KEYS):
        raise EdgeError(f"{strangers[0]!r} is unknown; a sample has {', '.join(sorted(_SAMPLE_KEYS))}")
    for key, value in table.items():
        wanted = int if key == "frame" else str
        if type(value) is not wanted:
            raise EdgeError(f"{key} must be {wanted.__name__} and is {type(value).__name__}")
    stated = {key: table[key] for key in _SET_KEYS & table.keys()}
    if ("image" in table) == ("text" in table):
        raise EdgeError("a sample has either an image or a text")
    if "text" in table:
        return _Entry(name=name, text=directory / table["text"], **stated)
    if "answer" in table and "prompt" not in table:
        raise EdgeError("an answer needs the prompt that it answers")
    return _Entry(
        name=name,
        image=directory / table["image"],
        frame=table.get("frame", 0),
        prompt=table.get("prompt", _QUESTION),
        text=table.get("answer"),
        **stated,
    )


def _raise(error: EdgeError) -> CalibrationSample:
    raise error


def _read_sample(entry: _Entry) -> CalibrationSample:
    """Read and decode all of a sample once, so that nothing is found out later.

    Raises:
        EdgeError: If something of it cannot be read.
    """
    text = _read_text(entry.text) if isinstance(entry.text, Path) else entry.text
    if text is not None and not text.strip():
        raise EdgeError("the text is blank")
    digest = hashlib.sha256()
    if entry.image is not None:
        load_image(entry.image, frame=entry.frame)
        digest.update(f"{sha256_file(entry.image)} {entry.frame}".encode())
    digest.update(json.dumps([entry.prompt, text]).encode())
    return CalibrationSample(
        name=entry.name,
        image=entry.image,
        frame=entry.frame,
        prompt=entry.prompt,
        text=text,
        modality="text" if entry.image is None else entry.modality,
        source=entry.source,
        licence=entry.licence,
        sha256=digest.hexdigest(),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EdgeError("it is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise EdgeError(f"{path} cannot be read ({error.strerror})") from None


def _check_use(
    sample: CalibrationSample, earlier: Sequence[CalibrationSample], *, images: bool, texts: bool
) -> None:
    """Refuse what the model cannot take, what is there twice, and what quality is measured on."""
    if sample.image is not None and not images:
        raise EdgeError("it has an image and the model sees none")
    if sample.image is None and not texts:
        raise EdgeError("it is a text and the model reads none")
    if any(sample.sha256 == other.sha256 for other in earlier):
        raise EdgeError("it is in the set already")
    if sample.text is not None and hashlib.sha256(sample.text.encode()).hexdigest() in _HELD_OUT_NOTES:
        raise EdgeError("it is a built-in note that quality is measured on")
