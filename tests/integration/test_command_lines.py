"""The whole path as a user walks it, and every bad input: one sentence, the right exit code, no traceback."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from medgemma_benchmarks.cli import bench_main, parity_main, report_main
from medgemma_export.cli import export_main
from medgemma_export.reference.cli import reference_main
from medgemma_runtime.cli import main as run_main

MODEL = "sample:medsiglip-tiny"
MAINS = {
    "medgemma-export": export_main,
    "medgemma-reference": reference_main,
    "medgemma-run": run_main,
    "medgemma-parity": parity_main,
    "medgemma-bench": bench_main,
    "medgemma-report": report_main,
}


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a command line wrote."""

    stdout: str
    stderr: str


def call(command, *words, expect=0):
    """Run a command line as its entry point does; an exception that it lets through fails the test."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [command, *map(str, words)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = MAINS[command]()
    assert code == expect, (code, stdout.getvalue(), stderr.getvalue())
    return Printed(stdout=stdout.getvalue(), stderr=stderr.getvalue())


def refusal(command, *words):
    """The one sentence of a refusal."""
    error = call(command, *words, expect=2).stderr.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Artifacts of every precision and the references they are held against."""
    directory = tmp_path_factory.mktemp("path")
    for precision in ("fp32", "int8", "int4"):
        words = ("--target", "onnx", "--model", MODEL, "--precision", precision)
        call("medgemma-export", *words, "--out", directory / precision)
    call("medgemma-reference", "record", "--model", MODEL, "--out", directory / "reference")
    for precision in ("int8", "int4"):
        words = (directory / precision, "--model", MODEL, "--reference", directory / "reference")
        call("medgemma-reference", "packing", *words, "--out", directory / f"packing-{precision}")
    return directory


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_every_gate_passes_on_real_images(work, precision, tmp_path):
    references = ["--reference", work / "reference"]
    if precision != "fp32":
        references += ["--reference", work / f"packing-{precision}"]
    out = tmp_path / "parity.json"
    call("medgemma-parity", work / precision, *references, "--out", out)
    text = out.read_text()
    assert '"FAIL"' not in text
    reports = json.loads(text)
    reports = reports if isinstance(reports, list) else [reports]
    assert {report["question"] for report in reports} == (
        {"lowering"} if precision == "fp32" else {"scheme", "packing"}
    )
    modalities = {image["modality"] for report in reports for image in report["images"] or ()}
    assert len(modalities) >= 6


def test_a_damaged_scale_fails_the_packing_gate_with_exit_code_1(work, tmp_path):
    """Damage that the hashes would catch, hidden from them on purpose: parity must see it by itself."""
    damaged = tmp_path / "int8"
    shutil.copytree(work / "int8", damaged)
    data = damaged / "onnx" / "vision_model_int8.onnx_data"
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    data.write_bytes(content)
    rehash(damaged, data)
    call("medgemma-parity", damaged, "--reference", work / "packing-int8", expect=1)


def test_one_altered_row_that_no_caption_uses_is_named(work, tmp_path):
    """Nothing that runs would show it; reading the integers back does."""
    onnx = pytest.importorskip("onnx")
    damaged = tmp_path / "int4"
    shutil.copytree(work / "int4", damaged)
    program = onnx.load(damaged / "onnx" / "text_model_q4.onnx", load_external_data=False)
    name = "text_model.embeddings.token_embedding.weight"
    [table] = [tensor for tensor in program.graph.initializer if tensor.name == name]
    place = {entry.key: entry.value for entry in table.external_data}
    data = damaged / "onnx" / place["location"]
    content = bytearray(data.read_bytes())
    content[int(place["offset"]) + int(place["length"]) - 1] ^= 1
    data.write_bytes(content)
    rehash(damaged, data)
    words = ("packing", damaged, "--model", MODEL, "--reference", work / "reference")
    assert name in refusal("medgemma-reference", *words, "--out", tmp_path / "packing")


