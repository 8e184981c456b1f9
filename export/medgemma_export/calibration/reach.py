"""Which parts of a model a calibration set reaches: known from names, before anything is computed."""

from collections.abc import Sequence

from medgemma_export.calibration.fold_ops import planned_folds
from medgemma_export.models import ModelSpec
from medgemma_export.models.spec import Component
from medgemma_quantization.calibration import CalibrationSet
from medgemma_quantization.folds import Fold
from medgemma_quantization.plan import QuantPlan
from medgemma_runtime.errors import EdgeError

__all__ = ["check_chain", "check_ranges", "reached_folds", "takes", "takes_pixels", "unreached_weights"]


def takes(model: ModelSpec, name: str) -> bool:
    """Whether a component has an input of this name."""
    return any(spec.name == name for component in model.components for spec in component.inputs)


def takes_pixels(component: Component) -> bool:
    """Whether a component sees images; the others read what becomes of texts."""
    return any(spec.name == "pixel_values" for spec in component.inputs)


def unreached_weights(model: ModelSpec, samples: CalibrationSet) -> list[str]:
    """The weights that only components without samples ask for."""
    images = any(sample.image is not None for sample in samples.samples)
    # An image for a model with prompts comes with a question.
    texts = model.prompt is not None or any(sample.text is not None for sample in samples.samples)
    reached = {
        spec.name
        for component in model.components
        if (images if takes_pixels(component) else texts)
        for spec in component.weights()
    }
    return [spec.name for spec in model.weights() if spec.name not in reached]


def reached_folds(model: ModelSpec, plan: QuantPlan, samples: CalibrationSet) -> tuple[Fold, ...]:
    """The folds whose activations the set shows; the others get no factors."""
    unreached = set(unreached_weights(model, samples))
    return tuple(fold for fold in planned_folds(model, plan) if not unreached.intersection(fold.readers))


def check_chain(model: ModelSpec) -> None:
    """Refuse to calibrate components whose inputs others make that are left out.

    Raises:
        EdgeError: If `image_features` or `inputs_embeds` would be missing.
    """
    made = {spec.name for component in model.components for spec in component.outputs}
    for component in model.components:
        for name in ("image_features", "inputs_embeds"):
            if any(spec.name == name for spec in component.inputs) and name not in made:
                raise EdgeError(
                    f"component {component.name} cannot be calibrated without the one that makes its {name}; "
                    "leave --components out"
                )


def check_ranges(plan: QuantPlan, unreached: Sequence[str]) -> None:
    """Refuse static ranges where no sample shows what a matrix multiplies.

    Raises:
        EdgeError: Naming the first such matrix.
    """
    if plan.ranges is None:
        return
    rows = [plan.by_name[name] for name in unreached]
    missing = [row.name for row in rows if row.role == "linear" and not row.storage.is_float]
    if missing:
        raise EdgeError(
            f"no calibration sample reaches {missing[0]} ({len(missing)} matrices in all), and a static "
            "range needs one; add such samples, leave the component out by --components, or say "
            'activations = "int8-dynamic"'
        )
