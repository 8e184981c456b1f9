"""Holds quantized models against the float one: predictions token by token, or embeddings of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgemma_export.calibration.calibrate import ModelInput, as_floats, run_lockstep
from medgemma_export.calibration.lockstep_ops import Memo, Samples
from medgemma_export.models import ModelSpec
from medgemma_export.torch_ops import compute
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["Fidelity", "measure", "measure_apart", "embed_images"]

# Rows of the output head that are read at a time, and logits of a model that are in memory at a time.
_HEAD_ROWS = 1 << 14
_LOGITS = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Fidelity:
    """How a quantized decoder predicts, token by token, beside the float one.

    Attributes:
        kl: Kullback-Leibler divergence of the quantized distribution from the float one, nats, [tokens].
        agrees: Whether both find the same token most likely, [tokens].
        loss: Negative log-likelihood of the true next token, nats, for the float and the quantized model,
            [2, tokens]; NaN where a sample ends.
    """

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    loss: NDArray[np.float64]


def measure(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    quantized: Sequence[ReadWeight],
    samples: Sequence[ModelInput],
    *,
    spill: Path,
    memory_bytes: int,
) -> list[Fidelity]:
    """Hold the predictions of quantized decoders against the float one's: weights only, activations float.

    Args:
        model: All its components.
        plan: Names, shapes and roles of its weights.
        read: Reads a float weight by name.
        quantized: The same for each quantized decoder, its integers as floats.
        samples: What is predicted.
        spill: A directory for activations beyond `memory_bytes`.
        memory_bytes: Of activations.

    Returns:
        One for each quantized decoder.

    Raises:
        EdgeError: If the model predicts nothing.
    """
    memos = (Memo(read), *(Memo(one) for one in quantized))
    return _measure(model, plan, memos, samples, spill, memory_bytes)


def measure_apart(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    rounded: ReadWeight,
    groups: Sequence[frozenset[str]],
    samples: Sequence[ModelInput],
    *,
    spill: Path,
    memory_bytes: int,
) -> list[Fidelity]:
    """The same for decoders of which only some weights are rounded: one result for each group of names.

    What is not rounded is read once for all of them.
    """
    plain = Memo(read)

    def choose(group: frozenset[str], name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return rounded(name, rows) if name in group else plain(name, rows)

    memos = (plain, *(Memo(partial(choose, group)) for group in groups))
    return _measure(model, plan, memos, samples, spill, memory_bytes)


def _measure(
    model: ModelSpec,
    plan: QuantPlan,
    memos: tuple[Memo, ...],
    samples: Sequence[ModelInput],
    spill: Path,
    memory_bytes: int,
) -> list[Fidelity]:
    found: list[Fidelity] = []
    ids = [sample.ids for sample in samples if sample.ids is not None]

    def predict(names: tuple[str, ...], inputs: Samples) -> None:
        heads = [(name, plan.by_name[name].shape[0]) for name in names]
        found.extend(_compare_predictions(memos, heads, inputs, ids))

    run_lockstep(
        model, plan, memos, samples, meet=_pass_by, predict=predict, spill=spill, memory_bytes=memory_bytes
    )
    if not found:
        raise EdgeError("the model predicts nothing, so its predictions cannot be compared")
    return found


def embed_images(
    model: ModelSpec,
    plan: QuantPlan,
    readers: tuple[ReadWeight, ReadWeight],
    *,
    pixels: Sequence[NDArray[np.float32]],
    captions: Sequence[NDArray[np.int64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Unit embeddings: of images by the float and by the quantized tower, of captions by the float one.

    Shapes:
        pixels: [1, 3, H, W] each
        captions: [1, S] each
        results: [images, D] twice, [captions, D]

    Raises:
        EdgeError: If the model has no tower for images and one for texts.
    """
    parts = {component.name: component for component in model.components}
    if not {"image", "text"} <= parts.keys():
        raise EdgeError(
            f"{model.architecture} neither predicts tokens nor compares images with texts, so there is "
            "nothing to measure a rounding by"
        )

    def embed(name: str, read: ReadWeight, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        weights = as_floats(plan, read)
        [spec] = parts[name].inputs
        found = [compute(parts[name], weights, {spec.name: one})["pooler_output"] for one in inputs]
        vectors = np.concatenate(found).astype(np.float64)
        unit: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    read, quantized = readers
    return embed("image", read, pixels), embed("image", quantized, pixels), embed("text", read, captions)


def _pass_by(names: tuple[str, ...], inputs: Samples | None) -> None:
    """Meet weights and do nothing."""


def _compare_predictions(
    readers: Sequence[ReadWeight],
    heads: Sequence[tuple[str, int]],
    inputs: Samples,
    ids: Sequence[NDArray[np.int64]],
) -> list[Fidelity]:
    """The logits of all tokens in all models, some rows of the head at a time, never all at once.

    Args:
        readers: Of each model's weights, the float one's first.
        heads: The weights that the head consists of, and their rows.
        inputs: What every token has at the head.
        ids: The tokens.

    The running maximum, the sum of exponentials and the sum of `exp(a) (a - b)` give the divergence:
    `KL = sum(exp(a) (a - b)) / sum(exp(a)) - log sum(exp(a)) + log sum(exp(b))`.
    """
    states = [torch.from_numpy(np.concatenate(part)) for part in zip(*inputs.rows(), strict=True)]
    truth = np.concatenate([[*row[1:], -1] for row in ids])
    models, tokens = len(readers), len(truth)
    peak = torch.full((models, tokens), -torch.inf, dtype=torch.float64)
    best = torch.zeros((models, tokens), dtype=torch.int64)
    total = torch.zeros((models, tokens), dtype=torch.float64)
    weighted = torch.zeros((models, tokens), dtype=torch.float64)
    true = torch.full((models, tokens), torch.nan, dtype=torch.float64)
    start = 0
    for name, piece in _in_pieces(heads):
        count = piece.stop - piece.start
        matrices = [torch.from_numpy(read(name, piece)) for read in readers]
        step = max(1, _LOGITS // count)
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            here = torch.from_numpy(truth[part] - start)
            inside = (here >= 0) & (here < count)
            place = here.clamp(0, count - 1)[:, None]
            reference, powers = None, None
            for model, head in enumerate(matrices):
                logits = states[model][part] @ head.T
                high, index = logits.max(-1)
                best[model, part] = torch.where(high > peak[model, part], index + start, best[model, part])
                higher = torch.maximum(peak[model, part], high)
                fading = (peak[model, part] - higher).exp()
                if reference is None or powers is None:
                    reference, faded = logits, fading
                    powers = (logits - higher[:, None].float()).exp_()
                    total[model, part] = total[model, part] * fading + powers.sum(-1)
                else:
                    difference = torch.linalg.vecdot(powers, reference - logits)
                    weighted[model, part] = weighted[model, part] * faded + difference
                    sums = logits.sub(higher[:, None].float()).exp_().sum(-1)
                    total[model, part] = total[model, part] * fading + sums
                peak[model, part] = higher
                at_truth = logits.gather(-1, place)[:, 0].double()
                true[model, part] = torch.where(inside, at_truth, true[model, part])
        start += count
    log_total = peak + total.log()
    loss = log_total - true
    return [
        Fidelity(
            kl=(weighted[model] / total[0] - log_total[0] + log_total[model]).numpy(),
            agrees=(best[0] == best[model]).numpy(),
            loss=loss[[0, model]].numpy(),
        )
        for model in range(1, models)
    ]


def _in_pieces(heads: Sequence[tuple[str, int]]) -> Iterator[tuple[str, slice]]:
    for name, rows in heads:
        for start in range(0, rows, _HEAD_ROWS):
            yield name, slice(start, min(start + _HEAD_ROWS, rows))
