"""Calibration in lockstep computes the model, and what it rounds does not depend on how it ran."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.calibration import fidelity as fidelity_module  # noqa: E402
from medgemma_export.calibration.calibrate import (  # noqa: E402
    ModelInput,
    calibrate,
)
from medgemma_export.calibration.fidelity import Fidelity, measure  # noqa: E402
from medgemma_export.calibration.inputs import model_inputs  # noqa: E402
from medgemma_export.calibration.reach import check_chain, unreached_weights  # noqa: E402
from medgemma_export.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from medgemma_export.models import ModelSpec, load_model  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.torch_ops import compute  # noqa: E402
from medgemma_export.unpack import compare_integers  # noqa: E402
from medgemma_quantization.calibration import open_set  # noqa: E402
from medgemma_quantization.methods import METHODS  # noqa: E402
from medgemma_quantization.plan import QuantPlan, make_plan, note_unreached, read_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_quantization.weights import QuantizedWeights, quantize_weights  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402

IMAGE_TOKENS, PLENTY = 16, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, a plan for it, its weights in memory, and samples for it."""

    checkpoint: Checkpoint
    model: ModelSpec
    plan: QuantPlan
    samples: list[ModelInput]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.model.reader(self.checkpoint)(name, rows)

    def calibrate(self, directory: Path, method: str = "gptq", **changes) -> QuantizedWeights:
        given = {"samples": self.samples, "read": self.read, "plan": self.plan, "memory_bytes": PLENTY}
        return calibrate(
            model=self.model, directory=directory, find=METHODS[method].find, **(given | changes)
        )

    def measure(self, weights: QuantizedWeights, samples: list[ModelInput] | None = None) -> Fidelity:
        [fidelity] = measure(
            self.model,
            weights.plan,
            self.read,
            [weights.current],
            self.samples if samples is None else samples,
            spill=weights.directory.parent,
            memory_bytes=PLENTY,
        )
        return fidelity


def make_sample(seed: int, *, image_id: int | None, length: int = 40) -> ModelInput:
    rng = np.random.default_rng(seed)
    ids = rng.integers(8, 290, length)
    ids[0] = 2
    blocks, pixels = np.full(length, -1), None
    if image_id is not None:
        ids[5 : 5 + IMAGE_TOKENS], blocks[5 : 5 + IMAGE_TOKENS] = image_id, 0
        coarse = rng.uniform(-1, 1, (1, 3, 14, 14)).astype(np.float32)
        pixels = np.kron(coarse, np.ones((16, 16), np.float32))
    return ModelInput(pixels=pixels, ids=ids, image_blocks=blocks)


@pytest.fixture(scope="module")
def subject() -> Subject:
    checkpoint = open_checkpoint("sample:medgemma-tiny")
    model = load_model(checkpoint)
    image_id = checkpoint.config["image_token_index"]
    samples = [make_sample(seed, image_id=image_id if seed % 2 else None) for seed in range(4)]
    plan = make_plan(SCHEMES["int4"], model.weights(), method="gptq")
    return Subject(checkpoint=checkpoint, model=model, plan=plan, samples=samples)


@pytest.fixture(scope="module")
def calibrated(subject, tmp_path_factory) -> QuantizedWeights:
    return subject.calibrate(tmp_path_factory.mktemp("gptq") / "weights")


def assert_same_integers(actual: QuantizedWeights, reference: QuantizedWeights) -> None:
    rows = [row for row in reference.plan.rows if not row.storage.is_float]
    assert rows
    for row in rows:
        first, second = actual.quantized(row.name), reference.quantized(row.name)
        np.testing.assert_array_equal(first.values, second.values, err_msg=row.name)
        np.testing.assert_array_equal(first.scales, second.scales, err_msg=row.name)


