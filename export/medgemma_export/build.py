"""From a checkpoint to an artifact. This is the file to read first.

checkpoint -> ModelSpec -> QuantPlan -> QuantizedWeights -> Target.lower -> Artifact
"""

import shutil
from dataclasses import dataclass, replace

from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint
from medgemma_export.models import ModelSpec, load_model
from medgemma_export.package import Package, open_package, require_absent, require_free_bytes
from medgemma_export.recipe import Recipe
from medgemma_export.targets import TARGETS
from medgemma_quantization.plan import QuantPlan, compare_packed, make_plan
from medgemma_quantization.weights import quantize_weights, source_fingerprint
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import CheckpointError, EdgeError
from medgemma_runtime.manifest import (
    SCHEMA_VERSION,
    ComponentEntry,
    Manifest,
    ModelInfo,
    QuantizationSummary,
)

__all__ = ["Decision", "build", "decide"]

PLAN_NAME = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """All that is known before a weight is read: what `--dry-run` shows."""

    checkpoint: Checkpoint
    model: ModelSpec
    plan: QuantPlan


def decide(recipe: Recipe) -> Decision:
    """Open the checkpoint, describe its model, and decide how every weight is stored.

    Raises:
        EdgeError: If the checkpoint, the scheme or the target do not fit each other.
    """
    checkpoint = open_checkpoint(recipe.model, revision=recipe.revision)
    model = load_model(checkpoint)
    check_tensors(checkpoint, model.checkpoint_shapes())
    model = _select(model, recipe.components)
    plan = make_plan(recipe.scheme, model.weights())
    TARGETS[recipe.target].check(model, plan)
    return Decision(checkpoint=checkpoint, model=model, plan=plan)


def build(recipe: Recipe, *, progress: Progress) -> Artifact:
    """Export as the recipe says.

    Raises:
        EdgeError: If something about the request or the checkpoint is wrong; nothing finished is left then.
    """
    require_absent(recipe.out)
    decision = decide(recipe)
    checkpoint, model, plan = decision.checkpoint, decision.model, decision.plan
    stamps = _stamps(checkpoint)
    # The integers are on disk twice for a while: as made, and as packed.
    require_free_bytes(recipe.out, 2 * sum(row.stored_bits for row in plan.rows) // 8)
    progress("hash the checkpoint", 0, 1)
    checkpoint_sha256 = checkpoint.weights_sha256()
    key = f"{checkpoint_sha256} {plan.sha256} {source_fingerprint()}"
    with open_package(recipe.out, key=key) as package:
        weights = quantize_weights(
            plan,
            model.reader(checkpoint),
            package.weights,
            progress=lambda done, total: progress("quantize", done, total),
        )
        components, packed = TARGETS[recipe.target].lower(
            model,
            weights,
            package.directory,
            progress=lambda done, total: progress(f"lower to {recipe.target}", done, total),
        )
        compare_packed(plan, packed)
        for name in model.extra_files:
            shutil.copyfile(checkpoint.file(name), package.directory / name)
        (package.directory / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")
        if _stamps(checkpoint) != stamps:
            raise CheckpointError(
                f"the weight files of {checkpoint.id} changed while they were read; export again"
            )
        progress("hash the artifact", 0, 1)
        return package.publish(_manifest(recipe, decision, checkpoint_sha256, components, package))


def _stamps(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Size and time of every weight file: what is hashed must be what is read."""
    states = [(checkpoint.directory / name).stat() for name in checkpoint.weight_files]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _select(model: ModelSpec, names: tuple[str, ...]) -> ModelSpec:
    known = {component.name: component for component in model.components}
    for name in names:
        if name not in known:
            raise EdgeError(f"{model.architecture} has no component {name!r}; it has {', '.join(known)}")
    return replace(model, components=tuple(known[name] for name in names or known))


def _manifest(
    recipe: Recipe,
    decision: Decision,
    checkpoint_sha256: str,
    components: dict[str, ComponentEntry],
    package: Package,
) -> Manifest:
    checkpoint, model, plan = decision.checkpoint, decision.model, decision.plan
    return Manifest(
        schema_version=SCHEMA_VERSION,
        target=recipe.target,
        precision=recipe.scheme.precision,
        model=ModelInfo(
            id=checkpoint.id,
            revision=checkpoint.revision,
            architecture=model.architecture,
            weights_sha256=checkpoint_sha256,
            licence=model.licence,
            intended_use=model.intended_use,
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
            calibration=None,
        ),
        build=package.build_info(),
        files=package.files(),
    )


def _takes(name: str, components: dict[str, ComponentEntry]) -> bool:
    return any(spec.name == name for entry in components.values() for spec in entry.inputs)
