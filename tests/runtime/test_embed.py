import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime import embed
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.embed import Embedder, logits, top_k, zero_shot
from medgemma_runtime.errors import ArtifactError, EdgeError, TextError
from medgemma_runtime.images import preprocess
from medgemma_runtime.manifest import ComponentEntry, Similarity
from tests.runtime.tiny_artifact import COLOURS, LENGTH, TOKEN_IDS, WIDTH, tensor, write_tiny_artifact

NAMES = list(COLOURS)


@pytest.fixture
def embedder(tmp_path: Path) -> Iterator[Embedder]:
    artifact = open_artifact(write_tiny_artifact(tmp_path / "artifact"))
    with Embedder(artifact, threads=1) as opened:
        yield opened


def plain(name: str, height: int = 9, width: int = 30) -> np.ndarray:
    return np.broadcast_to(np.array(COLOURS[name], np.uint8), (height, width, 3))


def noise(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8) for i in range(count)]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def test_images_and_texts_meet_where_the_encoders_were_built_to(embedder: Embedder) -> None:
    images = embedder.embed_images([plain(name) for name in NAMES])
    texts = embedder.embed_texts([f"a {name} image" for name in NAMES])
    assert images.shape == texts.shape == (3, WIDTH)
    # A plain colour is (1, -1, -1) in some order in each quarter: cosines 1 and -1/3.
    expected = np.full((3, 3), -1 / 3) + np.eye(3) * 4 / 3
    np.testing.assert_allclose(images @ texts.T, expected, atol=1e-5)


def test_embeddings_have_unit_length_in_float32(embedder: Embedder) -> None:
    rows = embedder.embed_images(noise(0, 4))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_an_image_is_preprocessed_by_the_manifests_own_spec(embedder: Embedder) -> None:
    images = noise(1, 3)
    spec = embedder.artifact.manifest.image
    assert spec is not None
    pixels = np.stack([preprocess(image, spec) for image in images])
    quarters = pixels.reshape(3, 3, 2, 8, 2, 8).mean(axis=(3, 5)).reshape(3, WIDTH)
    np.testing.assert_allclose(embedder.embed_images(images), unit(quarters), atol=1e-5)
    np.testing.assert_array_equal(embedder.embed_pixels(pixels), embedder.embed_images(images))


@pytest.mark.parametrize("batch_size", [2, 3, 5, 100])
def test_batches_change_nothing_but_the_number_of_runs(embedder: Embedder, batch_size: int) -> None:
    images = noise(2, 5)
    one_by_one = embedder.embed_images(images)
    seen: list[int] = []
    batched = embedder.embed_images(images, batch_size=batch_size, progress=seen.append)
    np.testing.assert_allclose(batched, one_by_one, atol=1e-6)
    assert sum(seen) == 5
    assert len(seen) == math.ceil(5 / batch_size)


def test_nothing_to_embed_is_no_rows(embedder: Embedder) -> None:
    assert embedder.embed_images([]).shape == (0, WIDTH)
    assert embedder.embed_texts([]).shape == (0, WIDTH)


def test_refuses_an_empty_batch_size(embedder: Embedder) -> None:
    with pytest.raises(EdgeError, match="batch_size must be at least 1 and is 0"):
        embedder.embed_images(noise(0, 1), batch_size=0)


def test_an_artifact_that_rounds_activations_takes_one_at_a_time(embedder: Embedder) -> None:
    manifest = embedder.artifact.manifest
    rounding = dataclasses.replace(manifest.quantization, activations="int8-dynamic")
    artifact = dataclasses.replace(
        embedder.artifact, manifest=dataclasses.replace(manifest, quantization=rounding)
    )
    with Embedder(artifact) as other:
        assert other.embed_images(noise(0, 2)).shape == (2, WIDTH)
        with pytest.raises(EdgeError, match="use batch_size 1"):
            other.embed_images(noise(0, 2), batch_size=2)