def last_logits(subject: Subject, weights: QuantizedWeights, sample: ModelInput, length: int) -> np.ndarray:
    """After the first tokens of a sample, by the components themselves: [vocabulary] float64."""
    parts = {component.name: component for component in subject.model.components}
    width = next(spec.shape[1] for spec in parts["embed"].inputs if spec.name == "image_features")
    features = np.zeros((0, width), np.float32)
    if sample.pixels is not None:
        features = compute(parts["vision"], weights, {"pixel_values": sample.pixels})["image_features"]
    inputs = {"input_ids": sample.ids[None, :length], "image_features": features}
    inputs = compute(parts["embed"], weights, inputs) | {
        "position_ids": np.arange(length)[None],
        "attention_mask": np.ones((1, length), np.int64),
        "image_blocks": sample.image_blocks[None, :length],
        "local_start": np.zeros(1, np.int64),
    }
    for spec in parts["decoder"].inputs:
        if spec.name.startswith("past_key_values"):
            inputs[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    return compute(parts["decoder"], weights, inputs)["logits"].reshape(-1).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_predictions_in_lockstep_are_those_of_the_components(subject, calibrated, tmp_path):
    """In both models, at tokens before, right after and well after an image."""
    exact = quantize_weights(make_plan(SCHEMES["fp32"], subject.model.weights()), subject.read, tmp_path)
    fidelity = subject.measure(calibrated)
    for number, length in ((0, 1), (1, 21), (1, 39), (2, 33)):
        sample = subject.samples[number]
        reference = log_softmax(last_logits(subject, exact, sample, length))
        actual = log_softmax(last_logits(subject, calibrated, sample, length))
        place = 40 * number + length - 1
        divergence = (np.exp(reference) * (reference - actual)).sum()
        assert fidelity.kl[place] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert fidelity.agrees[place] == (reference.argmax() == actual.argmax())
        following = sample.ids[length]
        for model, values in enumerate((reference, actual)):
            assert fidelity.loss[model, place] == pytest.approx(-values[following], rel=1e-4)
    assert np.isnan(fidelity.loss[:, 39::40]).all()


def test_the_head_is_read_in_pieces(subject, calibrated, monkeypatch):
    whole = subject.measure(calibrated, subject.samples[:2])
    monkeypatch.setattr(fidelity_module, "_HEAD_ROWS", 100)
    monkeypatch.setattr(fidelity_module, "_LOGITS", 700)
    pieces = subject.measure(calibrated, subject.samples[:2])
    np.testing.assert_allclose(pieces.kl, whole.kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pieces.loss, whole.loss, rtol=1e-5)
    np.testing.assert_array_equal(pieces.agrees, whole.agrees)


def test_calibration_brings_predictions_nearer(subject, calibrated, tmp_path):
    divergences = {"gptq": subject.measure(calibrated).kl.mean()}
    for method in ("rtn", "search"):
        weights = subject.calibrate(tmp_path / method, method)
        found = subject.measure(weights)
        divergences[method] = found.kl.mean()
    assert divergences["gptq"] < 0.8 * divergences["search"] < divergences["rtn"]


def test_round_to_nearest_in_lockstep_is_round_to_nearest(subject, tmp_path):
    weights = subject.calibrate(tmp_path / "lockstep", "rtn")
    assert_same_integers(weights, quantize_weights(subject.plan, subject.read, tmp_path / "plain"))


def test_activations_on_the_disk_change_nothing(subject, calibrated, tmp_path):
    weights = subject.calibrate(tmp_path / "weights", memory_bytes=200_000)
    assert_same_integers(weights, calibrated)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_the_order_of_samples_changes_nothing(subject, calibrated, tmp_path):
    assert_same_integers(subject.calibrate(tmp_path / "weights", samples=subject.samples[::-1]), calibrated)


def test_other_samples_make_other_integers(subject, calibrated, tmp_path):
    weights = subject.calibrate(tmp_path / "weights", samples=subject.samples[:2])
    with pytest.raises(AssertionError):
        assert_same_integers(weights, calibrated)


def test_an_interrupted_calibration_goes_on_where_it_stopped(subject, calibrated, tmp_path):
    def stop_halfway(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    directory = tmp_path / "weights"
    with pytest.raises(KeyboardInterrupt):
        subject.calibrate(directory, progress=stop_halfway)
    times = {path: path.stat().st_mtime_ns for path in directory.glob("*.sha256")}
    assert len(times) > 10
    weights = subject.calibrate(directory)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert_same_integers(weights, calibrated)


def test_progress_counts_every_weight_once(subject, tmp_path):
    steps: list[tuple[int, int]] = []
    subject.calibrate(tmp_path / "weights", "rtn", progress=lambda *step: steps.append(step))
    total = sum(not row.storage.is_float for row in subject.plan.rows)
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_damaged_integers_are_made_again(subject, calibrated, tmp_path):
    weights = subject.calibrate(tmp_path / "weights")
    for name in ("language_model.embed_tokens.weight", "language_model.layers.1.mlp.up_proj.weight"):
        path = tmp_path / "weights" / f"{name}.values.npy"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert_same_integers(subject.calibrate(tmp_path / "weights"), calibrated)
    assert_same_integers(weights, calibrated)


def test_what_no_image_reaches_is_searched_and_the_plan_says_so(subject, tmp_path):
    (tmp_path / "note.txt").write_text("findings")
    unreached = unreached_weights(subject.model, open_set(str(tmp_path), images=True, texts=True))
    assert {name.partition(".")[0] for name in unreached} == {"vision_tower", "multi_modal_projector"}
    plan = note_unreached(subject.plan, unreached)
    row = plan.by_name["vision_tower.encoder.layers.0.self_attn.q_proj.weight"]
    assert row.reason.endswith("; no calibration sample reaches it: scale search on the weight alone")
    table = "language_model.embed_tokens.weight"
    assert plan.by_name[table] == subject.plan.by_name[table]
    texts = [sample for sample in subject.samples if sample.pixels is None]
    weights = subject.calibrate(tmp_path / "texts", samples=texts[:1], plan=plan)
    searched = METHODS["search"].find(row.storage, None)(subject.read(row.name))
    np.testing.assert_array_equal(weights.quantized(row.name).values, searched.values)


def test_images_reach_everything(subject, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((30, 20, 3), 90, np.uint8)).save(tmp_path / "a.png")
    samples = open_set(str(tmp_path), images=True, texts=True)
    assert unreached_weights(subject.model, samples) == []
    medsiglip = load_model(open_checkpoint("sample:medsiglip-tiny"))
    assert all(name.startswith("text_model.") for name in unreached_weights(medsiglip, samples))


def test_a_component_without_the_one_before_it_is_refused(subject):
    check_chain(subject.model)
    for left_out, problem in (
        (0, "embed cannot .* its image_features"),
        (1, "decoder cannot .* its inputs_emb"),
    ):
        components = [part for place, part in enumerate(subject.model.components) if place != left_out]
        with pytest.raises(EdgeError, match=problem):
            check_chain(replace(subject.model, components=tuple(components)))


def test_one_sample_is_enough_to_run(subject, tmp_path):
    weights = subject.calibrate(tmp_path / "weights", samples=subject.samples[1:2])
    assert all(row.storage.is_float or weights.has(row.name) for row in subject.plan.rows)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.nan, "gate_proj.weight has inputs that are not finite"),
        (0.0, "gate_proj.weight cannot be calibrated: the layer's inputs are zero in every sample"),
    ],
)
def test_activations_that_are_of_no_use_name_the_layer(subject, tmp_path, value, problem):
    def read(name: str, rows: slice | None = None) -> np.ndarray:
        weight = subject.read(name, rows)
        # A gain is stored less one.
        return np.full_like(weight, value - 1) if "layers.3.pre_feedforward" in name else weight

    with pytest.raises(EdgeError, match=rf"layers\.3\.mlp\.{problem}"):
        subject.calibrate(tmp_path / "weights", read=read)


