"""What quantization costs: one row for each way to round the weights of one checkpoint, as JSON."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

__all__ = ["QuantizationReport", "QuantizationRow", "PredictionFidelity", "EmbeddingFidelity"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class PredictionFidelity:
    """How a quantized decoder predicts each token of texts, beside the float one on the same tokens before.

    Attributes:
        tokens: Predictions compared.
        kl_mean: Mean of KL(float || quantized), nats.
        kl_p99: What 99 % of the predictions stay below, nats.
        agreement: Share with the float model's first token; near ties count like all others.
        perplexity: Of the quantized model on the true tokens.
        reference_perplexity: Of the float model.
    """

    __pydantic_config__ = _STRICT

    tokens: int
    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    reference_perplexity: float


@dataclass(frozen=True, kw_only=True)
class EmbeddingFidelity:
    """How a quantized image tower embeds images, beside the float one.

    Attributes:
        images: Embeddings compared.
        cosine_mean: Mean cosine with the float tower's embedding.
        cosine_min: The lowest.
        agreement: Share of images with the float model's label among `labels`.
        labels: How many labels there are to choose from.
    """

    __pydantic_config__ = _STRICT

    images: int
    cosine_mean: float
    cosine_min: float
    agreement: float
    labels: int


@dataclass(frozen=True, kw_only=True)
class QuantizationRow:
    """One way to round all weights.

    Attributes:
        row: What was asked for, such as `gptq:int4`; no other row of the table has it.
        method: How integers are found, for people.
        storage: How many of the weights lie as what.
        is_emulated: Whether the row is another toolchain's rounding of the same weights.
        plan_sha256: Of the plan; None for an emulated row.
        bits_per_weight: Mean stored bits over all weights, scales included.
        size_bytes: Of all weights at that rate; an artifact adds its tokenizer and programs.
        predicted_kl: What the budget's choice expected, nats, on the calibration set; None where no budget
            chose.
        predictions: Of a decoder.
        embeddings: Of an image tower.
    """

    __pydantic_config__ = _STRICT

    row: str
    method: str
    storage: str
    is_emulated: bool
    plan_sha256: str | None
    bits_per_weight: float
    size_bytes: int
    predicted_kl: float | None = None
    predictions: PredictionFidelity | None = None
    embeddings: EmbeddingFidelity | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """A table over one checkpoint. Weights are rounded, activations stay float.

    Attributes:
        report: Tells this JSON from the other reports'.
        model_id: The checkpoint.
        revision: Of a hub id.
        weights_sha256: Of the checkpoint.
        calibration: Hash and counts of the set that methods were calibrated on.
        held_out: Hash and counts of the set that is measured on, which shares no sample with it.
        tokens_per_text: How many of each held-out text were predicted at most; None for all.
        versions: Of the packages whose code rounds.
        rows: In the order in which they were asked for.
    """

    __pydantic_config__ = _STRICT

    report: Literal["quantization"] = "quantization"
    model_id: str
    revision: str | None
    weights_sha256: str
    calibration: str
    held_out: str
    tokens_per_text: int | None
    versions: dict[str, str]
    rows: tuple[QuantizationRow, ...]
