"""Static int8: kernels compute what the emulation says, and the tower is as near as with dynamic ranges."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.calibration.calibrate import ModelInput  # noqa: E402
from medgemma_export.calibration.static_ranges import find_ranges  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.emulation import onnx_integer_linear  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.reference.exact_program import write_exact_program  # noqa: E402
from medgemma_export.torch_ops import compute, weight_only  # noqa: E402
from medgemma_export.unpack import compare_integers  # noqa: E402
from medgemma_quantization.activations import RANGES_NAME, read_ranges  # noqa: E402
from medgemma_quantization.plan import make_plan, read_plan  # noqa: E402
from medgemma_quantization.scheme import (  # noqa: E402
    FLOAT32,
    INT4,
    INT8,
    INT8_BLOCKS,
    SCHEMES,
    Scheme,
    load_scheme,
)
from medgemma_quantization.weights import quantize_weights  # noqa: E402
from medgemma_runtime.embed import Embedder  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402
from medgemma_runtime.images import load_image, preprocess  # noqa: E402
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, sample_image_path  # noqa: E402
from medgemma_runtime.text import load_tokenizer  # noqa: E402

STATIC = Scheme(name="int8-static", linear=INT8, table=INT8_BLOCKS, activations="int8-static")
PLENTY = 1 << 30


def request(out: Path, **changes) -> Recipe:
    given = {
        "model": "sample:medsiglip-tiny",
        "revision": None,
        "target": "onnx",
        "scheme": STATIC,
        "components": ("image",),
        "out": out,
        "calibration": "builtin",
    }
    return Recipe(**(given | changes))


def export(out: Path, **changes):
    return build(request(out, **changes), progress=lambda *step: None)


def run(program: Path, inputs: list[np.ndarray], *, optimize: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimize:
        # ONNX Runtime would fuse what dequantizes with the product, and round activations again.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: array})[0] for array in inputs])


def program_of(artifact, component: str = "image") -> Path:
    return artifact.path(artifact.manifest.components[component].program)


def cosines(actual: np.ndarray, reference: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(reference, axis=1)
    return (actual * reference).sum(axis=1) / norms


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return export(tmp_path_factory.mktemp("static") / "artifact")


@pytest.fixture(scope="module")
def weights(static, model, checkpoint, tmp_path_factory):
    plan = read_plan(static.path(static.manifest.quantization.plan))
    made = quantize_weights(plan, model.reader(checkpoint), tmp_path_factory.mktemp("integers"))
    return replace(made, inputs=read_ranges(static.directory))


@pytest.fixture(scope="module")
def pixels(model) -> list[np.ndarray]:
    return [
        preprocess(load_image(sample_image_path(sample), frame=sample.frame), model.image)[None]
        for sample in SAMPLE_IMAGES
    ]


class TestQuality:
    @pytest.fixture(scope="class")
    @staticmethod
    def float_artifact(tmp_path_factory):
        return export(
            tmp_path_factory.mktemp("fp32") / "artifact",
            scheme=SCHEMES["fp32"],
            calibration=None,
            components=(),
        )

    def test_the_tower_is_as_near_as_with_dynamic_ranges(self, static, float_artifact, pixels, tmp_path):
        """On the real images, of which calibration has seen all but six."""
        dynamic = export(tmp_path / "dynamic", scheme=SCHEMES["int8"], calibration=None)
        reference = run(program_of(float_artifact), pixels)
        found = {
            name: run(program_of(made), pixels) for name, made in (("static", static), ("dynamic", dynamic))
        }
        near = {name: cosines(values, reference) for name, values in found.items()}
        assert near["static"].min() > 0.999
        assert (near["dynamic"] - near["static"]).max() < 0.002
        assert near["static"].min() < 1 - 1e-6  # something was rounded

        spec = float_artifact.manifest.text
        tokenizer = load_tokenizer(float_artifact.directory, spec)
        captions = [tokenizer.encode([caption])[0][None] for caption in LABELS.values()]
        texts = run(program_of(float_artifact, "text"), captions)
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        labels = (found["static"] @ texts.T).argmax(axis=1)
        assert (labels == (reference @ texts.T).argmax(axis=1)).mean() > 0.99
        assert len(set(labels)) > 3

    def test_ranges_of_another_scale_are_seen(self, static, weights, model, pixels):
        """That the checks above can fail: ranges a fifth as wide clip what matters."""
        narrow = {
            name: replace(known, scale=float(np.float32(known.scale / 5)))
            for name, known in weights.inputs.items()
        }
        inputs = {"pixel_values": pixels[0]}
        reference = run(program_of(static), pixels[:1])
        wrong = compute(
            model.components[0], replace(weights, inputs=narrow), inputs, integer_linear=onnx_integer_linear
        )
        assert cosines(wrong["pooler_output"], reference).min() < 0.99


class TestProgram:
    def test_it_computes_what_the_emulation_says(self, static, weights, model, pixels):
        actual = run(program_of(static), pixels[:2])
        for row, given in zip(actual, pixels, strict=False):
            emulated = compute(
                model.components[0], weights, {"pixel_values": given}, integer_linear=onnx_integer_linear
            )["pooler_output"]
            # Activations on the edge of two integers fall either way.
            assert cosines(row[None], emulated).min() > 0.9999
        compare_integers(program_of(static), model.components[0], weights)

    def test_one_image_does_not_change_another(self, static, pixels):
        """Which it may where ranges are those of the whole input."""
        together = run(program_of(static), [np.concatenate(pixels[:3])])
        np.testing.assert_allclose(together, run(program_of(static), pixels[:3]), atol=1e-4)
        # So the runtime takes batches of such an artifact.
        embedded = Embedder(static).embed_pixels(np.concatenate(pixels[:3]), batch_size=3)
        assert cosines(embedded, together).min() > 0.99999

    def test_its_exact_form_rounds_nothing(self, static, weights, model, pixels, tmp_path):
        onnx = pytest.importorskip("onnx")
        out = program_of(static).with_name("exact.onnx")
        write_exact_program(program_of(static), out)
        try:
            actual = run(out, pixels[:1], optimize=False)
            kinds = {node.op_type for node in onnx.load(out, load_external_data=False).graph.node}
        finally:
            out.unlink()
        assert not kinds & {"QuantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
        reference = compute(
            model.components[0], weights, {"pixel_values": pixels[0]}, integer_linear=weight_only
        )["pooler_output"]
        np.testing.assert_allclose(actual, reference, atol=1e-4)

    def test_inputs_are_rounded_once_for_all_that_share_them(self, static):
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(program_of(static), load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        # q, k and v share one; every matrix is integer.
        assert kinds.count("QuantizeLinear") < kinds.count("MatMulIntegerToFloat")
        assert "DynamicQuantizeMatMul" not in kinds


class TestRanges:
    def test_matrices_that_share_an_input_share_its_range(self, static, weights):
        ranges = read_ranges(static.directory)
        stem = "vision_model.encoder.layers.0.self_attn"
        assert len({ranges[f"{stem}.{part}_proj.weight"] for part in "qkv"}) == 1
        integers = {
            row.name for row in weights.plan.rows if row.role == "linear" and not row.storage.is_float
        }
        assert ranges.keys() == integers
        assert weights.plan.ranges == "minmax"
        entry = next(file for file in static.manifest.files if file.path == RANGES_NAME)
        assert entry.size_bytes < 10_000

    def test_one_sample_is_enough_and_the_order_changes_nothing(self, model, checkpoint, pixels):
        plan = make_plan(STATIC, model.components[0].weights())
        image = replace(model, components=model.components[:1])
        samples = [ModelInput(pixels=given) for given in pixels[:3]]
        read = model.reader(checkpoint)
        given = {"method": "mse", "memory_bytes": PLENTY}
        assert len(find_ranges(image, plan, read, samples[:1], **given)) > 5
        forth = find_ranges(image, plan, read, samples, **given)
        assert forth == find_ranges(image, plan, read, samples[::-1], **given)

    def test_activations_that_are_not_finite_name_the_matrix(self, model, checkpoint, pixels):
        plan = make_plan(STATIC, model.components[0].weights())
        broken = pixels[0].copy()
        broken[0, 0, 0, 0] = np.nan
        with pytest.raises(
            EdgeError, match=r"layers\.0\.self_attn\.q_proj\.weight cannot be calibrated: an act"
        ):
            find_ranges(
                replace(model, components=model.components[:1]),
                plan,
                model.reader(checkpoint),
                [ModelInput(pixels=broken)],
                method="minmax",
                memory_bytes=PLENTY,
            )

    def test_a_component_that_no_sample_reaches_is_refused(self, tmp_path):
        from PIL import Image

        Image.fromarray(np.full((30, 20, 3), 90, np.uint8)).save(tmp_path / "a.png")
        given = request(tmp_path / "artifact", components=(), calibration=str(tmp_path))
        with pytest.raises(
            EdgeError, match=r"no calibration sample reaches text_model\..*static range needs"
        ):
            decide(given)


class TestRefusals:
    def test_without_samples(self, tmp_path):
        with pytest.raises(ValueError, match="static ranges of activations, which only samples show"):
            request(tmp_path, calibration=None)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"scheme": replace(STATIC, linear=INT4)}, "int4 block 32, whose kernel .* give matrices 8 bits"),
            ({"model": "sample:medgemma-tiny", "components": ()}, "the table is the output head, too"),
            ({"target": "executorch"}, "keeps activations int8-static, and XNNPACK"),
            ({"target": "coreml"}, "rounds activations to int8, and Core ML"),
        ],
    )
    def test_of_what_has_no_kernel(self, tmp_path, changes, problem):
        if changes.get("target") == "coreml" and importlib.util.find_spec("coremltools") is None:
            pytest.skip("the target asks for its library first")
        with pytest.raises(EdgeError, match=problem):
            decide(request(tmp_path / "artifact", **changes))

    def test_a_decoder_with_a_float_table_is_taken(self, tmp_path):
        scheme = replace(STATIC, table=FLOAT32)
        given = request(tmp_path / "artifact", model="sample:medgemma-tiny", components=(), scheme=scheme)
        assert decide(given).plan.ranges == "minmax"

    def test_a_scheme_names_how_ranges_are_chosen(self, tmp_path):
        path = tmp_path / "mine.toml"
        text = 'name = "mine"\nlinear = { bits = 8 }\ntable = { bits = 32 }\nactivations = "int8-static"\n'
        path.write_text(text + 'ranges = "entropy"\n')
        assert load_scheme(path).ranges == "entropy"
        path.write_text(text + 'ranges = "median"\n')
        with pytest.raises(EdgeError, match=r"ranges must be one of .*'median'"):
            load_scheme(path)


def test_smoothquant_narrows_what_static_ranges_must_hold(static, pixels, tmp_path):
    from PIL import Image

    place = tmp_path / "images"
    place.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(place / "a.png")
    smooth = export(tmp_path / "smooth", method="smoothquant", calibration=str(place))
    assert smooth.manifest.quantization.method == "smoothquant"
    plain, scaled = read_ranges(static.directory), read_ranges(smooth.directory)
    assert plain.keys() == scaled.keys() and plain != scaled
    assert np.isfinite(run(program_of(smooth), pixels[:1])).all()


def test_a_decoder_computes_what_the_emulation_says(tmp_path):
    """q, k and v are one product there; gate and up share an input."""
    from PIL import Image

    place = tmp_path / "set"
    place.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(place / "a.png")
    (place / "b.txt").write_text("findings of the chest radiograph")
    name = "sample:medgemma-tiny"
    made = export(
        tmp_path / "artifact",
        model=name,
        components=(),
        scheme=replace(STATIC, table=FLOAT32),
        calibration=str(place),
    )
    opened = open_checkpoint(name)
    described = load_model(opened)
    plan = read_plan(made.path(made.manifest.quantization.plan))
    integers = quantize_weights(plan, described.reader(opened), tmp_path / "integers")
    integers = replace(integers, inputs=read_ranges(made.directory))
    decoder = next(part for part in described.components if part.name == "decoder")
    inputs = {
        "inputs_embeds": rng.normal(size=(1, 9, 64)).astype(np.float32),
        "position_ids": np.arange(9)[None],
        "attention_mask": np.ones((1, 9), np.int64),
        "image_blocks": np.full((1, 9), -1),
        "local_start": np.zeros(1, np.int64),
    } | {
        spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in decoder.inputs
        if spec.name.startswith("past_key_values")
    }
    session = onnxruntime.InferenceSession(program_of(made, "decoder"), providers=["CPUExecutionProvider"])
    [actual] = session.run(["logits"], inputs)
    emulated, plain = (
        compute(decoder, integers, inputs, integer_linear=linear)["logits"]
        for linear in (onnx_integer_linear, weight_only)
    )
    assert cosines(actual[0], emulated[0]).min() > 0.9999
    assert np.abs(actual - plain).max() > 10 * np.abs(actual - emulated).max()
    compare_integers(program_of(made, "decoder"), decoder, integers)
