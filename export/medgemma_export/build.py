"""From a checkpoint to an artifact. This is the file to read first.

checkpoint -> ModelSpec -> QuantPlan -> QuantizedWeights -> Target.lower -> Artifact
"""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from medgemma_export.adapter import merge_adapter
from medgemma_export.calibration.integers import make_integers
from medgemma_export.calibration.mixed_bits import mix_bits
from medgemma_export.calibration.reach import (
    check_chain,
    check_ranges,
    reached_folds,
    takes,
    unreached_weights,
)
from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint
from medgemma_export.models import ModelSpec, load_model
from medgemma_export.package import (
    Needs,
    Package,
    open_package,
    predict_needs,
    require_absent,
    require_resources,
)
from medgemma_export.recipe import Recipe
from medgemma_export.targets import Target, choose_target
from medgemma_quantization.activations import RANGES_NAME
from medgemma_quantization.budget import Sensitivity, check_floor
from medgemma_quantization.calibration import CalibrationSet, open_set
from medgemma_quantization.equalization import FACTORS_NAME, note_equalized
from medgemma_quantization.integer_hashes import hash_integers, write_hashes
from medgemma_quantization.methods import METHODS
from medgemma_quantization.plan import QuantPlan, compare_packed, make_plan, note_unreached
from medgemma_quantization.weights import QuantizedWeights, source_fingerprint
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import CheckpointError, EdgeError
from medgemma_runtime.manifest import (
    SCHEMA_VERSION,
    AdapterInfo,
    ComponentEntry,
    Manifest,
    ModelInfo,
    QuantizationSummary,
)

__all__ = ["Decision", "build", "decide"]

PLAN_NAME = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """All that is known before weights are rounded: what `--dry-run` shows.

    Attributes:
        checkpoint: Where weights come from.
        model: What they are for.
        plan: How each is stored.
        needs: What the export will take.
        samples: The calibration set, if there is one.
        predicted_kl: What a budget's plan is expected to cost predictions, nats, on that set; not measured.
    """

    checkpoint: Checkpoint
    model: ModelSpec
    plan: QuantPlan
    needs: Needs
    samples: CalibrationSet | None
    predicted_kl: float | None = None


def decide(recipe: Recipe, *, progress: Progress = lambda *step: None) -> Decision:
    """Open the checkpoint, describe its model, and decide how every weight is stored.

    No weight is read, but for a budget: what bits are worth is then measured, unless a file says it.

    Raises:
        EdgeError: If the checkpoint, the adapter, the scheme or the target do not fit each other.
    """
    checkpoint = open_checkpoint(recipe.model, revision=recipe.revision)
    if recipe.adapter is not None:
        checkpoint = merge_adapter(checkpoint, recipe.adapter)
    model = load_model(checkpoint, residual_scale=recipe.scheme.residual_scale)
    check_tensors(checkpoint, model.checkpoint_shapes())
    model = _describe(recipe, checkpoint)
    plan = make_plan(recipe.scheme, model.weights(), method=recipe.method)
    samples, expected = None, None
    if recipe.calibration is not None:
        check_chain(model)
        samples = open_set(
            recipe.calibration, images=takes(model, "pixel_values"), texts=takes(model, "input_ids")
        )
        unreached = unreached_weights(model, samples)
        check_ranges(plan, unreached)
        plan = note_unreached(plan, unreached)
        if recipe.budget is not None:
            high = make_plan(_target(recipe).scheme("int8"), model.weights())
            check_floor(plan, high, recipe.budget)
            mixed = mix_bits(
                plan,
                high,
                recipe.budget,
                describe=partial(_describe, recipe, checkpoint),
                measure=partial(_sensitivity, recipe, checkpoint, samples, progress),
                cuts_tables=_target(recipe).cuts_tables,
            )
            model, plan, expected = mixed.model, mixed.plan, mixed.predicted_kl
        if METHODS[recipe.method].factors is not None:
            plan = note_equalized(plan, reached_folds(model, plan, samples))
    _target(recipe).check(model, plan)
    return Decision(
        checkpoint=checkpoint,
        model=model,
        plan=plan,
        needs=predict_needs(
            plan,
            calibration_bytes=None if samples is None else recipe.calibration_bytes,
            is_traced=recipe.target == "executorch",
        ),
        samples=samples,
        predicted_kl=expected,
    )


