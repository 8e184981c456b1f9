"""Holds an artifact against a reference bundle, one question at a time.

Pixels and tokens: does the runtime make the model inputs that the reference made? Then, on the *recorded*
inputs, so that a preprocessing error can neither hide nor fake another, one of

- lowering: the float artifact against the float reference,
- packing: the quantized artifact against the reference that carries the same integers,
- scheme: the quantized artifact against the float reference.

And last, end to end: from each decoded image and caption, through the runtime alone, to a zero-shot label.
Decoding a file (DICOM windows, EXIF) is the runtime's own work in the reference too, because transformers
does not do it; the runtime's tests hold it against pydicom and Pillow.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.bundle_record import BundleRecord
from medgemma_benchmarks.device import describe_device
from medgemma_benchmarks.gates import Gates, load_gates, worst
from medgemma_benchmarks.identity import describe_artifact
from medgemma_benchmarks.judge import Judge, compare_component, compare_zero_shot
from medgemma_benchmarks.layer_parity import check_layers
from medgemma_benchmarks.metrics import Choice
from medgemma_benchmarks.parity_inputs import ParityError, check_pixels, find_question, shown_names
from medgemma_benchmarks.parity_report import (
    ComponentParity,
    ImageParity,
    LayerParity,
    ParityReport,
    ZeroShotParity,
    describe_reference,
)
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil import Mode
from medgemma_runtime.backends.ort import OrtSession
from medgemma_runtime.command import Progress
from medgemma_runtime.embed import Embedder, NoDirectionError, logits, unit_length
from medgemma_runtime.manifest import Manifest, Similarity
from medgemma_runtime.text import load_tokenizer

__all__ = ["check_parity"]

_THUMBNAIL_PIXELS = 112
_INPUT = {"image": "pixel_values", "text": "input_ids"}
_OUTPUT = "pooler_output"


def check_parity(
    artifact: Artifact,
    bundle: ReferenceBundle,
    *,
    gates: Gates | None = None,
    threads: int | None = None,
    arithmetic: Mode | None = None,
    show_images: bool = False,
    per_layer: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Answer every question that this artifact and this reference allow.

    Args:
        artifact: An opened artifact.
        bundle: A reference of the same checkpoint; of the same plan, where its kind is `packing`.
        gates: The thresholds; None for those this package ships.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: How much of a Core ML program's fp16 is honoured; None for nothing, and for other targets.
        show_images: Name and show every image. Otherwise only samples are: an image given by the user may be
            of a patient, and so may its file name, so the report counts it and shows nothing of it.
        per_layer: Also compare the residual stream after every layer, and name the first that departs.
        progress: Called before every step.

    Raises:
        ParityError: If the reference is of another checkpoint or plan, was not computed in float32, or cannot
            answer any question here.
        EdgeError: If the runtime refuses an image or a caption, or a component fails.
    """
    manifest, record = artifact.manifest, bundle.record
    question = find_question(manifest, record)
    components = _shared_components(manifest, record)
    judge = Judge(question, manifest.precision, gates if gates is not None else load_gates())
    asks_labels = (
        question != "packing"
        and set(components) == set(_INPUT)
        and manifest.similarity is not None
        and len(record.labels) > 1  # of one label, every image has the right one
    )
    # A component's recorded inputs run once, and for packing once more in its exact form.
    passes = 2 if asks_labels or question == "packing" else 1
    steps = _Steps(components, record, passes, progress)
    names = shown_names(record, show_images=show_images)

    if "image" in components:
        check_pixels(manifest, bundle, "image", judge, show_images=show_images, step=steps.take)
    if "text" in components:
        _check_tokens(artifact, bundle, judge)

    outputs: dict[str, NDArray[Any]] = {}
    parities: dict[str, ComponentParity] = {}
    rounded: dict[str, ComponentParity] = {}
    for name in components:
        outputs[name] = _run_recorded(artifact, name, bundle, threads, arithmetic, steps)
        actual = outputs[name]
        if question == "packing":
            rounded[name] = compare_component(
                actual=actual, reference=bundle.arrays[f"{name}.rounded_output"]
            )
            actual = _run_recorded(artifact, name, bundle, threads, None, steps, is_exact=True)
        parities[name] = compare_component(actual=actual, reference=bundle.arrays[f"{name}.{_OUTPUT}"])
        judge.component(name, parities[name], rounded.get(name))

    zero_shot = images = None
    if asks_labels and manifest.similarity is not None:
        on_recorded = {name: _Embeddings.of(name, outputs[name]) for name in components}
        alone = _run_end_to_end(artifact, bundle, threads, arithmetic, steps)
        zero_shot = {
            where: _compare_labels(found, bundle, manifest.similarity, judge.gates.tie_margin_logits)
            for where, found in (("zero-shot", on_recorded), ("end-to-end", alone))
        }
        for where, result in zero_shot.items():
            judge.zero_shot(where, result, names)
        images = _image_rows(bundle, alone["image"].rows(), zero_shot["end-to-end"], show_images=show_images)

    layers: dict[str, tuple[LayerParity, ...]] = {}
    if per_layer:
        layers = check_layers(
            artifact, bundle, judge, threads=threads, arithmetic=arithmetic, progress=progress
        )
    return ParityReport(
        artifact=describe_artifact(artifact),
        reference=describe_reference(bundle),
        device=describe_device(threads=threads),
        arithmetic=arithmetic,
        question=question,
        tie_margin_logits=judge.gates.tie_margin_logits,
        verdict=worst(tuple(check.verdict for check in judge.checks)),
        checks=tuple(judge.checks),
        components=parities,
        rounded=rounded,
        zero_shot=zero_shot,
        labels=tuple(label.name for label in record.labels),
        captions=tuple(label.caption for label in record.labels),
        images=images,
        layers=layers,
    )


