"""Turns texts into token ids of a fixed length, as MedSigLIP's text encoder was trained to read them.

The source of the behaviour is SigLIP's own tokenizer, written in Python around SentencePiece:
`transformers`' `SiglipTokenizer` and, before it, big_vision's `canonicalize_text`. The converted
`tokenizer.json` files in circulation differ from it and from each other: one deletes all
punctuation except `/`, `<` and `>`, another deletes none and drops the byte fallback; and the
tokenizers package, applying SentencePiece's character table, loses combining marks. So a
`tokenizer.json` is taken here for its pieces, scores and table, and what happens around them is
stated once, below.
"""

import base64
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import TextSpec
from medgemma_runtime.tokenizer_faults import tokenizer_faults

__all__ = ["Tokenize", "load_tokenizer", "canonicalize"]

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHITE_SPACE = re.compile(r"\s+")

# SentencePiece writes a space as this character, so a text that contains it contains a space.
_META_SPACE = "\u2581"

# Steps that stand for SentencePiece's character table. Any other step of a tokenizer.json's
# normalizer is canonicalization, which some conversions add.
_TABLE = "Precompiled"
_UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})

# The table can turn a character into a space; SentencePiece collapses spaces after it.
_SINGLE_SPACES = (
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
)

# A vocabulary that has them all was trained to fall back to them instead of `<unk>`.
_BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))

# Names of pieces that SentencePiece never finds in a text, and the tokenizers package does.
_RESERVED = re.compile(r"<(?:pad|/?s|unk|0x[0-9A-F]{2})>")


