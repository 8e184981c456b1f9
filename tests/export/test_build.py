"""An export is whole or absent, goes on where it stopped, and refuses in one sentence."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from medgemma_export import build as build_module
from medgemma_export.build import build
from medgemma_export.package import open_package
from medgemma_export.recipe import Recipe
from medgemma_export.samples import sample_path
from medgemma_quantization import weights as weights_module
from medgemma_quantization.scheme import SCHEMES
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.errors import ArtifactError, CheckpointError, EdgeError
from tests.export.conftest import SAMPLE


def recipe(out, *, precision="int8", model=SAMPLE, components=()):
    return Recipe(
        model=model,
        revision=None,
        target="onnx",
        scheme=SCHEMES[precision],
        components=components,
        out=out,
    )


def silent(what, done, total):
    pass


def test_the_same_request_gives_the_same_bytes(tmp_path):
    hashes = []
    for name in ("a", "b"):
        artifact = build(recipe(tmp_path / name), progress=silent)
        hashes.append({file.path: file.sha256 for file in artifact.manifest.files})
    assert hashes[0] == hashes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_existing_destination_is_left_alone(out):
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(EdgeError, match="exists already"):
        build(recipe(out), progress=silent)
    assert (out / "mine.txt").read_text() == "keep"


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(out, monkeypatch):
    def must_not_decide(*args, **kwargs):
        raise AssertionError("the place was not looked at first")

    monkeypatch.setattr(build_module, "decide", must_not_decide)
    (out.parent / "file").write_text("no directory")
    with pytest.raises(EdgeError, match="file is no directory; name another --out"):
        build(recipe(out.parent / "file" / "artifact"), progress=silent)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(EdgeError, match="is read-only; name another --out"):
        build(recipe(out.parent / "deep" / "artifact"), progress=silent)


def test_two_exports_to_one_place_do_not_mix(out):
    with open_package(out, key="a"), pytest.raises(EdgeError, match="another export is writing"):
        build(recipe(out), progress=silent)


def test_an_interrupted_export_leaves_nothing_that_looks_finished_and_goes_on(out, monkeypatch):
    def stop_while_lowering(what, done, total):
        if what.startswith("lower") and done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe(out), progress=stop_while_lowering)
    assert not out.exists()
    with pytest.raises(ArtifactError, match="no finished artifact"):
        open_artifact(out.parent / f".{out.name}.partial" / "artifact")

    def must_not_quantize(*args):
        raise AssertionError("the integers were there already")

    monkeypatch.setattr("medgemma_quantization.weights.store_integers", must_not_quantize)
    open_artifact(build(recipe(out), progress=silent).directory)
    assert not (out.parent / f".{out.name}.partial").exists()


def test_integers_of_another_plan_are_not_taken_over(out):
    with pytest.raises(KeyboardInterrupt):
        build(recipe(out, precision="int4"), progress=interrupt_when("lower"))
    again = build(recipe(out, precision="int8"), progress=silent)
    fresh = build(recipe(out.with_name("fresh"), precision="int8"), progress=silent)
    assert [file.sha256 for file in again.manifest.files] == [file.sha256 for file in fresh.manifest.files]


def test_integers_made_by_other_code_are_not_taken_over(out, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        build(recipe(out), progress=interrupt_when("lower"))
    made: list[str] = []
    real = weights_module.store_integers
    monkeypatch.setattr(
        weights_module, "store_integers", lambda row, *rest: made.append(row.name) or real(row, *rest)
    )
    monkeypatch.setattr(build_module, "source_fingerprint", lambda readers: "of a newer version")
    build(recipe(out), progress=silent)
    assert len(made) > 10


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path, out):
    model = tmp_path / "model"
    shutil.copytree(sample_path(SAMPLE), model)

    def touch(what, done, total):
        if what == "quantize" and done == 3:
            os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while they were read"):
        build(recipe(out, model=str(model)), progress=touch)
    assert not out.exists()


def interrupt_when(stage):
    def progress(what, done, total):
        if what.startswith(stage):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("stage", ["quantize", "lower", "hash the artifact"])
def test_kill_minus_9_leaves_nothing_that_looks_finished(out, stage):
    """A process that stops itself the hard way at a given stage, then the same request again."""
    script = f"""
