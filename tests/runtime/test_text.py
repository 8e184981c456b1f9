# ruff: noqa: RUF001  characters that look like others are what these tests are about
import base64
import dataclasses
import io
import json
import random
import string
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import TextSpec
from medgemma_runtime.text import Tokenize, canonicalize, load_tokenizer
from medgemma_runtime.tokenizer_faults import tokenizer_faults
from tests.runtime.tiny_artifact import (
    LENGTH,
    TOKEN_IDS,
    text_spec,
    tokenizer_json,
    write_tiny_artifact,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_artifact(tmp_path / "artifact")


@pytest.fixture
def tokenize(directory: Path) -> Tokenize:
    return load_tokenizer(directory, text_spec())


def padded(*pieces: str) -> list[int]:
    ids = [TOKEN_IDS[piece] for piece in pieces]
    return ids + [1] * (LENGTH - len(ids))


def load_changed(directory: Path, **changes: Any) -> Tokenize:
    """Load the tiny tokenizer with top-level keys of its tokenizer.json replaced."""
    content = json.loads(tokenizer_json()) | changes
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(directory, text_spec())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("A Chest X-Ray.", "a chest xray"),
        ("  two\t\nlines\u00a0here ", "two lines here"),
        (string.punctuation, ""),
        ("5/<6>", "56"),
        ("ÄRZTE – „Befund“", "ärzte – „befund“"),
        ("a\u2581b", "a b"),
        ("", ""),
    ],
)
def test_canonicalizes_as_siglip_does(text: str, canonical: str) -> None:
    assert canonicalize(text, "siglip") == canonical
    assert canonicalize(text, "none") == text


def test_ids_are_tokens_end_token_and_padding_of_the_same_id(tokenize: Tokenize) -> None:
    ids = tokenize.encode(["a red image", "blue"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [padded("▁a", "▁red", "▁image"), padded("▁blue")]


def test_padding_is_the_pad_id_and_the_end_token_the_end_id(directory: Path) -> None:
    spec = dataclasses.replace(text_spec(), pad_id=0, eos_id=1, length=4)
    ids = load_tokenizer(directory, spec).encode(["red"])
    assert ids.tolist() == [[TOKEN_IDS["▁red"], 1, 0, 0]]


@pytest.mark.parametrize("text", ["", "   ", "...", "/<>"])
def test_a_text_without_content_is_end_token_and_padding(tokenize: Tokenize, text: str) -> None:
    assert tokenize.encode([text]).tolist() == [[1] * LENGTH]


def test_no_texts_are_no_rows(tokenize: Tokenize) -> None:
    assert tokenize.encode([]).shape == (0, LENGTH)


@pytest.mark.parametrize("text", ["red/blue", "red<blue>", "</red> blue", "RED, blue!"])
def test_slash_and_angle_brackets_are_deleted_though_the_file_keeps_them(
    directory: Path, tokenize: Tokenize, text: str
) -> None:
    words = canonicalize(text, "siglip").split()
    expected = tokenize.encode([" ".join(words)])[0]
    assert tokenize.encode([text])[0].tolist() == expected.tolist()
    # The file by itself does otherwise, so the assertion above has something to prove.
    if "/" in text or "<" in text:
        from tokenizers import Tokenizer

        kept = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
        assert kept != expected[: len(kept)].tolist()


def test_control_tokens_cannot_be_written_in_a_text(directory: Path, tokenize: Tokenize) -> None:
    assert tokenize.encode(["</s>"]).tolist() == [padded("▁", "s")]
    verbatim = load_tokenizer(directory, dataclasses.replace(text_spec(), canonicalize="none"))
    for piece in ("<pad>", "</s>", "<unk>", "<0x41>"):
        with pytest.raises(TextError, match=f"contains {piece}, which is a control token"):
            verbatim.encode([f"red{piece}red"])


def test_control_tokens_cannot_appear_from_other_forms_of_their_characters(
    directory: Path,
) -> None:
    tokenize = load_changed(directory, normalizer={"type": "NFKC"})
    with pytest.raises(TextError, match="contains </s>, which is a control token"):
        tokenize.encode(["＜／s＞"])


def test_unknown_characters_become_bytes_though_the_file_says_otherwise(
    tokenize: Tokenize,
) -> None:
    assert tokenize.encode(["é"]).tolist() == [padded("▁", "<0xC3>", "<0xA9>")]


def test_a_vocabulary_without_bytes_gives_the_unknown_token(directory: Path) -> None:
    model = json.loads(tokenizer_json())["model"]
    model["vocab"] = [entry for entry in model["vocab"] if not entry[0].startswith("<0x")]
    ids = load_changed(directory, model=model).encode(["é"])[0]
    assert ids[1] == 2


def test_truncation_and_padding_in_the_file_are_ignored(directory: Path) -> None:
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    ids = load_changed(directory, truncation=truncation).encode(["red green blue"])
    assert ids.tolist() == [padded("▁red", "▁green", "▁blue")]


def test_a_long_text_is_refused_with_its_number_of_tokens(tokenize: Tokenize) -> None:
    assert tokenize.encode(["red " * 63])[0].tolist() == [TOKEN_IDS["▁red"]] * 63 + [1]
    with pytest.raises(TextError, match="text 2 of 2 has 64 tokens and the model reads 63"):
        tokenize.encode(["red", "red " * 64])


def test_truncation_keeps_the_end_token_last(tokenize: Tokenize) -> None:
    ids = tokenize.encode(["red " * 100, "blue"], truncate=True)
    assert ids[0].tolist() == [TOKEN_IDS["▁red"]] * 63 + [1]
    assert ids[1].tolist() == padded("▁blue")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "must be a string and is NoneType"),
        (7, "must be a string and is int"),
        (b"red", "must be a string and is bytes"),
        ("red\0", "NUL"),
        ("red \ud83d", "surrogate"),
        ("\udcff", "surrogate"),
    ],
)
def test_what_is_no_text_is_refused(tokenize: Tokenize, text: Any, words: str) -> None:
    with pytest.raises(TextError, match=words) as caught:
        tokenize.encode(["red", text])
    assert "text 2 of 2" in str(caught.value)