def _shared_components(manifest: Manifest, record: BundleRecord) -> tuple[str, ...]:
    recorded = record.programs if record.kind == "packing" else tuple(_INPUT)
    names = tuple(name for name in recorded if name in manifest.components)
    if not names:
        raise ParityError(
            f"the artifact has {', '.join(sorted(manifest.components))} and the reference holds "
            f"{' and '.join(recorded)}; compare an artifact that has one of these"
        )
    return names


class _Steps:
    """Counts the rows still to run, for progress."""

    def __init__(
        self, components: Sequence[str], record: BundleRecord, passes: int, progress: Progress | None
    ):
        rows = {"image": len(record.images), "text": len(record.labels)}
        self.total = passes * sum(rows[name] for name in components)
        # Images are preprocessed once more.
        self.total += rows["image"] if "image" in components else 0
        self.done = 0
        self.progress = progress

    def take(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += 1


def _check_tokens(artifact: Artifact, bundle: ReferenceBundle, judge: Judge) -> None:
    spec = artifact.manifest.text
    if spec is None:
        raise ParityError("the artifact has a text component and no text spec; export it again")
    captions = [label.caption for label in bundle.record.labels]
    ids = load_tokenizer(artifact.directory, spec).encode(captions)
    recorded = bundle.arrays["text.input_ids"]
    if ids.shape != recorded.shape:
        raise ParityError(
            f"the runtime makes {ids.shape[1]} ids of a caption and the reference recorded "
            f"{recorded.shape[1]}; record the reference of this model"
        )
    differs = ids != recorded
    odd = [label.name for label, row in zip(bundle.record.labels, differs, strict=True) if row.any()]
    judge.values("tokens", "text", {"differing_ids": int(np.count_nonzero(differs))}, detail=", ".join(odd))


def _run_recorded(
    artifact: Artifact,
    name: str,
    bundle: ReferenceBundle,
    threads: int | None,
    arithmetic: Mode | None,
    steps: _Steps,
    *,
    is_exact: bool = False,
) -> NDArray[Any]:
    """Outputs [N, D] of a component, or of its exact form, on the reference's own inputs."""
    rows = []
    # Closed before the next one opens: two towers never share the memory of a small device.
    session = (
        OrtSession(artifact, name, threads=threads, exact_program=bundle.program(name))
        if is_exact
        else open_session(artifact, name, threads=threads, arithmetic=arithmetic)
    )
    try:
        for row in bundle.arrays[f"{name}.{_INPUT[name]}"]:
            steps.take(f"running {name}{', exact form' if is_exact else ''}")
            # One row at a time, as the reference was: run-time quantization may see the whole batch.
            rows.append(session.run({_INPUT[name]: row[None]})[_OUTPUT])
    finally:
        session.close()
    return np.concatenate(rows)


class _Embeddings:
    """One component's embeddings of unit length, row by row; a row without a direction is NaN.

    No gate passes NaN; `causes` say why there is any.
    """

    def __init__(self, width: int):
        self._rows: list[NDArray[np.float32]] = []
        self._width = width
        self.causes: list[str] = []

    @classmethod
    def of(cls, component: str, outputs: NDArray[Any]) -> Self:
        """From a component's outputs [N, D]."""
        embeddings = cls(outputs.shape[1])
        for row in outputs:
            embeddings.add(partial(unit_length, row[None], component))
        return embeddings

    def add(self, embed: Callable[[], NDArray[np.float32]]) -> None:
        """Add what `embed` gives, [1, D]. Of its errors only a lack of direction is a row of NaN."""
        try:
            self._rows.append(embed())
        except NoDirectionError as error:
            self._rows.append(np.full((1, self._width), np.nan, dtype=np.float32))
            self.causes.append(str(error))

    def rows(self) -> NDArray[np.float32]:
        """All rows, [N, D]."""
        return np.concatenate(self._rows)


def _run_end_to_end(
    artifact: Artifact,
    bundle: ReferenceBundle,
    threads: int | None,
    arithmetic: Mode | None,
    steps: _Steps,
) -> dict[str, _Embeddings]:
    """Embeddings by component of the runtime alone, from images and captions."""
    record = bundle.record
    found = {name: _Embeddings(bundle.arrays[f"{name}.{_OUTPUT}"].shape[1]) for name in _INPUT}
    with Embedder(artifact, threads=threads, arithmetic=arithmetic) as embedder:
        for entry in record.images:
            steps.take("images end to end")
            found["image"].add(partial(embedder.embed_images, [bundle.rgb(entry)]))
        # Closed before the next one opens, as above.
        embedder.close()
        for label in record.labels:
            steps.take("captions end to end")
            found["text"].add(partial(embedder.embed_texts, [label.caption]))
    return found


def _compare_labels(
    found: Mapping[str, _Embeddings], bundle: ReferenceBundle, similarity: Similarity, tie_margin: float
) -> ZeroShotParity:
    """Labels by embeddings against the reference's; where they are undefined, the causes say why."""
    result = compare_zero_shot(
        actual=logits(found["image"].rows(), found["text"].rows(), similarity),
        reference=bundle.arrays["logits"],
        tie_margin=tie_margin,
    )
    causes = dict.fromkeys(found["image"].causes + found["text"].causes)
    return replace(result, undefined="; ".join(causes)) if causes else result


def _image_rows(
    bundle: ReferenceBundle, embeddings: NDArray[Any], zero_shot: ZeroShotParity, *, show_images: bool
) -> tuple[ImageParity, ...]:
    rows = []
    names = shown_names(bundle.record, show_images=show_images)
    labels = [label.name for label in bundle.record.labels]
    parity = compare_component(actual=embeddings, reference=bundle.arrays[f"image.{_OUTPUT}"])
    for index, (image, name) in enumerate(zip(bundle.record.images, names, strict=True)):
        choice: Choice | None = zero_shot.choices[index] if zero_shot.choices is not None else None
        wanted = int(np.argmax(zero_shot.reference_probabilities[index]))
        rows.append(
            ImageParity(
                name=name,
                modality=image.modality,
                label=image.label,
                source=image.source,
                licence=image.licence,
                thumbnail=_thumbnail(bundle.rgb(image)) if image.is_sample or show_images else None,
                cosine=parity.cosines[index] if parity.cosines is not None else None,
                predicted=labels[choice.actual] if choice is not None else None,
                probability=(
                    zero_shot.probabilities[index][choice.actual]
                    if choice is not None and zero_shot.probabilities is not None
                    else None
                ),
                reference_predicted=labels[wanted],
                reference_probability=zero_shot.reference_probabilities[index][wanted],
                margin=choice.margin if choice is not None else None,
                agreement=choice.verdict if choice is not None else None,
            )
        )
    return tuple(rows)


def _thumbnail(rgb: NDArray[np.uint8]) -> str:
    """A small PNG as a data URI, so that a report needs no other file."""
    small = Image.fromarray(rgb)
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    small.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
