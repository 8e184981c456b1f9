import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgemma_benchmarks import cli
from medgemma_benchmarks.engine_process import EngineModel, EngineProcess
from medgemma_benchmarks.generation import GenerationReport, Spread, measure_generation, prompt_ids
from medgemma_benchmarks.report import write_report
from medgemma_benchmarks.results import read_result, to_json
from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.prompt import load_prompt_tokenizer
from medgemma_runtime.sample_notes import SAMPLE_NOTES, load_note
from tests.benchmarks.engines import generating_artifact, scripted, steady  # noqa: F401 - a fixture
from tests.benchmarks.tiny_bundle import tiny_opened

pytest.importorskip("psutil")


@pytest.fixture
def report(tmp_path: Path, scripted) -> GenerationReport:  # noqa: F811
    """Ours takes 1 ms a token of the prompt and 10 ms a further one; one peer is slower and one faster."""
    ours = scripted("edge", steady("ours", prefill=0.001, decode=0.01, first=(4, 5, 6)))
    slow = scripted("slow", steady("slow", prefill=0.002, decode=0.025, first=(4, 5, 8)))
    fast = scripted("fast", steady("fast", prefill=0.0005, decode=0.004, first=(4, 5, 6)))
    return measure_generation(
        generating_artifact(tmp_path / "artifact"),
        ours,
        [slow, replace(fast, model=tmp_path / "artifact")],
        threads=1,
        prompts=(3, 20),
        decode=4,
        rounds=3,
    )


def constant(value: float) -> Spread:
    return Spread(median=pytest.approx(value), min=pytest.approx(value), max=pytest.approx(value))


def test_rates_are_tokens_a_second_and_a_ratio_above_1_means_that_ours_is_faster(report) -> None:
    ours, (slow, fast) = report.ours, report.peers
    assert [(w.prompt_tokens, w.decode_tokens) for w in ours.workloads] == [(3, 4), (20, 4)]
    for mine, slower, faster in zip(ours.workloads, slow.workloads, fast.workloads, strict=True):
        assert (mine.prefill_rate, mine.decode_rate) == (constant(1000), constant(100))
        assert (mine.prefill_ratio, mine.decode_ratio, mine.same_tokens) == (None, None, None)
        assert (slower.prefill_rate, slower.decode_rate) == (constant(500), constant(40))
        assert (slower.prefill_ratio, slower.decode_ratio) == (constant(2.0), constant(2.5))
        assert (faster.prefill_ratio, faster.decode_ratio) == (constant(0.5), constant(0.4))
        assert (slower.same_tokens, faster.same_tokens) == (2, 5)


def test_each_engine_is_asked_for_the_same_in_turns(report, tmp_path: Path) -> None:
    asked = [(tmp_path / "engines" / f"{name}.asked").read_text() for name in ("edge", "slow", "fast")]
    requests = [[json.loads(line) for line in lines.splitlines()] for lines in asked]
    assert requests[0][1:] == requests[1][1:] == requests[2][1:]
    assert all(first["threads"] == 1 and first["context"] == 1024 for first, *_ in requests)
    assert report.rounds == 4  # three, made even, after one to warm up
    assert [len(r["ids"]) for r in requests[0][1:]] == [3, 20] * 5
    turns = (tmp_path / "engines/turns").read_text().split()
    assert turns[:3] == ["edge", "slow", "fast"]  # loading
    forward, backward = ["edge", "slow", "fast"] * 2, ["fast", "slow", "edge"] * 2
    assert turns[3:] == backward + forward + backward + forward + backward


def test_the_facts_beside_the_rates(report, tmp_path: Path) -> None:
    slow, fast = report.peers
    assert (slow.engine, slow.version, slow.load_seconds) == ("slow", "1", 0.5)
    assert (slow.model, slow.size_bytes) == (
        "engines.py",
        (Path(__file__).parent / "engines.py").stat().st_size,
    )
    files = [path for path in (tmp_path / "artifact").iterdir() if path.is_file()]
    assert (fast.model, fast.size_bytes) == ("artifact", sum(path.stat().st_size for path in files))
    if sys.platform == "linux":
        assert all(engine.peak_rss_bytes > 1 << 20 for engine in (report.ours, slow, fast))
        assert report.load_average >= 0
    (tmp_path / "result.json").write_text(to_json(report))
    assert read_result(tmp_path / "result.json") == [report]


