"""A table of what quantization costs one checkpoint: every row a plan, measured on unseen samples.

Only weights are rounded; activations stay float, so that a row says what its integers are worth on any
target. A decoder is measured by its predictions on the held-out notes, an image tower by its embeddings of
the held-out images. Rows that are there already are kept: an interrupted table goes on where it stopped.
"""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np

from medgemma_benchmarks.quantization_report import (
    EmbeddingFidelity,
    PredictionFidelity,
    QuantizationReport,
    QuantizationRow,
)
from medgemma_benchmarks.results import read_result, to_json
from medgemma_export.calibration.calibrate import ModelInput
from medgemma_export.calibration.fidelity import embed_images, measure
from medgemma_export.calibration.inputs import caption_inputs, model_inputs
from medgemma_export.calibration.integers import make_integers
from medgemma_export.calibration.mixed_bits import mix_bits
from medgemma_export.calibration.peer_rounding import PEERS, PeerName, peer_reader
from medgemma_export.calibration.reach import takes, unreached_weights
from medgemma_export.calibration.sensitivity import open_sensitivity
from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint
from medgemma_export.models import ModelSpec, load_model
from medgemma_quantization.budget import Budget, Sensitivity
from medgemma_quantization.calibration import CalibrationSet, held_out_set, open_set
from medgemma_quantization.methods import METHODS, MethodName
from medgemma_quantization.plan import QuantPlan, make_plan, note_unreached
from medgemma_quantization.scheme import SCHEMES, Scheme, load_scheme
from medgemma_quantization.weights import (
    QuantizedWeights,
    ReadWeight,
    source_fingerprint,
)
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.files import replacing
from medgemma_runtime.sample_images import LABELS

__all__ = ["RowRequest", "parse_row", "tabulate", "DEFAULT_ROWS"]

DEFAULT_ROWS: tuple[str, ...] = (
    "rtn:int4",
    "onnxruntime-int4",
    "llama.cpp-q4_0",
    "onnxruntime-uint4",
    "search:int4",
    "gptq:int4",
    "gptq:4.6",
    "gptq:5",
    "gptq:5.5",
    "gptq:7.5",
    "rtn:int8",
)

