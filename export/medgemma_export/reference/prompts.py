"""The prompts of a generative reference: the built-in ones, or a directory of the user's."""

from dataclasses import dataclass
from pathlib import Path

from medgemma_benchmarks.bundle import DecodedImage
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.sample_notes import NOTES_LICENCE, SAMPLE_NOTES, load_note

__all__ = ["PromptText", "note_prompts", "directory_prompts", "image_prompts"]

_QUESTION = "What does this image show?"
_ANSWER = "This image shows {caption}."
_PAIR = ("head-mr-first", "head-mr-last")
_PAIR_QUESTION = "Do these two images belong to one examination?"
_PAIR_ANSWER = "Yes. Both are slices of the same MR examination of the head."


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A prompt to record, as `ReferencePrompt` describes it, before it is tokenized."""

    name: str
    images: tuple[str, ...] = ()
    question: str | None = None
    text: str
    source: str
    licence: str
    is_sample: bool = False


def note_prompts() -> tuple[PromptText, ...]:
    """The built-in notes that are never calibrated on."""
    return tuple(
        PromptText(
            name=note.name,
            text=load_note(note),
            source="medgemma-edge",
            licence=NOTES_LICENCE,
            is_sample=True,
        )
        for note in SAMPLE_NOTES
        if note.split == "held_out"
    )


def directory_prompts(directory: Path, *, licence: str = "not stated") -> tuple[PromptText, ...]:
    """Every .txt file of a directory as a text to predict, in name order.

    Raises:
        EdgeError: If there is none, or one is empty or not UTF-8.
    """
    paths = sorted(path for path in directory.glob("*.txt") if path.is_file())
    if not paths:
        raise EdgeError(f"{directory} has no .txt files; give a directory of notes")
    prompts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise EdgeError(f"{path.name} is not UTF-8 text; save it as UTF-8") from None
        if not text.strip():
            raise EdgeError(f"{path.name} is empty; remove it")
        prompts.append(PromptText(name=path.name, text=text, source="given by the user", licence=licence))
    return tuple(prompts)


def image_prompts(images: tuple[DecodedImage, ...], captions: dict[str, str]) -> tuple[PromptText, ...]:
    """Questions about built-in images: one image of each modality, and two images together.

    Args:
        images: The built-in images.
        captions: Of their labels.
    """
    first = {image.modality: image for image in reversed(images)}
    singles = [image for image in images if image is first[image.modality]]
    prompts = [
        PromptText(
            name=f"image {image.name}",
            images=(image.name,),
            question=_QUESTION,
            text=_ANSWER.format(caption=captions[image.label or ""]),
            source="medgemma-edge",
            licence=NOTES_LICENCE,
            is_sample=True,
        )
        for image in singles
    ]
    pair = PromptText(
        name="images " + " and ".join(_PAIR),
        images=_PAIR,
        question=_PAIR_QUESTION,
        text=_PAIR_ANSWER,
        source="medgemma-edge",
        licence=NOTES_LICENCE,
        is_sample=True,
    )
    return (*prompts, pair)
