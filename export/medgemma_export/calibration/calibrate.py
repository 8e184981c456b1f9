"""Finds integers with calibration samples: the model runs once over all of them, layer by layer."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgemma_export.calibration.lockstep_ops import LockstepOps, Meet, Memo, Samples, SampleStore
from medgemma_export.calibration.reach import takes_pixels
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

__all__ = ["ModelInput", "calibrate", "component_inputs", "round_apart", "run_lockstep", "as_floats"]


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
    run = partial(
        run_lockstep,
        model,
        plan,
        samples=samples,
        predict=rounder,
        spill=directory.parent,
        memory_bytes=memory_bytes,
    )
    if not all(is_whole(row, directory) for row in _tied_tables(model, plan)):
        run((Memo(read),), meet=_check_finite)
    run((Memo(read), Memo(weights.current)), meet=rounder)
    rounder.round_rest()
    return weights


def _check_finite(names: tuple[str, ...], inputs: Samples | None) -> None:
    """Meet weights in the float model, where what is not finite is the checkpoint's or a sample's fault."""
    if inputs is not None and not all(bool(tensor.isfinite().all()) for tensor in inputs.tensors):
        raise EdgeError(
            f"{names[0]} has inputs that are not finite, in float already; look for the sample that does it, "
            "or get the checkpoint again"
        )


def round_apart(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    directory: Path,
    *,
    find: FindRounder,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[QuantizedWeights, list[tuple[str, ...]]]:
    """Round every integer weight for the inputs that it has in the float model, as if it were the only one.

    Args:
        model: See `calibrate`, like all others.
        plan: What to do.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it.
        directory: Where the integers go.
        find: How to find them.
        memory_bytes: Of activations.
        progress: Called with the weights done and their number.

    Returns:
        The weights, and in order those that share their inputs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = QuantizedWeights(plan=plan, directory=directory, read=read)
    rounder = _Rounder(weights, find, progress or (lambda done, total: None))
    together: list[tuple[str, ...]] = []

    def meet(names: tuple[str, ...], inputs: Samples | None) -> None:
        together.append(names)
        _check_finite(names, inputs)
        # A table that is also the output head is rounded for the head's inputs.
        if inputs is not None:
            rounder(names, inputs)

    run_lockstep(
        model,
        plan,
        (Memo(read),),
        samples,
        meet=meet,
        predict=rounder,
        spill=directory.parent,
        memory_bytes=memory_bytes,
    )
    rounder.round_rest()
    return weights, together


class _Rounder:
    """Rounds weights when they are met, for the inputs that they have then."""

    def __init__(
        self, weights: QuantizedWeights, find: FindRounder, progress: Callable[[int, int], None]
    ) -> None:
        self._weights, self._find, self._progress = weights, find, progress
        self._left = {row.name for row in weights.plan.rows if not row.storage.is_float}
        self._total = len(self._left)

    def round_rest(self) -> None:
        """Round what no sample reached."""
        for row in self._weights.plan.rows:
            if not row.storage.is_float and not self._weights.has(row.name):
                self((row.name,), None)

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


def run_lockstep(
    model: ModelSpec,
    plan: QuantPlan,
    memos: tuple[Memo, ...],
    samples: Sequence[ModelInput],
    *,
    meet: Meet,
    predict: Callable[[tuple[str, ...], Samples], None],
    spill: Path,
    memory_bytes: int,
) -> None:
    """Run every component on the samples that reach it, in several models side by side.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        plan: Names, shapes and roles of its weights.
        memos: Where each model reads its weights, as floats.
        samples: The inputs.
        meet: See `LockstepOps`.
        predict: See `LockstepOps`; called for the decoder.
        spill: A directory for files of activations beyond `memory_bytes`; they are gone afterwards.
        memory_bytes: Of activations.
    """
    with tempfile.TemporaryDirectory(dir=spill) as place, torch.inference_mode():
        store = SampleStore(memory_bytes, Path(place), models=len(memos))
        made: dict[str, Samples] = {}
        for component in model.components:
            inputs = component_inputs(component, samples, made, store)
            if inputs is None:
                continue
            ops = LockstepOps(
                models=tuple(TorchOps(weights=as_floats(plan, memo)) for memo in memos),
                memos=memos,
                store=store,
                meet=meet,
                predict=predict if component.name == "decoder" else None,
            )
            made |= component.forward(ops, inputs)


def as_floats(plan: QuantPlan, read: ReadWeight) -> QuantizedWeights:
    """The weights of a plan as `read` gives them, rounded or not, padded where the plan says so."""
    rows = tuple(replace(row, storage=FLOAT32) for row in plan.rows)
    return QuantizedWeights(plan=replace(plan, rows=rows), directory=Path(), read=read)


def component_inputs(
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
