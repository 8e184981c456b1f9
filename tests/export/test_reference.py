import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle, open_bundle  # noqa: E402 - after importorskip
from medgemma_benchmarks.bundle_record import ReferenceLabel  # noqa: E402 - after importorskip
from medgemma_export.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from medgemma_export.reference.encoders import (  # noqa: E402
    canonicalize,
    prepare_inputs,
    record_reference,
    similarity_logits,
)
from medgemma_runtime.errors import CheckpointError, EdgeError  # noqa: E402

SAMPLE = "sample:medsiglip-tiny"
LABELS = (
    ReferenceLabel(name="chest", caption="A chest X-ray / frontal <view>."),
    ReferenceLabel(name="head", caption="a CT of the head"),
)


def decoded_image(name: str, seed: int) -> DecodedImage:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return DecodedImage(
        name=name,
        modality="test",
        label=None,
        source="tests",
        licence="CC0",
        rgb=np.kron(coarse, np.ones((40, 50, 1), np.uint8)),
    )


IMAGES = (decoded_image("one", 1), decoded_image("two", 2), decoded_image("three", 3))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    out = tmp_path_factory.mktemp("recorded") / "reference"
    return record_reference(SAMPLE, out, images=IMAGES, labels=LABELS)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sample's files in a directory of their own."""
    directory = tmp_path / "copied"
    shutil.copytree(open_checkpoint(SAMPLE).directory, directory)
    return directory


def load_model() -> torch.nn.Module:
    directory = open_checkpoint(SAMPLE).directory
    return transformers.SiglipModel.from_pretrained(directory, dtype=torch.float32).eval()


def test_it_records_what_the_whole_model_computes_in_one_batch(bundle: ReferenceBundle) -> None:
    with torch.inference_mode():
        output = load_model()(
            input_ids=torch.from_numpy(bundle.arrays["text.input_ids"]),
            pixel_values=torch.from_numpy(bundle.arrays["image.pixel_values"]),
        )
    expected = {
        "image.pooler_output": output.vision_model_output.pooler_output,
        "text.pooler_output": output.text_model_output.pooler_output,
        "logits": output.logits_per_image,
    }
    for name, tensor in expected.items():
        np.testing.assert_allclose(bundle.arrays[name], tensor.numpy(), atol=2e-5, err_msg=name)
    # The rows differ, or the comparison would say little.
    assert np.ptp(bundle.arrays["image.pooler_output"], axis=0).max() > 0.01


def test_pixels_are_those_of_transformers_own_processor(bundle: ReferenceBundle) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(
        open_checkpoint(SAMPLE).directory, use_fast=False
    )
    images = [bundle.rgb(image) for image in bundle.record.images]
    expected = processor(images=images, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(bundle.arrays["image.pixel_values"], expected)
    assert "SiglipImageProcessorPil" in bundle.record.producer.image_processor
    assert (bundle.record.image.resample, bundle.record.image.antialias) == ("bicubic", True)


def test_ids_are_those_of_the_canonical_text(bundle: ReferenceBundle) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(open_checkpoint(SAMPLE).directory / "tokenizer.json")
    )
    for label, canonical, row in zip(
        LABELS,
        ("a chest xray frontal view", "a ct of the head"),
        bundle.arrays["text.input_ids"],
        strict=True,
    ):
        ids = fast(canonical)["input_ids"]
        ids = ids if ids[-1] == 1 else [*ids, 1]
        assert row.tolist() == ids + [1] * (64 - len(ids)), label


def test_canonicalization_does_not_rest_on_the_fast_tokenizer(copy: Path, bundle: ReferenceBundle) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    assert content["normalizer"] is not None
    (copy / "tokenizer.json").write_text(json.dumps(content | {"normalizer": None}))
    inputs = prepare_inputs(open_checkpoint(str(copy)), IMAGES[:1], LABELS)
    np.testing.assert_array_equal(inputs.input_ids, bundle.arrays["text.input_ids"])


@pytest.mark.parametrize(
    "text",
    ["A chest X-ray.", "  tabs\tand\nlines  ", "a/b <c> d_e", "ÄÖ é İ 5.1%", "", "...", "pre-op\u00a0view"],
)
def test_canonicalization_is_that_of_siglips_own_tokenizer(text: str) -> None:
    tokenizer = transformers.SiglipTokenizer.__new__(transformers.SiglipTokenizer)
    tokenizer.do_lower_case = True
    assert canonicalize(text) == tokenizer.canonicalize_text(text)


