"""How every comparison with a reference begins: do the two belong together, and are the pixels equal?"""

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.bundle_record import BundleRecord
from medgemma_benchmarks.gates import Question, Subject
from medgemma_benchmarks.judge import Judge
from medgemma_benchmarks.metrics import max_abs_error
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.images import normalize, resize
from medgemma_runtime.manifest import ImageSpec, Manifest

__all__ = [
    "ParityError",
    "find_question",
    "residual_scale",
    "features_to_give",
    "features_to_compare",
    "shown_names",
    "check_pixels",
]


class ParityError(EdgeError):
    """An artifact and a reference that cannot be compared."""


def find_question(manifest: Manifest, record: BundleRecord) -> Question:
    """Which of lowering, packing and scheme an artifact and a reference answer.

    Raises:
        ParityError: If the reference is of another checkpoint or plan, or was not computed in float32.
    """
    model = manifest.model
    if model.weights_sha256 != record.weights_sha256:
        raise ParityError(
            f"the artifact was made from {model.id} with weights {model.weights_sha256[:12]} and the "
            f"reference from {record.model_id} with weights {record.weights_sha256[:12]}; "
            "record a reference of the artifact's checkpoint"
        )
    if record.producer.dtype != "float32":
        raise ParityError(
            f"the reference was computed in {record.producer.dtype}, whose own error is as large as those "
            "that the gates look for; record the reference in float32"
        )
    if record.kind == "packing":
        if manifest.precision not in ("int8", "int4"):
            raise ParityError(
                f"the artifact is {manifest.precision}, which packs no integers, and the reference is of "
                "kind packing; compare it with a float reference"
            )
        if manifest.quantization.plan_sha256 != record.plan_sha256:
            raise ParityError(
                f"the artifact packs plan {manifest.quantization.plan_sha256[:12]} and the packing reference "
                f"carries plan {str(record.plan_sha256)[:12]}; record the packing reference of this artifact"
            )
        return "packing"
    return "lowering" if manifest.precision == "fp32" else "scheme"


def residual_scale(artifact: Artifact) -> float:
    """What an artifact's decoder and the image features for it are multiplied by, a power of two."""
    plan = artifact.path(artifact.manifest.quantization.plan).read_text(encoding="utf-8")
    return float(json.loads(plan)["residual_scale"])


def features_to_give(artifact: Artifact, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """A reference's image features, [F, D], as the artifact's `embed` takes them.

    An ExecuTorch artifact's are [F, D + 1]: the last column is how many tokens of the same image follow.
    """
    scaled = features * np.float32(residual_scale(artifact))
    if artifact.manifest.target != "executorch":
        return scaled
    return np.concatenate([scaled, _following(artifact, len(features))], axis=1)


def features_to_compare(artifact: Artifact, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an artifact's `vision` gives for whole images, as a reference has it: [F, D], unscaled.

    Raises:
        ParityError: If the last column of an ExecuTorch artifact's, [F, D + 1], is not what it should be.
    """
    if artifact.manifest.target == "executorch":
        features, counts = features[:, :-1], features[:, -1:]
        if not np.array_equal(counts, _following(artifact, len(features))):
            raise ParityError(
                "the last column of image features must say how many tokens of the same image follow, and it "
                f"begins with {', '.join(f'{count:g}' for count in counts[:3, 0])}; export again"
            )
    return features / np.float32(residual_scale(artifact))


def _following(artifact: Artifact, count: int) -> NDArray[np.float32]:
    """How many tokens of the same image follow each of so many, [count, 1]."""
    assert artifact.manifest.prompt is not None  # there is one wherever there are image features
    tokens = artifact.manifest.prompt.tokens_per_image
    return (tokens - 1 - np.arange(count) % tokens).astype(np.float32)[:, None]


def shown_names(record: BundleRecord, *, show_images: bool) -> list[str]:
    """What the report calls each image: its name, or its number in the bundle."""
    return [
        image.name if image.is_sample or show_images else f"image {number}"
        for number, image in enumerate(record.images, start=1)
    ]


def check_pixels(
    manifest: Manifest,
    bundle: ReferenceBundle,
    component: Subject,
    judge: Judge,
    *,
    show_images: bool,
    step: Callable[[str], None],
) -> None:
    """Judge whether the runtime makes the pixels that the reference's own processor made.

    Args:
        manifest: Of the artifact.
        bundle: A reference with images.
        component: The one that takes pixels.
        judge: Where the verdict goes.
        show_images: Name every image, not samples alone.
        step: Called before each image.

    Raises:
        ParityError: If the two make images of different sizes.
    """
    record, spec, theirs = bundle.record, manifest.image, bundle.record.image
    if spec is None or theirs is None:
        raise ParityError(f"the artifact has {component!r} and no image spec; export it again")
    if (spec.height, spec.width) != (theirs.height, theirs.width):
        raise ParityError(
            f"the artifact takes images of {spec.height}x{spec.width} and the reference was recorded at "
            f"{theirs.height}x{theirs.width}; record the reference of this model"
        )
    differing, largest, odd = 0, 0.0, []
    names, pixel_values = shown_names(record, show_images=show_images), f"{component}.pixel_values"
    for image, name, recorded in zip(record.images, names, bundle.arrays[pixel_values], strict=True):
        step("preprocessing images")
        resized = resize(bundle.rgb(image), spec)
        pixels = normalize(resized, spec)
        count = int(np.count_nonzero(resized != _as_uint8(recorded, theirs)))
        largest = max(largest, max_abs_error(actual=pixels, reference=recorded))
        differing += count
        if count:
            odd.append(name)
    detail = "; ".join(filter(None, [", ".join(odd), _spec_difference(spec, theirs)]))
    judge.values("pixels", component, {"differing_uint8": differing, "max_abs_error": largest}, detail=detail)


def _as_uint8(pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """Undo a reference's normalization: [3, H, W] float to the [H, W, 3] uint8 it came from."""
    mean, std = (np.array(x, dtype=np.float64)[:, None, None] for x in (spec.mean, spec.std))
    levels = np.rint((pixels.astype(np.float64) * std + mean) / spec.rescale)
    return np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _spec_difference(artifact: ImageSpec, reference: ImageSpec) -> str:
    fields = ("fit", "resample", "antialias", "rounding", "rescale", "mean", "std")
    return ", ".join(
        f"{field}: artifact {getattr(artifact, field)}, reference {getattr(reference, field)}"
        for field in fields
        if getattr(artifact, field) != getattr(reference, field)
    )
