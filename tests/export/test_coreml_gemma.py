"""Gemma 3 lowered to Core ML: caches inside, chunks and single tokens, held against the module in PyTorch."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("medgemma_export.targets.coreml_mil")


from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.targets import TARGETS
from medgemma_export.targets.coreml_unpack import compare_package, compare_rows
from medgemma_export.torch_ops import TorchOps, compute
from medgemma_quantization.affine import unpack_int4
from medgemma_quantization.plan import make_plan
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.backends.mil import MilProgram
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.static_cache import StaticCache, read_sizes
from tests.export.coreml_spec import narrow_or_not_finite
from tests.export.uncached_decoder import expected_logits

TARGET = TARGETS["coreml"]
MODEL = "sample:medgemma-tiny"
TABLE = "language_model.embed_tokens.weight"
WINDOW = 32
PROMPT = 70  # more than twice the window
TOTAL = PROMPT + 32
IMAGES = ((3, 19), (26, 42), (53, 69))  # the second and third lie across the window's edge
LOCAL_ROWS = 64  # so the ring begins again twice


def export(directory, scheme, components=()):
    recipe = Recipe(
        model=MODEL,
        revision=None,
        target="coreml",
        scheme=scheme,
        components=components,
        out=directory / "artifact",
        context=112,
    )
    artifact, decision = build(recipe, progress=lambda *step: None), decide(recipe)
    weights = quantize_weights(
        decision.plan, decision.model.reader(decision.checkpoint), directory / "weights"
    )
    return artifact, {component.name: component for component in decision.model.components}, weights


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def exported(request, tmp_path_factory):
    return export(tmp_path_factory.mktemp(request.param), TARGET.scheme(request.param))


def package_of(artifact, name):
    return artifact.directory / artifact.manifest.components[name].program


@pytest.fixture(scope="module")
def conversation():
    """Embeddings with three images among them, and which image each belongs to."""
    rng = np.random.default_rng(5)
    blocks = np.full(TOTAL, -1)
    for index, (start, end) in enumerate(IMAGES):
        blocks[start:end] = index
    return rng.normal(size=(TOTAL, 64)).astype(np.float16).astype(np.float32), blocks


class StoredScale(TorchOps):
    """With the factor of the queries as the program holds it: the sample's is the square root of 2."""

    def cached_attention(self, q, k, v, past_key, past_value, mask, heads, scale):
        root = heads.width**0.5
        if self.weights.plan.activations == "float16":
            scale = float(np.float16(scale * root)) / root
        return super().cached_attention(q, k, v, past_key, past_value, mask, heads, scale)


def teacher_forced(program, conversation, *, mode="fp32", total=TOTAL, dtype=np.float32):
    """After each chunk of the prompt and each token that follows: how many were read, and the logits."""
    embeddings, blocks = conversation
    cache = StaticCache(read_sizes(program.metadata["decoder"]), dtype=dtype)
    state = program.new_state()
    steps = [*cache.steps(blocks[:PROMPT]), *(slice(at, at + 1) for at in range(PROMPT, total))]
    for step in steps:
        function, inputs = cache.step(embeddings[step], blocks[step])
        yield step.stop, program.run(function, inputs, state=state, mode=mode)["logits"]


def test_chunks_and_single_tokens_equal_the_module(exported, conversation):
    artifact, components, weights = exported
    program = MilProgram.open(package_of(artifact, "decoder"))
    assert program.functions["decode"].states["local_cache"].shape[2] == LOCAL_ROWS
    cache = StaticCache(read_sizes(program.metadata["decoder"]), dtype=np.float32)
    steps = list(cache.steps(conversation[1][:PROMPT]))
    assert [step.stop for step in steps] == [3, 19, 26, 42, 53, 69, 70]
    for count, logits in teacher_forced(program, conversation):
        if count <= PROMPT or count % 8 == 0 or count == TOTAL:
            expected = expected_logits(
                components["decoder"], StoredScale(weights=weights), conversation, count
            )
            assert np.abs(logits - expected).max() < 1e-4, count


def test_float16_is_finite_and_close(exported, conversation):
    artifact, components, weights = exported
    program = MilProgram.open(package_of(artifact, "decoder"))
    last = PROMPT + 4
    for mode in ("fp16", "fp16_accumulate"):
        dtype = np.float16 if weights.plan.activations == "float16" else np.float32
        [*_, (_, logits)] = teacher_forced(program, conversation, mode=mode, total=last, dtype=dtype)
        expected = expected_logits(components["decoder"], StoredScale(weights=weights), conversation, last)
        # 56 dB and more were measured; a program in float32 rounds its caches only.
        assert 10 * np.log10((expected**2).sum() / ((logits - expected) ** 2).sum()) > 48


