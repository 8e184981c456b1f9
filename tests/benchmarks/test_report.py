import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medgemma_benchmarks.latency import LatencyReport, TimedImage, measure_latency
from medgemma_benchmarks.parity import check_parity
from medgemma_benchmarks.parity_report import ParityReport
from medgemma_benchmarks.peers import PeerModel
from medgemma_benchmarks.report import write_report
from medgemma_benchmarks.results import read_result
from medgemma_benchmarks.timing import Repetition
from medgemma_runtime.errors import EdgeError
from tests.benchmarks.tiny_bundle import IMAGES, LABELS, broken_image, tiny_opened, write_tiny_bundle

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

# Elements that must not be closed.
_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The tags, texts and attributes of a page, and whether its tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def parities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParityReport]:
    root = tmp_path_factory.mktemp("parities")
    bundle = write_tiny_bundle(root / "reference")
    artifacts = {
        "fp32": tiny_opened(root / "fp32"),
        "int8": tiny_opened(root / "int8", precision="int8"),
        "int4": broken_image(root / "int4", "Neg", precision="int4"),
        "broken": broken_image(root / "broken", "Log", precision="int4"),
    }
    return {name: check_parity(artifact, bundle) for name, artifact in artifacts.items()}


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> LatencyReport:
    root = tmp_path_factory.mktemp("latency")
    return measure_latency(
        tiny_opened(root / "fp32"),
        [TimedImage(name="red", decode=lambda: IMAGES[0].rgb)],
        [LABELS[0].caption],
        repetition=Repetition(seconds=0, min_runs=2, warm_up_runs=0),
        peers=[PeerModel(name="itself", path=root / "fp32/image.onnx")],
        profile=True,
    )