def test_ids_and_texts_agree(embedder: Embedder) -> None:
    ids = np.ones((1, LENGTH), np.int64)
    ids[0, 0] = TOKEN_IDS["▁red"]
    np.testing.assert_array_equal(embedder.embed_ids(ids), embedder.embed_texts(["Red!"]))


def test_a_long_text_is_refused_or_truncated_by_choice(embedder: Embedder) -> None:
    with pytest.raises(TextError, match="has 70 tokens"):
        embedder.embed_texts(["red " * 70])
    truncated = embedder.embed_texts(["red " * 70], truncate=True)
    np.testing.assert_allclose(truncated, embedder.embed_texts(["red"]), atol=1e-6)


def test_each_encoder_is_loaded_when_needed_and_once(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = embed.open_session
    monkeypatch.setattr(
        embed,
        "open_session",
        lambda artifact, name, **options: opened.append(name) or real(artifact, name, threads=1),
    )
    embedder.embed_texts(["red"])
    embedder.embed_texts(["blue"])
    assert opened == ["text"]
    embedder.embed_images(noise(0, 1))
    assert opened == ["text", "image"]
    embedder.close()
    embedder.embed_texts(["red"])
    assert opened == ["text", "image", "text"]


def test_a_vector_without_direction_is_refused(embedder: Embedder) -> None:
    with pytest.raises(EdgeError, match=r"'text' gave a vector of length 0\.0"):
        embedder.embed_texts(["nothing"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(embedder: Embedder, value: float) -> None:
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(EdgeError, match="component 'image' gave NaN or infinity"):
        embedder.embed_pixels(pixels)


def test_a_length_past_float32_is_refused(embedder: Embedder) -> None:
    with pytest.raises(EdgeError, match="gave a vector of length inf"):
        embedder.embed_pixels(np.full((1, 3, 16, 16), 1e30, np.float32))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "at least one label"),
        (["red", "..."], r"the label '\.\.\.' has no word"),
        (["red", "blue", "Red."], r"'red' and 'Red\.' are the same to the model"),
        (["red", "red"], "'red' and 'red' are the same"),
        (["red " * 64], "has 64 tokens"),
    ],
)
def test_labels_that_make_no_question_are_refused(embedder: Embedder, labels: list[str], words: str) -> None:
    with pytest.raises(TextError, match=words):
        embedder.embed_labels(labels)


def test_labels_are_embedded_as_texts(embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.embed_labels(NAMES), embedder.embed_texts(NAMES))


@pytest.mark.parametrize("field", ["image", "text", "similarity"])
def test_an_artifact_of_another_model_is_refused(embedder: Embedder, field: str) -> None:
    artifact = embedder.artifact
    manifest = dataclasses.replace(artifact.manifest, **{field: None})
    other = Embedder(dataclasses.replace(artifact, manifest=manifest))
    with pytest.raises(ArtifactError, match=f"states no '{field}' in its manifest"):
        {
            "image": lambda: other.embed_images(noise(0, 1)),
            "text": lambda: other.embed_texts(["red"]),
            "similarity": lambda: other.similarity,
        }[field]()


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        (tensor("hidden", "float32", "batch", WIDTH),),
        (tensor("pooler_output", "float32", "batch", "width"),),
        (tensor("pooler_output", "float32", "batch", 3, WIDTH),),
    ],
)
def test_a_component_that_is_no_encoder_is_refused(embedder: Embedder, outputs: tuple) -> None:
    artifact = embedder.artifact
    entry: ComponentEntry = dataclasses.replace(artifact.component("text"), outputs=outputs)
    manifest = dataclasses.replace(artifact.manifest, components={"text": entry})
    other = Embedder(dataclasses.replace(artifact, manifest=manifest))
    with pytest.raises(ArtifactError, match="so it is no encoder"):
        other.embed_ids(np.ones((1, LENGTH), np.int64))
    with pytest.raises(ArtifactError, match="no component 'image'"):
        other.embed_images(noise(0, 1))