def test_a_sentencepiece_model_goes_before_the_fast_tokenizer(copy: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a chest xray frontal view", "a ct of the head"] * 50),
        model_prefix=str(copy / "spiece"),
        vocab_size=30,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (copy / "spiece.vocab").unlink()
    checkpoint = open_checkpoint(str(copy))
    inputs = prepare_inputs(checkpoint, IMAGES[:1], LABELS)
    assert "SiglipTokenizer (slow, spiece.model)" in inputs.tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(copy / "spiece.model"))
    text = "".join(pieces.id_to_piece(int(i)) for i in inputs.input_ids[0] if i != 1)
    assert text.replace("▁", " ").strip() == "a chest xray frontal view"
    assert inputs.input_ids.shape == (2, 64)
    assert inputs.input_ids[1, -1] == 1


def test_every_row_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, ...]] = []
    model = transformers.SiglipModel
    for method in ("get_image_features", "get_text_features"):
        intact = getattr(model, method)

        def spy(self, *, intact=intact, **inputs):
            rows.extend(tuple(tensor.shape) for tensor in inputs.values())
            return intact(self, **inputs)

        monkeypatch.setattr(model, method, spy)
    record_reference(SAMPLE, tmp_path / "reference", images=IMAGES, labels=LABELS)
    assert {shape[0] for shape in rows} == {1}
    # One more of each to warm up.
    assert len(rows) == len(IMAGES) + len(LABELS) + 2


def test_logits_from_recorded_embeddings_are_the_models_own() -> None:
    model = load_model()
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 64, generator=generator) for n in (3, 5))
    scale, bias = model.logit_scale.detach().exp(), model.logit_bias.detach()
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(similarity_logits(model, image, text), cosines * scale + bias)


def test_the_record_says_what_computed_it(bundle: ReferenceBundle) -> None:
    record, producer = bundle.record, bundle.record.producer
    checkpoint = open_checkpoint(SAMPLE)
    assert (record.kind, record.model_id, record.plan_sha256) == ("float", SAMPLE, None)
    assert record.weights_sha256 == checkpoint.weights_sha256()
    assert (producer.device, producer.dtype, producer.attention) == ("cpu", "float32", "eager")
    assert producer.device_name
    assert producer.versions["transformers"] == transformers.__version__
    assert "canonicalization" in producer.tokenizer
    assert {stage: timing.runs for stage, timing in record.timings.items()} == {
        "preprocess": 3,
        "tokenize": 2,
        "image": 3,
        "text": 2,
    }
    assert all(timing.p50_ms > 0 for timing in record.timings.values())


def test_recording_twice_gives_the_same_arrays(bundle: ReferenceBundle, tmp_path: Path) -> None:
    again = record_reference(SAMPLE, tmp_path / "again", images=IMAGES, labels=LABELS)
    for name, array in bundle.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)


def test_a_coarser_dtype_is_recorded_as_float32_and_named(tmp_path: Path, bundle: ReferenceBundle) -> None:
    coarse = record_reference(SAMPLE, tmp_path / "coarse", images=IMAGES, labels=LABELS, dtype="bfloat16")
    assert coarse.record.producer.dtype == "bfloat16"
    image = coarse.arrays["image.pooler_output"]
    assert image.dtype == np.float32
    difference = np.abs(image - bundle.arrays["image.pooler_output"]).max()
    assert 1e-4 < difference < 0.2


def test_progress_counts_the_rows(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    record_reference(
        SAMPLE,
        tmp_path / "reference",
        images=IMAGES,
        labels=LABELS,
        progress=lambda *step: steps.append(step),
    )
    assert [step[1:] for step in steps] == [(done, 5) for done in range(5)]
    assert [step[0] for step in steps] == ["running image"] * 3 + ["running text"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="no CUDA device that torch can use; record on the CPU"):
        record_reference(SAMPLE, tmp_path / "reference", images=IMAGES, labels=LABELS, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_place_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="exists; remove it"):
        record_reference("no/such-model", tmp_path, images=IMAGES, labels=LABELS)


def test_a_caption_that_is_too_long_is_refused(checkpoint: Checkpoint) -> None:
    labels = (replace(LABELS[0], caption="a chest " * 70),)
    with pytest.raises(EdgeError, match=r"caption of label 'chest' makes .* ids and the model takes 64"):
        prepare_inputs(checkpoint, IMAGES[:1], labels)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_of_the_checkpoint_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"copied has no {name}"):
        prepare_inputs(open_checkpoint(str(copy)), IMAGES[:1], LABELS)


def test_another_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPModel"]}))
    with pytest.raises(CheckpointError, match=r"is \['CLIPModel'\] and a reference is .* SiglipModel"):
        prepare_inputs(open_checkpoint(str(copy)), IMAGES[:1], LABELS)


def test_a_bundle_is_opened_again_from_its_place(bundle: ReferenceBundle) -> None:
    assert open_bundle(bundle.directory).record == bundle.record