def test_a_ratio_is_of_the_same_round_and_warming_up_counts_for_nothing(
    tmp_path: Path,
    scripted,  # noqa: F811
) -> None:
    # The first run is slow, and later both slow down in the same rounds, as when the machine is shared.
    script = steady("{name}", prefill=0.001, decode=0.01)
    slowing = (
        "import itertools\nrounds = itertools.count()\n" + script + "\nsteady = answer\n"
        "def answer(request):\n"
        "    said = steady(request)\n"
        "    if 'ids' in said:\n"
        "        said['prefill_seconds'] *= (50, 2, 3, 1, 2, 3, 1)[next(rounds)]\n"
        "    return said\n"
    )
    report = measure_generation(
        generating_artifact(tmp_path / "artifact"),
        scripted("edge", slowing),
        [scripted("peer", slowing.replace("* len", "* 3 * len"))],
        threads=1,
        prompts=(8,),
        decode=2,
        rounds=6,
    )
    [ours], [theirs] = report.ours.workloads, report.peers[0].workloads
    assert (ours.prefill_rate.min, ours.prefill_rate.max) == pytest.approx((1000 / 3, 1000))
    assert theirs.prefill_ratio == constant(3.0)
    assert theirs.decode_ratio == constant(1.0)


def test_a_worker_that_dies_in_between_ends_the_comparison(tmp_path: Path, scripted) -> None:  # noqa: F811
    dying = steady("dying", prefill=0.1, decode=0.1).replace(
        "steps =", "exit('lost') if len(request['ids']) > 5 else None; steps ="
    )
    with pytest.raises(EdgeError, match=r"^dying \(engines\.py\) ended with exit status 1: lost$"):
        measure_generation(
            generating_artifact(tmp_path / "artifact"),
            scripted("edge", steady("ours", prefill=0.1, decode=0.1)),
            [scripted("dying", dying)],
            threads=1,
            prompts=(3, 8),
            decode=2,
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"prompts": (17, 512), "decode": 89},
            "of 512 tokens and 89 further .* context of 600; give a",
        ),
        ({"prompts": ()}, "prompts of no tokens"),
        ({"prompts": (17, 0)}, "prompts of 17, 0 tokens, .* must be at least 1"),
        ({"decode": 0}, "0 further tokens"),
        ({"rounds": 0}, "0 rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_engine_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments,
    words: str,
) -> None:
    monkeypatch.setattr(EngineProcess, "__init__", lambda *_, **__: pytest.fail("it was started"))
    artifact = generating_artifact(tmp_path / "artifact")
    model = EngineModel(engine="edge", model=artifact.directory, python=sys.executable)
    with pytest.raises(EdgeError, match=words):
        measure_generation(artifact, model, [], threads=1, **arguments)


