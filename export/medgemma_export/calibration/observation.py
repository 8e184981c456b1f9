"""Runs the float model on calibration samples, layer by layer, and shows what passes through it."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from medgemma_export.calibration.calibrate import ModelInput, component_inputs
from medgemma_export.calibration.lockstep_ops import LockstepOps, Meet, Memo, Samples, SampleStore
from medgemma_export.models import ModelSpec
from medgemma_export.torch_ops import TorchOps
from medgemma_quantization.plan import make_plan
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import QuantizedWeights, ReadWeight

__all__ = ["observe", "pass_by"]


def pass_by(names: tuple[str, ...], inputs: Samples | None) -> None:
    """A `Meet` that does nothing."""


def observe(
    model: ModelSpec,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    *,
    memory_bytes: int,
    meet: Meet = pass_by,
    grown: Callable[[str, Samples], None] = lambda component, stream: None,
    predict: Callable[[tuple[str, ...], Samples], None] | None = None,
    make_ops: Callable[[QuantizedWeights], TorchOps] = lambda weights: TorchOps(weights=weights),
) -> None:
    """Run every component that samples reach, once, with float weights.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        read: Reads a float weight by name.
        samples: What runs through it.
        memory_bytes: Activations beyond this go to temporary files.
        meet: Called with the inputs of weights, as in `LockstepOps`, like the others.
        grown: Called with the component's name and the residual stream in it.
        predict: Called with what every token has at a decoder's output head.
        make_ops: What computes, given the weights.
    """
    plan = make_plan(SCHEMES["fp32"], model.weights())
    memo = Memo(read)
    with tempfile.TemporaryDirectory() as spill, torch.inference_mode():
        store = SampleStore(memory_bytes, Path(spill), models=1)
        weights = QuantizedWeights(plan=plan, directory=Path(spill), read=memo)
        made: dict[str, Samples] = {}
        for component in model.components:
            inputs = component_inputs(component, samples, made, store)
            if inputs is None:
                continue
            ops = LockstepOps(
                models=(make_ops(weights),),
                memos=(memo,),
                store=store,
                meet=meet,
                predict=predict or (lambda names, inputs: None) if component.name == "decoder" else None,
                grown=partial(grown, component.name),
            )
            made |= component.forward(ops, inputs)
