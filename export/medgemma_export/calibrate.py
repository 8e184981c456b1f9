"""Finds integers with calibration samples: the model runs once over all of them, layer by layer."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgemma_export.calibration_reach import takes_pixels
from medgemma_export.lockstep_ops import LockstepOps, Meet, Memo, Samples, SampleStore
from medgemma_export.models import ModelSpec
from medgemma_export.models.spec import Component
from medgemma_export.torch_ops import TorchOps
from medgemma_quantization.methods.method import FindRounder
from medgemma_quantization.methods.search import searched
from medgemma_quantization.observers import Moments
from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_quantization.scheme import FLOAT32
from medgemma_quantization.weights import (
    QuantizedWeights,
    ReadWeight,
    is_whole,
    store_integers,
)
from medgemma_runtime.errors import EdgeError

__all__ = ["ModelInput", "Fidelity", "calibrate", "measure"]

# Rows of the output head that are read at a time, and logits that are in memory at a time.
_HEAD_ROWS = 1 << 14
_LOGITS = 1 << 25


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInput:
    """What one sample is to a model.

    Shapes:
        pixels: [images, 3, H, W] float32
        ids: [S] int64, or None for an image alone
        image_blocks: [S] int64, as `Prompt` has them
    """

    pixels: NDArray[np.float32] | None = None
    ids: NDArray[np.int64] | None = None
    image_blocks: NDArray[np.int64] | None = None


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


def calibrate(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    directory: Path,
    *,
    find: FindRounder,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedWeights:
    """Round every integer weight of a plan.

    A table that is also the output head is rounded first, for the inputs that the head has in the float
    model; then the model runs again, its rounded weights growing. Weights that no sample reaches are rounded
    by scale search, as `note_unreached` says in the plan.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        plan: What to do.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it.
        directory: Where the integers go; those that are there already, and whole, are kept.
        find: How to find them.
        memory_bytes: Activations beyond this go to files beside `directory`.
        progress: Called with the weights done and their number.

    Raises:
        EdgeError: If the method cannot use what it sees of a layer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = QuantizedWeights(plan=plan, directory=directory, read=read)
    rounder = _Rounder(weights, find, progress or (lambda done, total: None))
    if not all(is_whole(row, directory) for row in _tied_tables(model, plan)):
        _run(model, weights, samples, memory_bytes, meet=_check_finite, predict=rounder.head, models=1)
    _run(model, weights, samples, memory_bytes, meet=rounder, predict=rounder.head)
    for row in plan.rows:
        if not row.storage.is_float and not weights.has(row.name):
            rounder((row.name,), None)
    return weights


def measure(
    model: ModelSpec, weights: QuantizedWeights, samples: Sequence[ModelInput], *, memory_bytes: int
) -> Fidelity:
    """Hold a quantized decoder's predictions against the float one's, weights only, activations float."""
    found: list[Fidelity] = []
    ids = [sample.ids for sample in samples if sample.ids is not None]

    def predict(name: str, inputs: Samples) -> None:
        found.append(_compare_predictions(weights, name, inputs, ids))

    _run(model, weights, samples, memory_bytes, meet=_pass_by, predict=predict)
    if not found:
        raise EdgeError("the model predicts nothing, so its predictions cannot be compared")
    return found[0]


def _pass_by(names: tuple[str, ...], inputs: Samples | None) -> None:
    """Meet weights and do nothing."""


def _check_finite(names: tuple[str, ...], inputs: Samples | None) -> None:
    """Meet weights in the float model, where what is not finite is the checkpoint's or a sample's fault."""
    if inputs is not None and not all(bool(tensor.isfinite().all()) for tensor in inputs.tensors):
        raise EdgeError(
            f"{names[0]} has inputs that are not finite, in float already; look for the sample that does it, "
            "or get the checkpoint again"
        )


