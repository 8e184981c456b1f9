"""Records what an artifact's integers compute, without the artifact's engine: a packing reference.

The integers are made again from the checkpoint, the plan, and the factors and ranges that calibration found.
Those that samples had a part in nobody can make again without them: they are read back from the artifact, and
held against the hashes that were taken of them before they were packed. For each input the bundle holds two
outputs: `pooler_output`, with activations left float, and `rounded_output`, with the target's own rounding of
activations. It also carries each program's exact form, which the device runs over the artifact's weight file.
The residual stream between layers, where it is asked for, is that of the exact form: rounding of activations
sends two right programs 2e-3 of the stream apart in four layers of the tiny sample, as a wrong matrix does.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle, open_bundle, write_bundle
from medgemma_benchmarks.layer_parity import MAX_ITEMS
from medgemma_export.calibration.fold_ops import planned_folds
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.models import Component, ModelSpec, load_model
from medgemma_export.package import require_absent
from medgemma_export.reference.encoders import describe_torch
from medgemma_export.reference.exact_program import write_exact_program
from medgemma_export.targets import TARGETS
from medgemma_export.torch_ops import IntegerLinear, compute, weight_only
from medgemma_export.unpack import compare_integers, read_integers
from medgemma_quantization.activations import read_ranges
from medgemma_quantization.equalization import read_factors
from medgemma_quantization.integer_hashes import compare_hashes, hash_integers, read_hashes
from medgemma_quantization.methods import METHODS
from medgemma_quantization.plan import QuantPlan, read_plan
from medgemma_quantization.weights import QuantizedWeights, ReadWeight, quantize_weights
from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.layers import kept_tokens

__all__ = ["record_packing"]

# MedSigLIP's widest activation, [8, 1024, 4304], takes 280 MB in the float64 that exact sums need.
_ROWS_AT_ONCE = 8


def record_packing(
    artifact_directory: Path,
    model: str,
    reference: Path,
    out: Path,
    *,
    revision: str | None = None,
    per_layer: bool = False,
    progress: Progress,
) -> ReferenceBundle:
    """Compute an artifact's packing reference on the inputs of a float reference.

    Args:
        artifact_directory: The quantized artifact, for its plan and its programs.
        model: The checkpoint it was made from.
        reference: A float reference bundle of that checkpoint.
        out: The bundle to create.
        revision: Hub revision, or None for its main branch.
        per_layer: Also keep the residual stream between the layers, of the first images and captions.
        progress: Called with what is being done, steps done, and steps in all.

    Raises:
        EdgeError: If artifact, checkpoint and reference do not belong together, or `out` exists.
    """
    require_absent(out)
    artifact = open_artifact(artifact_directory)
    if (adapter := artifact.manifest.model.adapter) is not None:
        raise EdgeError(
            f"{artifact_directory.name} has the adapter {adapter.name} merged in, and "
            "references are of whole checkpoints; merge it with PEFT's merge_and_unload and export what "
            "that saves"
        )
    bundle = open_bundle(reference)
    manifest, record = artifact.manifest, bundle.record
    if record.kind != "float":
        raise EdgeError(
            f"{reference} is a {record.kind} reference, and packing is asked of encoders with a float one; "
            "name that, or compare the artifact with this reference as it is"
        )
    if manifest.precision == "fp32":
        raise EdgeError(
            f"{artifact_directory.name} is fp32 and packs no integers; compare it with the reference"
        )
    if manifest.target != "onnx":
        raise EdgeError(
            f"{artifact_directory.name} is of target {manifest.target}, and a packing reference carries the "
            "exact form of an ONNX program; export the same recipe with --target onnx and name that"
        )
    method = next((known for name, known in METHODS.items() if name == manifest.quantization.method), None)
    if method is None:
        raise EdgeError(
            f"{artifact_directory.name} was made by the method {manifest.quantization.method!r}, which this "
            f"version does not know; it knows {', '.join(METHODS)}"
        )
    checkpoint = open_checkpoint(model, revision=revision)
    for what, weights_sha256 in (
        ("the checkpoint", checkpoint.weights_sha256()),
        ("the reference", record.weights_sha256),
    ):
        if weights_sha256 != manifest.model.weights_sha256:
            raise EdgeError(
                f"{what} has weights {weights_sha256[:12]} and the artifact was made from "
                f"{manifest.model.weights_sha256[:12]}; name the checkpoint and reference of this artifact"
            )
    plan = read_plan(artifact.path(manifest.quantization.plan))
    spec = load_model(checkpoint, residual_scale=plan.residual_scale)
    read = spec.reader(checkpoint)
    if method.factors is not None:
        read = read_factors(artifact_directory, planned_folds(spec, plan)).reader(read)
    # The float model's layers are not what these integers compute.
    arrays: dict[str, NDArray[np.generic]] = {
        name: array for name, array in bundle.arrays.items() if not name.endswith(".layers")
    }
    programs: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        if method.sees_inputs and manifest.quantization.calibration is not None:
            weights = _shipped_integers(artifact, spec, plan, read, Path(work, "weights"))
        else:
            weights = quantize_weights(
                plan,
                read,
                Path(work, "weights"),
                find=method.find,
                progress=lambda done, total: progress("quantize", done, total),
            )
        if plan.ranges is not None:
            weights = replace(weights, inputs=read_ranges(artifact_directory))
        rounding = TARGETS[manifest.target].integer_linear()
        for component in spec.components:
            if component.name not in manifest.components:
                continue
            name = component.name
            program = artifact.path(manifest.components[name].program)
            compare_integers(program, component, weights)
            arrays[f"{name}.pooler_output"] = _run(component, weights, bundle, weight_only, progress)
            arrays[f"{name}.rounded_output"] = _run(component, weights, bundle, rounding, progress)
            if per_layer:
                progress(f"compute {name} layer by layer", 0, 1)
                arrays[f"{name}.layers"] = _layer_states(component, weights, bundle)
            programs[name] = Path(work, f"{name}.onnx")
            write_exact_program(program, programs[name])
        return write_bundle(
            out,
            kind="packing",
            model_id=checkpoint.id,
            revision=checkpoint.revision,
            weights_sha256=record.weights_sha256,
            plan_sha256=plan.sha256,
            producer=describe_torch(record.producer),
            image=record.image,
            images=[
                DecodedImage(
                    name=image.name,
                    modality=image.modality,
                    label=image.label,
                    source=image.source,
                    licence=image.licence,
                    rgb=bundle.rgb(image),
                    is_sample=image.is_sample,
                )
                for image in record.images
            ],
            labels=record.labels,
            arrays=arrays,
            timings={},  # the float reference's are of another machine and another program
            programs=programs,
            layers=tuple(programs) if per_layer else (),
        )


def _shipped_integers(
    artifact: Artifact, model: ModelSpec, plan: QuantPlan, read: ReadWeight, directory: Path
) -> QuantizedWeights:
    """The integers that an artifact's programs carry, if they are those that were made for it."""
    directory.mkdir()
    stated = read_hashes(artifact.directory)
    weights = QuantizedWeights(plan=plan, directory=directory, read=read)
    for component in model.components:
        if component.name in artifact.manifest.components:
            program = artifact.path(artifact.manifest.components[component.name].program)
            read_integers(program, component, plan, directory)
            names = {weight.name for weight in component.weights()}
            compare_hashes(hash_integers(weights, names), stated)
    return weights


