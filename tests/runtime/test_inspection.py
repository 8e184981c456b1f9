import json
import shutil
from pathlib import Path

import pytest

from medgemma_runtime.backends.mil import MilProgram, contents
from medgemma_runtime.cli import main
from tests.runtime.test_mil import GOLDEN, WIDTH
from tests.runtime.test_mil_session import ENTRY, write_artifact
from tests.runtime.tiny_artifact import write_tiny_artifact


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["medgemma-run", "inspect", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "120")
    code = main()
    return code, *capsys.readouterr()


def test_operators_and_weights_are_counted() -> None:
    found = contents(MilProgram.open(GOLDEN).functions["decode"])
    assert found.operators["linear"] == found.operators["slice_update"] == 1
    assert "const" not in found.operators
    by_name = {weight.name: weight for weight in found.weights}
    weight = by_name["weight"]
    assert (weight.storage, weight.shape, weight.is_float) == ("int4 per channel", (16, WIDTH), False)
    assert weight.size_bytes == 16 * WIDTH // 2 + 16 * 2
    assert not {"integers", "scales"} & by_name.keys()  # they are inside it
    assert {item.storage for item in found.weights if item.is_float} == {"float16"}


def test_an_artifact_and_a_package_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = write_artifact(tmp_path / "artifact", GOLDEN, ENTRY)
    for path in (artifact, artifact / "decoder.mlpackage"):
        code, printed, _ = run(monkeypatch, capsys, path)
        assert code == 0
        for function in ("prefill", "decode"):
            assert f"decoder.mlpackage, {function}" in printed
        assert "slice_update" in printed and "int4 per channel" in printed
    code, printed, _ = run(monkeypatch, capsys, artifact, "--json")
    [prefill, decode] = json.loads(printed).values()
    assert prefill["operators"] == decode["operators"]
    assert {weight["storage"] for weight in prefill["weights"]} == {"int4 per channel", "float16"}


def test_a_matrix_of_floats_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = pytest.importorskip("tests.runtime.mil_programs", reason="coremltools writes the program")
    import numpy as np

    def body(v: dict[str, object]) -> dict[str, object]:
        weight = programs.mb.const(val=np.ones((5, WIDTH), np.float16), name="forgotten")
        return {"y": programs.mb.linear(x=v["x"], weight=weight, bias=np.ones(5, np.float16))}

    package = programs.write_program(tmp_path / "p.mlpackage", {"x": ((1, WIDTH), "fp16")}, body)
    _, printed, _ = run(monkeypatch, capsys, package)
    assert f"float16 of 5 x {WIDTH}: forgotten" in printed


def test_what_is_no_core_ml_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(monkeypatch, capsys, write_tiny_artifact(tmp_path / "onnx"))
    assert code == 2
    assert "of target onnx, and what is inspected is programs of Core ML" in " ".join(said.split())
    broken = Path(shutil.copytree(GOLDEN, tmp_path / "p.mlpackage"))
    (broken / "Data/com.apple.CoreML/weights/weight.bin").unlink()
    code, _, said = run(monkeypatch, capsys, broken)
    assert code == 2 and "weight.bin is missing" in " ".join(said.split())
