"""What the command lines of export add to what they call."""

import json
import logging
from pathlib import Path

import pytest

from medgemma_export import cli
from medgemma_export.cli import export_main
from medgemma_export.reference import cli as reference_cli
from medgemma_export.reference.cli import reference_main
from medgemma_runtime.manifest import read_manifest

safetensors_torch = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")

MEDGEMMA = ("--target", "onnx", "--model", "sample:medgemma-tiny", "--precision", "int4")
MEDSIGLIP = ("--target", "onnx", "--model", "sample:medsiglip-tiny")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty directory; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(main, *words: object):
        monkeypatch.setattr("sys.argv", ["medgemma", *map(str, words)])
        return main(), *capsys.readouterr()

    return run


@pytest.fixture
def adapter(tmp_path) -> Path:
    directory = tmp_path / "my-lora"
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.language_model.layers.2.mlp.up_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(160, 2)}
    safetensors_torch.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_a_dry_run_says_what_will_be_and_what_it_takes(call, adapter, tmp_path):
    words = (*MEDGEMMA, "--adapter", adapter, "--context", "512", "--dry-run")
    code, shown, _ = call(export_main, *words)
    assert code == 0
    assert "sample:medgemma-tiny with adapter my-lora, " in shown
    assert "context 512 tokens; the export needs 0.1 GB of memory and 0.1 GB of disk" in shown
    code, shown, _ = call(export_main, *words, "--json")
    facts = json.loads(shown)
    assert (facts["model"], facts["adapter"], facts["context"]) == ("sample:medgemma-tiny", "my-lora", 512)
    assert facts["memory_bytes"] > 1 << 26 and facts["disk_bytes"] > 1 << 26
    assert {row["storage"]["bits"] for row in facts["plan"]["rows"]} == {4, 32}
    assert [path.name for path in tmp_path.iterdir()] == ["my-lora"]


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_the_mobile_scheme_stores_the_image_tower_in_int8_and_all_else_in_wide_blocks(call, target):
    pytest.importorskip({"onnx": "onnx_ir", "coreml": "coremltools"}.get(target, target))
    words = ("--target", target, "--model", "sample:medgemma-tiny", "--scheme", "mobile", "--context", "512")
    code, shown, _ = call(export_main, *words, "--dry-run", "--json")
    assert code == 0
    stored = {(row["storage"]["bits"], row["storage"]["block"]) for row in json.loads(shown)["plan"]["rows"]}
    assert {storage for storage in stored if storage[0] < 16} == {(4, 64), (8, 0)}
    towers = {
        row["storage"]["bits"]
        for row in json.loads(shown)["plan"]["rows"]
        if row["role"] == "linear" and row["name"].startswith(("vision_tower", "multi_modal_projector"))
    }
    assert towers == {8}


def test_weights_apart_are_asked_of_executorch_alone(call):
    code, _, said = call(export_main, *MEDSIGLIP, "--separate-weights", "--dry-run")
    assert code == 2
    assert "--separate-weights is a choice within --target executorch; onnx has none" in said


def test_a_model_without_prompts_has_no_context_to_show(call):
    code, shown, _ = call(export_main, *MEDSIGLIP, "--dry-run")
    assert code == 0 and "context" not in shown
    _, shown, _ = call(export_main, *MEDSIGLIP, "--dry-run", "--json")
    assert (json.loads(shown)["context"], json.loads(shown)["adapter"]) == (None, None)


def test_context_and_adapter_reach_the_manifest(call, adapter, tmp_path):
    words = (*MEDGEMMA, "--adapter", adapter, "--context", "512", "--components", "decoder")
    code, shown, _ = call(export_main, *words)
    assert code == 0
    assert shown.startswith("medgemma-tiny-my-lora-onnx-int4: sample:medgemma-tiny with adapter my-lora as ")
    manifest = read_manifest(tmp_path / "medgemma-tiny-my-lora-onnx-int4")
    assert manifest.prompt.context == 512
    assert manifest.model.adapter.name == "my-lora"
    code, shown, _ = call(export_main, *MEDGEMMA, "--components", "decoder")
    assert code == 0 and shown.startswith("medgemma-tiny-onnx-int4: sample:medgemma-tiny as onnx")
    manifest = read_manifest(tmp_path / "medgemma-tiny-onnx-int4")
    assert (manifest.prompt.context, manifest.model.adapter) == (4096, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*MEDGEMMA, "--context", 4097), "a context of 4097 tokens was asked for and the model has 4096"),
        ((*MEDGEMMA, "--context", 1), "context 1 leaves no room for a prompt and an answer; name more"),
        ((*MEDGEMMA, "--context", -5), "context -5 leaves no room"),
        ((*MEDSIGLIP, "--context", 64), "SiglipModel answers no prompts, so it has no context"),
        ((*MEDGEMMA, "--adapter", "absent"), "adapter absent is no directory"),
        ((*MEDGEMMA, "--revision", "v1"), "revision 'v1' was given for sample:medgemma-tiny"),
        ((*MEDSIGLIP, "--adapter", "my-lora"), "does not fit sample:medsiglip-tiny"),
    ],
)
def test_exports_that_cannot_be(call, adapter, words, says):
    for more in ((), ("--dry-run",)):
        code, shown, error = call(export_main, *words, *more)
        assert (code, shown) == (2, "")
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_a_scheme_that_is_no_file_says_which_name_there_is(call):
    code, shown, error = call(export_main, *MEDGEMMA, "--scheme", "mobil", "--dry-run")
    assert (code, shown) == (2, "")
    assert error.startswith("error: scheme mobil is no file and not mobile, ") and "--precision" in error


