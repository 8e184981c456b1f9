"""Artifacts in ONNX Runtime GenAI, unchanged, held against this project's own runtime."""

import json
import os

import numpy as np
import PIL.Image
import pytest

from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_export.samples import medgemma_tiny
from medgemma_quantization.scheme import SCHEMES
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.images import preprocess

# Official builds report usage to Microsoft; where this is set at import, nothing of that starts.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
genai = pytest.importorskip("onnxruntime_genai")

LENGTH = 90  # the sample's window is 32
STEPS = 20
IMAGE = slice(40, 56)
EQUAL = 1e-4
# What the mask is worth on the sample: the logits' standard deviation is about 1.
LOST = 0.1

ALL = ("vision", "embed", "decoder")
TEXT_ONLY = ("embed", "decoder")


def recipe(directory, *, model="sample:medgemma-tiny", precision="fp32", components=ALL):
    return Recipe(
        model=model,
        revision=None,
        target="onnx",
        scheme=SCHEMES[precision],
        components=components,
        out=directory / "artifact",
    )


@pytest.fixture(scope="module")
def artifact(request, tmp_path_factory):
    precision, components = request.param
    directory = tmp_path_factory.mktemp("genai")
    return build(recipe(directory, precision=precision, components=components), progress=lambda *step: None)


@pytest.fixture(scope="module")
def sessions(artifact):
    opened = {name: open_session(artifact, name, threads=1) for name in artifact.manifest.components}
    yield opened
    for session in opened.values():
        session.close()


with_images = pytest.mark.parametrize("artifact", [("fp32", ALL)], indirect=True, ids=["fp32"])


def open_stock(artifact: Artifact, **search):
    """The artifact's directory as GenAI opens it; `search` overrides what genai_config.json says."""
    found = genai.Config(str(artifact.directory))
    threads = {"decoder": {"session_options": {"intra_op_num_threads": 1}}}
    found.overlay(json.dumps({"model": threads, "search": search}))
    return genai.Model(found)


def begin(stock, ids, **inputs):
    """A generator of GenAI's that has read a prompt."""
    options = genai.GeneratorParams(stock)
    options.set_search_options(max_length=LENGTH + STEPS)
    generator = genai.Generator(stock, options)
    if inputs:
        named = genai.NamedTensors()
        for name, array in inputs.items():
            named[name] = array
        generator.set_inputs(named)
    generator.append_tokens(ids.astype(np.int32))
    return generator


def logits_of(generator):
    return np.array(generator.get_logits()).reshape(-1)


def prompt():
    ids = np.random.default_rng(2).integers(10, 200, LENGTH)
    ids[0] = 2
    return ids


def image_prompt(artifact, *places):
    ids = prompt()
    for place in places:
        ids[place] = artifact.manifest.prompt.image_id
    return ids


def pixels(images):
    return np.random.default_rng(5).uniform(-1, 1, (images, 3, 224, 224)).astype(np.float32)