def test_the_page_needs_nothing_but_itself(tmp_path: Path, parities, latency) -> None:
    page = Page(write_report([parities["fp32"], parities["int8"], latency], tmp_path / "report"))
    tags = {tag for tag, _, _ in page.attributes} | {"html"}
    assert not tags & {"script", "link", "iframe", "object"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert re.match("data:image/(png|svg\\+xml);base64,", value), (tag, value[:80])
    raw = (tmp_path / "report/report.html").read_text()
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", raw)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["report.html", "report.json"]


def test_every_image_has_an_alternative_text(tmp_path: Path, parities, latency) -> None:
    page = Page(write_report([parities["fp32"], latency], tmp_path / "report"))
    images = sum(name == "src" for tag, name, _ in page.attributes if tag == "img")
    alternatives = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    # A thumbnail each, cosines, size, two heat maps, latency.
    assert images == len(alternatives) == len(IMAGES) + 5
    assert all(len(text) > 10 for text in alternatives)
    assert any("reference (float32)" in text and "red red 100%" in text for text in alternatives)
    assert any("Latency by stage, p50: fp32 decode" in text for text in alternatives)


def test_images_of_the_user_are_not_shown(tmp_path: Path) -> None:
    private = tuple(replace(image, name=f"DOE^{image.name}", is_sample=False) for image in IMAGES)
    bundle = write_tiny_bundle(tmp_path / "reference", images=private)
    artifact = tiny_opened(tmp_path / "fp32")
    page = Page(write_report([check_parity(artifact, bundle)], tmp_path / "report"))
    assert page.text.count("not shown") == len(IMAGES)
    assert "medgemma-parity --show-images shows them" in page.text
    for path in (tmp_path / "report").iterdir():
        assert "DOE" not in path.read_text(encoding="utf-8")
    shown = Page(write_report([check_parity(artifact, bundle, show_images=True)], tmp_path / "shown"))
    assert "DOE^red" in shown.text
    assert "not shown" not in shown.text


def test_the_worst_verdict_comes_first(tmp_path: Path, parities) -> None:
    assert "✓ Every gate passed" in Page(write_report([parities["fp32"]], tmp_path / "pass")).text[:600]
    page = Page(write_report([parities["fp32"], parities["int4"]], tmp_path / "fail"))
    assert "✗ A gate failed" in page.text[:600]
    assert "float reference in float32 on the CPU, Test CPU" in page.text[:600]
    assert "✗ differs" in page.text
    assert "3 different: red, green, blue" in page.text


def test_what_could_not_be_computed_is_a_dash_and_a_failure(tmp_path: Path, parities) -> None:
    page = Page(write_report([parities["fp32"], parities["broken"]], tmp_path / "report"))
    assert "✗ A gate failed" in page.text
    assert "no output" in page.text
    assert "cosine min \u2013, limit" in page.text
    assert not re.search(r"\bnan\b(?! or infinit)", page.text, re.IGNORECASE)


@pytest.mark.parametrize(("ties", "words"), [(1, "1 near tie "), (2, "2 near ties ")])
def test_near_ties_are_counted_and_their_margin_is_stated(
    tmp_path: Path, parities, ties: int, words: str
) -> None:
    report = parities["int8"]
    found = {where: replace(result, near_ties=ties) for where, result in report.zero_shot.items()}
    tied = replace(report, verdict="NEAR_TIE", zero_shot=found)
    page = Page(write_report([parities["fp32"], tied], tmp_path / "report"))
    assert f"≈ No gate failed; {words}" in page.text
    assert "within the tie margin of its own first choice, 0.1 logits." in page.text


@pytest.mark.parametrize(
    ("name", "metric", "values", "shown"),
    [
        ("fp32", "max_abs_error", {"image": 2e-5, "text": 9e-5}, "max abs error 9.00e-05"),
        ("fp32", "max_abs_error", {"image": 9e-5, "text": 2e-5}, "max abs error 9.00e-05"),
        ("int8", "cosine_min", {"image": 0.9995, "text": 0.9991}, "cosine min 0.99910"),
        ("int8", "cosine_min", {"image": 0.9995, "text": None}, "cosine min \u2013"),
    ],
)
def test_the_summary_shows_the_worst_component(tmp_path: Path, parities, name, metric, values, shown) -> None:
    report = parities[name]
    checks = tuple(
        replace(c, value=values[c.subject]) if c.metric == metric and c.subject in values else c
        for c in report.checks
        if c.question not in ("pixels", "tokens")
    )
    summary = Page(write_report([replace(report, checks=checks)], tmp_path / "report")).text
    assert shown in summary[: summary.index("Artifacts")]


def test_times_without_parity_say_so(tmp_path: Path, latency) -> None:
    page = Page(write_report([latency], tmp_path / "report"))
    assert "nothing here says that the outputs are right" in page.text
    assert "itself" in page.text
    assert "AveragePool" in page.text


def test_samples_are_called_plumbing(tmp_path: Path, parities) -> None:
    report = parities["fp32"]
    sample = replace(report, artifact=replace(report.artifact, model_id="sample:medsiglip-tiny"))
    assert "plumbing, not medicine" in Page(write_report([sample], tmp_path / "sample")).text
    assert "plumbing" not in Page(write_report([report], tmp_path / "other")).text


def test_names_cannot_inject_markup(tmp_path: Path, parities) -> None:
    report = parities["fp32"]
    assert report.images is not None
    named = replace(report.images[0], name="<b onclick=x>", source='"><script>')
    page = Page(write_report([replace(report, images=(named, *report.images[1:]))], tmp_path / "report"))
    assert "<b onclick=x>" in page.text
    assert not {tag for tag, _, _ in page.attributes} & {"b", "script"}


def test_beside_the_page_lies_what_it_was_made_from(tmp_path: Path, parities, latency) -> None:
    write_report([parities["fp32"], latency], tmp_path / "report")
    data = json.loads((tmp_path / "report/report.json").read_text())
    (tmp_path / "again.json").write_text(json.dumps(data["parity"] + data["latency"]))
    assert read_result(tmp_path / "again.json") == [parities["fp32"], latency]


def test_the_same_results_give_the_same_page(tmp_path: Path, parities, latency) -> None:
    pages = [write_report([parities["fp32"], latency], tmp_path / name).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_images_that_differ_are_shown_first_and_the_rest_is_counted(
    tmp_path: Path, parities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medgemma_benchmarks.report._SHOWN_IMAGES", 1)
    report = parities["fp32"]
    assert report.images is not None
    images = (*report.images[:2], replace(report.images[2], agreement="DIFFERENT"))
    page = Page(write_report([replace(report, images=images)], tmp_path / "report"))
    assert "1 of 3 images are shown, those that differ first" in page.text
    thumbnails = [v for tag, n, v in page.attributes if (tag, n) == ("img", "alt") and "Thumbnail" in v]
    assert thumbnails == ["Thumbnail of blue: blue"]


def test_the_lowest_cosine_of_a_model_that_answers_is_shown(tmp_path: Path, parities) -> None:
    report = parities["fp32"]
    answering = replace(
        report,
        components={"vision": replace(report.components["image"], cosine_min=0.98765)},
        reference=replace(report.reference, kind="generative"),
    )
    page = Page(write_report([answering], tmp_path / "report"))
    assert "vision 0.98765" in " ".join(page.text.split())


def test_a_margin_has_the_digits_that_matter(tmp_path: Path, parities) -> None:
    report = parities["fp32"]
    images = (replace(report.images[0], margin=10.6711), *report.images[1:])
    page = Page(write_report([replace(report, images=images)], tmp_path / "report"))
    assert "margin 10.7 " in page.text


def test_a_packing_reference_stands_beside_the_float_one(tmp_path: Path, parities) -> None:
    report = parities["int8"]
    packing = replace(
        report,
        question="packing",
        reference=replace(report.reference, kind="packing", bundle_sha256="1" * 64),
        checks=tuple(replace(c, question="packing") for c in report.checks if c.question == "scheme"),
    )
    page = Page(write_report([packing, report], tmp_path / "report"))
    assert "Packing reference" in page.text
    assert "Float reference" in page.text
    assert "is the float reference in float32" in page.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: [], "nothing to report"),
        (lambda r: [r, r], "two parity results are of fp32 and answer the same"),
        (
            lambda r: [r, replace(r, artifact=replace(r.artifact, weights_sha256="5" * 64))],
            "of 2 checkpoints",
        ),
    ],
)
def test_results_that_do_not_belong_together_are_refused(tmp_path: Path, parities, change, words) -> None:
    with pytest.raises(EdgeError, match=words):
        write_report(change(parities["fp32"]), tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("{}", "no parity, latency, generation or quantization report"),
        ('[{"report": "parity"}]', "not to the form of this version: artifact"),
        ('{"report": ["parity"]}', "no parity, latency, generation or quantization report"),
        ("3", "no parity, latency, generation or quantization report"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(EdgeError, match=words):
        read_result(tmp_path / "result.json")
    with pytest.raises(EdgeError, match="cannot be read"):
        read_result(tmp_path / "none.json")
