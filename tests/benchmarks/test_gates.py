import math
from pathlib import Path

import pytest

from medgemma_benchmarks.gates import Gate, load_gates, worst
from medgemma_runtime.errors import EdgeError

FORM = """
tie_margin_logits = 0.1
[[gate]]
question = "scheme"
components = ["image"]
precisions = ["int8"]
metric = "cosine_min"
at_least = 0.5
reason = "a test"
"""


def gate(**limits: float) -> Gate:
    return Gate(
        question="scheme",
        components=("image",),
        precisions=("int8",),
        metric="cosine_min",
        reason="a test",
        **limits,
    )


def test_the_shipped_gates_answer_every_question_that_parity_asks() -> None:
    gates = load_gates()
    for precision in ("fp32", "fp16", "int8", "lut6", "int4", "lut4"):
        for subject in ("image", "vision"):
            assert gates.find("pixels", subject, precision)
        for subject in ("text", "decoder"):
            assert gates.find("tokens", subject, precision)
    for subject in ("image", "text", "zero-shot", "end-to-end", "vision", "decoder", "prefill"):
        assert gates.find("lowering", subject, "fp32")
        for precision in ("fp16", "int8", "lut6", "int4", "lut4"):
            assert gates.find("scheme", subject, precision)
    for component in ("image", "text"):
        for precision in ("int8", "int4"):
            assert gates.find("packing", component, precision)
    assert all(len(gate.reason) > 20 for gate in gates.gate)


def test_no_question_component_and_precision_has_one_metric_twice() -> None:
    seen = [
        (gate.question, component, precision, gate.metric)
        for gate in load_gates().gate
        for component in gate.components
        for precision in gate.precisions
    ]
    assert len(seen) == len(set(seen))


def test_the_limits_agreed_on() -> None:
    gates = load_gates()
    assert gates.find("lowering", "image", "fp32")[0].at_most == 1e-4
    assert gates.find("packing", "text", "int8")[0].at_most == 1e-4
    assert {g.metric: g.at_least for g in gates.find("scheme", "image", "int8")}["cosine_min"] == 0.999
    assert gates.find("scheme", "end-to-end", "int8")[0].at_least == 0.99
    assert gates.find("lowering", "decoder", "fp32")[0].at_most == 1e-4
    assert {g.metric: g.at_most for g in gates.find("pixels", "image", "fp32")}["differing_uint8"] == 0


@pytest.mark.parametrize(
    ("limits", "value", "verdict"),
    [
        ({"at_least": 0.5}, 0.5, "PASS"),
        ({"at_least": 0.5}, 0.499, "FAIL"),
        ({"at_most": 0.5}, 0.5, "PASS"),
        ({"at_most": 0.5}, 0.501, "FAIL"),
        ({"at_most": 0.5}, None, "FAIL"),
        ({"at_least": 0.5}, None, "FAIL"),
        ({"at_most": 0.5}, math.nan, "FAIL"),
        ({"at_least": 0.5}, math.nan, "FAIL"),
    ],
)
def test_a_gate_judges_on_both_sides_of_its_limit(limits, value, verdict) -> None:
    assert gate(**limits).judge(value) == verdict


def test_a_gate_has_exactly_one_limit() -> None:
    for limits in ({}, {"at_most": 1.0, "at_least": 0.0}):
        with pytest.raises(ValueError, match="needs one of at_most and at_least"):
            gate(**limits)


def test_what_has_no_gate_is_an_error_and_not_a_pass() -> None:
    with pytest.raises(EdgeError, match="no gate for lowering of image at int8"):
        load_gates().find("lowering", "image", "int8")


def test_the_worst_verdict_counts_and_none_at_all_is_no_pass() -> None:
    assert worst(("PASS", "NEAR_TIE", "FAIL")) == "FAIL"
    assert worst(("PASS", "NEAR_TIE")) == "NEAR_TIE"
    assert worst(("PASS",)) == "PASS"
    with pytest.raises(ValueError, match="no verdict"):
        worst(())


def test_gates_of_the_user_replace_ours(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(FORM, encoding="utf-8")
    assert [gate.limit for gate in load_gates(path).gate] == ["≥ 0.5"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("at_least", "at_leest"), "not to the form"),
        (("at_least = 0.5", ""), "needs one of"),
        (('"scheme"', '"wish"'), "not to the form: gate.0.question"),
        (("[[gate]]", "[[gate]"), "no TOML"),
        (("tie_margin_logits = 0.1", ""), "tie_margin_logits"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(FORM.replace(*change), encoding="utf-8")
    with pytest.raises(EdgeError, match=words):
        load_gates(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"gates none\.toml cannot be read"):
        load_gates(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("question", "component", "metric"),
    [
        ("pixels", "image", "cosine_min"),
        ("tokens", "text", "differing_uint8"),
        ("scheme", "zero-shot", "cosine_min"),
        ("scheme", "image", "agreement"),
        ("lowering", "image", "rounded_cosine_min"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(
    question: str, component: str, metric: str, tmp_path: Path
) -> None:
    text = FORM.replace("scheme", question).replace('["image"]', f'["{component}"]')
    (tmp_path / "gates.toml").write_text(text.replace("cosine_min", metric))
    with pytest.raises(EdgeError, match=f"{metric} is not measured for {question} of {component}"):
        load_gates(tmp_path / "gates.toml")


def test_a_negative_tie_margin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gates.toml").write_text(FORM.replace("0.1", "-0.1"))
    with pytest.raises(EdgeError, match="cannot be negative"):
        load_gates(tmp_path / "gates.toml")