def read_whole(sessions, ids, blocks, values):
    """Our logits after a prompt with images whose tokens see each other as `blocks` says."""
    features = sessions["vision"].run({"pixel_values": values})["image_features"]
    embeds = sessions["embed"].run({"input_ids": ids[None], "image_features": features})["inputs_embeds"]
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        "image_blocks": blocks[None],
        "local_start": np.zeros(1, np.int64),
    }
    for spec in sessions["decoder"].entry.inputs:
        if spec.name.startswith("past_key_values"):
            inputs[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    return sessions["decoder"].run(inputs)["logits"].reshape(-1)


@pytest.mark.parametrize("is_shared", [True, False], ids=["in place", "growing caches"])
@pytest.mark.parametrize(
    "artifact",
    [("fp32", ALL), ("int4", ALL), ("int8", ALL), ("fp32", TEXT_ONLY), ("int4", TEXT_ONLY)],
    indirect=True,
    ids=lambda value: f"{value[0]} {' '.join(value[1])}",
)
def test_an_answer_to_text_is_the_same_token_by_token(artifact, sessions, is_shared):
    generator = begin(open_stock(artifact, past_present_share_buffer=is_shared), prompt())
    decoder = Decoder(sessions["embed"], sessions["decoder"], artifact.manifest.prompt)
    cache = decoder.new_cache(LENGTH + STEPS)
    expected = decoder.read(cache, prompt())
    assert np.abs(logits_of(generator) - expected).max() < EQUAL
    for _ in range(STEPS - 1):
        generator.generate_next_token()
        [token] = generator.get_next_tokens()
        assert token == expected.argmax()
        expected = decoder.read(cache, np.array([token], np.int64))
        assert np.abs(logits_of(generator) - expected).max() < EQUAL


@with_images
@pytest.mark.parametrize("places", [(IMAGE,), (IMAGE, slice(60, 76))], ids=["one image", "two images"])
def test_an_image_loses_the_mask_and_nothing_else(artifact, sessions, places):
    """GenAI gives no `image_blocks`, so an image's tokens see what is before them only."""
    ids, values = image_prompt(artifact, *places), pixels(len(places))
    tokens = np.array([sum(place.stop - place.start for place in places)])
    actual = logits_of(begin(open_stock(artifact), ids, pixel_values=values, num_image_tokens=tokens))
    blocks = np.full(LENGTH, -1)
    assert np.abs(actual - read_whole(sessions, ids, blocks, values)).max() < EQUAL
    for number, place in enumerate(places):
        blocks[place] = number
    assert np.abs(actual - read_whole(sessions, ids, blocks, values)).max() > LOST


@with_images
def test_features_of_another_image_are_seen(artifact, sessions):
    """What the comparison above would miss if GenAI gave the features to nobody."""
    ids, values = image_prompt(artifact, IMAGE), pixels(1)
    tokens = np.array([IMAGE.stop - IMAGE.start])
    actual = logits_of(begin(open_stock(artifact), ids, pixel_values=-values, num_image_tokens=tokens))
    assert np.abs(actual - read_whole(sessions, ids, np.full(LENGTH, -1), values)).max() > LOST


@with_images
def test_genai_prepares_an_image_as_we_do(artifact, tmp_path):
    image = np.random.default_rng(7).integers(0, 256, (333, 500, 3), dtype=np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    processor = open_stock(artifact).create_multimodal_processor()
    images = genai.Images.open(str(tmp_path / "image.png"))
    [actual] = processor("<start_of_image>", images=images)["pixel_values"].as_numpy()
    assert np.abs(actual - preprocess(image, artifact.manifest.image)).max() < 1e-6


@pytest.mark.parametrize("images", [1, 2])
def test_a_picture_and_a_question_as_genai_s_examples_ask_it(tmp_path, monkeypatch, images):
    """GenAI's processor knows images of 256 tokens only, and counts those of one."""
    monkeypatch.setattr(medgemma_tiny, "IMAGE_TOKENS", 256)
    (tmp_path / "checkpoint").mkdir()
    medgemma_tiny.write(tmp_path / "checkpoint")
    artifact = build(
        recipe(tmp_path, model=str(tmp_path / "checkpoint")),
        progress=lambda *step: None,
    )
    pictures = np.random.default_rng(7).integers(0, 256, (images, 90, 120, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{number}.png") for number in range(images)]
    for file, picture in zip(files, pictures, strict=True):
        PIL.Image.fromarray(picture).save(file)
    stock = open_stock(artifact)
    text = "<bos><start_of_turn>user\n" + "<start_of_image>" * images + "this image<end_of_turn>\n"
    inputs = stock.create_multimodal_processor()(text, images=genai.Images.open(*files))
    inputs["num_image_tokens"] = np.array([256 * images])
    ids = inputs["input_ids"].as_numpy()[0].astype(np.int64)
    options = genai.GeneratorParams(stock)
    options.set_search_options(max_length=len(ids) + STEPS)
    generator = genai.Generator(stock, options)
    generator.set_inputs(inputs)
    opened = {name: open_session(artifact, name, threads=1) for name in ALL}
    values = np.stack([preprocess(picture, artifact.manifest.image) for picture in pictures])
    expected = read_whole(opened, ids, np.full(len(ids), -1), values)
    for session in opened.values():
        session.close()
    assert (ids == artifact.manifest.prompt.image_id).sum() == 256 * images
    assert np.abs(logits_of(generator) - expected).max() < EQUAL


def test_a_model_that_answers_nothing_gets_no_genai_files(tmp_path):
    artifact = build(recipe(tmp_path, components=("vision", "embed")), progress=lambda *step: None)
    assert not [file.path for file in artifact.manifest.files if "genai" in file.path]
