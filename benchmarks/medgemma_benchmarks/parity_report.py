"""What a parity check found: plain data that goes to JSON and back."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.bundle_record import BundleKind, StageTiming
from medgemma_benchmarks.device import DeviceDescription
from medgemma_benchmarks.gates import Question, Verdict
from medgemma_benchmarks.identity import ArtifactDescription
from medgemma_benchmarks.metrics import Choice
from medgemma_runtime.backends.mil import Mode

__all__ = [
    "ParityReport",
    "ReferenceDescription",
    "Check",
    "ComponentParity",
    "ZeroShotParity",
    "ImageParity",
    "LayerParity",
    "PredictionParity",
    "PromptParity",
    "describe_reference",
]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class ReferenceDescription:
    """Which reference it was held against; `bundle_sha256` is the hash of `bundle.json`."""

    __pydantic_config__ = _STRICT

    kind: BundleKind
    bundle_sha256: str
    device: str
    device_name: str
    dtype: str
    attention: str
    image_processor: str
    tokenizer: str
    versions: dict[str, str]
    timings: dict[str, StageTiming]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One value against one gate.

    Attributes:
        question: What was asked.
        subject: As a gate's `components`.
        metric: The value's name.
        value: The value; None when it could not be computed, which fails.
        limit: As text, such as `≤ 0.0001`.
        verdict: Of this gate.
        detail: What stands out, such as the images that differ.
        reason: Why the limit is where it is.
    """

    __pydantic_config__ = _STRICT

    question: Question
    subject: str
    metric: str
    value: float | None
    limit: str
    verdict: Verdict
    detail: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ComponentParity:
    """One component's outputs on the recorded inputs.

    Attributes:
        rows: Images or captions; of `vision` the image tokens.
        cosines: One for each row.
        cosine_min: The lowest of them.
        cosine_mean: Their mean.
        max_abs_error: Largest difference of one element.
        relative_error: Length of the difference over length of the reference.
        sqnr_db: In dB; None when nothing differs at all.
        undefined: Why the values are None, such as NaN in the outputs; None when they are not.
    """

    __pydantic_config__ = _STRICT

    rows: int
    cosines: tuple[float, ...] | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    sqnr_db: float | None = None
    undefined: str | None


@dataclass(frozen=True, kw_only=True)
class ZeroShotParity:
    """Labels given to images.

    Attributes:
        reference_probabilities: [N][M] softmax over the labels, of the reference's logits.
        probabilities: The same of the artifact's; None when undefined.
        choices: One for each image.
        agreement: Share of images with the reference's label, without near ties; None when all are.
        near_ties: How many were left out.
        near_tie_share: Their share of all images.
        logit_error: Largest difference of one logit.
        kl_mean: Mean over images of KL(reference || artifact), nats.
        undefined: Why the values are None, if they are.
    """

    __pydantic_config__ = _STRICT

    reference_probabilities: tuple[tuple[float, ...], ...]
    probabilities: tuple[tuple[float, ...], ...] | None = None
    choices: tuple[Choice, ...] | None = None
    agreement: float | None = None
    near_ties: int
    near_tie_share: float | None = None
    logit_error: float | None = None
    kl_mean: float | None = None
    undefined: str | None