class Tokenize:
    """Encodes texts to the ids that a text encoder takes; made by `load_tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, table: "_CharacterTable | None", spec: TextSpec) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._table = table

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int64]:
        """The ids of texts.

        A text without anything to encode, such as an empty one, becomes end token and padding.

        Args:
            texts: Any number of texts.
            truncate: Cut a longer text after its first `length - 1` tokens, as `transformers` does,
                instead of refusing it. The end token stays last.

        Returns:
            `[len(texts), length]`: the tokens of each text, the end token, then padding.

        Raises:
            TextError: If a text is too long, is no string, or has characters that are no text.
        """
        if isinstance(texts, str):
            raise TextError("encode takes a list of texts and was given one string; put it in a list")
        ids = np.full((len(texts), self.spec.length), self.spec.pad_id, dtype=np.int64)
        for number, (row, text) in enumerate(zip(ids, texts, strict=True), start=1):
            # A text may be about a patient, so messages count texts and do not quote them.
            name = f"text {number} of {len(texts)}"
            tokens = self._encode_one(text, name)
            room = self.spec.length - 1
            if len(tokens) > room and not truncate:
                raise TextError(
                    f"{name} has {len(tokens)} tokens and the model reads {room}; "
                    "shorten it, or ask for truncation"
                )
            tokens = [*tokens[:room], self.spec.eos_id]
            row[: len(tokens)] = tokens
        return ids

    def _encode_one(self, text: str, name: str) -> list[int]:
        if not isinstance(text, str):
            raise TextError(f"{name} must be a string and is {type(text).__name__}")
        if "\0" in text:
            raise TextError(f"{name} contains a NUL character; remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TextError(
                f"{name} has half of a surrogate pair, which is no character; read it as UTF-8"
            ) from None
        # Only a file that was not made for this model fails here.
        with tokenizer_faults(f"{self.spec.tokenizer} cannot encode {name}"):
            pieces = canonicalize(text, self.spec.canonicalize)
            if self._table is not None:
                pieces = self._table.map(pieces)
            if self._tokenizer.normalizer is not None:
                pieces = self._tokenizer.normalizer.normalize_str(pieces)
            # The end token is ours to add: its place and the padding are the model's contract.
            ids: list[int] = self._tokenizer.encode(pieces, add_special_tokens=False).ids
        if (reserved := _RESERVED.search(pieces)) is not None:
            raise TextError(f"{name} contains {reserved[0]}, which is a control token; remove it")
        return ids


def load_tokenizer(artifact_dir: Path, spec: TextSpec) -> Tokenize:
    """Load the tokenizer that an artifact carries.

    Args:
        artifact_dir: The artifact's directory.
        spec: Its manifest's `text`.

    Raises:
        TextError: If the file is absent or damaged, or has no such pad or end token.
    """
    path = artifact_dir / spec.tokenizer
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise TextError(f"the tokenizer {path} cannot be read ({error.strerror})") from None
    with tokenizer_faults(f"{path} is no Hugging Face tokenizer.json"):
        content = json.loads(stored.decode("utf-8"))
        table = None
        if spec.canonicalize == "siglip":
            content, table = _separate(content)
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for name, token_id in (("pad_id", spec.pad_id), ("eos_id", spec.eos_id)):
        if tokenizer.id_to_token(token_id) is None:
            raise TextError(
                f"{path} has {tokenizer.get_vocab_size()} tokens and the manifest's {name} is "
                f"{token_id}; export the model again"
            )
    return Tokenize(tokenizer, table, spec)


def canonicalize(text: str, rule: Literal["siglip", "none"]) -> str:
    """The text that is cut into tokens.

    Args:
        text: Any text.
        rule: `siglip`: lower case, no ASCII punctuation, single spaces, none at the ends. `none`:
            the text as it is.
    """
    if rule == "none":
        return text
    text = text.replace(_META_SPACE, " ").lower().translate(_DELETE_PUNCTUATION)
    return _WHITE_SPACE.sub(" ", text).strip()


def _separate(content: dict[str, Any]) -> tuple[dict[str, Any], "_CharacterTable | None"]:
    """A tokenizer.json without canonicalization, and the character table that was in it."""
    steps = _steps(content["normalizer"])
    tables = [step["precompiled_charsmap"] for step in steps if step["type"] == _TABLE]
    forms = [step for step in steps if step["type"] in _UNICODE_FORMS]
    pieces = {piece for piece, _ in content["model"]["vocab"]}
    separated = content | {
        "normalizer": {"type": "Sequence", "normalizers": [*forms, *_SINGLE_SPACES]},
        "model": content["model"] | {"byte_fallback": pieces >= _BYTE_PIECES},
    }
    return separated, _CharacterTable(base64.b64decode(tables[0])) if tables else None


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, nested sequences opened."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for nested in normalizer["normalizers"] for step in _steps(nested)]


class _CharacterTable:
    """SentencePiece's `precompiled_charsmap`: byte sequences and what stands for them.

    Four bytes of length, a double-array trie of that length in 32-bit units (the layout of
    darts-clone), then the replacements, each ended by a NUL.
    """

    def __init__(self, table: bytes) -> None:
        trie_bytes = int.from_bytes(table[:4], "little")
        self._units = np.frombuffer(table, dtype="<u4", count=trie_bytes // 4, offset=4).tolist()
        self._replacements = table[4 + trie_bytes :]

    def map(self, text: str) -> str:
        """Replace, from the left, the longest sequence that the table knows, else copy a byte."""
        data = text.encode("utf-8")
        mapped = bytearray()
        start = 0
        while start < len(data):
            size, replacement = self._longest(data, start)
            mapped += replacement
            start += size
        return mapped.decode("utf-8")

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        """Bytes that the longest known sequence at `start` takes, and what stands for it."""
        units = self._units
        size, replacement = 1, data[start : start + 1]
        node = _child_offset(units[0])
        for end in range(start, len(data)):
            node ^= data[end]
            unit = units[node]
            if unit & 0x8000_00FF != data[end]:  # the label; a set top bit marks a leaf
                break
            node ^= _child_offset(unit)
            if unit & 0x100:  # a sequence ends here: its leaf holds where its replacement starts
                first = units[node] & 0x7FFF_FFFF
                size = end + 1 - start
                replacement = self._replacements[first : self._replacements.index(b"\0", first)]
        return size, replacement


def _child_offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