def test_one_string_is_no_list_of_texts(tokenize: Tokenize) -> None:
    with pytest.raises(TextError, match="put it in a list"):
        tokenize.encode("red")


def test_an_absent_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"tokenizer\.json cannot be read \(No such file"):
        load_tokenizer(tmp_path, text_spec())


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"normalizer": null}']
)
def test_a_damaged_tokenizer_is_refused(directory: Path, content: bytes) -> None:
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(TextError, match=r"is no Hugging Face tokenizer\.json"):
        load_tokenizer(directory, text_spec())


def test_an_interruption_is_no_fault_of_a_tokenizer() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_faults("the file"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("spec", [{"pad_id": 9999}, {"eos_id": 9999}])
def test_ids_outside_the_vocabulary_are_refused(directory: Path, spec: dict[str, int]) -> None:
    (name,) = spec
    with pytest.raises(TextError, match=f"270 tokens and the manifest's {name} is 9999"):
        load_tokenizer(directory, dataclasses.replace(text_spec(), **spec))


def test_a_tokenizer_that_cannot_encode_is_refused(directory: Path) -> None:
    model = json.loads(tokenizer_json())["model"]
    model["vocab"] = [entry for entry in model["vocab"] if not entry[0].startswith("<0x")]
    with pytest.raises(TextError, match=r"tokenizer\.json cannot encode text 1 of 1"):
        load_changed(directory, model=model | {"unk_id": None}).encode(["é"])


def hand_made_table() -> bytes:
    """A double-array trie by hand: `e` -> `E`, `e` + U+0301 -> `é`; nothing else is known.

    A unit is `label | ends << 8 | offset << 10`; a child sits at `node ^ offset ^ byte`, the leaf
    that a sequence ends in at `node ^ offset`.
    """
    units = [0] * 2048
    units[0] = 256 << 10
    first = 256 ^ ord("e")
    units[first] = ord("e") | 1 << 8 | 512 << 10
    units[first ^ 512] = 1 << 31 | 0  # "E" starts at 0
    second = first ^ 512 ^ 0xCC
    units[second] = 0xCC | 1024 << 10
    third = second ^ 1024 ^ 0x81
    units[third] = 0x81 | 1 << 8 | 1536 << 10
    units[third ^ 1536] = 1 << 31 | 2  # "é" starts at 2
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + b"E\0" + "é".encode() + b"\0"


def with_table(directory: Path, table: bytes) -> Tokenize:
    charsmap = base64.b64encode(table).decode()
    return load_changed(directory, normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})