def test_a_token_that_the_table_does_not_have_is_refused(subject, tmp_path):
    sample = replace(subject.samples[0], ids=subject.samples[0].ids.copy())
    sample.ids[3] = 70_000
    with pytest.raises(EdgeError, match=r"has the token 70000 and .*embed_tokens has \d+ rows"):
        subject.calibrate(tmp_path / "weights", samples=[sample])


def test_a_model_without_predictions_cannot_be_measured(tmp_path):
    checkpoint = open_checkpoint("sample:medsiglip-tiny")
    model = load_model(checkpoint)
    plan = make_plan(SCHEMES["int4"], model.weights())
    subject = Subject(checkpoint=checkpoint, model=model, plan=plan, samples=[])
    samples = [ModelInput(ids=np.arange(3, 67))]
    weights = subject.calibrate(tmp_path / "weights", samples=samples)
    assert all(row.storage.is_float or weights.has(row.name) for row in plan.rows)
    with pytest.raises(EdgeError, match="the model predicts nothing"):
        subject.measure(weights, samples)


class TestInputs:
    @pytest.fixture
    def directory(self, tmp_path) -> Path:
        from PIL import Image

        Image.fromarray(np.full((30, 20, 3), 90, np.uint8)).save(tmp_path / "a.png")
        (tmp_path / "calibration.toml").write_text(
            '[[sample]]\nimage = "a.png"\nprompt = "Describe this image"\nanswer = "findings"\n'
            '[[sample]]\ntext = "b.txt"\n'
        )
        (tmp_path / "b.txt").write_text("findings")
        return tmp_path

    def test_a_prompt_with_its_answer_and_a_text(self, subject, directory):
        samples = open_set(str(directory), images=True, texts=True)
        image, text = model_inputs(samples, subject.model, subject.checkpoint)
        assert image.pixels.shape == (1, 3, 224, 224)
        assert (image.image_blocks == 0).sum() == IMAGE_TOKENS
        assert len(image.ids) == len(image.image_blocks)
        assert text.pixels is None
        assert text.ids[0] == subject.model.prompt.bos_id
        # The answer's tokens are those of the text, after the opening of the model's turn.
        np.testing.assert_array_equal(image.ids[-len(text.ids) + 1 :], text.ids[1:])
        assert (image.ids == subject.model.prompt.bos_id).sum() == 1

    def test_a_pair_for_medsiglip(self, directory):
        checkpoint = open_checkpoint("sample:medsiglip-tiny")
        model = load_model(checkpoint)
        samples = open_set(str(directory), images=True, texts=True)
        image, text = model_inputs(samples, model, checkpoint)
        assert image.pixels.shape[0] == 1
        assert image.ids.shape == text.ids.shape == (64,)
        np.testing.assert_array_equal(image.ids, text.ids)
        assert text.pixels is None

    def test_a_text_that_does_not_fit_is_named(self, subject, directory):
        short = replace(subject.model, prompt=replace(subject.model.prompt, context=3))
        samples = open_set(str(directory), images=True, texts=True)
        with pytest.raises(EdgeError, match="calibration sample sample 1: the prompt has"):
            model_inputs(samples, short, subject.checkpoint)