@dataclass(frozen=True, kw_only=True)
class ImageParity:
    """One image, end to end.

    Attributes:
        name: In the bundle, or `image N`, its number there, where it is not shown.
        modality: Such as `CT`.
        label: The label that fits it, where known.
        source: Package and file.
        licence: Of the image.
        thumbnail: A small PNG as a data URI; None where the image is not shown.
        cosine: Of the artifact's embedding with the reference's.
        predicted: The artifact's label.
        probability: Its softmax probability.
        reference_predicted: The reference's label.
        reference_probability: Its softmax probability.
        margin: Logits between the reference's first and second label.
        agreement: Verdict on the label.
    """

    __pydantic_config__ = _STRICT

    name: str
    modality: str
    label: str | None
    source: str
    licence: str
    thumbnail: str | None
    cosine: float | None
    predicted: str | None
    probability: float | None
    reference_predicted: str
    reference_probability: float
    margin: float | None
    agreement: Literal["SAME", "NEAR_TIE", "DIFFERENT"] | None


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """How far the residual stream before the first layer or after one, or the component's result, is off.

    Attributes:
        name: `embeddings`, `residual_N` after layer N, or the result's own, such as `logits`.
        is_seen: Whether the engine shows it; what stays inside a delegate's call is not seen.
        is_result: Whether it is what the component gives: the last row, where the reference holds it.
        sqnr_db: Signal to noise; None where not seen, and where there is no noise at all.
        cosine_min: The lowest of all tokens.
        max_abs_error: Of one element, at a residual scale of 1.
        relative_error: Length of the difference over the length of the reference.
        undefined: Why the values are None, if they are.
    """

    __pydantic_config__ = _STRICT

    name: str
    is_seen: bool
    is_result: bool = False
    sqnr_db: float | None = None
    cosine_min: float | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    undefined: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictionParity:
    """How an artifact predicts the tokens of recorded texts, given all tokens before.

    Attributes:
        tokens: Predictions compared.
        kl_mean: Mean of KL(reference || artifact), nats.
        kl_p99: What 99 % of the predictions stay below, nats.
        max_abs_error: Largest difference of one logit.
        max_standardized_error: Largest difference of one logit, in standard deviations of the reference's
            logits at the same position.
        agreement: Share with the reference's first token, without near ties; None when all are.
        near_ties: How many were left out.
        near_tie_share: Their share of all.
        perplexity: Of the artifact on the recorded tokens.
        reference_perplexity: Of the reference.
        perplexity_ratio: The one over the other.
        undefined: Why the values are None, if they are.
    """

    __pydantic_config__ = _STRICT

    tokens: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    max_abs_error: float | None = None
    max_standardized_error: float | None = None
    agreement: float | None = None
    near_ties: int = 0
    near_tie_share: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    undefined: str | None


@dataclass(frozen=True, kw_only=True)
class PromptParity:
    """One prompt, predicted token by token: its name in the bundle, or `prompt N` where it is not shown."""

    __pydantic_config__ = _STRICT

    name: str
    source: str
    licence: str
    parity: PredictionParity


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that one artifact against one reference showed.

    Attributes:
        report: Tells this JSON from the latency report's.
        artifact: Which artifact.
        reference: Which reference, on which device and in which dtype.
        device: Where the artifact ran.
        question: `lowering`, `packing` or `scheme`.
        tie_margin_logits: Below this distance of two of the reference's logits its preference is a near tie.
        verdict: The worst of all checks.
        checks: Every gate.
        components: By component; for packing, of its exact form.
        rounded: For packing, of the shipped program against the reference that rounds as it does.
        zero_shot: `zero-shot` from the recorded inputs, `end-to-end` from images and captions; None
            when the artifact lacks a tower, when there is one label to choose from, and for packing, whose
            labels are the scheme's concern.
        labels: Names, in the order of the columns.
        captions: What the text tower read for each.
        images: One row an image; None when `zero_shot` is.
        arithmetic: How much of a Core ML program's fp16 was honoured; None for nothing.
        predictions: Of a model that answers, by `decoder` (every token by itself, through the caches) and
            `prefill` (each prompt read at once, and what follows it).
        prompts: Of a model that answers, one row a prompt.
        layers: By component, the states between its layers in order; empty unless they were asked for.
    """

    __pydantic_config__ = _STRICT

    report: Literal["parity"] = "parity"
    artifact: ArtifactDescription
    reference: ReferenceDescription
    device: DeviceDescription
    question: Question
    tie_margin_logits: float
    verdict: Verdict
    checks: tuple[Check, ...]
    components: dict[str, ComponentParity]
    rounded: dict[str, ComponentParity]
    zero_shot: dict[str, ZeroShotParity] | None
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    images: tuple[ImageParity, ...] | None
    arithmetic: Mode | None = None
    predictions: dict[str, PredictionParity] = field(default_factory=dict)
    prompts: tuple[PromptParity, ...] = ()
    layers: dict[str, tuple[LayerParity, ...]] = field(default_factory=dict)

    @property
    def near_ties(self) -> int:
        """Images left undecided: of the two ways to a label, the one with more of them counts."""
        return max((result.near_ties for result in (self.zero_shot or {}).values()), default=0)


def describe_reference(bundle: ReferenceBundle) -> ReferenceDescription:
    """The identity of a reference and what computed it."""
    record, producer = bundle.record, bundle.record.producer
    return ReferenceDescription(
        kind=record.kind,
        bundle_sha256=bundle.sha256,
        device=producer.device,
        device_name=producer.device_name,
        dtype=producer.dtype,
        attention=producer.attention,
        image_processor=producer.image_processor,
        tokenizer=producer.tokenizer,
        versions=producer.versions,
        timings=record.timings,
    )