class _Rounder:
    """Rounds weights when they are met, for the inputs that they have then."""

    def __init__(
        self, weights: QuantizedWeights, find: FindRounder, progress: Callable[[int, int], None]
    ) -> None:
        self._weights, self._find, self._progress = weights, find, progress
        self._left = {row.name for row in weights.plan.rows if not row.storage.is_float}
        self._total = len(self._left)

    def head(self, name: str, inputs: Samples) -> None:
        """An output head."""
        self((name,), inputs)

    def __call__(self, names: tuple[str, ...], inputs: Samples | None) -> None:
        """See `Meet`."""
        directory = self._weights.directory
        rows = [self._weights.plan.by_name[name] for name in names]
        self._left.difference_update(names)
        self._progress(self._total - len(self._left), self._total)
        rows = [row for row in rows if not row.storage.is_float and not is_whole(row, directory)]
        if not rows:
            return
        storages = {row.storage for row in rows}
        if inputs is None:
            # A lookup's errors reach the model as they are: no input is larger than another.
            rounders = {storage: searched(storage, None) for storage in storages}
        else:
            try:
                moments = _observe(inputs, rows[0].stored_shape[1])
                rounders = {storage: self._find(storage, moments) for storage in storages}
            except ValueError as error:
                raise EdgeError(
                    f"{names[0]} cannot be calibrated: {error}; mend the calibration set, or quantize "
                    "without one by --method search"
                ) from None
        for row in rows:
            store_integers(row, self._weights.read, directory, rounders[row.storage])


def _observe(inputs: Samples, width: int) -> Moments:
    moments = Moments.zeros(width)
    for *original, x in inputs.rows():
        moments.add(x, original[0] if original else None)
    return moments


def _tied_tables(model: ModelSpec, plan: QuantPlan) -> list[PlanRow]:
    """Integer tables that two components ask for."""
    asking = [{spec.name for spec in component.weights()} for component in model.components]
    return [
        row
        for row in plan.rows
        if row.role == "table" and not row.storage.is_float and sum(row.name in names for names in asking) > 1
    ]


def _run(
    model: ModelSpec,
    weights: QuantizedWeights,
    samples: Sequence[ModelInput],
    memory_bytes: int,
    *,
    meet: Meet,
    predict: Callable[[str, Samples], None],
    models: Literal[1, 2] = 2,
) -> None:
    """Run every component on the samples that reach it: in the float model alone, or in the rounded, too."""
    # Rounded weights are read as floats, once for all samples.
    rows = tuple(replace(row, storage=FLOAT32) for row in weights.plan.rows)
    plain = replace(weights, plan=replace(weights.plan, rows=rows))
    memos = (Memo(weights.read), Memo(partial(_read_rounded, weights)))[:models]
    with tempfile.TemporaryDirectory(dir=weights.directory.parent) as spill, torch.inference_mode():
        store = SampleStore(memory_bytes, Path(spill), models=models)
        made: dict[str, Samples] = {}
        for component in model.components:
            inputs = _inputs(component, samples, made, store)
            if inputs is None:
                continue
            ops = LockstepOps(
                models=tuple(TorchOps(weights=replace(plain, read=memo)) for memo in memos),
                memos=memos,
                store=store,
                meet=meet,
                predict=predict if component.name == "decoder" else None,
            )
            made |= component.forward(ops, inputs)


def _read_rounded(weights: QuantizedWeights, name: str, rows: slice | None = None) -> NDArray[np.float32]:
    """A weight as it is by now."""
    row = weights.plan.by_name[name]
    if row.storage.is_float or not weights.has(name):
        return weights.read(name, rows)
    return weights.quantized(name, rows).dequantize()