def build(recipe: Recipe, *, progress: Progress) -> Artifact:
    """Export as the recipe says.

    Raises:
        EdgeError: If something about the request or the checkpoint is wrong; nothing finished is left then.
    """
    require_absent(recipe.out)
    decision = decide(recipe, progress=progress)
    checkpoint, model, plan = decision.checkpoint, decision.model, decision.plan
    stamps = _stamps(checkpoint)
    require_resources(recipe.out, decision.needs)
    progress("hash the checkpoint", 0, 1)
    checkpoint_sha256 = checkpoint.weights_sha256()
    samples_sha256 = decision.samples and decision.samples.sha256
    key = f"{checkpoint_sha256} {plan.sha256} {samples_sha256} {source_fingerprint(Path(__file__).parent)}"
    with open_package(recipe.out, key=key) as package:
        weights = _quantize(recipe, decision, package.weights, progress)
        for name in model.extra_files:
            (package.directory / name).write_bytes(checkpoint.content(name))
        for name in (FACTORS_NAME, RANGES_NAME):
            if (found := package.weights / name).exists():
                shutil.copy(found, package.directory)
        components, packed = _target(recipe).lower(
            model,
            weights,
            package.directory,
            progress=lambda done, total: progress(f"lower to {recipe.target}", done, total),
        )
        compare_packed(plan, packed)
        (package.directory / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")
        write_hashes(hash_integers(weights), package.directory)
        if _stamps(checkpoint) != stamps:
            raise CheckpointError(
                f"the weights of {checkpoint.id} changed while they were read; export again"
            )
        progress("hash the artifact", 0, 1)
        return package.publish(_manifest(recipe, decision, checkpoint_sha256, components, package))


def _target(recipe: Recipe) -> Target:
    return choose_target(
        recipe.target,
        units=recipe.units,
        delegate=recipe.delegate,
        separate_weights=recipe.separate_weights,
    )


def _quantize(recipe: Recipe, decision: Decision, directory: Path, progress: Progress) -> QuantizedWeights:
    """Make the integers, with samples or without."""
    checkpoint, model = decision.checkpoint, decision.model
    inputs = None
    if decision.samples is not None:
        from medgemma_export.calibration.inputs import model_inputs  # PyTorch

        progress("prepare calibration samples", 0, 1)
        inputs = model_inputs(decision.samples, model, checkpoint)
    return make_integers(
        model,
        decision.plan,
        model.reader(checkpoint),
        inputs,
        directory,
        method=recipe.method,
        memory_bytes=recipe.calibration_bytes,
        progress=progress,
    )


def _sensitivity(
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: CalibrationSet,
    progress: Progress,
    model: ModelSpec,
    plan: QuantPlan,
    high: QuantPlan,
) -> Sensitivity:
    """What 4 bits cost, from the recipe's file or measured."""
    from medgemma_export.calibration.inputs import model_inputs  # PyTorch
    from medgemma_export.calibration.sensitivity import open_sensitivity

    progress("hash the checkpoint", 0, 1)
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    return open_sensitivity(
        recipe.sensitivity,
        model=model,
        plan=plan,
        high=high,
        read=model.reader(checkpoint),
        samples=model_inputs(samples, model, checkpoint),
        work=recipe.out.parent,
        weights_sha256=checkpoint.weights_sha256(),
        samples_sha256=samples.sha256,
        method=recipe.method,
        memory_bytes=recipe.calibration_bytes,
        progress=progress,
    )


def _stamps(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Size and time of every file of weights: what is hashed must be what is read."""
    states = [path.stat() for path in checkpoint.weight_paths]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _describe(recipe: Recipe, checkpoint: Checkpoint, table_bounds: tuple[int, ...] = ()) -> ModelSpec:
    """The parts of a model that are asked for, their table cut at these rows."""
    scale = recipe.scheme.residual_scale
    model = load_model(checkpoint, residual_scale=scale, table_bounds=table_bounds)
    return _limit(_select(model, recipe.components), recipe.context)


def _select(model: ModelSpec, names: tuple[str, ...]) -> ModelSpec:
    known = {component.name: component for component in model.components}
    for name in names:
        if name not in known:
            raise EdgeError(f"{model.architecture} has no component {name!r}; it has {', '.join(known)}")
    return replace(model, components=tuple(known[name] for name in names or known))


def _limit(model: ModelSpec, context: int | None) -> ModelSpec:
    """The model with a shorter context, which costs a device less memory."""
    if context is None:
        return model
    if model.prompt is None:
        raise EdgeError(f"{model.architecture} answers no prompts, so it has no context; leave --context out")
    if context > model.prompt.context:
        raise EdgeError(
            f"a context of {context} tokens was asked for and the model has {model.prompt.context}; "
            "name that many or fewer"
        )
    return replace(model, prompt=replace(model.prompt, context=context))


def _manifest(
    recipe: Recipe,
    decision: Decision,
    checkpoint_sha256: str,
    components: dict[str, ComponentEntry],
    package: Package,
) -> Manifest:
    checkpoint, model, plan = decision.checkpoint, decision.model, decision.plan
    adapter = checkpoint.adapter
    return Manifest(
        schema_version=SCHEMA_VERSION,
        target=recipe.target,
        precision=plan.precision,
        model=ModelInfo(
            id=checkpoint.id,
            revision=checkpoint.revision,
            architecture=model.architecture,
            weights_sha256=checkpoint_sha256,
            licence=model.licence,
            intended_use=model.intended_use,
            adapter=None if adapter is None else AdapterInfo(name=adapter.name, sha256=adapter.sha256()),
        ),
        components=components,
        image=model.image if _takes("pixel_values", components) else None,
        text=model.text if "text" in components else None,
        prompt=model.prompt if "decoder" in components else None,
        similarity=model.similarity,
        quantization=QuantizationSummary(
            plan=PLAN_NAME,
            plan_sha256=plan.sha256,
            scheme=plan.scheme,
            method=plan.method,
            activations=plan.activations,
            bits_per_weight=plan.bits_per_weight,
            calibration=None if decision.samples is None else decision.samples.summary,
        ),
        build=package.build_info(),
        files=package.files(),
    )


def _takes(name: str, components: dict[str, ComponentEntry]) -> bool:
    return any(spec.name == name for entry in components.values() for spec in entry.inputs)