_TOOLS = ("medgemma-edge", "numpy", "torch", "gguf", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class RowRequest:
    """One row: a method and a scheme, or a peer.

    Attributes:
        row: As it was written.
        method: Of ours, or None.
        scheme: What a method of ours rounds to, or None.
        bits: Mean bits per weight that 8-bit weights among those of the scheme may bring it to, or None.
        peer: Another toolchain's rounding, or None.
    """

    row: str
    method: MethodName | None = None
    scheme: Scheme | None = None
    bits: float | None = None
    peer: PeerName | None = None


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What all rows share."""

    model: ModelSpec
    checkpoint: Checkpoint
    weights_sha256: str
    calibration: CalibrationSet
    samples: list[ModelInput]
    held_out: list[ModelInput]
    out: Path
    work: Path
    memory_bytes: int

    @property
    def read(self) -> ReadWeight:
        return self.model.reader(self.checkpoint)

    @property
    def is_decoder(self) -> bool:
        return self.model.prompt is not None


def parse_row(text: str) -> RowRequest:
    """`METHOD:SCHEME`, the scheme a name, a TOML file or mean bits per weight; or the name of a peer.

    Raises:
        EdgeError: If it is neither, or the scheme has no integers.
    """
    if text in PEERS:
        [peer] = [name for name in get_args(PeerName) if name == text]
        return RowRequest(row=text, peer=peer)
    method, colon, wish = text.partition(":")
    if not colon or method not in METHODS:
        raise EdgeError(
            f"row {text!r} is unknown; a row is METHOD:SCHEME with one of the methods {', '.join(METHODS)}, "
            f"or a peer: {', '.join(PEERS)}"
        )
    bits = float(wish) if re.fullmatch(r"\d+(\.\d+)?", wish) else None
    built_in = {str(name): scheme for name, scheme in SCHEMES.items()}
    scheme = SCHEMES["int4"] if bits else built_in.get(wish) or load_scheme(Path(wish))
    if scheme.linear.is_float and scheme.table.is_float:
        raise EdgeError(f"row {text!r} rounds nothing: scheme {scheme.name} keeps all weights float")
    [known] = [name for name in get_args(MethodName) if name == method]
    return RowRequest(row=text, method=known, scheme=replace(scheme, activations="float"), bits=bits)


def tabulate(
    model: str,
    out: Path,
    *,
    rows: Sequence[RowRequest],
    calibration: str,
    tokens_per_text: int | None = None,
    revision: str | None = None,
    memory_bytes: int = 2 << 30,
    progress: Progress,
) -> QuantizationReport:
    """Measure rows, and write the table anew after each.

    Args:
        model: As `Recipe` has it.
        out: The table, a JSON file; rows that it holds already are kept.
        rows: What to measure.
        calibration: A calibration set, as `open_set` takes it.
        tokens_per_text: How many of each held-out note are predicted at most; None for all.
        revision: Hub revision.
        memory_bytes: Of activations.
        progress: Called with what is being done, steps done, and steps in all.

    Raises:
        EdgeError: If the model is neither a decoder nor an encoder with both towers, or `out` is another
            table.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    spec = load_model(checkpoint)
    check_tensors(checkpoint, spec.checkpoint_shapes())
    reads_images, reads_texts = takes(spec, "pixel_values"), takes(spec, "input_ids")
    samples = open_set(calibration, images=reads_images, texts=reads_texts)
    is_decoder = spec.prompt is not None
    held_out = held_out_set(images=not is_decoder, texts=is_decoder)
    progress("read the checkpoint", 0, 1)
    report = QuantizationReport(
        model_id=checkpoint.id,
        revision=checkpoint.revision,
        weights_sha256=checkpoint.weights_sha256(),
        calibration=samples.summary,
        held_out=held_out.summary,
        tokens_per_text=tokens_per_text,
        versions={tool: version(tool) for tool in _TOOLS},
        rows=(),
    )
    kept = {row.row: row for row in _kept_rows(out, report)}
    subject = _Subject(
        model=spec,
        checkpoint=checkpoint,
        weights_sha256=report.weights_sha256,
        calibration=samples,
        samples=model_inputs(samples, spec, checkpoint),
        held_out=[_cut(sample, tokens_per_text) for sample in model_inputs(held_out, spec, checkpoint)],
        out=out,
        work=out.with_name(f".{out.name}.partial"),
        memory_bytes=memory_bytes,
    )
    subject.work.mkdir(parents=True, exist_ok=True)
    for number, request in enumerate(rows, start=1):
        if request.row not in kept:
            at = f"row {number} of {len(rows)}, {request.row}"
            kept[request.row] = _measure_row(subject, request, partial(_tell, progress, at))
            with replacing(out) as stream:
                stream.write(to_json(replace(report, rows=tuple(kept.values()))).encode())
    shutil.rmtree(subject.work)
    return replace(report, rows=tuple(kept.values()))


def _tell(progress: Progress, at: str, what: str, done: int, total: int) -> None:
    progress(f"{at}: {what}", done, total)


def _kept_rows(out: Path, report: QuantizationReport) -> tuple[QuantizationRow, ...]:
    if not out.exists():
        return ()
    found = read_result(out)
    if len(found) != 1 or not isinstance(found[0], QuantizationReport):
        raise EdgeError(f"{out} exists and is no quantization table; name another --out")
    if replace(found[0], rows=()) != report:
        raise EdgeError(
            f"{out} is a table of another checkpoint, calibration set, length or version; name another --out "
            "or remove it"
        )
    return found[0].rows


def _cut(sample: ModelInput, tokens: int | None) -> ModelInput:
    if tokens is None or sample.ids is None or sample.image_blocks is None:
        return sample
    return replace(sample, ids=sample.ids[:tokens], image_blocks=sample.image_blocks[:tokens])


def _measure_row(subject: _Subject, request: RowRequest, progress: Progress) -> QuantizationRow:
    if request.peer is not None:
        peer = PEERS[request.peer]
        plan = make_plan(SCHEMES["int4"], subject.model.weights())
        bits = sum(
            row.stored_bits if row.storage.is_float else peer.bits * np.prod(row.stored_shape)
            for row in plan.rows
        )
        return _with_fidelity(
            subject,
            plan,
            peer_reader(peer, plan, subject.read),
            progress,
            QuantizationRow(
                row=request.row,
                method=peer.label,
                storage=peer.storage,
                is_emulated=True,
                plan_sha256=None,
                bits_per_weight=float(bits) / plan.weight_count,
                size_bytes=int(bits) // 8,
            ),
        )
    if request.method is None or request.scheme is None:
        raise ValueError(f"row {request.row!r} has neither a peer nor a method with a scheme")
    plan = make_plan(request.scheme, subject.model.weights(), method=request.method)
    if METHODS[request.method].samples != "none":
        plan = note_unreached(plan, unreached_weights(subject.model, subject.calibration))
    predicted = None
    if request.bits is not None:
        mixed = mix_bits(
            plan,
            make_plan(SCHEMES["int8"], subject.model.weights()),
            Budget(size_bytes=int(request.bits * plan.weight_count / 8)),
            describe=lambda bounds: load_model(subject.checkpoint, table_bounds=bounds),
            measure=partial(_sensitivity, subject, request.method, progress),
            cuts_tables=True,
        )
        subject, plan = replace(subject, model=mixed.model), mixed.plan
        predicted = mixed.predicted_kl
    directory = subject.work / _key(subject, plan)
    weights = _round(subject, plan, request.method, directory, progress)
    row = _with_fidelity(
        subject,
        plan,
        weights.current,
        progress,
        QuantizationRow(
            row=request.row,
            method=request.method,
            storage=_describe_storage(plan),
            is_emulated=False,
            plan_sha256=plan.sha256,
            bits_per_weight=plan.bits_per_weight,
            size_bytes=sum(row.stored_bits for row in plan.rows) // 8,
            predicted_kl=predicted,
        ),
    )
    shutil.rmtree(directory)
    return row


def _sensitivity(
    subject: _Subject,
    method: MethodName,
    progress: Progress,
    model: ModelSpec,
    plan: QuantPlan,
    high: QuantPlan,
) -> Sensitivity:
    """Measured once for each method, and kept beside the table: `medgemma-export --sensitivity` takes it."""
    return open_sensitivity(
        subject.out.with_name(f"{subject.out.stem}.{method}-sensitivity.json"),
        model=model,
        plan=plan,
        high=high,
        read=model.reader(subject.checkpoint),
        samples=subject.samples,
        work=subject.work,
        weights_sha256=subject.weights_sha256,
        samples_sha256=subject.calibration.sha256,
        method=method,
        memory_bytes=subject.memory_bytes,
        progress=progress,
    )


def _key(subject: _Subject, plan: QuantPlan) -> str:
    """What integers depend on: those of an interrupted row are taken over where all of it is the same."""
    parts = (
        subject.weights_sha256,
        plan.sha256,
        subject.calibration.sha256,
        source_fingerprint(Path(__file__).parent.parent),
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _round(
    subject: _Subject, plan: QuantPlan, method: MethodName, directory: Path, progress: Progress
) -> QuantizedWeights:
    return make_integers(
        subject.model,
        plan,
        subject.read,
        None if METHODS[method].samples == "none" else subject.samples,
        directory,
        method=method,
        memory_bytes=subject.memory_bytes,
        progress=progress,
    )


def _describe_storage(plan: QuantPlan) -> str:
    """Such as `int4 block 32 96 %, int8 per channel 4 %`; the float vectors are too few to show."""
    counts: Counter[str] = Counter()
    for row in plan.rows:
        counts[str(row.storage)] += int(np.prod(row.shape))
    total = sum(counts.values())
    shares = [(storage, count / total) for storage, count in counts.most_common()]
    return ", ".join(f"{storage} {share:.0%}" for storage, share in shares if share >= 0.005)


def _with_fidelity(
    subject: _Subject, plan: QuantPlan, quantized: ReadWeight, progress: Progress, row: QuantizationRow
) -> QuantizationRow:
    progress("measure", 0, 1)
    if subject.is_decoder:
        return replace(row, predictions=_predictions(subject, plan, quantized))
    return replace(row, embeddings=_embeddings(subject, plan, quantized))


def _predictions(subject: _Subject, plan: QuantPlan, quantized: ReadWeight) -> PredictionFidelity:
    [fidelity] = measure(
        subject.model,
        plan,
        subject.read,
        [quantized],
        subject.held_out,
        spill=subject.work,
        memory_bytes=subject.memory_bytes,
    )
    # The last token of a text has no next one that its prediction could be held against.
    inside = ~np.isnan(fidelity.loss[0])
    reference, actual = np.exp(fidelity.loss[:, inside].mean(axis=1))
    return PredictionFidelity(
        tokens=int(inside.sum()),
        kl_mean=float(fidelity.kl[inside].mean()),
        kl_p99=float(np.quantile(fidelity.kl[inside], 0.99)),
        agreement=float(fidelity.agrees[inside].mean()),
        perplexity=float(actual),
        reference_perplexity=float(reference),
    )


def _embeddings(subject: _Subject, plan: QuantPlan, quantized: ReadWeight) -> EmbeddingFidelity:
    reference, actual, labels = embed_images(
        subject.model,
        plan,
        (subject.read, quantized),
        pixels=[sample.pixels for sample in subject.held_out if sample.pixels is not None],
        captions=caption_inputs(list(LABELS.values()), subject.model, subject.checkpoint),
    )
    cosines = (reference * actual).sum(axis=1)
    same = (reference @ labels.T).argmax(axis=1) == (actual @ labels.T).argmax(axis=1)
    return EmbeddingFidelity(
        images=len(cosines),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        agreement=float(same.mean()),
        labels=len(labels),
    )