def test_an_artifact_that_generates_nothing_is_refused(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    model = EngineModel(engine="edge", model=artifact.directory, python=sys.executable)
    with pytest.raises(EdgeError, match=r"has the components image, text .* give an artifact of a MedGemma"):
        measure_generation(artifact, model, [], threads=1)


@pytest.fixture(scope="module")
def medgemma(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny MedGemma's text half."""
    pytest.importorskip("torch")
    from medgemma_export.build import build
    from medgemma_export.recipe import Recipe
    from medgemma_quantization.scheme import SCHEMES

    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="onnx",
        scheme=SCHEMES["fp32"],
        components=("embed", "decoder"),
        out=tmp_path_factory.mktemp("medgemma") / "artifact",
    )
    build(recipe, progress=lambda *step: None)
    return open_artifact(recipe.out)


def test_a_prompt_is_the_beginning_of_our_notes(medgemma: Artifact) -> None:
    tokenizer = load_prompt_tokenizer(medgemma.directory, medgemma.manifest.prompt)
    ids = prompt_ids(medgemma, 40)
    assert (len(ids), ids[0], ids.count(2)) == (40, 2, 1)
    text = tokenizer.decode(ids[1:-3])  # a character may be cut at the end
    assert len(text) > 10
    assert load_note(SAMPLE_NOTES[0]).startswith(text)
    # Far more than all notes together.
    assert len(prompt_ids(medgemma, 60_000)) == 60_000


def test_the_artifact_itself_is_run_by_the_runtime(medgemma: Artifact, tmp_path: Path) -> None:
    ids = prompt_ids(medgemma, 30)
    model = EngineModel(engine="edge", model=medgemma.directory, python=sys.executable)
    with EngineProcess(model, threads=1, context=64) as process:
        assert process.loaded.engine == "medgemma-edge"
        process.run([2, 5], decode=1)
        run = process.run(ids, decode=6)
    # The same, each token from a whole prompt without a cache that was used before.
    sessions = [open_session(medgemma, name, threads=1) for name in ("embed", "decoder")]
    decoder = Decoder(*sessions, medgemma.manifest.prompt)
    for count, token in enumerate(run.ids):
        so_far = np.array([*ids, *run.ids[:count]], np.int64)
        assert decoder.read(decoder.new_cache(64), so_far).argmax() == token
    with pytest.raises(EdgeError, match=r"edge \(tiny\) failed: ArtifactError: .*no prompt spec"):
        EngineProcess(replace(model, model=tiny_opened(tmp_path / "tiny").directory), threads=1, context=64)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted):  # noqa: F811
    """Runs `medgemma-bench generate` on an artifact, with one slower engine beside it."""
    generating_artifact(tmp_path / "artifact")
    scripted("edge", steady("ours", prefill=0.001, decode=0.01))
    scripted("slow", steady("slow", prefill=0.002, decode=0.025))

    def run(*words: object) -> int:
        peer = f"slow={tmp_path / 'artifact'}@{sys.executable}"
        options = ["--against", peer, "--prompt", "9", "--decode", "2", "--rounds", "2", *map(str, words)]
        monkeypatch.setattr("sys.argv", ["medgemma-bench", "generate", str(tmp_path / "artifact"), *options])
        monkeypatch.setenv("COLUMNS", "200")
        return cli.bench_main()

    return run


def test_the_command_line_prints_rates_and_ratios(bench, tmp_path: Path, capsys) -> None:
    assert bench("--threads", 1, "--out", tmp_path / "result.json") == 0
    printed = capsys.readouterr().out
    for words in (
        "threads: 1, 2 rounds",
        "1000 (1000 to 1000)",
        "2.00 (2.00 to 2.00)",
        "2.50 (2.50 to 2.50)",
        "3/3",
    ):
        assert words in printed
    [report] = read_result(tmp_path / "result.json")
    assert report.ours.workloads[0].prompt_tokens == 9


def test_the_command_line_prints_json_alone(bench, capsys) -> None:
    assert bench("--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["report"] == "generation"
    assert content["device"]["threads"] == content["device"]["logical_cores"]


def test_the_command_line_refuses_in_one_sentence(bench, tmp_path: Path, capsys) -> None:
    assert bench("--against", f"tensorrt={tmp_path}@{sys.executable}") == 2
    assert capsys.readouterr().err.startswith("error: --against tensorrt: there is no such engine")
    assert bench("--prompt", 600) == 2
    assert "has a context of 600; give a shorter --prompt" in capsys.readouterr().err
    assert bench("--out", tmp_path / "no/out.json") == 2


def test_the_report_shows_generation(report, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = write_report([report], tmp_path / "report").read_text(encoding="utf-8")
    assert "<h2>Generation</h2>" in page
    assert "2.00 (2.00 to 2.00)" in page
    assert "2 of 5" in page
    unknown = replace(
        report, load_average=None, ours=replace(report.ours, peak_rss_bytes=None, engine="<b>ours</b>")
    )
    page = write_report([unknown], tmp_path / "report").read_text(encoding="utf-8")
    assert "load average" not in page
    assert "<b>ours" not in page
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert [result["report"] for result in content["generation"]] == ["generation"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], "generate"),
        (["generate", "--help"], "ENGINE=MODEL@PYTHON"),
        (["stages", "--help"], "--batch"),
        (["--batch", "1", "--help"], "--batch"),  # the command that needs no name
    ],
)
def test_the_help_of_each_command(monkeypatch: pytest.MonkeyPatch, capsys, words, expected: str) -> None:
    monkeypatch.setattr("sys.argv", ["medgemma-bench", *words])
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.bench_main() == 0
    printed = capsys.readouterr().out
    assert expected in printed
    assert "Example" in printed