def _inputs(
    component: Component, samples: Sequence[ModelInput], made: dict[str, Samples], store: SampleStore
) -> dict[str, Samples] | None:
    """A component's inputs, once for each model. None if no sample reaches it."""

    def repeated(arrays: Iterable[NDArray[Any]]) -> Samples:
        return Samples(store, (torch.from_numpy(np.concatenate([array] * store.models)) for array in arrays))

    names = {spec.name: spec for spec in component.inputs}
    if takes_pixels(component):
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        return {"pixel_values": repeated(pixels)} if pixels else None
    ids = [sample.ids for sample in samples if sample.ids is not None]
    if not ids:
        return None
    inputs: dict[str, Samples] = {}
    for name, spec in names.items():
        if name == "input_ids":
            inputs[name] = repeated(row[None] for row in ids)
        elif name == "position_ids":
            inputs[name] = repeated(np.arange(len(row))[None] for row in ids)
        elif name == "attention_mask":
            inputs[name] = repeated(np.ones((1, len(row)), np.int64) for row in ids)
        elif name == "image_blocks":
            inputs[name] = repeated(
                sample.image_blocks[None] for sample in samples if sample.image_blocks is not None
            )
        elif name == "local_start":
            inputs[name] = repeated(np.zeros(1, np.int64) for _ in ids)
        elif name == "image_features":
            inputs[name] = _features(samples, made, int(spec.shape[1]), store)
        elif name.startswith("past_key_values"):
            heads, width = int(spec.shape[1]), int(spec.shape[3])
            inputs[name] = repeated(np.zeros((1, heads, 0, width), np.float32) for _ in ids)
        else:
            inputs[name] = made[name]
    return inputs


def _features(
    samples: Sequence[ModelInput], made: dict[str, Samples], width: int, store: SampleStore
) -> Samples:
    """Image features of all samples with text: none for those without images."""
    seen = iter(made["image_features"].tensors if "image_features" in made else ())
    found = [None if sample.pixels is None else next(seen) for sample in samples]
    return Samples(
        store,
        (
            torch.zeros(0, width) if features is None else features
            for sample, features in zip(samples, found, strict=True)
            if sample.ids is not None
        ),
    )


def _compare_predictions(
    weights: QuantizedWeights, name: str, inputs: Samples, ids: Sequence[NDArray[np.int64]]
) -> Fidelity:
    """The logits of all tokens in both models, some rows of the head at a time, never all at once.

    The running maximum, the sum of exponentials and the sum of `exp(a) (a - b)` give the divergence:
    `KL = sum(exp(a) (a - b)) / sum(exp(a)) - log sum(exp(a)) + log sum(exp(b))`.
    """
    states = [torch.from_numpy(np.concatenate(half)) for half in zip(*inputs.rows(), strict=True)]
    truth = np.concatenate([[*row[1:], -1] for row in ids])
    rows = weights.plan.by_name[name].shape[0]
    tokens = len(truth)
    peak = torch.full((2, tokens), -torch.inf, dtype=torch.float64)
    best = torch.zeros((2, tokens), dtype=torch.int64)
    total = torch.zeros((2, tokens), dtype=torch.float64)
    weighted = torch.zeros(tokens, dtype=torch.float64)
    true = torch.full((2, tokens), torch.nan, dtype=torch.float64)
    for start in range(0, rows, _HEAD_ROWS):
        piece = slice(start, min(start + _HEAD_ROWS, rows))
        heads = [
            torch.from_numpy(read(name, piece)) for read in (weights.read, partial(_read_rounded, weights))
        ]
        step = max(1, _LOGITS // (piece.stop - start))
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            logits = torch.stack([x[part] @ head.T for x, head in zip(states, heads, strict=True)])
            high, index = logits.max(-1)
            best[:, part] = torch.where(high > peak[:, part], index + start, best[:, part])
            higher = torch.maximum(peak[:, part], high)
            fading = (peak[:, part] - higher).exp()
            powers = (logits - higher[..., None].float()).exp()
            total[:, part] = total[:, part] * fading + powers.sum(-1)
            difference = (powers[0] * (logits[0] - logits[1])).sum(-1)
            weighted[part] = weighted[part] * fading[0] + difference
            peak[:, part] = higher
            here = torch.from_numpy(truth[part] - start)
            inside = (here >= 0) & (here < piece.stop - start)
            found = logits.gather(-1, here.clamp(0, piece.stop - start - 1).expand(2, -1)[..., None])[..., 0]
            true[:, part] = torch.where(inside, found.double(), true[:, part])
    log_total = peak + total.log()
    return Fidelity(
        kl=(weighted / total[0] - log_total[0] + log_total[1]).numpy(),
        agrees=(best[0] == best[1]).numpy(),
        loss=(log_total - true).numpy(),
    )