def test_a_plan_names_weights_whole_on_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, shown, _ = call(export_main, *MEDSIGLIP, "--dry-run")
    assert code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_an_interruption_says_where_its_work_is(call, monkeypatch):
    def stop(recipe, *, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build", stop)
    assert call(export_main, *MEDSIGLIP, "--out", "made") == (130, "", "interrupted\n")
    Path(".made.partial").mkdir()
    says = "the same command goes on with what is finished in .made.partial\ninterrupted\n"
    assert call(export_main, *MEDSIGLIP, "--out", "made") == (130, "", says)


@pytest.mark.parametrize("name", ["torchao", "torch.utils._pytree"])
def test_what_other_packages_warn_of_is_not_shown_and_their_errors_are(call, name, monkeypatch):
    shown: list[bool] = []
    logger = logging.getLogger(name)
    logger.setLevel(logging.NOTSET)

    def look(recipe, *, progress):
        shown.extend(logger.isEnabledFor(level) for level in (logging.WARNING, logging.ERROR))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build", look)
    call(export_main, *MEDSIGLIP)
    assert shown == [False, True]


def test_references_take_a_revision_and_layers(call, monkeypatch, tmp_path):
    """Only a hub id has one, so a refusal shows that it was not dropped on the way."""
    model = ("--model", "sample:medsiglip-tiny")
    says = "revision 'v1' was given for sample:medsiglip-tiny"
    words = ("plain-onnx", *model, "--out", "plain.onnx")
    code, _, error = call(reference_main, *words, "--revision", "v1")
    assert code == 2 and says in error
    given: list[tuple[str | None, bool]] = []

    def record_packing(artifact, model, reference, out, *, revision, per_layer, progress):
        given.append((revision, per_layer))
        raise KeyboardInterrupt

    pytest.importorskip("medgemma_export.reference.packing")
    monkeypatch.setattr("medgemma_export.reference.packing.record_packing", record_packing)
    words = ("packing", tmp_path, *model, "--reference", tmp_path, "--out", "packing")
    call(reference_main, *words, "--revision", "v1")
    call(reference_main, *words, "--per-layer")
    assert given == [("v1", False), (None, True)]


def test_a_packing_reference_of_an_adapter_is_refused(call, adapter, tmp_path):
    call(export_main, *MEDSIGLIP, "--precision", "int8", "--out", "plain")
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    manifest["model"]["adapter"] = {"name": "my-lora", "sha256": "0" * 64}
    (tmp_path / "plain" / "manifest.json").write_text(json.dumps(manifest))
    words = ("packing", "plain", "--model", "sample:medsiglip-tiny", "--reference", "any")
    code, _, error = call(reference_main, *words, "--out", "packing")
    assert code == 2
    assert "plain has the adapter my-lora merged in, and references are of whole checkpoints" in error


BUDGET = (*MEDGEMMA, "--method", "search", "--calibration", "notes", "--sensitivity", "costs.json")


@pytest.fixture
def notes(tmp_path) -> Path:
    place = tmp_path / "notes"
    place.mkdir()
    (place / "note.txt").write_text("No acute findings.")
    return place


def test_a_budget_is_shown_before_anything_is_made(call, notes, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = call(export_main, *BUDGET, "--budget", "0.7MB", "--dry-run")
    assert code == 0
    assert "predicted, not measured: KL 0." in shown
    assert "language_model.embed_tokens.weight" in shown
    assert "budget 0.7 MB: 4 bits of 2 weights alone cost" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "notes"]
    code, shown, _ = call(export_main, *BUDGET, "--max-kl", "0.05", "--dry-run", "--json")
    facts = json.loads(shown)
    assert 0 < facts["predicted_kl"] <= 0.05
    assert facts["plan"]["scheme"] == "int4-int8"
    code, shown, _ = call(export_main, *MEDGEMMA, "--dry-run", "--json")
    assert json.loads(shown)["predicted_kl"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "1MB", "--max-kl", "0.1"), "--budget and --max-kl are two ways to say how far to go"),
        (("--budget", "much"), "size 'much' is not understood"),
        (("--budget", "1kB"), "size '1kB' is not understood"),
        (("--budget", "0.1MB"), "the smallest plan, int4 throughout, takes 0.63"),
        (("--max-kl", "-1"), "a divergence of -1.0 nats is no budget"),
        ((), "sensitivities are measured for a budget; name one"),
        (("--budget", "0.7MB", "--precision", "int8"), "the scheme is int8; choose precision int4"),
    ],
)
def test_budgets_that_cannot_be(call, notes, words, says):
    code, shown, error = call(export_main, *BUDGET, *words, "--dry-run")
    assert (code, shown) == (2, "")
    assert says in error and error.count("\n") == 1


def test_a_quantization_table(call, notes, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ("quantization", "--model", "sample:medgemma-tiny", "--row", "rtn:int4", "--tokens", "4")
    words += ("--calibration", "notes", "--out", "table.json")
    code, shown, _ = call(reference_main, *words)
    assert code == 0
    assert "weights rounded and activations float" in shown and "int4 block 32" in shown
    code, shown, _ = call(reference_main, *words, "--json")
    assert json.loads(shown) == json.loads((tmp_path / "table.json").read_text())
    code, _, error = call(reference_main, *words, "--row", "none")
    assert code == 2 and "row 'none' is unknown" in error


def test_examples_name_options_that_exist(call):
    """Every word of the examples that begins with -- is an option of the help above them."""
    for main, examples, commands in (
        (export_main, cli._EXAMPLES, [()]),
        (
            reference_main,
            reference_cli._EXAMPLES,
            [("record",), ("packing",), ("ranges",), ("quantization",)],
        ),
    ):
        known = "".join(call(main, *command, "--help")[1] for command in commands)
        for word in examples.split():
            assert not word.startswith("--") or word in known, word
