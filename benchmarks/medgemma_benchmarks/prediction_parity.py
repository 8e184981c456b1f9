"""Holds an artifact that answers against a generative reference, one question at a time.

Pixels and tokens: does the runtime make the model inputs that the reference made? Then, on the *recorded*
inputs, so that no error can hide or fake another:

- vision: the image features;
- decoder: every token of the recorded texts by itself, through the caches, as an answer is written;
- prefill: each whole prompt at once, and the one prediction that follows it.

Against a float artifact this asks whether the lowering is right, against integers whether the scheme is good
enough.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.bundle_record import ReferencePrompt
from medgemma_benchmarks.device import describe_device
from medgemma_benchmarks.gates import Gates, load_gates, worst
from medgemma_benchmarks.identity import describe_artifact
from medgemma_benchmarks.judge import Judge, compare_component
from medgemma_benchmarks.layer_parity import check_layers
from medgemma_benchmarks.parity_inputs import (
    ParityError,
    check_pixels,
    features_to_compare,
    features_to_give,
    find_question,
)
from medgemma_benchmarks.parity_report import (
    ComponentParity,
    LayerParity,
    ParityReport,
    PredictionParity,
    PromptParity,
    describe_reference,
)
from medgemma_benchmarks.teacher_forced import (
    Prediction,
    compare_predictions,
    predict,
    reference_logits,
    summarize,
)
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil import Mode
from medgemma_runtime.command import Progress
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import NotFiniteError
from medgemma_runtime.manifest import PromptSpec
from medgemma_runtime.prompt import Image, Message, Text, image_blocks, load_prompt_tokenizer

__all__ = ["check_predictions", "RecordedPrompt", "recorded_prompts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedPrompt:
    """A prompt of a bundle with its part of the arrays.

    Attributes:
        prompt: What it is.
        ids: [S] int64.
        hidden_states: [T, D] float32, the reference's at the last T + 1 tokens but the last.
        image_features: [F, D] float32, the reference's, of its images in order; None without images.
    """

    prompt: ReferencePrompt
    ids: NDArray[np.int64]
    hidden_states: NDArray[np.float32]
    image_features: NDArray[np.float32] | None


def recorded_prompts(bundle: ReferenceBundle) -> Iterator[RecordedPrompt]:
    """The prompts of a generative reference, in order."""
    arrays, record = bundle.arrays, bundle.record
    order = {image.name: row for row, image in enumerate(record.images)}
    features = np.split(arrays["vision.image_features"], len(order)) if order else []
    token, prediction = 0, 0
    for prompt in record.prompts:
        seen = [features[order[name]] for name in prompt.images]
        yield RecordedPrompt(
            prompt=prompt,
            ids=arrays["decoder.input_ids"][token : token + prompt.tokens],
            hidden_states=arrays["decoder.hidden_states"][prediction : prediction + prompt.predictions],
            image_features=np.concatenate(seen) if seen else None,
        )
        token, prediction = token + prompt.tokens, prediction + prompt.predictions


def check_predictions(
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
    """Answer every question that an artifact and a generative reference allow.

    Args:
        artifact: An opened artifact that answers.
        bundle: A generative reference of the same checkpoint.
        gates: The thresholds; None for those this package ships.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: How much of a Core ML program's fp16 is honoured; None for nothing, and for other targets.
        show_images: Name every image and prompt. Otherwise only samples are named.
        per_layer: Also compare the residual stream after every layer, and name the first that departs.
        progress: Called before every step.

    Raises:
        ParityError: If artifact and reference do not belong together, or the artifact does not answer.
    """
    manifest, record = artifact.manifest, bundle.record
    question = find_question(manifest, record)
    needed = {"embed", "decoder"} | ({"vision"} if record.images else set())
    if manifest.prompt is None or not needed <= manifest.components.keys():
        raise ParityError(
            f"the artifact has {', '.join(sorted(manifest.components))} and the reference holds prompts "
            f"for {', '.join(sorted(needed))}; compare an artifact that has all of these"
        )
    judge = Judge(question, manifest.precision, gates if gates is not None else load_gates())
    steps = _Steps(bundle, progress)
    components: dict[str, ComponentParity] = {}
    if record.images:
        check_pixels(manifest, bundle, "vision", judge, show_images=show_images, step=steps.take)
        components["vision"] = _run_vision(artifact, bundle, threads, arithmetic, steps)
    _check_tokens(artifact, manifest.prompt, bundle, judge, show_all=show_images)
    for name, parity in components.items():
        judge.component(name, parity, None)
    predictions, prompts = _run_decoder(
        artifact,
        manifest.prompt,
        bundle,
        threads,
        arithmetic,
        steps,
        judge.gates.tie_margin_logits,
        show_all=show_images,
    )
    for name, found in predictions.items():
        judge.predictions(name, found)
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
        components=components,
        rounded={},
        zero_shot=None,
        labels=(),
        captions=(),
        images=None,
        predictions=predictions,
        prompts=prompts,
        layers=layers,
    )


class _Steps:
    """Counts images and predictions still to make, for progress."""

    def __init__(self, bundle: ReferenceBundle, progress: Progress | None):
        prompts = bundle.record.prompts
        self.total = 2 * len(bundle.record.images) + sum(prompt.predictions + 1 for prompt in prompts)
        self.done, self.progress = 0, progress

    def take(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += 1


def _run_vision(
    artifact: Artifact,
    bundle: ReferenceBundle,
    threads: int | None,
    arithmetic: Mode | None,
    steps: _Steps,
) -> ComponentParity:
    """Features of the reference's own pixels, one image at a time as the reference was."""
    rows = []
    with closing(open_session(artifact, "vision", threads=threads, arithmetic=arithmetic)) as session:
        for pixels in bundle.arrays["vision.pixel_values"]:
            steps.take("running vision")
            rows.append(session.run({"pixel_values": pixels[None]})["image_features"])
    return compare_component(
        actual=features_to_compare(artifact, np.concatenate(rows)),
        reference=bundle.arrays["vision.image_features"],
    )


