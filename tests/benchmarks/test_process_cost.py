import subprocess
import sys
from pathlib import Path

import pytest

from medgemma_benchmarks import process_cost
from medgemma_benchmarks.process_cost import measure_process_cost, peak_rss_bytes, zero_inputs
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.errors import EdgeError
from tests.runtime import tiny_artifact as tiny


def test_a_fresh_process_opens_runs_and_reports(tmp_path: Path) -> None:
    artifact = open_artifact(tiny.write_tiny_artifact(tmp_path / "artifact"))
    cost = measure_process_cost(artifact, ["image", "text"], threads=1)
    assert cost.components == ("image", "text")
    assert min(cost.cold_load_ms, cost.first_run_ms, cost.warm_load_ms) > 0
    # The engine alone takes some megabytes; a training stack would take hundreds.
    assert 2**24 < cost.idle_rss_bytes < cost.peak_rss_bytes < 2**28


def test_a_large_parent_does_not_show_in_its_child(tmp_path: Path) -> None:
    artifact = open_artifact(tiny.write_tiny_artifact(tmp_path / "artifact"))
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"\1" * len(ballast[:: 1 << 12])
    assert peak_rss_bytes() > 300 << 20
    assert measure_process_cost(artifact, ["image"], threads=1).peak_rss_bytes < 300 << 20


def test_memory_that_was_given_back_still_counts() -> None:
    code = (
        "from medgemma_benchmarks.process_cost import peak_rss_bytes as peak\n"
        "before = peak(); ballast = bytearray(b'1') * (64 << 20); del ballast\n"
        "assert peak() - before > 60 << 20, peak() - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_that_was_given_back_is_not_resident_now() -> None:
    code = (
        "from medgemma_benchmarks.process_cost import rss_bytes as now\n"
        "before = now(); ballast = bytearray(b'1') * (64 << 20); held = now(); del ballast\n"
        "assert held - before > 60 << 20, held - before\n"
        "assert now() - before < 16 << 20, now() - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_idle_memory_is_what_is_resident_and_not_a_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(tiny.write_tiny_artifact(tmp_path / "artifact"))
    monkeypatch.setattr(process_cost, "rss_bytes", lambda: 5)
    assert process_cost._observe(artifact, ["image"], 1).idle_rss_bytes == 5


def test_what_the_process_says_last_is_the_error(tmp_path: Path) -> None:
    artifact = open_artifact(tiny.write_tiny_artifact(tmp_path / "artifact"))
    (tmp_path / "artifact/image.onnx").write_bytes(
        b"\x07" * (tmp_path / "artifact/image.onnx").stat().st_size
    )
    with pytest.raises(EdgeError, match=r"fresh process could not open image: .*cannot be loaded"):
        measure_process_cost(artifact, ["image"], threads=None)


def test_inputs_are_zeros_with_one_for_every_free_dimension() -> None:
    entry = tiny.tensor("x", "int64", "batch", 3, "rows")
    (array,) = zero_inputs(
        type("Entry", (), {"inputs": (entry,)})(),  # only `inputs` is read
    ).values()
    assert (array.shape, array.dtype, array.any()) == ((1, 3, 1), "int64", False)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys\n"
        "import medgemma_benchmarks.cli, medgemma_benchmarks.report, medgemma_benchmarks.process_cost\n"
        "heavy = {'torch', 'transformers', 'onnx', 'matplotlib', 'jinja2', 'onnxruntime', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
