"""Gemma 3 lowered to ONNX: masks, caches and the tied table, held against the module in PyTorch."""

from itertools import pairwise

import numpy as np
import onnxruntime
import pytest

from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.reference.exact_program import write_exact_program
from medgemma_export.targets import onnx_builder
from medgemma_export.torch_ops import compute
from medgemma_export.unpack import compare_integers
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.errors import ArtifactError

onnx = pytest.importorskip("onnx")

MODEL = "sample:medgemma-tiny"
WINDOW = 32
PROMPT = 44  # longer than the window
IMAGES = ((3, 19), (26, 42))  # the second lies across the window's edge


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int4"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(
        model=MODEL,
        revision=None,
        target="onnx",
        scheme=SCHEMES[request.param],
        components=(),
        out=directory / "artifact",
    )
    artifact, decision = build(recipe, progress=lambda *step: None), decide(recipe)
    weights = quantize_weights(
        decision.plan, decision.model.reader(decision.checkpoint), directory / "weights"
    )
    components = {component.name: component for component in decision.model.components}
    return artifact, components, weights, directory


def exact_session(artifact, name, directory):
    """The program without rounding of activations, so that only packing and lowering are compared."""
    program = artifact.path(artifact.manifest.components[name].program)
    write_exact_program(program, directory / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(program.parent)
    )
    return onnxruntime.InferenceSession((directory / f"{name}.onnx").read_bytes(), options)


def run(session, feeds):
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def prompt(components, seed=5):
    """Random embeddings with two images among them, and empty caches."""
    decoder = components["decoder"]
    rng = np.random.default_rng(seed)
    blocks = np.full((1, PROMPT), -1)
    for index, (start, end) in enumerate(IMAGES):
        blocks[0, start:end] = index
    feeds = {
        "inputs_embeds": rng.normal(size=(1, PROMPT, decoder.inputs[0].shape[-1])).astype(np.float32),
        "position_ids": np.arange(PROMPT)[None],
        "image_blocks": blocks,
        "attention_mask": np.ones((1, PROMPT), np.int64),
        "local_start": np.array([0]),
    }
    for spec in decoder.inputs:
        if spec.name.startswith("past"):
            feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    return feeds


def carried(outputs, decoder):
    """The caches of a step as the next one's inputs; of local layers only what they look back at."""
    caches = {}
    for spec in decoder.inputs:
        if spec.name.startswith("past"):
            whole = outputs[spec.name.replace("past_key_values", "present")]
            caches[spec.name] = whole[:, :, -(WINDOW - 1) :] if spec.shape[2] == "past_local" else whole
    return caches


def following(outputs, position, decoder):
    """The feeds of one more token."""
    width = decoder.inputs[0].shape[-1]
    return carried(outputs, decoder) | {
        "attention_mask": np.ones((1, position + 1), np.int64),
        "local_start": np.array([position - (WINDOW - 1)]),
        "inputs_embeds": np.full((1, 1, width), 0.3, np.float32),
        "position_ids": np.array([[position]]),
        "image_blocks": np.array([[-1]]),
    }


def test_prefill_and_decode_equal_the_module(exported):
    artifact, components, weights, directory = exported
    session = exact_session(artifact, "decoder", directory)
    feeds = prompt(components)
    for position in range(PROMPT, PROMPT + 5):
        expected = compute(components["decoder"], weights, feeds)
        actual = run(session, feeds)
        for name, array in expected.items():
            assert actual[name].shape == array.shape, name
            assert np.abs(actual[name] - array).max() < 1e-4, name
        feeds = following(actual, position, components["decoder"])


def test_caches_that_keep_everything_give_the_same(exported):
    """As stock runtimes use the program: they know neither `image_blocks` nor `local_start`."""
    artifact, components, _, directory = exported
    session = exact_session(artifact, "decoder", directory)
    feeds = prompt(components)
    feeds["image_blocks"] = np.full((1, PROMPT), -1)
    known = {node.name for node in session.get_inputs()}
    assert set(feeds) - known == {"image_blocks", "local_start"}
    first = run(session, feeds)
    stock = run(session, {name: feeds[name] for name in known})
    assert (stock["logits"] == first["logits"]).all()
    whole = {
        name.replace("present", "past_key_values"): array
        for name, array in stock.items()
        if name.startswith("present")
    }
    windowed = following(first, PROMPT, components["decoder"])
    expected = run(session, windowed)["logits"]
    del windowed["image_blocks"], windowed["local_start"]
    assert np.abs(run(session, windowed | whole)["logits"] - expected).max() < 1e-4


def test_padding_is_not_looked_at(exported):
    artifact, components, _, directory = exported
    session = exact_session(artifact, "decoder", directory)
    feeds = prompt(components)
    feeds["image_blocks"] = np.full((1, PROMPT), -1)
    feeds["attention_mask"][0, :5] = 0
    expected = run(session, feeds)["logits"]
    feeds["inputs_embeds"][0, :5] += 1
    assert (run(session, feeds)["logits"] == expected).all()
    feeds["attention_mask"][0, 4] = 1
    assert np.abs(run(session, feeds)["logits"] - expected).max() > 1e-4