def test_the_character_table_takes_the_longest_sequence(directory: Path) -> None:
    table = with_table(directory, hand_made_table())._table
    assert table is not None
    assert table.map("ee\u0301xe\u0302") == "EéxE\u0302"
    assert table.map("") == ""
    assert table.map("日本 e") == "日本 E"


@pytest.mark.parametrize("table", [b"", b"\0" * 4, struct.pack("<3I", 8, 2**32 - 1, 2**32 - 1)])
def test_a_damaged_character_table_is_refused(directory: Path, table: bytes) -> None:
    with pytest.raises(TextError, match=r"tokenizer\.json"):
        with_table(directory, table).encode(["red"])


TEXTS = (
    "a chest x-ray with /<> pneumonia",
    " lead",
    "HELLO\tworld\n",
    "▁a ▁b",
    "e\u0301 é a\u0301\u0302b",
    "e\u0323\u0302 (Vietnamese, decomposed)",
    "ﬁne ﬃ ½ x² ①② Ⅳ ㎎ ﷺ",
    "１０ｍｇ／ｍＬ ａｂｃ！",
    "µg/mL ≥5 °C",
    "क्षय रोग",
    "التهاب رئوي حاد",
    "肺炎，左下叶",
    "폐렴 없음",
    "пневмония слева",
    "ΣΑΣ İstanbul ß ẞ ŉ",
    "👩\u200d⚕️ doctor",
    "x\u00a0y x\u3000y a\u2028b x\u0085y a\u00adb \ufeffbom \u200b z",
    "a\x01b\x7f",
    "naïve café Ångström “quoted”—dash–x…",
    "word " * 90,
)


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of every script below U+3000, with what separates and combines."""
    rng = random.Random(seed)
    common = " abcXYZ.,<>/-0"
    texts = []
    for _ in range(count):
        chars = [
            chr(rng.randrange(0x20, 0x3000)) if rng.random() < 0.4 else rng.choice(common)
            for _ in range(rng.randint(1, 20))
        ]
        texts.append("".join(chars))
    return texts


def test_ids_equal_those_of_siglips_own_tokenizer(tmp_path: Path) -> None:
    """The independent truth: transformers' SiglipTokenizer, over a SentencePiece model made here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    transformers = pytest.importorskip("transformers")

    corpus = [canonicalize(text, "siglip") for text in TEXTS]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3),
        model_writer=written,
        vocab_size=500,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    parsed = proto.ModelProto.FromString(written.getvalue())
    table = base64.b64encode(parsed.normalizer_spec.precompiled_charsmap).decode()
    content = json.loads(tokenizer_json()) | {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}
    }
    content["model"]["vocab"] = [[piece.piece, piece.score] for piece in parsed.pieces]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    reference = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    spec = TextSpec(
        tokenizer="tokenizer.json",
        length=64,
        pad_id=reference.pad_token_id,
        eos_id=reference.eos_token_id,
        canonicalize="siglip",
        source="",
    )
    texts = [*TEXTS, *random_texts(2, 1500)]
    actual = load_tokenizer(tmp_path, spec).encode(texts, truncate=True).tolist()
    expected = reference(texts, truncation=True, max_length=64, padding="max_length")["input_ids"]
    different = [text for text, ours, theirs in zip(texts, actual, expected, strict=True) if ours != theirs]
    assert different == []
    assert any(len({*row}) > 10 for row in expected)
    assert expected[-1][-1] == spec.pad_id
    assert expected[TEXTS.index("word " * 90)][-2:] != [1, 1]
