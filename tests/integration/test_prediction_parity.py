"""Artifacts that answer, held against a recorded reference; then broken, and seen to fail."""

import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_benchmarks import cli, prediction_parity
from medgemma_benchmarks.bundle import open_bundle, write_bundle
from medgemma_benchmarks.parity_inputs import ParityError
from medgemma_benchmarks.prediction_parity import check_predictions
from medgemma_benchmarks.results import read_result
from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_export.reference.packing import record_packing
from medgemma_quantization.scheme import SCHEMES
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import EdgeError, NotFiniteError
from medgemma_runtime.prompt import PromptTokenizer
from tests import tiny_prompts


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("predictions")
    for precision in ("fp32", "int8", "int4"):
        recipe = Recipe(
            model=tiny_prompts.MODEL,
            revision=None,
            target="onnx",
            scheme=SCHEMES[precision],
            components=(),
            out=directory / precision,
        )
        build(recipe, progress=lambda *step: None)
    tiny_prompts.record(directory / "reference")
    return directory


@pytest.fixture(scope="module")
def bundle(work):
    return open_bundle(work / "reference")


def altered(bundle, out, *, prompts=None, **arrays):
    """The bundle with other arrays, or other prompts."""
    record = bundle.record
    return write_bundle(
        out,
        kind=record.kind,
        model_id=record.model_id,
        revision=record.revision,
        weights_sha256=record.weights_sha256,
        plan_sha256=None,
        producer=record.producer,
        image=record.image,
        images=tiny_prompts.images(),
        labels=(),
        arrays=bundle.arrays | arrays,
        timings={},
        prompts=prompts or record.prompts,
        embedding_scale=record.embedding_scale,
    )


def failed(report):
    return {(check.question, check.subject) for check in report.checks if check.verdict == "FAIL"}


def check(work, bundle, precision="fp32", **options):
    return check_predictions(open_artifact(work / precision), bundle, threads=1, **options)


def test_the_float_program_is_the_model(work, bundle):
    steps = []
    report = check(work, bundle, progress=lambda *step: steps.append(step))
    assert report.verdict == "PASS"
    assert report.question == "lowering"
    assert {(c.question, c.subject) for c in report.checks} == {
        ("pixels", "vision"),
        ("tokens", "decoder"),
        ("lowering", "vision"),
        ("lowering", "decoder"),
        ("lowering", "prefill"),
    }
    decoder, prefill = report.predictions["decoder"], report.predictions["prefill"]
    # 8e-6 is seen.
    assert decoder.max_abs_error < 5e-5 and prefill.max_abs_error < 5e-5
    assert decoder.kl_mean < 1e-9 and decoder.agreement == 1.0
    assert (decoder.tokens, prefill.tokens) == (sum(p.predictions for p in bundle.record.prompts), 3)
    assert decoder.perplexity == pytest.approx(decoder.reference_perplexity, rel=1e-5)
    assert [row.name for row in report.prompts] == ["one image", "two images", "text"]
    assert [done for _, done, _ in steps] == list(range(steps[0][2]))


@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 1e-5, 0.02), ("int4", 0.02, 0.5)])
def test_a_quantized_program_loses_what_its_bits_lose(work, bundle, precision, least, most):
    report = check(work, bundle, precision)
    assert report.question == "scheme"
    assert least < report.predictions["decoder"].kl_mean < most
    judged = {check.metric for check in report.checks if check.subject == "decoder"}
    assert judged >= {"differing_ids", "kl_mean"}


def test_logits_of_the_position_beside_fail(work, bundle, tmp_path):
    rolled = np.roll(bundle.arrays["decoder.hidden_states"], 1, axis=0)
    shifted = altered(bundle, tmp_path / "shifted", **{"decoder.hidden_states": rolled})
    report = check(work, shifted)
    assert failed(report) == {("lowering", "decoder"), ("lowering", "prefill")}
    assert report.predictions["decoder"].kl_mean > 0.1
    # Integers are no excuse either.
    assert ("scheme", "decoder") in failed(check(work, shifted, "int8"))


class BlindSession:
    """An engine that knows nothing of image blocks, as stock runtimes do not."""

    def __init__(self, session):
        self._session, self.entry = session, session.entry

    def run(self, inputs):
        return self._session.run(inputs)

    def run_into(self, inputs, outputs):
        blocks = np.full_like(inputs["image_blocks"], -1)
        return self._session.run_into({**inputs, "image_blocks": blocks}, outputs)

    def close(self):
        self._session.close()


def test_a_dropped_image_mask_fails_where_there_are_images(work, bundle, monkeypatch):
    def open_blind(artifact, component, **options):
        return BlindSession(open_session(artifact, component, **options))

    monkeypatch.setattr(prediction_parity, "open_session", open_blind)
    report = check(work, bundle)
    assert failed(report) == {("lowering", "decoder"), ("lowering", "prefill")}
    errors = {row.name: row.parity.max_abs_error for row in report.prompts}
    assert min(errors["one image"], errors["two images"]) > 0.01 > 1e-4 > errors["text"]


