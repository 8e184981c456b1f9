"""What 4 bits on a weight cost is what rounding it alone does to the predictions."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.calibration import sensitivity as sensitivity_module  # noqa: E402
from medgemma_export.calibration.calibrate import ModelInput  # noqa: E402
from medgemma_export.calibration.fidelity import measure  # noqa: E402
from medgemma_export.calibration.sensitivity import measure_sensitivity, open_sensitivity  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_quantization.budget import Budget  # noqa: E402
from medgemma_quantization.methods import METHODS  # noqa: E402
from medgemma_quantization.plan import make_plan, read_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402
from tests.export.short_models import load_short_model  # noqa: E402

PLENTY = 1 << 30
TABLE = "language_model.embed_tokens.weight"


def silent(*step: object) -> None:
    """A `Progress`."""


def make_text(seed: int, length: int = 20) -> ModelInput:
    ids = np.random.default_rng(seed).integers(8, 290, length)
    ids[0] = 2
    return ModelInput(ids=ids, image_blocks=np.full(length, -1))


@pytest.fixture(scope="module")
def subject():
    checkpoint = open_checkpoint("sample:medgemma-tiny")
    model = load_short_model(checkpoint)
    plan = make_plan(SCHEMES["int4"], model.weights(), method="search")
    high = make_plan(SCHEMES["int8"], model.weights())
    return model, plan, high, model.reader(checkpoint), [make_text(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def measured(subject, tmp_path_factory):
    model, plan, high, read, samples = subject
    return measure_sensitivity(
        model,
        plan,
        high,
        read,
        samples,
        tmp_path_factory.mktemp("sensitivity") / "weights",
        key="key",
        find=METHODS["search"].find,
        memory_bytes=PLENTY,
        progress=silent,
    )


def test_decisions_cover_every_integer_weight_once_and_keep_together_what_targets_fuse(subject, measured):
    _, plan, *_ = subject
    names = [name for share in measured.shares for name in share.names]
    assert sorted(names) == sorted(row.name for row in plan.rows if not row.storage.is_float)
    groups = [share.names for share in measured.shares]
    layer = "language_model.layers.0"
    for expected in (
        (TABLE,),
        (f"{layer}.self_attn.q_proj.weight",),
        (f"{layer}.self_attn.k_proj.weight", f"{layer}.self_attn.v_proj.weight"),
        (f"{layer}.self_attn.o_proj.weight",),
        (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
        (f"{layer}.mlp.down_proj.weight",),
    ):
        assert expected in groups
    [tower] = [group for group in groups if any(name.startswith("vision_tower") for name in group)]
    assert all(name.startswith(("vision_tower", "multi_modal_projector")) for name in tower)


def test_a_cost_is_that_of_rounding_alone(subject, measured, tmp_path):
    """Round to nearest, which knows no inputs, by the way that measures whole models."""
    model, plan, high, read, samples = subject
    found = measure_sensitivity(
        model,
        plan,
        high,
        read,
        samples,
        tmp_path / "weights",
        key="key",
        find=METHODS["rtn"].find,
        memory_bytes=PLENTY,
        progress=silent,
    )
    texts = [replace(s, ids=s.ids[:16], image_blocks=s.image_blocks[:16]) for s in samples]
    costs = {share.names: share.kl for share in found.shares}
    rtn = METHODS["rtn"].find(SCHEMES["int4"].linear, None)

    def alone(names, name, rows=None):
        weight = read(name, rows)
        return rtn(weight).dequantize() if name in names else weight

    everything = tuple(name for names in costs for name in names if not name.startswith("vision"))
    for names, cost in [*list(costs.items())[1:5], (everything, found.low_kl)]:
        [fidelity] = measure(
            model, plan, read, [partial(alone, names)], texts, spill=tmp_path, memory_bytes=PLENTY
        )
        counted = ~np.isnan(fidelity.loss[0])
        assert cost == pytest.approx(fidelity.kl[counted].mean(), rel=1e-3, abs=1e-7)
        assert cost > 0
    assert found.tokens == 3 * 15
    assert found.high_kl < 0.05 * found.low_kl


def test_the_tower_costs_nothing_where_no_image_is(measured):
    [tower] = [share for share in measured.shares if share.names[0].startswith("vision_tower")]
    assert tower.kl == pytest.approx(0, abs=1e-6)


def test_variants_side_by_side_are_variants_one_by_one(subject, measured, tmp_path, monkeypatch):
    model, plan, high, read, samples = subject
    monkeypatch.setattr(sensitivity_module, "_VARIANTS", 3)
    again = measure_sensitivity(
        model,
        plan,
        high,
        read,
        samples,
        tmp_path / "weights",
        key="key",
        find=METHODS["search"].find,
        memory_bytes=PLENTY,
        progress=silent,
    )
    for one, other in zip(again.shares, measured.shares, strict=True):
        assert one.names == other.names
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-7)


def test_a_file_is_read_and_one_of_something_else_refused(subject, measured, tmp_path, monkeypatch):
    model, plan, high, read, samples = subject
    runs: list[str] = []

    def stand_in(*args, key, **more):
        runs.append(key)
        return replace(measured, key=key)

    monkeypatch.setattr(sensitivity_module, "measure_sensitivity", stand_in)
    given = {
        "model": model,
        "plan": plan,
        "high": high,
        "read": read,
        "samples": samples,
        "work": tmp_path,
        "weights_sha256": "1" * 64,
        "samples_sha256": "2" * 64,
        "method": "search",
        "memory_bytes": PLENTY,
        "progress": silent,
    }
    path = tmp_path / "sensitivity.json"
    first = open_sensitivity(path, **given)
    assert open_sensitivity(path, **given) == first
    assert len(runs) == 1
    for change in ({"weights_sha256": "3" * 64}, {"samples_sha256": "3" * 64}, {"method": "gptq"}):
        with pytest.raises(EdgeError, match="measured on another checkpoint, method or calibration set"):
            open_sensitivity(path, **(given | change))
    open_sensitivity(None, **given)
    assert len(runs) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["sensitivity.json"]


def test_samples_without_a_next_token_are_refused(subject, tmp_path):
    model, plan, high, read, _ = subject
    with pytest.raises(EdgeError, match="no text of the calibration set has a next token"):
        measure_sensitivity(
            model,
            plan,
            high,
            read,
            [make_text(0, length=1)],
            tmp_path / "weights",
            key="key",
            find=METHODS["rtn"].find,
            memory_bytes=PLENTY,
            progress=silent,
        )


class TestBudget:
    @pytest.fixture
    def request_(self, tmp_path):
        place = tmp_path / "notes"
        place.mkdir()
        (place / "note.txt").write_text("findings and impression")
        return Recipe(
            model="sample:medgemma-tiny",
            revision=None,
            target="onnx",
            scheme=SCHEMES["int4"],
            components=(),
            out=tmp_path / "artifact",
            method="search",
            calibration=str(place),
            budget=Budget(size_bytes=700_000),
            sensitivity=tmp_path / "sensitivity.json",
        )

    def test_an_artifact_keeps_the_budget_and_says_why(self, request_, tmp_path):
        decision = decide(request_)
        assert 0 < decision.predicted_kl < 1
        artifact = build(request_, progress=silent)
        plan = read_plan(artifact.path("plan.json"))
        assert plan == decision.plan
        assert sum(row.stored_bits for row in plan.rows) / 8 <= 700_000
        kinds = {str(row.storage) for row in plan.rows}
        assert {"int4 block 32", "int8 block 32"} <= kinds
        integers = [row for row in plan.rows if not row.storage.is_float]
        assert all(re.match(r"budget 0\.7 MB: 4 bits .*rank \d+ of 42", row.reason) for row in integers)
        assert artifact.manifest.quantization.scheme == "int4-int8"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["artifact", "notes", "sensitivity.json"]

    def test_what_mobile_stores_in_int8_stays_as_it_is(self, request_):
        mobile = replace(request_, scheme=SCHEMES["mobile"], budget=Budget(size_bytes=800_000))
        plan = decide(mobile).plan
        whole = decide(replace(mobile, budget=None, sensitivity=None)).plan
        assert {str(row.storage) for row in plan.rows} >= {"int4 block 64", "int8 block 32"}
        for row, before in zip(plan.rows, whole.rows, strict=True):
            assert row == before or before.storage.bits == 4

    def test_budgets_that_cannot_be(self, request_):
        with pytest.raises(EdgeError, match=r"the smallest plan, int4 throughout, takes 0\.63"):
            decide(replace(request_, budget=Budget(size_bytes=1000)))
        with pytest.raises(ValueError, match="a budget needs a calibration set"):
            replace(request_, calibration=None)
        with pytest.raises(ValueError, match="the scheme is int8; choose precision int4"):
            replace(request_, scheme=SCHEMES["int8"])
        with pytest.raises(ValueError, match="without the factors of method awq-gptq; choose gptq or search"):
            replace(request_, method="awq-gptq")
        with pytest.raises(ValueError, match="sensitivities are measured for a budget"):
            replace(request_, budget=None)
        with pytest.raises(EdgeError, match="SiglipModel predicts nothing, so no budget"):
            decide(
                replace(request_, model="sample:medsiglip-tiny", budget=Budget(max_kl=0.1), sensitivity=None)
            )
