"""The files around SigLIP weights, with a tokenizer built piece by piece, the same on every machine."""

import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["build_siglip_tokenizer", "write_siglip_files", "write_json"]

_WORD_START = "▁"
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Whole words win over fragments, fragments over letters, however many: each costs more than any word.
_FRAGMENT_SCORE = -30.0
_LETTER_SCORE = -50.0
_FRAGMENTS = 128


def build_siglip_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A Unigram tokenizer that treats text as SigLIP's does, with a vocabulary made from `texts`.

    It lower-cases, deletes ASCII punctuation, collapses white space and appends `</s>`; characters it does
    not know become bytes. Ids are 0 `<pad>`, 1 `</s>`, 2 `<unk>`. As with SigLIP, padding is the caller's
    business, and it is done with id 1 (transformers, siglip/tokenization_siglip.py, and the files of
    google/siglip-base-patch16-224).
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{_escaped(string.punctuation)}]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    words = Counter(word for text in texts for word in normalizer.normalize_str(text).split())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(piece, 0.0) for piece in _BYTE_PIECES] + _pieces(words)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_WORD_START, prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([piece for piece, _ in special])
    return tokenizer


def write_siglip_files(directory: Path, tokenizer: Tokenizer, *, image_size: int) -> None:
    """Write what stands beside the weights of google/medsiglip-448: tokenizer and image processor.

    Args:
        directory: An existing directory.
        tokenizer: As `build_siglip_tokenizer` makes it.
        image_size: Side of the square model input, in pixels.
    """
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 64,
            "padding_side": "right",
            "do_lower_case": True,
            "pad_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "SiglipProcessor",
            "do_convert_rgb": None,
            "do_resize": True,
            "size": {"height": image_size, "width": image_size},
            "resample": 3,
            "do_rescale": True,
            # MedSigLIP's own file cuts 1/255 off after eleven digits.
            "rescale_factor": 0.00392156862,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def _pieces(words: Counter[str]) -> list[tuple[str, float]]:
    """Words, the most useful fragments of words, and letters, each with its Unigram score."""
    total = words.total()
    whole = {_WORD_START + word: round(math.log(count / total), 4) for word, count in words.items()}
    fragments: Counter[str] = Counter()
    for word, count in words.items():
        marked = _WORD_START + word
        for length in (2, 3, 4):
            for start in range(len(marked) - length + 1):
                fragments[marked[start : start + length]] += count * length
    letters = [_WORD_START, *string.ascii_lowercase, *string.digits]
    # Ties are broken by spelling, so that the vocabulary does not depend on the order of the texts.
    ranked = sorted(fragments.items(), key=lambda item: (-item[1], item[0]))
    chosen = [piece for piece, _ in ranked if piece not in whole][:_FRAGMENTS]
    return [
        *sorted(whole.items(), key=lambda item: (-item[1], item[0])),
        *((piece, _FRAGMENT_SCORE) for piece in chosen),
        *((letter, _LETTER_SCORE) for letter in letters if letter not in whole),
    ]


def _escaped(characters: str) -> str:
    return "".join("\\" + character for character in characters)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
