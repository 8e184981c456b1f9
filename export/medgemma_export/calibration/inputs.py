"""Turns calibration samples into what a model takes, with the code that does it on the device."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_export.calibration.calibrate import ModelInput
from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models import ModelSpec
from medgemma_quantization.calibration import CalibrationSample, CalibrationSet
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.images import preprocess
from medgemma_runtime.manifest import PromptSpec, TextSpec
from medgemma_runtime.prompt import Image, Message, Text, image_blocks, load_prompt_tokenizer
from medgemma_runtime.text import load_tokenizer

__all__ = ["model_inputs", "caption_inputs"]


def model_inputs(samples: CalibrationSet, model: ModelSpec, checkpoint: Checkpoint) -> list[ModelInput]:
    """Every sample of a set, decoded and tokenized.

    A text is read as it is, after `<bos>`. An image with a prompt is a chat, with the answer, if there is
    one, in the model's turn. MedSigLIP sees images, and reads texts and answers as captions.

    Raises:
        EdgeError: If a sample does not fit the model, such as a text that is too long.
    """
    with _tokenizer_directory(model, checkpoint) as directory:
        if model.prompt is not None:
            make = _prompt_maker(model, model.prompt, directory)
        else:
            make = _pair_maker(model, model.text, directory)
        inputs = []
        for sample in samples.samples:
            try:
                inputs.append(make(sample))
            except EdgeError as error:
                raise EdgeError(f"calibration sample {sample.name}: {error}") from None
    return inputs


def caption_inputs(
    captions: Sequence[str], model: ModelSpec, checkpoint: Checkpoint
) -> list[NDArray[np.int64]]:
    """Captions as an encoder's text tower reads them, [1, S] each; none where it has no such tower."""
    if model.text is None:
        return []
    with _tokenizer_directory(model, checkpoint) as directory:
        return list(load_tokenizer(directory, model.text).encode(list(captions))[:, None])


@contextmanager
def _tokenizer_directory(model: ModelSpec, checkpoint: Checkpoint) -> Iterator[Path]:
    """A directory with the tokenizer, which a checkpoint may hold inside another file."""
    with tempfile.TemporaryDirectory() as directory:
        spec = model.prompt or model.text
        if spec is not None:
            Path(directory, spec.tokenizer).write_bytes(checkpoint.content(spec.tokenizer))
        yield Path(directory)


def _prompt_maker(
    model: ModelSpec, spec: PromptSpec, directory: Path
) -> Callable[[CalibrationSample], ModelInput]:
    tokenizer = load_prompt_tokenizer(directory, spec)

    def make(sample: CalibrationSample) -> ModelInput:
        if sample.image is None:
            read = tokenizer.encode_text(sample.text or "")
            return ModelInput(ids=read.ids, image_blocks=read.image_blocks)
        if model.image is None:
            raise EdgeError("it has an image and the model sees none")
        asked = Message(role="user", parts=(Image(), Text(sample.prompt or "")))
        ids = tokenizer.encode([asked], image_count=1).ids
        if sample.text is not None:
            ids = np.concatenate((ids, tokenizer.encode_text(sample.text.strip()).ids[1:]))
        return ModelInput(
            pixels=preprocess(sample.pixels(), model.image)[None],
            ids=ids,
            image_blocks=image_blocks(ids, spec.image_id),
        )

    return make


def _pair_maker(
    model: ModelSpec, spec: TextSpec | None, directory: Path
) -> Callable[[CalibrationSample], ModelInput]:
    tokenizer = None if spec is None else load_tokenizer(directory, spec)

    def make(sample: CalibrationSample) -> ModelInput:
        pixels = ids = None
        if sample.image is not None and model.image is not None:
            pixels = preprocess(sample.pixels(), model.image)[None]
        if sample.text is not None and tokenizer is not None:
            ids = tokenizer.encode([sample.text], truncate=True)[0]
        return ModelInput(pixels=pixels, ids=ids)

    return make