def rehash(directory, path):
    from medgemma_runtime.artifact import sha256_file

    manifest = json.loads((directory / "manifest.json").read_text())
    [entry] = [file for file in manifest["files"] if (directory / file["path"]) == path]
    entry["sha256"] = sha256_file(path)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_run_bench_and_report_take_the_artifact(work, tmp_path):
    from medgemma_runtime.sample_images import SAMPLE_IMAGES, sample_image_path

    image = sample_image_path(SAMPLE_IMAGES[0])
    answer = call(
        "medgemma-run", "classify", work / "int8", image,
        "--label", "a chest radiograph", "--label", "a head CT", "--json",
    )  # fmt: skip
    assert "a chest radiograph" in answer.stdout
    call("medgemma-bench", work / "int8", "--runs", "2", "--seconds", "0", "--out", tmp_path / "bench.json")
    call(
        "medgemma-parity", work / "int8", "--reference", work / "reference", "--out", tmp_path / "parity.json"
    )
    call("medgemma-report", tmp_path / "bench.json", tmp_path / "parity.json", "--out", tmp_path / "report")
    page = next((tmp_path / "report").glob("*.html")).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "plumbing" in page or "medicine" in page


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    words = (
        "--target",
        "onnx",
        "--model",
        MODEL,
        "--precision",
        "int4",
        "--out",
        tmp_path / "x",
        "--dry-run",
    )
    shown = call("medgemma-export", *words)
    assert "int4 block 32" in shown.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def artifact(work, tmp_path) -> Path:
    shutil.copytree(work / "int8", tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_flipped_byte_in_a_weight_file(artifact):
    data = artifact / "onnx" / "text_model_int8.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    words = ("search", artifact, artifact / "none.npz", "--text", "x")
    assert "SHA-256" in refusal("medgemma-run", *words)
    assert "SHA-256" in call("medgemma-run", "verify", artifact, expect=1).stderr
    assert "SHA-256" in refusal("medgemma-bench", artifact)


def test_an_unknown_manifest_version(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    assert "version 99" in refusal("medgemma-run", "info", artifact)


def test_a_half_written_export_is_no_artifact(tmp_path):
    """Killed the hard way after the programs were written, in a process of its own."""
    script = """
import os, signal, sys
import medgemma_export.build as build
from medgemma_export.cli import export_main

build.compare_packed = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(export_main())
"""
    words = ("--target", "onnx", "--model", MODEL, "--out", str(tmp_path / "out"))
    killed = subprocess.run([sys.executable, "-c", script, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = tmp_path / ".out.partial" / "artifact"
    assert "no finished artifact" in refusal("medgemma-run", "info", left)
    call("medgemma-export", *words)
    call("medgemma-run", "verify", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(tmp_path, monkeypatch):
    words = ("--target", "onnx", "--model", MODEL, "--out", tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: usage)
        assert "of disk" in refusal("medgemma-export", *words)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medgemma_export.external_data.ExternalData.add", full)
    assert "disk is full" in refusal("medgemma-export", *words)
    assert not (tmp_path / "out").exists()


def test_a_dicom_file_without_pixels(artifact):
    pydicom_data = pytest.importorskip("pydicom.data")
    path = pydicom_data.get_testdata_file("rtplan.dcm", download=False)
    error = refusal("medgemma-run", "classify", artifact, path, "--label", "a", "--label", "b")
    assert "holds no image (it is RT Plan Storage)" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--target", "onnx", "--model", "sample:medsiglip-tony"), "did you mean sample:medsiglip-tiny"),
        (("--target", "onnx", "--model", "/no/such/place"), "does not exist"),
        (("--target", "coreml", "--model", MODEL, "--scheme", "no-such.toml"), "no-such.toml"),
        (("--target", "onnx", "--model", MODEL, "--components", "decoder"), "no component 'decoder'"),
    ],
)
def test_exports_that_cannot_be(tmp_path, words, says):
    assert says in refusal("medgemma-export", *words, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_is_not_known(tmp_path):
    from medgemma_export.samples import sample_path

    other = tmp_path / "other"
    shutil.copytree(sample_path(MODEL), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    words = ("--target", "onnx", "--model", other, "--out", tmp_path / "out")
    error = refusal("medgemma-export", *words)
    assert "'LlamaForCausalLM'" in error
    assert "SiglipModel" in error


def test_a_reference_of_another_model_is_refused(work, tmp_path):
    words = (work / "int8", "--reference", work / "packing-int4")
    assert "plan" in refusal("medgemma-parity", *words)


@pytest.mark.parametrize("command", MAINS)
def test_help_has_examples(command):
    shown = call(command, "--help").stdout
    assert "Example" in shown


def readme_commands():
    """Every command that a README shows in a block of its own, with the line it begins on."""
    root = Path(__file__).parents[2]
    for path in (root / "README.md", *sorted(root.glob("*/README.md"))):
        for block in re.findall(r"^```\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition("  #")[0].split()
                if words and words[0] in MAINS:
                    yield pytest.param(words, id=f"{path.relative_to(root)}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(readme_commands()))
def test_a_command_of_a_readme_has_the_options_that_it_shows(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command, *rest = words
    help_text = call(command, "--help").stdout
    subcommands = re.findall(r"^│ ([a-z-]+) ", help_text, re.M) if "COMMAND [ARGS]" in help_text else []
    if rest and rest[0] in subcommands:
        help_text = call(command, rest[0], "--help").stdout
    elif "stages" in subcommands:
        help_text = call(command, "stages", "--help").stdout
    known = set(re.findall(r"--[a-z-]+", help_text))
    assert {word for word in rest if word.startswith("--")} <= known
