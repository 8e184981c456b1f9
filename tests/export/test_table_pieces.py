"""A table in pieces of rows: the same model, a decision on each, one lookup and one head in a program."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from medgemma_export import build as build_module  # noqa: E402
from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.calibration.calibrate import ModelInput, calibrate  # noqa: E402
from medgemma_export.calibration.fidelity import measure  # noqa: E402
from medgemma_export.calibration.inputs import model_inputs  # noqa: E402
from medgemma_export.calibration.integers import make_integers  # noqa: E402
from medgemma_export.calibration.sensitivity import measure_sensitivity  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.torch_ops import TorchOps, compute  # noqa: E402
from medgemma_export.unpack import compare_integers  # noqa: E402
from medgemma_quantization import row_pieces  # noqa: E402
from medgemma_quantization.budget import Budget, Sensitivity, Share  # noqa: E402
from medgemma_quantization.methods import METHODS  # noqa: E402
from medgemma_quantization.plan import make_plan, read_plan  # noqa: E402
from medgemma_quantization.row_pieces import piece_name, spans, table_to_cut  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_runtime.errors import ArtifactError  # noqa: E402
from tests.export.short_models import load_short_model  # noqa: E402
from tests.export.test_onnx_gemma import exact_session, prompt, run  # noqa: E402

PLENTY = 1 << 30
TABLE = "language_model.embed_tokens.weight"
PIECE = 96


def silent(*step: object) -> None:
    """A `Progress`."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(row_pieces, "PIECE_ROWS", PIECE)


def make_text(seed: int, length: int = 24) -> ModelInput:
    ids = np.random.default_rng(seed).integers(8, 290, length)
    ids[0] = 2
    return ModelInput(ids=ids, image_blocks=np.full(length, -1))


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("sample:medgemma-tiny")


@pytest.fixture
def whole(checkpoint):
    return load_short_model(checkpoint)


@pytest.fixture
def cut(checkpoint, whole):
    _, bounds = table_to_cut(make_plan(SCHEMES["int4"], whole.weights()))
    assert len(bounds) > 1
    return load_short_model(checkpoint, table_bounds=bounds)


@pytest.fixture
def samples():
    return [make_text(seed) for seed in range(3)]


def test_pieces_are_the_rows_of_the_table(checkpoint, whole, cut):
    read, read_cut = whole.reader(checkpoint), cut.reader(checkpoint)
    pieces = [spec.name for spec in cut.components[-1].weights() if spec.role == "table"]
    assert (np.concatenate([read_cut(name) for name in pieces]) == read(TABLE)).all()
    assert (read_cut(pieces[1], slice(3, 7)) == read(TABLE, slice(PIECE + 3, PIECE + 7))).all()
    assert cut.checkpoint_shapes() == whole.checkpoint_shapes()


def test_gptq_gives_pieces_the_integers_of_the_whole(checkpoint, whole, cut, samples, tmp_path):
    def rounded(model, directory):
        plan = make_plan(SCHEMES["int4"], model.weights(), method="gptq")
        find = METHODS["gptq"].find
        return calibrate(
            model, plan, model.reader(checkpoint), samples, directory, find=find, memory_bytes=PLENTY
        )

    expected = rounded(whole, tmp_path / "whole")
    actual = rounded(cut, tmp_path / "cut")
    pieces = [row.name for row in actual.plan.rows if row.role == "table"]
    values = np.concatenate([actual.quantized(name).values for name in pieces])
    assert (values == expected.quantized(TABLE).values).all()
    for row in expected.plan.rows:
        if row.role == "linear":
            assert (actual.quantized(row.name).values == expected.quantized(row.name).values).all()