import os, signal
from pathlib import Path
from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_quantization.scheme import SCHEMES

def progress(what, done, total):
    if what.startswith({stage!r}) and (total == 1 or done > 5):
        os.kill(os.getpid(), signal.SIGKILL)

build(Recipe(model={SAMPLE!r}, revision=None, target="onnx", scheme=SCHEMES["int8"], components=(),
             out=Path({str(out)!r})), progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert all(path.name.startswith(".") for path in out.parent.iterdir())
    open_artifact(build(recipe(out), progress=silent).directory)


def test_a_disk_that_is_too_small_is_refused_before_the_work(out, monkeypatch):
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(EdgeError, match=r"needs about 0\.1 GB of disk .* 0\.0 GB are free"):
        build(recipe(out), progress=silent)
    assert not list(out.parent.iterdir())


def test_a_memory_that_is_too_small_is_refused_before_the_work(out, monkeypatch):
    monkeypatch.setattr("medgemma_export.package.available_memory_bytes", lambda: 1000)
    words = r"needs about 0\.1 GB of memory \(to round .*\.weight\) and 0\.0 GB are available; close other"
    with pytest.raises(EdgeError, match=words):
        build(recipe(out), progress=silent)
    assert not list(out.parent.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(out, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medgemma_export.external_data.ExternalData.add", full)
    with pytest.raises(OSError, match="No space left"):
        build(recipe(out), progress=silent)
    assert not out.exists()


def test_a_target_that_packs_something_else_is_caught(out, monkeypatch):
    """The plan is compared with what was packed: drop one weight and see."""
    compare = build_module.compare_packed
    monkeypatch.setattr(build_module, "compare_packed", lambda plan, packed: compare(plan, packed[:-1]))
    with pytest.raises(RuntimeError, match="not packed"):
        build(recipe(out), progress=silent)
    assert not out.exists()


def test_requests_that_cannot_be_met(out):
    with pytest.raises(EdgeError, match="has no component 'decoder'; it has image, text"):
        build(recipe(out, components=("decoder",)), progress=silent)
    with pytest.raises(ValueError, match="name one twice"):
        recipe(out, components=("text", "text"))
    with pytest.raises(ValueError, match="target 'tflite'"):
        Recipe(model=SAMPLE, revision=None, target="tflite", scheme=SCHEMES["int8"], components=(), out=out)


def test_progress_only_goes_forward_and_ends(out):
    steps: list[tuple[str, int, int]] = []
    build(recipe(out), progress=lambda *step: steps.append(step))
    for stage in ("quantize", "lower to onnx"):
        mine = [(done, total) for what, done, total in steps if what == stage]
        assert mine == sorted(mine)
        assert mine[-1][0] == mine[-1][1]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Twice the layers, about the same peak: measured on Python's own allocations."""
    tracemalloc = pytest.importorskip("tracemalloc")
    transformers = pytest.importorskip("transformers")
    peaks = []
    for layers in (2, 8):
        directory = tmp_path / f"checkpoint-{layers}"
        write_checkpoint(transformers, directory, layers)
        tracemalloc.start()
        build(recipe(tmp_path / f"out-{layers}", model=str(directory)), progress=silent)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def write_checkpoint(transformers, directory, layers):
    from medgemma_export.samples import sample_path

    parts = {
        "hidden_size": 256,
        "intermediate_size": 1000,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = transformers.SiglipConfig(
        vision_config={**parts, "image_size": 56, "patch_size": 14},
        text_config={
            **parts,
            "vocab_size": 500,
            "projection_size": 256,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    )
    transformers.set_seed(0)
    transformers.SiglipModel(config).save_pretrained(directory)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path(SAMPLE) / name, directory / name)