def test_the_mask_and_the_rows_reach_the_program(exported, conversation):
    """Text that is not told of its images, or a token written to another's row, gives other logits."""
    artifact, _, _ = exported
    program = MilProgram.open(package_of(artifact, "decoder"))
    embeddings, blocks = conversation
    [*_, (_, told)] = teacher_forced(program, conversation, total=PROMPT)
    [*_, (_, untold)] = teacher_forced(program, (embeddings, np.full_like(blocks, -1)), total=PROMPT)
    assert np.abs(told - untold).max() > 1e-2
    cache = StaticCache(read_sizes(program.metadata["decoder"]), dtype=np.float32)
    right, wrong = program.new_state(), program.new_state()
    for start in (0, 1):
        function, inputs = cache.step(embeddings[start : start + 1], blocks[start : start + 1])
        expected = program.run(function, inputs, state=right)["logits"]
        actual = program.run(function, inputs | {"local_slot": np.array([5], np.int32)}, state=wrong)[
            "logits"
        ]
    assert np.abs(actual - expected).max() > 1e-3


def test_the_packages_carry_the_integers_of_the_plan_in_both_functions(exported):
    artifact, components, weights = exported
    for name in ("vision", "decoder"):
        compare_package(package_of(artifact, name), components[name], weights)
    compare_rows(package_of(artifact, "embed"), weights, tables=[TABLE])


def test_weights_are_on_disk_once(exported):
    artifact, _, weights = exported
    total = sum(file.size_bytes for file in artifact.manifest.files if file.path.endswith("weight.bin"))
    planned = sum(row.stored_bits for row in weights.plan.rows) / 8
    assert planned < total < planned + 3 * 128 * len(weights.plan.rows)
    assert not list(artifact.directory.glob("coreml/*.bin"))


def test_rows_are_looked_up_where_the_description_says(exported):
    artifact, components, weights = exported
    facts = json.loads(package_of(artifact, "embed").read_text())
    ids = np.array([[7, 1200]])
    [piece], width = facts["pieces"], facts["width"]
    data = np.memmap(artifact.directory / piece["file"], mode="r")
    row_bytes = width * piece["bits"] // 8
    blocks = width // piece["block"]
    rows = []
    for row in ids[0]:
        start = piece["values_offset"] + row * row_bytes
        values = data[start : start + row_bytes]
        if piece["bits"] == 32:
            rows.append(values.view(np.float32))
            continue
        start = piece["scales_offset"] + row * blocks * np.dtype(piece["scales_dtype"]).itemsize
        scales = np.frombuffer(data, piece["scales_dtype"], blocks, start).astype(np.float32)
        integers = unpack_int4(values) if piece["bits"] == 4 else values.view(np.int8)
        rows.append(integers * np.repeat(scales, piece["block"]))
    given = {"input_ids": ids, "image_features": np.zeros((0, 64), np.float32)}
    expected = compute(components["embed"], weights, given)["inputs_embeds"]
    assert (np.array(rows) * np.float32(facts["scale"]) == expected[0]).all()
    assert facts["image_id"] is not None


def test_vision_equals_the_module(exported):
    artifact, components, weights = exported
    size = components["vision"].inputs[0].shape[-1]
    levels = np.random.default_rng(6).integers(0, 256, (1, 3, size, size)).astype(np.float32)
    pixels = (levels * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    expected = compute(components["vision"], weights, {"pixel_values": pixels})["image_features"]
    actual = MilSession(artifact, "vision").run({"pixel_values": pixels})["image_features"]
    assert np.abs(actual - expected).max() < 1e-5


def test_operators_are_those_that_are_meant(exported):
    artifact, _, weights = exported
    program = MilProgram.open(package_of(artifact, "decoder"))
    names = [row.name for row in weights.plan.rows if row.name.startswith("language_model.")]
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in names)
    for name, tokens in (("prefill", 16), ("decode", 1)):
        kinds = Counter(step.operation.type for step in program.functions[name].steps)
        assert program.functions[name].inputs["inputs_embeds"].shape == (1, tokens, 64)
        assert kinds["linear"] == 7 * layers + 1
        assert (
            kinds["scaled_dot_product_attention"] == kinds["slice_update"] == kinds["write_state"] == layers
        )
        assert kinds["rsqrt"] == 6 * layers + 1
        assert kinds["gather"] == (tokens > 1)
        assert kinds["matmul"] == kinds["softmax"] == 0