class TestBuild:
    def request(self, out: Path, **changes) -> Recipe:
        given = {
            "model": "sample:medsiglip-tiny",
            "revision": None,
            "target": "onnx",
            "scheme": SCHEMES["int4"],
            "components": ("image",),
            "out": out,
            "method": "gptq",
            "calibration": "builtin",
        }
        return Recipe(**(given | changes))

    def test_an_artifact_says_how_it_was_calibrated_and_holds_nothing_of_the_set(self, tmp_path):
        from PIL import Image

        place = tmp_path / "ward-seven"
        place.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            place / "SMITH-1950.png"
        )
        (place / "SMITH-note.txt").write_text("Mrs Smith has a cough.")
        request = self.request(tmp_path / "artifact", calibration=str(place), components=())
        artifact = build(request, progress=lambda *step: None)
        samples = open_set(str(place), images=True, texts=True)
        summary = artifact.manifest.quantization
        assert (summary.method, summary.calibration) == ("gptq", samples.summary)
        for path in artifact.directory.rglob("*"):
            if path.is_file():
                content = path.read_bytes().lower()
                assert b"smith" not in content, path
                assert b"ward-seven" not in content, path

        model = load_model(open_checkpoint("sample:medsiglip-tiny"))
        plan = read_plan(artifact.path(summary.plan))
        read = model.reader(open_checkpoint("sample:medsiglip-tiny"))
        inputs = model_inputs(samples, model, open_checkpoint("sample:medsiglip-tiny"))
        again = calibrate(
            model, plan, read, inputs, tmp_path / "again", find=METHODS["gptq"].find, memory_bytes=PLENTY
        )
        for component in model.components:
            program = artifact.path(artifact.manifest.components[component.name].program)
            compare_integers(program, component, again)

    def test_requests_that_cannot_be_met(self, tmp_path):
        out = tmp_path / "artifact"
        with pytest.raises(ValueError, match="method gptq needs a calibration set: a directory"):
            self.request(out, calibration=None)
        with pytest.raises(ValueError, match="method rtn looks at no samples"):
            self.request(out, method="rtn")
        with pytest.raises(ValueError, match="method 'hqq' is unknown; the methods are rtn, search, gptq"):
            self.request(out, method="hqq")
        with pytest.raises(ValueError, match="calibration_bytes must be above zero"):
            self.request(out, calibration_bytes=0)
        with pytest.raises(
            EdgeError, match="decoder cannot be calibrated without the one that makes its inp"
        ):
            decide(self.request(out, model="sample:medgemma-tiny", components=("decoder",)))

    def test_scale_search_needs_no_samples(self, tmp_path):
        request = self.request(tmp_path / "artifact", method="search", calibration=None)
        artifact = build(request, progress=lambda *step: None)
        assert artifact.manifest.quantization.calibration is None
        assert artifact.manifest.quantization.method == "search"