def test_without_image_blocks_the_program_answers_otherwise(exported):
    """The mask reaches the kernel: text that is not told of its images gives other logits."""
    artifact, components, _, directory = exported
    session = exact_session(artifact, "decoder", directory)
    feeds = prompt(components)
    told = run(session, feeds)["logits"]
    untold = run(session, feeds | {"image_blocks": np.full((1, PROMPT), -1)})["logits"]
    assert np.abs(told - untold).max() > 1e-2


def test_one_call_equals_two_where_no_image_is_cut(exported):
    artifact, components, _, directory = exported
    session = exact_session(artifact, "decoder", directory)
    feeds = prompt(components)
    whole = run(session, feeds)["logits"]
    past = {name: array for name, array in feeds.items() if name.startswith("past")}
    for start, end in pairwise((0, 22, PROMPT)):
        sequences = ("inputs_embeds", "position_ids", "image_blocks")
        step = {name: feeds[name][:, start:end] for name in sequences}
        step["attention_mask"] = feeds["attention_mask"][:, :end]
        step["local_start"] = np.array([max(0, start - (WINDOW - 1))])
        outputs = run(session, past | step)
        past = carried(outputs, components["decoder"])
    assert np.abs(outputs["logits"] - whole).max() < 1e-4


def test_vision_and_embedding_equal_the_module(exported):
    artifact, components, weights, directory = exported
    vision, embed = components["vision"], components["embed"]
    rng = np.random.default_rng(6)
    size = vision.inputs[0].shape[-1]
    pixels = rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32)
    expected = compute(vision, weights, {"pixel_values": pixels})["image_features"]
    actual = run(exact_session(artifact, "vision", directory), {"pixel_values": pixels})["image_features"]
    assert np.abs(actual - expected).max() < 1e-4
    session = exact_session(artifact, "embed", directory)
    ids = rng.integers(5, 200, (1, 40))
    none = np.zeros((0, expected.shape[1]), np.float32)
    for features in (none, expected[:16]):
        feeds = {"input_ids": image_ids(artifact, ids, len(features)), "image_features": features}
        reference = compute(embed, weights, feeds)["inputs_embeds"]
        assert (run(session, feeds)["inputs_embeds"] == reference).all()
        if len(features):
            assert (reference[0, 4:20] == features).all()


def image_ids(artifact, ids, count):
    """Put the checkpoint's own image token where the features go."""
    import json

    config = json.loads((artifact.directory / "config.json").read_text())
    ids[0, 4 : 4 + count] = config.get("image_token_index", config.get("image_token_id"))
    return ids


def test_a_tied_table_is_on_disk_once(exported):
    artifact, _, weights, _ = exported
    table = "language_model.embed_tokens.weight"
    places = []
    for name in ("embed", "decoder"):
        program = onnx.load(
            artifact.path(artifact.manifest.components[name].program), load_external_data=False
        )
        [tensor] = [found for found in program.graph.initializer if found.name == table]
        places.append({entry.key: entry.value for entry in tensor.external_data})
    assert places[0] == places[1]
    total = sum(file.size_bytes for file in artifact.manifest.files if file.path.endswith("_data"))
    # Scales are float32 in the file and 16 bits in the plan; alignment adds a little.
    planned = sum(row.stored_bits for row in weights.plan.rows) / 8
    assert total < 1.35 * planned


def test_a_large_table_is_multiplied_in_pieces_of_the_same_bytes(exported, tmp_path, monkeypatch):
    artifact, components, weights, directory = exported
    if artifact.manifest.precision != "int4":
        pytest.skip("large tables are int4 or int8 in blocks")
    monkeypatch.setattr(onnx_builder, "_PIECE_BYTES", 16_000)
    monkeypatch.setattr(onnx_builder, "_PIECE_ROWS", 64)
    recipe = Recipe(
        model=MODEL,
        revision=None,
        target="onnx",
        scheme=SCHEMES["int4"],
        components=(),
        out=tmp_path / "artifact",
    )
    cut = build(recipe, progress=lambda *step: None)
    assert cut.size_bytes - artifact.size_bytes < 100_000  # more nodes, no more weights
    program = cut.path(cut.manifest.components["decoder"].program)
    graph = onnx.load(program, load_external_data=False).graph
    table = "language_model.embed_tokens.weight"
    pieces = [tensor.name for tensor in graph.initializer if tensor.name.startswith(f"{table}[")]
    assert len(pieces) > 2
    assert pieces[0].startswith(f"{table}[0:")
    compare_integers(program, components["decoder"], weights)
    feeds = prompt(components)
    expected = run(exact_session(artifact, "decoder", directory), feeds)["logits"]
    assert (run(exact_session(cut, "decoder", tmp_path), feeds)["logits"] == expected).all()
    # The check itself: a scale of the last piece, changed, is seen.
    last = [tensor for tensor in graph.initializer if tensor.name.startswith(f"{table}.scales[")][-1]
    place = {entry.key: entry.value for entry in last.external_data}
    with (program.parent / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]) + int(place["length"]) - 2)
        file.write(b"\x11\x11")
    with pytest.raises(ArtifactError, match=r"does not carry language_model\.embed_tokens\.weight"):
        compare_integers(program, components["decoder"], weights)
