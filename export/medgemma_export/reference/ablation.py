"""What the details that ports of Gemma 3 get wrong are worth, in nats, on the original model.

Each ablation changes one thing of transformers' own model and leaves the rest alone; what it then predicts is
compared with what the unchanged model predicts, at every position of the same texts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import DecodedImage
from medgemma_benchmarks.gates import load_gates
from medgemma_benchmarks.parity_report import PredictionParity
from medgemma_benchmarks.teacher_forced import compare_predictions, reference_logits, summarize
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.reference.decoders import EncodedPrompt, encode_prompts, hidden_states, open_network
from medgemma_export.reference.original import Device
from medgemma_export.reference.prompts import PromptText
from medgemma_runtime.command import Progress

__all__ = ["Ablation", "ABLATIONS", "ablate"]

# MedGemma 4B's factor on its global layers (config.json of google/medgemma-4b-it).
_ROPE_FACTOR = 8.0


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One change, to the model for as long as a context lasts, or to what it is given.

    Attributes:
        name: What is wrong: image tokens that see only what is before them, a scale that is not rounded to
            bfloat16 as the released model's is, another number of `<bos>`, and so on.
        change: Changes the network and puts it back.
        bos: How many `<bos>` a prompt begins with.
        sees_images_whole: Whether the tokens of an image see each other; where not, only prompts with images
            are run.
    """

    name: str
    change: Callable[[Any], Any] | None = None
    bos: int = 1
    sees_images_whole: bool = True


@contextmanager
def _unrounded_scale(network: Any) -> Iterator[None]:
    embedding = network.get_input_embeddings()
    with _replaced(embedding.embed_scale, math.sqrt(embedding.embedding_dim)):
        yield


@contextmanager
def _scaled_local_rotary(network: Any) -> Iterator[None]:
    frequencies = network.get_decoder().rotary_emb.sliding_attention_inv_freq
    with _replaced(frequencies, frequencies / _ROPE_FACTOR):
        yield


@contextmanager
def _replaced(buffer: Any, values: Any) -> Iterator[None]:
    kept = buffer.clone()
    buffer[...] = values
    try:
        yield
    finally:
        buffer[...] = kept


ABLATIONS: tuple[Ablation, ...] = (
    Ablation(name="image mask dropped", sees_images_whole=False),
    Ablation(name="embedding scale unrounded", change=_unrounded_scale),
    Ablation(name="<bos> twice", bos=2),
    Ablation(name="no <bos>", bos=0),
    Ablation(name=f"RoPE factor {_ROPE_FACTOR:g} on local layers", change=_scaled_local_rotary),
)


def ablate(
    model: str,
    *,
    prompts: Sequence[PromptText],
    images: Sequence[DecodedImage] = (),
    revision: str | None = None,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> dict[str, PredictionParity]:
    """Predict prompts with the original in float32, and with each of `ABLATIONS`.

    Args:
        model: As `record_text_reference` takes it, like all others.
        prompts: What is predicted.
        images: Those that prompts name.
        revision: Commit, for a hub id.
        device: Where to run.
        progress: Called before every step.

    Returns:
        By the ablation's name, in order; without the one of images where no prompt has any.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    encoded, _, _ = encode_prompts(checkpoint, prompts, images)
    network = open_network(checkpoint, device=device)
    head = network.get_output_embeddings().weight.detach().float().cpu().numpy()
    tie_margin = load_gates().tie_margin_logits
    asked = [
        ablation
        for ablation in ABLATIONS
        if ablation.sees_images_whole or any(prompt.pixel_values is not None for prompt in encoded)
    ]
    found: dict[str, list[Any]] = {ablation.name: [] for ablation in asked}
    for number, prompt in enumerate(encoded):
        # Without <bos> the first token of a text has nothing before it.
        first = max(prompt.given_tokens, 2)
        whole = replace(prompt, given_tokens=first)
        reference = _states(network, whole)
        for ablation in asked:
            if progress is not None:
                progress(ablation.name, number, len(encoded))
            if not ablation.sees_images_whole and prompt.pixel_values is None:
                continue
            actual = _run(network, ablation, whole)
            found[ablation.name] += compare_predictions(
                actual=reference_logits(actual, head),
                reference=reference_logits(reference, head),
                ids=prompt.ids[first:],
                tie_margin=tie_margin,
            )
    return {name: summarize(predictions) for name, predictions in found.items()}


def _run(network: Any, ablation: Ablation, prompt: EncodedPrompt) -> NDArray[np.float32]:
    bos, rest = prompt.ids[:1], prompt.ids[1:]
    changed = replace(
        prompt,
        ids=np.concatenate((np.repeat(bos, ablation.bos), rest)),
        given_tokens=prompt.given_tokens - 1 + ablation.bos,
    )
    if ablation.change is None:
        return _states(network, changed, sees_images_whole=ablation.sees_images_whole)
    with ablation.change(network):
        return _states(network, changed)


def _states(network: Any, prompt: EncodedPrompt, *, sees_images_whole: bool = True) -> NDArray[np.float32]:
    states: NDArray[np.float32] = (
        hidden_states(network, prompt, sees_images_whole=sees_images_whole).float().cpu().numpy()
    )
    return states
