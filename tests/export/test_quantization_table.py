"""A table measures what it says, keeps what it has, and refuses what is not its own."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from medgemma_benchmarks.results import read_result  # noqa: E402
from medgemma_export.calibration import quantization_table  # noqa: E402
from medgemma_export.calibration.fidelity import embed_images, measure  # noqa: E402
from medgemma_export.calibration.inputs import caption_inputs, model_inputs  # noqa: E402
from medgemma_export.calibration.integers import make_integers  # noqa: E402
from medgemma_export.calibration.quantization_table import DEFAULT_ROWS, parse_row, tabulate  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.torch_ops import compute  # noqa: E402
from medgemma_quantization.calibration import BUILTIN, held_out_set, open_set  # noqa: E402
from medgemma_quantization.plan import make_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_quantization.weights import quantize_weights  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402
from medgemma_runtime.sample_images import LABELS  # noqa: E402
from medgemma_runtime.sample_notes import SAMPLE_NOTES  # noqa: E402

TOKENS = 9
MODEL, ENCODER = "sample:medgemma-tiny", "sample:medsiglip-tiny"


def silent(*step: object) -> None:
    """A `Progress`."""


@pytest.fixture
def notes(tmp_path):
    place = tmp_path / "notes"
    place.mkdir()
    (place / "note.txt").write_text("No acute findings. Follow-up in six weeks.")
    return str(place)


def make(out, notes, *rows, **changes):
    given = {
        "rows": [parse_row(row) for row in rows],
        "calibration": notes,
        "tokens_per_text": TOKENS,
        "progress": silent,
    }
    return tabulate(MODEL, out, **(given | changes))


def test_rows_of_all_kinds_are_measured_on_the_held_out_notes(tmp_path, notes):
    out = tmp_path / "table.json"
    report = make(out, notes, "rtn:int4", "llama.cpp-q4_0", "search:7.5")
    [kept] = read_result(out)
    assert kept == report
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "table.json",
        "table.search-sensitivity.json",
    ]
    held_out = [note for note in SAMPLE_NOTES if note.split == "held_out"]
    assert report.held_out.startswith(f"{len(held_out)} samples ({len(held_out)} text)")
    assert {note.language for note in held_out} == {"en", "de", "es", "fr", "hi", "pt"}
    plain, peer, mixed = report.rows
    assert {row.predictions.tokens for row in report.rows} == {len(held_out) * (TOKENS - 1)}
    assert (plain.is_emulated, peer.is_emulated) == (False, True)
    assert plain.bits_per_weight == pytest.approx(peer.bits_per_weight, rel=1e-3)
    assert 7.3 < mixed.bits_per_weight <= 7.5
    assert mixed.predictions.kl_mean < plain.predictions.kl_mean
    assert mixed.predicted_kl > 0 and plain.predicted_kl is None
    assert "int8 per channel" in mixed.storage and plain.storage == "int4 block 32 92%, float32 8%"

    # The first row again, from plain parts.
    checkpoint = open_checkpoint(MODEL)
    model = load_model(checkpoint)
    plan = make_plan(SCHEMES["int4"], model.weights())
    weights = quantize_weights(plan, model.reader(checkpoint), tmp_path / "weights")
    inputs = model_inputs(held_out_set(images=False, texts=True), model, checkpoint)
    inputs = [replace(s, ids=s.ids[:TOKENS], image_blocks=s.image_blocks[:TOKENS]) for s in inputs]
    [fidelity] = measure(
        model, plan, weights.read, [weights.current], inputs, spill=tmp_path, memory_bytes=1 << 30
    )
    inside = np.arange(len(fidelity.kl)) % TOKENS != TOKENS - 1
    assert plain.predictions.kl_mean == pytest.approx(fidelity.kl[inside].mean(), rel=1e-5)
    assert plain.predictions.agreement == fidelity.agrees[inside].mean()
    assert plain.predictions.perplexity == pytest.approx(np.exp(fidelity.loss[1, inside].mean()), rel=1e-5)
    assert plain.plan_sha256 != plan.sha256  # its activations are float


def test_a_row_of_a_method_that_scales_inputs_has_its_factors(tmp_path, notes):
    """AWQ here rounds to nearest, so without its factors its row would be that of `rtn`."""
    plain, scaled = make(tmp_path / "table.json", notes, "rtn:int4", "awq:int4").rows
    assert scaled.bits_per_weight == plain.bits_per_weight
    checkpoint = open_checkpoint(MODEL)
    model = load_model(checkpoint)
    read, plan = model.reader(checkpoint), make_plan(SCHEMES["int4"], model.weights(), method="awq")
    weights = make_integers(
        model,
        plan,
        read,
        model_inputs(open_set(notes, images=True, texts=True), model, checkpoint),
        tmp_path / "weights",
        method="awq",
        memory_bytes=1 << 30,
        progress=silent,
    )
    inputs = model_inputs(held_out_set(images=False, texts=True), model, checkpoint)
    inputs = [replace(s, ids=s.ids[:TOKENS], image_blocks=s.image_blocks[:TOKENS]) for s in inputs]
    [fidelity] = measure(model, plan, read, [weights.current], inputs, spill=tmp_path, memory_bytes=1 << 30)
    inside = np.arange(len(fidelity.kl)) % TOKENS != TOKENS - 1
    assert scaled.predictions.kl_mean == pytest.approx(fidelity.kl[inside].mean(), rel=1e-5)
    assert scaled.predictions.kl_mean != pytest.approx(plain.predictions.kl_mean, rel=1e-5)


def test_rows_that_are_there_are_kept(tmp_path, notes, monkeypatch):
    out = tmp_path / "table.json"
    first = make(out, notes, "rtn:int4")

    def fail(*args):
        raise KeyboardInterrupt

    whole = quantization_table._measure_row
    monkeypatch.setattr(quantization_table, "_measure_row", fail)
    assert make(out, notes, "rtn:int4") == first
    with pytest.raises(KeyboardInterrupt):
        make(out, notes, "rtn:int4", "rtn:int8")
    assert read_result(out) == [first]
    monkeypatch.setattr(quantization_table, "_measure_row", whole)
    second = make(out, notes, "rtn:int8")
    assert [row.row for row in second.rows] == ["rtn:int4", "rtn:int8"]
    assert second.rows[0] == first.rows[0]


def test_a_table_of_something_else_is_left_alone(tmp_path, notes):
    out = tmp_path / "table.json"
    make(out, notes, "rtn:int4")
    before = out.read_bytes()
    for changes in ({"tokens_per_text": 5}, {"calibration": BUILTIN}):
        with pytest.raises(EdgeError, match="a table of another checkpoint, calibration set, length"):
            make(out, notes, "rtn:int4", **changes)
    assert out.read_bytes() == before
    out.write_text(json.dumps({"report": "something"}))
    with pytest.raises(EdgeError, match="no parity, latency, generation or quantization report"):
        make(out, notes, "rtn:int4")


def test_an_encoder_is_measured_by_its_embeddings_of_the_held_out_images(tmp_path):
    rows = [parse_row(row) for row in ("rtn:int4", "llama.cpp-q4_0", "rtn:int8")]
    report = tabulate(ENCODER, tmp_path / "table.json", rows=rows, calibration=BUILTIN, progress=silent)
    low, peer, high = (row.embeddings for row in report.rows)
    assert all(row.predictions is None for row in report.rows)
    assert {found.images for found in (low, peer, high)} == {6}
    assert {found.labels for found in (low, peer, high)} == {len(LABELS)}
    assert low.cosine_min < high.cosine_min < high.cosine_mean < 1
    assert high.cosine_min > 0.999 and high.agreement == 1
    assert 0.9 < peer.cosine_min < high.cosine_min
    names = {sample.name for sample in held_out_set(images=True, texts=False).samples}
    assert not names & {sample.name for sample in open_set(BUILTIN, images=True, texts=True).samples}


def test_embeddings_are_those_of_the_components(tmp_path):
    checkpoint = open_checkpoint(ENCODER)
    model = load_model(checkpoint)
    parts = {component.name: component for component in model.components}
    plan = make_plan(SCHEMES["int4"], model.weights())
    weights = quantize_weights(plan, model.reader(checkpoint), tmp_path / "int4")
    exact = quantize_weights(make_plan(SCHEMES["fp32"], model.weights()), weights.read, tmp_path / "fp32")
    [pixels] = [
        sample.pixels for sample in model_inputs(held_out_set(images=True, texts=False), model, checkpoint)
    ][:1]
    captions = caption_inputs(["a chest radiograph"], model, checkpoint)
    found = embed_images(model, plan, (weights.read, weights.current), pixels=[pixels], captions=captions)
    expected = (
        compute(parts["image"], exact, {"pixel_values": pixels})["pooler_output"],
        compute(parts["image"], weights, {"pixel_values": pixels})["pooler_output"],
        compute(parts["text"], exact, {"input_ids": captions[0]})["pooler_output"],
    )
    for actual, reference in zip(found, expected, strict=True):
        unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
        np.testing.assert_allclose(actual, unit, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4", "row 'int4' is unknown; a row is METHOD:SCHEME with one of the methods rtn"),
        ("hqq:int4", "row 'hqq:int4' is unknown"),
        ("rtn:fp32", "row 'rtn:fp32' rounds nothing"),
        ("rtn:absent.toml", "scheme absent.toml cannot be read"),
    ],
)
def test_rows_that_are_none(text, says):
    with pytest.raises(EdgeError, match=says):
        parse_row(text)


def test_every_default_row_is_one():
    for text in DEFAULT_ROWS:
        assert parse_row(text).row == text
