"""Writes `sample:medgemma-tiny`, a Gemma 3 vision-language model with random weights.

It has what makes MedGemma hard to export, at a five-thousandth of the size: local layers with a window of 32
and a global one with scaled RoPE, heads whose widths do not add up to the hidden width, grouped keys and
values, norms on queries and keys, gains stored as w of (1 + w), an attention scale that is not the head
width's, a tied table with rows beyond the tokenizer, a vision MLP that is no multiple of 32, and 4x4 pooling
of the patches. It has learned nothing: what it says is noise.
"""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from medgemma_export.samples.captions import CAPTIONS
from medgemma_export.samples.siglip_files import write_json

__all__ = ["build_gemma_tokenizer", "gemma_distribution", "write", "write_gemma_files"]

IMAGE_SIZE = 224
IMAGE_TOKENS = 16
# Rows of the table past the tokenizer's entries, as Gemma 3 has them (262,208 rows for 262,144 pieces).
SPARE_ROWS = 64

_IMAGE_TOKEN = "<image_soft_token>"
_CONTROL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
)
# Gemma 3's turns, for user and assistant, texts and images.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_WORDS = ("user", "model", "Describe", "this", "image", "findings", "SLICE")


def build_gemma_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-fallback BPE that treats text as Gemma's does, with every word of `texts` as one token.

    Spaces are part of tokens, nothing is stripped or lower-cased, runs of newlines merge into one token, and
    `<bos>` goes first. `<image_soft_token>` has the id after the last piece.
    """
    # Earlier merges win where words share letters, so the words of prompts come first.
    words = dict.fromkeys([*_WORDS, *sorted({word for text in texts for word in text.split()})])
    characters = [chr(code) for code in range(33, 127)]
    pieces = [*_CONTROL_TOKENS, *_BYTE_PIECES, "▁", "\n", *characters]
    merges = [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n")]
    for word in words:
        # Letter by letter from the left, for the word alone and after a space.
        for spelled in (word, "▁" + word):
            merges += [(spelled[:end], spelled[end]) for end in range(1, len(spelled))]
    merges = list(dict.fromkeys(merges))
    vocabulary = list(dict.fromkeys([*pieces, *(left + right for left, right in merges)]))
    tokenizer = Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(vocabulary)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (*_CONTROL_TOKENS, _IMAGE_TOKEN)]
    )
    return tokenizer


def write(directory: Path, *, seed: int = 0) -> None:
    """Write the checkpoint as transformers writes a Gemma3ForConditionalGeneration.

    Args:
        directory: An existing directory.
        seed: Of the weights; each tensor's depend only on it and on the tensor's name.
    """
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = build_gemma_tokenizer(text for texts in CAPTIONS.values() for text in texts)
    image_id = tokenizer.get_vocab()[_IMAGE_TOKEN]
    config = Gemma3Config(
        text_config={
            "vocab_size": image_id + SPARE_ROWS,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 216,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=tokenizer.token_to_id("<start_of_image>"),
        eoi_token_index=tokenizer.token_to_id("<end_of_image>"),
        image_token_index=image_id,
        eos_token_id=[1, tokenizer.token_to_id("<end_of_turn>")],
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            mean, deviation = gemma_distribution(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values * np.float32(deviation) + np.float32(mean)))
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    write_gemma_files(directory, tokenizer, image_size=IMAGE_SIZE, image_tokens=IMAGE_TOKENS)


def gemma_distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near one and make every part matter."""
    if "vision_tower" in name and "norm" in name and name.endswith("weight"):
        return 1.0, 0.2
    if name.endswith("bias") or "norm" in name:
        return 0.0, 0.2
    if name.endswith("mm_input_projection_weight"):  # stored [inputs, outputs]
        return 0.0, 1.0 / math.sqrt(shape[0])
    if "position_embedding" in name:
        return 0.0, 0.5
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def write_gemma_files(directory: Path, tokenizer: Tokenizer, *, image_size: int, image_tokens: int) -> None:
    """Write what lies beside a Gemma 3 checkpoint's weights: tokenizer and image processor."""
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": _IMAGE_TOKEN,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "do_convert_rgb": None,
            "do_pan_and_scan": None,
            "do_resize": True,
            "size": {"height": image_size, "width": image_size},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 0.00392156862745098,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_seq_length": image_tokens,
        },
    )
