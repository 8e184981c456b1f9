"""A generative reference of `sample:medgemma-tiny` that takes a second: two images, three prompts."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle
from medgemma_export.reference.decoders import record_text_reference
from medgemma_export.reference.prompts import PromptText

MODEL = "sample:medgemma-tiny"


@cache
def images() -> tuple[DecodedImage, ...]:
    """Smooth random images, as images are smooth."""
    made = []
    for name, seed in (("left", 1), ("right", 2)):
        coarse = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
        made.append(
            DecodedImage(
                name=name,
                modality="test",
                label=None,
                source="tests",
                licence="CC0",
                rgb=np.kron(coarse, np.ones((30, 40, 1), np.uint8)),
                is_sample=True,
            )
        )
    return tuple(made)


def prompt(name: str, text: str, **changes: Any) -> PromptText:
    return PromptText(name=name, text=text, source="tests", licence="CC0", is_sample=True, **changes)


# The tokenizer spells what is no word of a caption, so the text is longer than the window of 32.
PROMPTS = (
    prompt("one image", "A slice.", images=("left",), question="Describe this image"),
    prompt("two images", "Both findings.", images=("right", "left"), question="which?"),
    prompt("text", "Blood pressure 128/70 mmHg.\n\nPulse 84/min, regular; 36.8 °C."),
)


def record(out: Path, **changes: Any) -> ReferenceBundle:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "images": images()}
    return record_text_reference(MODEL, out, **(arguments | changes))