def test_what_a_piece_costs_is_what_rounding_its_rows_alone_does(checkpoint, whole, cut, samples, tmp_path):
    plan = make_plan(SCHEMES["int4"], cut.weights())
    found = measure_sensitivity(
        cut,
        plan,
        make_plan(SCHEMES["int8"], cut.weights()),
        cut.reader(checkpoint),
        samples,
        tmp_path / "weights",
        key="key",
        find=METHODS["rtn"].find,
        memory_bytes=PLENTY,
        progress=silent,
    )
    costs = {share.names: share.kl for share in found.shares}
    read = whole.reader(checkpoint)
    rtn = METHODS["rtn"].find(SCHEMES["int4"].table, None)
    texts = [replace(s, ids=s.ids[:16], image_blocks=s.image_blocks[:16]) for s in samples]

    def with_rows_rounded(start, stop, name, rows=None):
        weight = read(name).copy()
        if name == TABLE:
            weight[start:stop] = rtn(weight[start:stop]).dequantize()
        return weight if rows is None else weight[rows]

    whole_plan = make_plan(SCHEMES["int4"], whole.weights())
    table, bounds = table_to_cut(whole_plan)
    for span in spans(table.shape[0], bounds):
        [fidelity] = measure(
            whole,
            whole_plan,
            read,
            [partial(with_rows_rounded, *span)],
            texts,
            spill=tmp_path,
            memory_bytes=PLENTY,
        )
        expected = fidelity.kl[~np.isnan(fidelity.loss[0])].mean()
        assert costs[(piece_name(TABLE, *span),)] == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A budget that is spent on the first and third piece, because they are said to cost most."""
    place = tmp_path / "notes"
    place.mkdir()
    (place / "note.txt").write_text("findings and impression")

    def invent(recipe, checkpoint, samples, progress, model, plan, high):
        names = [row.name for row in plan.rows if row.storage.bits == 4]
        dear = {piece_name(TABLE, start, start + PIECE) for start in (0, 2 * PIECE)}
        shares = tuple(Share(names=(name,), kl=1.0 if name in dear else 1e-6) for name in names)
        total = sum(share.kl for share in shares)
        return Sensitivity(key="key", tokens=1, shares=shares, low_kl=total, high_kl=1e-9)

    monkeypatch.setattr(build_module, "_sensitivity", invent)
    return Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="onnx",
        scheme=SCHEMES["int4"],
        components=(),
        out=tmp_path / "artifact",
        method="search",
        calibration=str(place),
        budget=Budget(max_kl=0.1),
    )


def export(recipe, directory):
    """An artifact, its components, and its integers, made again."""
    artifact, decision = build(recipe, progress=silent), decide(recipe)
    assert read_plan(artifact.path("plan.json")) == decision.plan
    checkpoint, model = decision.checkpoint, decision.model
    weights = make_integers(
        model,
        decision.plan,
        model.reader(checkpoint),
        model_inputs(decision.samples, model, checkpoint),
        directory / "again",
        method="search",
        memory_bytes=PLENTY,
        progress=silent,
    )
    return artifact, {component.name: component for component in model.components}, weights


@pytest.fixture
def exported(recipe, tmp_path):
    return export(recipe, tmp_path)


def test_the_plan_says_which_rows_have_8_bits(recipe):
    decision = decide(recipe)
    tables = {row.name: str(row.storage) for row in decision.plan.rows if row.role == "table"}
    kinds = ["int8 block 32", "int4 block 32", "int8 block 32", "int4 block 32"]
    assert list(tables.values()) == kinds
    assert list(tables)[:2] == [piece_name(TABLE, 0, PIECE), piece_name(TABLE, PIECE, 2 * PIECE)]
    assert [spec.name for spec in decision.model.components[1].weights()] == list(tables)
    assert decision.predicted_kl < 0.1


def test_onnx_looks_up_and_multiplies_every_piece(exported, tmp_path):
    artifact, components, weights = exported
    decoder, embed = components["decoder"], components["embed"]
    rows, width = decoder.outputs[0].shape[-1], embed.outputs[0].shape[-1]
    session = exact_session(artifact, "embed", tmp_path)
    every = np.delete(np.arange(rows), artifact.manifest.prompt.image_id)[None]
    feeds = {"input_ids": every, "image_features": np.zeros((0, width), np.float32)}
    expected = compute(embed, weights, feeds)["inputs_embeds"]
    assert (run(session, feeds)["inputs_embeds"] == expected).all()
    # As of a whole table, whose kernel gives zeros.
    beyond = run(session, feeds | {"input_ids": np.array([[3, rows, rows + PIECE]])})["inputs_embeds"]
    assert beyond[0, 0].any() and not beyond[0, 1:].any()
    feeds = prompt(components)
    expected = compute(decoder, weights, feeds)["logits"]
    found = run(exact_session(artifact, "decoder", tmp_path), feeds)["logits"]
    assert found.shape == expected.shape == (1, 1, rows)
    assert np.abs(found - expected).max() < 1e-4


def test_a_piece_is_on_disk_once_and_a_changed_byte_is_seen(exported):
    artifact, components, weights = exported
    names = [spec.name for spec in components["embed"].weights() if spec.role == "table"]
    places = {}
    for part in ("embed", "decoder"):
        program = artifact.path(artifact.manifest.components[part].program)
        graph = onnx.load(program, load_external_data=False).graph
        places[part] = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.name.removesuffix(".scales") in names
        }
        compare_integers(program, components[part], weights)
    assert places["embed"] == places["decoder"]
    assert len(places["embed"]) == 2 * len(names)
    place = places["decoder"][names[-1]]
    with (program.parent / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        [byte] = file.read(1)
        file.seek(int(place["offset"]))
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ArtifactError, match="does not carry " + re.escape(names[-1])):
        compare_integers(program, components["decoder"], weights)


def test_core_ml_looks_up_and_multiplies_every_piece(recipe, tmp_path):
    pytest.importorskip("coremltools")
    from medgemma_export.targets.coreml_unpack import compare_package, compare_rows
    from medgemma_runtime.backends.embedding_rows import EmbeddingRows
    from medgemma_runtime.backends.mil import MilProgram
    from tests.export.test_coreml_gemma import teacher_forced
    from tests.export.uncached_decoder import expected_logits

    scheme = replace(SCHEMES["int4"], activations="float")
    recipe = replace(recipe, target="coreml", scheme=scheme, context=112)
    artifact, components, weights = export(recipe, tmp_path)
    decoder, embed = components["decoder"], components["embed"]
    names = [spec.name for spec in embed.weights() if spec.role == "table"]
    assert len(names) == 4
    package = artifact.directory / artifact.manifest.components["decoder"].program
    compare_package(package, decoder, weights)
    description = artifact.directory / artifact.manifest.components["embed"].program
    compare_rows(description, weights, tables=names)
    with pytest.raises(ArtifactError, match="does not lead to"):
        compare_rows(description, weights, tables=[names[2], names[1], names[0], names[3]])
    rows = decoder.outputs[0].shape[-1]
    feeds = {"input_ids": np.delete(np.arange(rows), artifact.manifest.prompt.image_id)[None]}
    found = EmbeddingRows(artifact, "embed").run(feeds)["inputs_embeds"]
    feeds["image_features"] = np.zeros((0, found.shape[-1]), np.float32)
    assert (found == compute(embed, weights, feeds)["inputs_embeds"]).all()
    rng = np.random.default_rng(5)
    conversation = rng.normal(size=(3, found.shape[-1])).astype(np.float32), np.full(3, -1)
    [(count, logits), *_] = teacher_forced(MilProgram.open(package), conversation, total=3)
    expected = expected_logits(decoder, TorchOps(weights=weights), conversation, count)
    assert logits.shape == expected.shape == (1, 1, rows)
    assert np.abs(logits - expected).max() < 1e-4


def test_executorch_decides_on_a_table_as_a_whole(recipe):
    plan = decide(replace(recipe, target="executorch", budget=Budget(max_kl=2e-5), context=112)).plan
    assert [row.name for row in plan.rows if row.role == "table"] == [TABLE]
