"""A quantization table in JSON, in a terminal, and on the page."""

import json
from dataclasses import replace

import pytest

from medgemma_benchmarks.quantization_report import (
    EmbeddingFidelity,
    PredictionFidelity,
    QuantizationReport,
    QuantizationRow,
)
from medgemma_benchmarks.quantization_table import print_quantization
from medgemma_benchmarks.report import write_report
from medgemma_benchmarks.results import read_result, to_json
from medgemma_runtime.errors import EdgeError
from tests.benchmarks.test_report import Page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

ROW = QuantizationRow(
    row="gptq:5.5",
    method="gptq",
    storage="int4 block 32 70%, int8 per channel 30%",
    is_emulated=False,
    plan_sha256="3" * 64,
    bits_per_weight=5.4987,
    size_bytes=184_000_000,
    predicted_kl=0.0612,
    predictions=PredictionFidelity(
        tokens=2032,
        kl_mean=0.0712,
        kl_p99=0.91,
        agreement=0.875,
        perplexity=36.51,
        reference_perplexity=35.44,
    ),
)
PEER = replace(
    ROW,
    row="llama.cpp-q4_0",
    method="llama.cpp Q4_0",
    storage="Q4_0, symmetric, block 32",
    is_emulated=True,
    plan_sha256=None,
    bits_per_weight=4.506,
    predicted_kl=None,
    predictions=replace(ROW.predictions, kl_mean=0.9),
)
TOWER = replace(
    ROW,
    row="rtn:int8",
    method="rtn",
    storage="int8 per channel 100%",
    predicted_kl=None,
    predictions=None,
    embeddings=EmbeddingFidelity(images=6, cosine_mean=0.99996, cosine_min=0.99991, agreement=1.0, labels=16),
)
REPORT = QuantizationReport(
    model_id="sample:gemma3-270m",
    revision=None,
    weights_sha256="1" * 64,
    calibration="17 samples (17 text), sha256 aa",
    held_out="16 samples (16 text), sha256 bb",
    tokens_per_text=128,
    versions={"numpy": "2"},
    rows=(ROW, PEER),
)


def test_a_table_is_read_back(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(to_json(REPORT))
    assert read_result(path) == [REPORT]
    data = json.loads(path.read_text())
    data["rows"][0]["bits_per_weight"] = None
    path.write_text(json.dumps(data))
    with pytest.raises(EdgeError, match=r"not to the form of this version: rows\.0\.bits_per_weight"):
        read_result(path)


def test_the_terminal_shows_each_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_quantization(replace(REPORT, rows=(ROW, PEER, TOWER)))
    lines = capsys.readouterr().out.splitlines()
    [mixed] = [line for line in lines if line.strip().startswith("gptq")]
    assert all(word in mixed for word in ("5.499", "184.0", "0.0712", "0.910", "87.5%", "36.51", "35.44"))
    [tower] = [line for line in lines if line.strip().startswith("rtn")]
    assert all(word in tower for word in ("0.999960", "0.999910", "100% of 6"))


def test_the_page_shows_a_table_by_itself(tmp_path):
    page = Page(write_report([REPORT], tmp_path / "report"))
    for words in ("What quantization costs", "gptq", "0.0712 0.0612", "llama.cpp Q4_0 emulated", "88%"):
        assert words in page.text
    assert "at most 128 tokens of each text" in page.text
    assert "Times only" not in page.text
    [alt] = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert "gptq 0.0712 at 5.50; llama.cpp Q4_0 0.9 at 4.51" in alt
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["row"] for row in data["quantization"][0]["rows"]] == ["gptq:5.5", "llama.cpp-q4_0"]


def test_the_page_shows_towers(tmp_path):
    page = Page(write_report([replace(REPORT, rows=(TOWER,))], tmp_path / "report"))
    assert "0.999960" in page.text and "6, 16 labels" in page.text
    assert "KL mean" not in page.text


def test_tables_of_several_checkpoints_are_refused(tmp_path):
    with pytest.raises(EdgeError, match="of 2 checkpoints"):
        write_report([REPORT, replace(REPORT, weights_sha256="2" * 64)], tmp_path / "report")