def _run(
    component: Component,
    weights: QuantizedWeights,
    bundle: ReferenceBundle,
    integer_linear: IntegerLinear,
    progress: Progress,
) -> NDArray[np.float32]:
    """All recorded inputs, a few at a time: each reading of the weights serves several."""
    [spec] = component.inputs
    inputs = bundle.arrays[f"{component.name}.{spec.name}"]
    outputs = []
    for start in range(0, len(inputs), _ROWS_AT_ONCE):
        progress(f"compute {component.name}", start, len(inputs))
        rows = {spec.name: inputs[start : start + _ROWS_AT_ONCE]}
        outputs.append(compute(component, weights, rows, integer_linear=integer_linear)["pooler_output"])
    return np.concatenate(outputs)


def _layer_states(
    component: Component, weights: QuantizedWeights, bundle: ReferenceBundle
) -> NDArray[np.float32]:
    """The residual stream of the first recorded inputs, [items, layers + 1, kept tokens, H]."""
    [spec] = component.inputs
    states: list[NDArray[np.float32]] = []

    def keep(_: str, x: Tensor) -> None:
        states.append(x[:, kept_tokens(x.shape[1])].numpy())

    compute(
        component, weights, {spec.name: bundle.arrays[f"{component.name}.{spec.name}"][:MAX_ITEMS]}, show=keep
    )
    return np.stack(states, axis=1)
