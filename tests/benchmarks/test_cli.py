import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgemma_benchmarks import cli
from medgemma_benchmarks.results import read_result
from tests.benchmarks.tiny_bundle import (
    IMAGES,
    LABELS,
    arrays_of,
    broken_image,
    decoded_image,
    tiny_opened,
    write_packing_bundle,
    write_tiny_bundle,
)
from tests.runtime import tiny_artifact as tiny

pytest.importorskip("safetensors")
pytest.importorskip("psutil")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs one of the three commands with these arguments and gives its exit code."""

    def run_main(main: Callable[[], int], *arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["medgemma", *(str(a) for a in arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        # Captions of words that the tiny text encoder knows: any other gives it a vector of length zero.
        monkeypatch.setattr(cli, "LABELS", {label.name: label.caption for label in LABELS})
        return main()

    return run_main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    (folder / ".DS_Store").write_text("no image")
    return folder


def test_parity_passes_with_0_and_writes_its_result(run, tmp_path: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact")
    write_tiny_bundle(tmp_path / "reference")
    arguments = (tmp_path / "artifact", "--reference", tmp_path / "reference", "--out", tmp_path / "out.json")
    assert run(cli.parity_main, *arguments) == 0
    printed = capsys.readouterr().out
    assert "against the float reference, float32 on Test CPU" in printed
    assert "lowering" in printed
    assert printed.rstrip().splitlines()[-1].startswith("PASS  manifest ")
    (report,) = read_result(tmp_path / "out.json")
    assert report.verdict == "PASS"


def test_images_of_the_user_are_shown_when_asked(run, tmp_path: Path) -> None:
    tiny_opened(tmp_path / "artifact")
    write_tiny_bundle(tmp_path / "reference", images=tuple(replace(i, is_sample=False) for i in IMAGES))
    arguments = (tmp_path / "artifact", "--reference", tmp_path / "reference", "--out", tmp_path / "out.json")
    for options, names in (((), ["image 1", "image 2", "image 3"]), (("--show-images",), list(tiny.COLOURS))):
        assert run(cli.parity_main, *arguments, *options) == 0
        (report,) = read_result(tmp_path / "out.json")
        assert [image.name for image in report.images] == names


def test_a_place_for_the_result_is_refused_before_the_work(run, tmp_path: Path, capsys) -> None:
    nowhere = ("--out", tmp_path / "no/out.json")
    assert run(cli.parity_main, tmp_path, "--reference", tmp_path, *nowhere) == 2
    assert run(cli.bench_main, tmp_path, *nowhere) == 2
    assert capsys.readouterr().err.count("no is no directory; make it first") == 2


def test_a_failed_gate_exits_with_1_and_still_writes_its_result(run, tmp_path: Path, capsys) -> None:
    broken_image(tmp_path / "artifact", "Neg")
    write_tiny_bundle(tmp_path / "reference")
    arguments = (tmp_path / "artifact", "--reference", tmp_path / "reference", "--out", tmp_path / "out.json")
    assert run(cli.parity_main, *arguments) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "3 different: red, green, blue" in printed
    assert read_result(tmp_path / "out.json")[0].verdict == "FAIL"


def test_near_ties_alone_exit_with_0_and_are_counted(run, tmp_path: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact", precision="int8")
    pictures = (decoded_image("both", "red", "green"), *IMAGES)
    arrays = arrays_of(pictures)
    arrays["logits"][0, 0] = arrays["logits"][0, 1] - 0.05
    write_tiny_bundle(tmp_path / "reference", images=pictures, arrays=arrays)
    assert run(cli.parity_main, tmp_path / "artifact", "--reference", tmp_path / "reference") == 0
    assert "No gate failed; 1 near tie (margin 0.1 logits)\nNEAR_TIE  manifest " in capsys.readouterr().out


def test_several_references_give_a_list_and_one_failure_counts(run, tmp_path: Path, capsys) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int8")
    write_tiny_bundle(tmp_path / "float")
    arrays = {"image.pooler_output": np.ones((3, 12), np.float32)}
    write_packing_bundle(tmp_path / "packing", artifact, arrays=arrays)
    arguments = [
        tmp_path / "artifact",
        "--reference",
        tmp_path / "float",
        "--reference",
        tmp_path / "packing",
    ]
    assert run(cli.parity_main, *arguments, "--json") == 1
    reports = json.loads(capsys.readouterr().out)
    assert [(r["question"], r["verdict"]) for r in reports] == [("scheme", "PASS"), ("packing", "FAIL")]


def test_gates_of_the_user_are_used(run, tmp_path: Path) -> None:
    tiny_opened(tmp_path / "artifact")
    write_tiny_bundle(tmp_path / "reference")
    gates = tmp_path / "gates.toml"
    gates.write_text("tie_margin_logits = 0.1\ngate = []\n")
    arguments = (tmp_path / "artifact", "--reference", tmp_path / "reference", "--gates", gates)
    assert run(cli.parity_main, *arguments) == 2


def test_a_reference_of_another_checkpoint_exits_with_2(run, tmp_path: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact")
    write_tiny_bundle(tmp_path / "reference", weights_sha256="7" * 64)
    assert run(cli.parity_main, tmp_path / "artifact", "--reference", tmp_path / "reference") == 2
    assert "record a reference of the artifact's checkpoint" in capsys.readouterr().err


def test_bench_measures_a_directory(run, tmp_path: Path, images: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact")
    arguments = [tmp_path / "artifact", "--images", images, "--seconds", 0, "--runs", 2, "--threads", 1]
    peer = f"itself={tmp_path / 'artifact/image.onnx'}"
    more = ["--batch", "1,2", "--against", peer, "--profile", "--out", tmp_path / "bench.json"]
    assert run(cli.bench_main, *arguments, *more) == 0
    printed = capsys.readouterr().out
    for words in ("end-to-end", "batch 2: ", "against itself: ", "AveragePool", "threads: 1"):
        assert words in printed
    (report,) = read_result(tmp_path / "bench.json")
    assert report.images == ("image 1",)
    assert run(cli.report_main, tmp_path / "bench.json", "--out", tmp_path / "report") == 0
    assert (tmp_path / "report/report.html").is_file()


def test_bench_prints_json_alone(run, tmp_path: Path, images: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact")
    arguments = (tmp_path / "artifact", "--images", images, "--seconds", 0, "--runs", 1, "--json")
    assert run(cli.bench_main, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["report"] == "latency"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "npu"], "onnx artifacts run on the CPU only"),
        (["--batch", "1,x"], "no list of sizes"),
        (["--batch", "0"], "at least 1"),
        (["--against", "peer"], "is not NAME=PATH"),
        (["--samples", "--images", "."], "choose one"),
    ],
)
def test_what_bench_cannot_do_exits_with_2(run, tmp_path: Path, images, capsys, arguments, words) -> None:
    tiny_opened(tmp_path / "artifact")
    images_given = [] if "--images" in arguments else ["--images", images]
    assert run(cli.bench_main, tmp_path / "artifact", *images_given, *arguments) == 2
    assert words in capsys.readouterr().err


def test_an_empty_directory_exits_with_2(run, tmp_path: Path, capsys) -> None:
    tiny_opened(tmp_path / "artifact")
    (tmp_path / "empty").mkdir()
    assert run(cli.bench_main, tmp_path / "artifact", "--images", tmp_path / "empty") == 2
    assert "has no images" in capsys.readouterr().err


def test_report_refuses_a_file_that_is_none(run, tmp_path: Path, capsys) -> None:
    assert run(cli.report_main, tmp_path / "none.json", "--out", tmp_path / "report") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("main", [cli.parity_main, cli.bench_main, cli.report_main])
def test_help_shows_an_example(run, main, capsys) -> None:
    assert run(main, "--help") == 0
    assert "Example" in capsys.readouterr().out