def _check_tokens(
    artifact: Artifact, spec: PromptSpec, bundle: ReferenceBundle, judge: Judge, *, show_all: bool
) -> None:
    tokenizer = load_prompt_tokenizer(artifact.directory, spec)
    differing, odd = 0, []
    for number, recorded in enumerate(recorded_prompts(bundle), start=1):
        prompt, text = recorded.prompt, tokenizer.encode_text(recorded.prompt.text).ids
        if prompt.question is not None:
            images = tuple(Image() for _ in prompt.images)
            message = Message(role="user", parts=(*images, Text(prompt.question)))
            asked = tokenizer.encode([message], image_count=len(prompt.images)).ids
            text = np.concatenate((asked, text[1:]))  # the answer without a <bos> of its own
        shared = min(len(text), len(recorded.ids))
        count = int(np.count_nonzero(text[:shared] != recorded.ids[:shared]))
        count += max(len(text), len(recorded.ids)) - shared
        differing += count
        if count:
            odd.append(_shown_name(prompt, number, show_all=show_all))
    judge.values("tokens", "decoder", {"differing_ids": differing}, detail=", ".join(odd))


def _run_decoder(
    artifact: Artifact,
    spec: PromptSpec,
    bundle: ReferenceBundle,
    threads: int | None,
    arithmetic: Mode | None,
    steps: _Steps,
    tie_margin: float,
    *,
    show_all: bool,
) -> tuple[dict[str, PredictionParity], tuple[PromptParity, ...]]:
    """All prompts token by token and at once; what an artifact cannot compute is undefined, and why."""
    head = bundle.arrays["decoder.head"]
    alone: list[Prediction] = []
    at_once: list[Prediction] = []
    rows: list[PromptParity] = []
    with (
        closing(open_session(artifact, "embed", threads=threads, arithmetic=arithmetic)) as embed,
        closing(open_session(artifact, "decoder", threads=threads, arithmetic=arithmetic)) as session,
    ):
        decoder = Decoder(embed, session, spec)
        for number, recorded in enumerate(recorded_prompts(bundle), start=1):
            prompt, ids, features = recorded.prompt, recorded.ids, recorded.image_features
            if features is not None:
                features = features_to_give(artifact, features)
            blocks = image_blocks(ids, spec.image_id)
            try:
                written = predict(
                    decoder, ids, given=prompt.given_tokens, image_blocks=blocks, image_features=features
                )
                predictions = compare_predictions(
                    actual=_counted(written, steps),
                    reference=reference_logits(recorded.hidden_states, head),
                    ids=ids[prompt.given_tokens :],
                    tie_margin=tie_margin,
                )
                steps.take("reading prompts at once")
                last = predict(decoder, ids, given=len(ids) - 1, image_blocks=blocks, image_features=features)
                at_once += compare_predictions(
                    actual=last,
                    reference=reference_logits(recorded.hidden_states[-1:], head),
                    ids=ids[-1:],
                    tie_margin=tie_margin,
                )
            except NotFiniteError as error:
                undefined = PredictionParity(tokens=len(alone), undefined=str(error))
                return {"decoder": undefined, "prefill": undefined}, tuple(rows)
            alone += predictions
            rows.append(
                PromptParity(
                    name=_shown_name(prompt, number, show_all=show_all),
                    source=prompt.source,
                    licence=prompt.licence,
                    parity=summarize(predictions),
                )
            )
    return {"decoder": summarize(alone), "prefill": summarize(at_once)}, tuple(rows)


def _counted(rows: Iterator[NDArray[np.float32]], steps: _Steps) -> Iterator[NDArray[np.float32]]:
    for row in rows:
        steps.take("predicting token by token")
        yield row


def _shown_name(prompt: ReferencePrompt, number: int, *, show_all: bool) -> str:
    return prompt.name if prompt.is_sample or show_all else f"prompt {number}"
