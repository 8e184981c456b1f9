"""What a generative reference records is what transformers computes, from inputs that transformers made."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from medgemma_benchmarks.bundle import ReferenceBundle, open_bundle
from medgemma_benchmarks.prediction_parity import recorded_prompts
from medgemma_benchmarks.teacher_forced import reference_logits
from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.reference.decoders import (
    _set_released_scale,
    encode_prompts,
    record_text_reference,
    records_text,
    sees_images,
)
from medgemma_export.reference.prompts import directory_prompts, image_prompts, note_prompts
from medgemma_runtime.errors import CheckpointError, EdgeError
from medgemma_runtime.sample_notes import SAMPLE_NOTES
from tests import tiny_prompts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    return tiny_prompts.record(tmp_path_factory.mktemp("recorded") / "reference")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(tiny_prompts.MODEL)


def test_every_row_of_logits_is_that_of_the_whole_model(bundle: ReferenceBundle, checkpoint) -> None:
    network = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        checkpoint.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()  # sqrt(64), its embedding scale, needs no rounding
    pixel_values = dict(
        zip([i.name for i in bundle.record.images], bundle.arrays["vision.pixel_values"], strict=True)
    )
    for recorded in recorded_prompts(bundle):
        inputs = {"input_ids": torch.from_numpy(recorded.ids[None])}
        if recorded.prompt.images:
            seen = np.stack([pixel_values[name] for name in recorded.prompt.images])
            is_image = (recorded.ids[None] == checkpoint.config["image_token_index"]).astype(np.int64)
            inputs |= {"pixel_values": torch.from_numpy(seen), "token_type_ids": torch.from_numpy(is_image)}
        with torch.inference_mode():
            expected = network(**inputs).logits[0, recorded.prompt.given_tokens - 1 : -1].numpy()
        made = np.stack(list(reference_logits(recorded.hidden_states, bundle.arrays["decoder.head"])))
        assert made.shape == expected.shape
        np.testing.assert_allclose(made, expected, atol=3e-5)
    assert bundle.record.embedding_scale == 8.0


def test_ids_are_those_of_the_processor_and_of_the_tokenizer(bundle: ReferenceBundle, checkpoint) -> None:
    one, two, text = recorded_prompts(bundle)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.directory)
    places = "<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
    asked = f"<start_of_turn>user\n\n\n{places}Describe this image<end_of_turn>\n<start_of_turn>model\n"
    assert one.ids.tolist() == tokenizer(asked + "A slice.").input_ids
    assert text.ids.tolist() == tokenizer(tiny_prompts.PROMPTS[2].text).input_ids
    assert (one.ids[0], text.ids[0]) == (2, 2)
    answers = [tokenizer(p.text, add_special_tokens=False).input_ids for p in tiny_prompts.PROMPTS]
    assert [p.prompt.predictions for p in (one, two, text)] == [len(ids) for ids in answers]
    assert (two.ids == checkpoint.config["image_token_index"]).sum() == 32
    assert two.image_features is not None
    left = one.image_features
    assert left is not None
    np.testing.assert_array_equal(two.image_features[16:], left)
    assert text.image_features is None


def test_the_scale_is_rounded_to_bfloat16() -> None:
    embedding = SimpleNamespace(embedding_dim=640, embed_scale=torch.tensor(640**0.5))
    _set_released_scale(embedding)
    assert float(embedding.embed_scale) == 25.25  # sqrt(640) is 25.298


def test_what_answers_and_what_sees_images(checkpoint) -> None:
    assert records_text(checkpoint) and sees_images(checkpoint)
    text_only = replace(checkpoint, config={"architectures": ["Gemma3ForCausalLM"]})
    assert records_text(text_only) and not sees_images(text_only)
    assert not records_text(replace(checkpoint, config={}))


def test_images_that_no_prompt_names_are_left_out(tmp_path) -> None:
    made = tiny_prompts.record(tmp_path / "text", prompts=tiny_prompts.PROMPTS[2:])
    assert (made.record.images, made.record.image) == ((), None)
    assert made.record.producer.image_processor == "none"
    assert set(made.arrays) == {"decoder.input_ids", "decoder.hidden_states", "decoder.head"}
    assert open_bundle(made.directory).sha256 == made.sha256


def test_a_question_without_a_chat_template_is_refused(tmp_path, checkpoint) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.directory, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="copy has no chat template and 'one image' is a question"):
        encode_prompts(open_checkpoint(str(copy)), tiny_prompts.PROMPTS, tiny_prompts.images())


def test_other_checkpoints_and_an_existing_place_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"\['SiglipModel'\] and a generative reference is recorded of"):
        record_text_reference("sample:medsiglip-tiny", tmp_path / "new", prompts=tiny_prompts.PROMPTS)
    with pytest.raises(EdgeError, match="exists; remove it"):
        tiny_prompts.record(tmp_path)


def test_built_in_prompts_are_held_out_notes_and_each_modality() -> None:
    notes = note_prompts()
    assert {prompt.name for prompt in notes} == {n.name for n in SAMPLE_NOTES if n.split == "held_out"}
    assert all(prompt.is_sample and prompt.question is None for prompt in notes)
    shown = tuple(
        replace(tiny_prompts.images()[0], name=name, modality=modality, label="a")
        for name, modality in (("x", "CT"), ("y", "MR"), ("z", "CT"))
    )
    asked = image_prompts(shown, {"a": "a test"})
    assert [prompt.images for prompt in asked] == [("x",), ("y",), ("head-mr-first", "head-mr-last")]
    assert asked[0].text == "This image shows a test."


def test_a_directory_of_notes(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfFirst.\r\n")
    (tmp_path / "c.md").write_text("no note")
    prompts = directory_prompts(tmp_path)
    assert [(prompt.name, prompt.text) for prompt in prompts] == [("a.txt", "First.\n"), ("b.txt", "Second.")]
    assert not any(prompt.is_sample for prompt in prompts)
    (tmp_path / "d.txt").write_bytes(b"\xff")
    with pytest.raises(EdgeError, match=r"d\.txt is not UTF-8"):
        directory_prompts(tmp_path)
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(EdgeError, match=r"d\.txt is empty"):
        directory_prompts(tmp_path)
    with pytest.raises(EdgeError, match=r"has no \.txt files"):
        directory_prompts(tmp_path / "nowhere")