def test_the_decoder_describes_itself_to_core_ml(exported):
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    artifact, _, _ = exported
    model = coremltools.models.MLModel(str(package_of(artifact, "decoder")), skip_model_load=True)
    spec = model.get_spec()
    load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    assert spec.description.defaultFunctionName == "decode"
    assert narrow_or_not_finite(spec) == []
    for function in spec.description.functions:
        assert {feature.name for feature in function.state} == {"local_cache", "global_cache"}
        for feature in (*function.input, *function.output, *function.state):
            assert feature.shortDescription
    sizes = read_sizes(model.user_defined_metadata["decoder"])
    assert (sizes.chunk, sizes.window, sizes.context) == (16, WINDOW, 112)
    assert (sizes.local.rope_factor, sizes.all.rope_factor) == (1, 8)


def test_a_scaled_residual_stream_changes_no_logits(tmp_path, conversation):
    """A quarter in embeddings, in image features and in every branch; norms undo it."""
    results = {}
    for scale in (1.0, 0.25):
        scheme = replace(TARGET.scheme("fp32"), residual_scale=scale)
        directory = tmp_path / str(scale)
        directory.mkdir()
        artifact, components, weights = export(directory, scheme)
        assert weights.plan.residual_scale == scale
        peaks = []

        def observe(name, kind, x, peaks=peaks):
            peaks.append(float(np.abs(x).max()))

        program = MilProgram.open(package_of(artifact, "decoder"))
        embeddings, blocks = conversation
        cache = StaticCache(read_sizes(program.metadata["decoder"]), dtype=np.float32)
        function, inputs = cache.step(embeddings[:3] * np.float32(scale), blocks[:3])
        logits = program.run(function, inputs, state=program.new_state(), observe=observe)["logits"]
        size = components["vision"].inputs[0].shape[-1]
        pixels = np.full((1, 3, size, size), 0.2, np.float32)
        pixels[:, :, ::2] = -1
        features = compute(components["vision"], weights, {"pixel_values": pixels})["image_features"]
        factor = json.loads(package_of(artifact, "embed").read_text())["scale"]
        compare_package(package_of(artifact, "decoder"), components["decoder"], weights)
        results[scale] = logits, features, factor
    (logits, features, factor), (scaled_logits, scaled_features, scaled_factor) = results.values()
    np.testing.assert_allclose(scaled_logits, logits, rtol=0, atol=1e-5)
    assert (scaled_features == features * np.float32(0.25)).all()
    assert scaled_factor == factor / 4


def test_a_table_of_its_own_file_when_no_decoder_holds_it(tmp_path):
    artifact, _, weights = export(tmp_path, TARGET.scheme("int4"), components=("embed",))
    [piece] = json.loads(package_of(artifact, "embed").read_text())["pieces"]
    assert piece["file"] == "coreml/embedding.bin"
    compare_rows(package_of(artifact, "embed"), weights, tables=[TABLE])
    path = artifact.directory / piece["file"]
    content = bytearray(path.read_bytes())
    content[piece["scales_offset"]] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"does not lead to language_model\.embed_tokens\.weight"):
        compare_rows(package_of(artifact, "embed"), weights, tables=[TABLE])


def test_caches_that_no_phone_holds_are_refused(exported):
    recipe = Recipe(
        model=MODEL,
        revision=None,
        target="coreml",
        scheme=TARGET.scheme("int4"),
        components=(),
        out=exported[0].directory / "never",
    )
    model = decide(recipe).model
    long = replace(model, prompt=replace(model.prompt, context=1 << 24))
    with pytest.raises(EdgeError, match=r"16777216 tokens take .* GB; name a shorter --context"):
        TARGET.check(long, make_plan(TARGET.scheme("int4"), long.weights()))


def test_a_block_as_wide_as_the_matrix_is_a_scale_for_each_channel(tmp_path):
    """The sample is 64 wide and the scheme's blocks are of 64; the file cannot say which was meant."""
    artifact, parts, weights = export(tmp_path, TARGET.scheme("mobile"), components=("decoder",))
    compare_package(package_of(artifact, "decoder"), parts["decoder"], weights)


def test_a_scale_that_rounds_is_no_wish():
    with pytest.raises(ValueError, match="power of two"):
        replace(TARGET.scheme("int4"), residual_scale=0.3)