def test_logits_are_scaled_and_shifted_cosines() -> None:
    images = unit(np.array([[1, 0], [1, 1]]))
    texts = unit(np.array([[1, 0], [0, 2], [-1, 0]]))
    actual = logits(images, texts, Similarity(scale=100.0, bias=-10.0))
    half = 100 * math.sqrt(0.5) - 10
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, [[90, -10, -110], [half, half, -half - 20]], rtol=1e-5)


def test_logits_equal_those_of_transformers() -> None:
    """On random embeddings, by SiglipModel's own formula."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    images, texts = unit(rng.standard_normal((4, 8))), unit(rng.standard_normal((5, 8)))
    logit_scale, logit_bias = torch.tensor([4.7]), torch.tensor([-16.5])
    per_text = torch.from_numpy(texts) @ torch.from_numpy(images).T
    reference = (per_text * logit_scale.exp() + logit_bias).T
    similarity = Similarity(scale=math.exp(4.7), bias=-16.5)
    result = zero_shot(images, texts, similarity)
    np.testing.assert_allclose(result.logits, reference, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(result.softmax_over_labels, reference.softmax(dim=1), rtol=1e-4)
    np.testing.assert_allclose(result.sigmoid_per_label, reference.sigmoid(), rtol=1e-4)


def test_probabilities_of_known_logits() -> None:
    eye = np.eye(2, dtype=np.float32)
    result = zero_shot(eye[:1], eye, Similarity(scale=math.log(3), bias=0.0))
    np.testing.assert_allclose(result.softmax_over_labels, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(result.sigmoid_per_label, [[0.75, 0.5]], rtol=1e-6)


def test_extreme_logits_neither_overflow_nor_lose_their_small_values() -> None:
    axis = np.array([[1.0, 0.0]], np.float32)
    both = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        result = zero_shot(axis, both, Similarity(scale=1e4, bias=0.0))
        small = zero_shot(axis, both[1:], Similarity(scale=80.0, bias=0.0))
    assert result.softmax_over_labels.tolist() == [[1, 0]]
    assert result.sigmoid_per_label.tolist() == [[1, 0]]
    assert small.sigmoid_per_label[0, 0] == pytest.approx(math.exp(-80), rel=1e-5)


def test_a_single_label_has_the_whole_softmax_and_its_own_sigmoid() -> None:
    axis = np.array([[1.0, 0.0]], np.float32)
    result = zero_shot(axis, -axis, Similarity(scale=5.0, bias=0.0))
    assert result.softmax_over_labels.tolist() == [[1]]
    assert result.sigmoid_per_label[0, 0] < 0.01


def test_top_k_equals_a_plain_sort() -> None:
    rng = np.random.default_rng(4)
    queries, rows = unit(rng.standard_normal((3, 6))), unit(rng.standard_normal((40, 6)))
    found, cosines = top_k(queries, rows, 7)
    for query, indices, values in zip(queries, found, cosines, strict=True):
        by_hand = sorted(range(40), key=lambda row: -float(query @ rows[row]))[:7]
        assert indices.tolist() == by_hand
        np.testing.assert_allclose(values, rows[by_hand] @ query, atol=1e-6)
    single, single_cosines = top_k(queries[1], rows, 7)
    assert single.tolist() == found[1].tolist()
    assert single_cosines.shape == (7,)


def test_top_k_puts_the_earlier_of_equal_rows_first() -> None:
    rows = np.eye(2, dtype=np.float32)[np.arange(5000) % 2]
    found, _ = top_k(rows[0], rows, 5000)
    assert found.tolist() == [*range(0, 5000, 2), *range(1, 5000, 2)]


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_k_refuses_a_number_that_is_not_there(k: int) -> None:
    rows = unit(np.eye(3))
    with pytest.raises(EdgeError, match=f"the {k} nearest of 3"):
        top_k(rows[0], rows, k)


def test_top_k_refuses_another_width() -> None:
    with pytest.raises(EdgeError, match="4 wide and the index 3"):
        top_k(np.zeros(4, np.float32), unit(np.eye(3)), 1)
