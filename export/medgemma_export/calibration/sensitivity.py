"""Measures what 4 bits on each weight cost a decoder's predictions, on calibration samples.

Every weight is rounded by the method for the inputs that it has in the float model. Then the model runs in
many variants side by side, each with one decision rounded and the rest float, and the divergence of each
variant's predictions is its cost: nothing about how errors travel is assumed.
"""

import hashlib
import json
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_export.calibration.calibrate import ModelInput, round_apart
from medgemma_export.calibration.fidelity import Fidelity, measure_apart
from medgemma_export.calibration.reach import takes_pixels
from medgemma_export.models import ModelSpec
from medgemma_quantization.budget import (
    Sensitivity,
    Share,
    read_sensitivity,
    write_sensitivity,
)
from medgemma_quantization.methods import METHODS, MethodName
from medgemma_quantization.methods.method import FindRounder
from medgemma_quantization.methods.rounding import nearest
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError

__all__ = ["measure_sensitivity", "open_sensitivity"]

# Variants that run side by side: what is float in them is read once for all.
_VARIANTS = 8
# Of each text so many tokens are predicted, and of samples with images so many are taken: enough to rank by.
_TEXT_TOKENS = 16
_IMAGE_SAMPLES = 4


def open_sensitivity(
    path: Path | None,
    *,
    model: ModelSpec,
    plan: QuantPlan,
    high: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    work: Path,
    weights_sha256: str,
    samples_sha256: str,
    method: MethodName,
    memory_bytes: int,
    progress: Progress,
) -> Sensitivity:
    """What a file holds, or, where there is none yet, what is measured now and then kept in it.

    Args:
        path: The file; None to keep nothing.
        model: See `measure_sensitivity`, like all that is not said here.
        plan: Weights at 4 bits, those that are to be decided on.
        high: How each is stored that gets 8 bits.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it.
        work: A directory for what is made meanwhile.
        weights_sha256: Of the checkpoint.
        samples_sha256: Of the calibration set.
        method: How integers are found.
        memory_bytes: Of activations.
        progress: Called with what is being done, steps done, and steps in all.

    Raises:
        EdgeError: If the file was measured on something else.
    """
    # Storage alone: reasons and activations change nothing that is measured.
    stored = [
        (row.name, row.stored_shape, str(row.storage), str(high.by_name[row.name].storage))
        for row in plan.rows
    ]
    facts = [weights_sha256, samples_sha256, method, stored]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if path is not None and path.exists():
        return read_sensitivity(path, key=key)
    with tempfile.TemporaryDirectory(dir=work, prefix="sensitivity.") as directory:
        found = measure_sensitivity(
            model,
            plan,
            high,
            read,
            samples,
            Path(directory, "weights"),
            key=key,
            find=METHODS[method].find,
            memory_bytes=memory_bytes,
            progress=progress,
        )
    if path is not None:
        write_sensitivity(found, path)
    return found


def measure_sensitivity(
    model: ModelSpec,
    plan: QuantPlan,
    high: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    directory: Path,
    *,
    key: str,
    find: FindRounder,
    memory_bytes: int,
    progress: Progress,
) -> Sensitivity:
    """Cost of 4 bits for each decision of a plan.

    Args:
        model: A decoder with all its components.
        plan: Weights at 4 bits, those that are to be decided on.
        high: How each is stored that gets 8 bits.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it; all of it rounds, some of it measures.
        directory: Where integers and activations go meanwhile.
        key: What the result will be known by.
        find: How integers are found.
        memory_bytes: Of activations.
        progress: Called with what is being done, steps done, and steps in all.

    Raises:
        EdgeError: If the model predicts nothing, or no sample is left to measure with.
    """
    if not any(component.name == "decoder" for component in model.components):
        raise EdgeError(
            f"{model.architecture} predicts nothing, so no budget can be held against what bits cost its "
            "predictions; leave the budget out and name bits in a --scheme"
        )
    weights, together = round_apart(
        model,
        plan,
        read,
        samples,
        directory,
        find=find,
        memory_bytes=memory_bytes,
        progress=lambda done, total: progress("round for sensitivity", done, total),
    )
    taken = _shorten(samples)
    counted = _counted(taken)
    if not counted.any():
        raise EdgeError(
            "no text of the calibration set has a next token to predict; add texts, or questions to images"
        )
    decisions = _decisions(model, plan, together)
    everything = frozenset(name for names in decisions for name in names)
    run = partial(measure_apart, model, plan, read, samples=taken, spill=directory, memory_bytes=memory_bytes)
    [eight] = run(partial(_nearest, high, read), groups=[everything])
    groups = [everything, *map(frozenset, decisions)]
    found: list[Fidelity] = []
    for start in range(0, len(groups), _VARIANTS):
        progress("measure sensitivity", start, len(groups))
        found += run(weights.current, groups=groups[start : start + _VARIANTS])
    costs = [float(fidelity.kl[counted].mean()) for fidelity in found]
    return Sensitivity(
        key=key,
        tokens=int(counted.sum()),
        low_kl=costs[0],
        high_kl=float(eight.kl[counted].mean()),
        shares=tuple(
            Share(names=names, kl=max(cost, 0.0)) for names, cost in zip(decisions, costs[1:], strict=True)
        ),
    )


def _nearest(high: QuantPlan, read: ReadWeight, name: str, rows: slice | None = None) -> NDArray[np.float32]:
    """A weight at 8 bits, where methods differ too little to matter."""
    return nearest(high.by_name[name].storage, None)(read(name, rows)).dequantize()


def _decisions(
    model: ModelSpec, plan: QuantPlan, together: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Weights that are decided on together: each once.

    Args:
        model: What asks for them; a component that sees images is one decision.
        plan: Which are integers, and their shapes.
        together: Weights that share their inputs; those of one shape among them, such as keys and values,
            or gate and up, are one decision, so that targets can still compute them as one product. Rows of a
            table are not.
    """
    groups = [
        tuple(spec.name for spec in component.weights())
        for component in model.components
        if takes_pixels(component)
    ]
    for names in together:
        by_shape: dict[Hashable, list[str]] = {}
        for name in names:
            row = plan.by_name[name]
            by_shape.setdefault(name if row.role == "table" else row.shape, []).append(name)
        groups += map(tuple, by_shape.values())
    seen: set[str] = set()
    decisions = []
    for group in groups:
        fresh = [name for name in dict.fromkeys(group) if name not in seen]
        seen.update(fresh)
        decisions.append(tuple(name for name in fresh if plan.by_name[name].storage.bits == 4))
    return [names for names in decisions if names]


def _shorten(samples: Sequence[ModelInput]) -> list[ModelInput]:
    taken, images = [], 0
    for sample in samples:
        if sample.ids is None or sample.image_blocks is None:
            continue
        if sample.pixels is None:
            blocks = sample.image_blocks[:_TEXT_TOKENS]
            taken.append(replace(sample, ids=sample.ids[:_TEXT_TOKENS], image_blocks=blocks))
        elif images < _IMAGE_SAMPLES:
            images += 1
            taken.append(sample)
    return taken


def _counted(samples: Sequence[ModelInput]) -> NDArray[np.bool_]:
    """Which predictions count: those of a text token, by a token that is not part of an image."""
    parts = []
    for sample in samples:
        if sample.image_blocks is not None:
            outside = sample.image_blocks < 0
            outside[-1] = False
            parts.append(outside)
    return np.concatenate(parts) if parts else np.zeros(0, bool)