def test_images_in_another_order_fail(work, bundle, tmp_path):
    features = np.roll(bundle.arrays["vision.image_features"], 16, axis=0)
    report = check(work, altered(bundle, tmp_path / "swapped", **{"vision.image_features": features}))
    assert failed(report) == {("lowering", "vision"), ("lowering", "decoder"), ("lowering", "prefill")}


def test_one_wrong_row_of_the_head_fails(work, bundle, tmp_path):
    """A token that no text contains: agreement and perplexity would not show it."""
    head = bundle.arrays["decoder.head"].copy()
    head[-1] *= 1.01
    report = check(work, altered(bundle, tmp_path / "head", **{"decoder.head": head}))
    assert ("lowering", "decoder") in failed(report)
    assert report.predictions["decoder"].agreement == 1.0


def test_a_second_bos_is_seen(work, bundle, monkeypatch):
    encode = PromptTokenizer.encode_text

    def doubled(self, text):
        made = encode(self, text)
        return replace(made, ids=np.concatenate((made.ids[:1], made.ids)))

    monkeypatch.setattr(PromptTokenizer, "encode_text", doubled)
    report = check(work, bundle)
    assert failed(report) == {("tokens", "decoder")}
    [tokens] = [check for check in report.checks if check.question == "tokens"]
    assert "text" in tokens.detail and tokens.value > 1


def test_logits_that_are_not_finite_fail_and_say_so(work, bundle, monkeypatch):
    def broken(self, *_, **__):
        raise NotFiniteError("the decoder's logits are not finite")

    monkeypatch.setattr(Decoder, "read", broken)
    report = check(work, bundle)
    assert failed(report) == {("lowering", "decoder"), ("lowering", "prefill")}
    assert report.predictions["decoder"].undefined == "the decoder's logits are not finite"
    assert report.prompts == ()


def test_prompts_of_the_user_are_not_named(work, bundle, tmp_path):
    own = tuple(replace(prompt, is_sample=False) for prompt in bundle.record.prompts)
    report = check(work, altered(bundle, tmp_path / "own", prompts=own))
    assert [row.name for row in report.prompts] == ["prompt 1", "prompt 2", "prompt 3"]
    shown = check(work, altered(bundle, tmp_path / "shown", prompts=own), show_images=True)
    assert [row.name for row in shown.prompts] == ["one image", "two images", "text"]


def test_what_does_not_go_together_is_refused(work, bundle, tmp_path):
    recipe = Recipe(
        model=tiny_prompts.MODEL,
        revision=None,
        target="onnx",
        scheme=SCHEMES["int8"],
        components=("embed", "decoder"),
        out=tmp_path / "blind",
    )
    build(recipe, progress=lambda *step: None)
    with pytest.raises(ParityError, match="prompts for decoder, embed, vision; compare an artifact that has"):
        check_predictions(open_artifact(tmp_path / "blind"), bundle)
    other = replace(bundle, record=replace(bundle.record, weights_sha256="0" * 64))
    with pytest.raises(ParityError, match="record a reference of the artifact's checkpoint"):
        check(work, other)


def test_a_packing_reference_is_not_made_of_a_generative_one(work, tmp_path):
    with pytest.raises(EdgeError, match="is a generative reference, and packing is asked of encoders"):
        record_packing(
            work / "int8",
            tiny_prompts.MODEL,
            work / "reference",
            tmp_path / "packing",
            progress=lambda *step: None,
        )


def test_the_command_line_decides_by_the_kind_of_the_reference(work, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["medgemma-parity", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        return cli.parity_main()

    arguments = (work / "int8", "--reference", work / "reference", "--threads", "1")
    assert run(*arguments, "--out", tmp_path / "parity.json") == 0
    printed = capsys.readouterr().out
    assert "int8 (int8) against the generative reference" in printed
    assert "decoder, " in printed and "perplexity" in printed
    [report] = read_result(tmp_path / "parity.json")
    assert [row.name for row in report.prompts] == ["one image", "two images", "text"]
    words = ["medgemma-report", tmp_path / "parity.json", "--out", tmp_path / "page"]
    monkeypatch.setattr("sys.argv", [*map(str, words)])
    assert cli.report_main() == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<h2>Predictions</h2>" in page and "two images" in page
    assert f'<td class="n">{report.predictions["decoder"].tokens}</td>' in page

    strict = tmp_path / "gates.toml"
    shipped = (files("medgemma_benchmarks") / "gates.toml").read_text(encoding="utf-8")
    strict.write_text(re.sub(r'(metric = "kl_mean"\nat_most = )\S+', r"\g<1>1e-9", shipped))
    assert run(*arguments, "--gates", strict) == 1
    assert "FAIL  manifest" in capsys.readouterr().out
