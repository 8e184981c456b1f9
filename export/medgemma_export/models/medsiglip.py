"""MedSigLIP: `google/medsiglip-448` and every other SiglipModel checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models.siglip import Encoder, encode_patches, encode_text, pool_by_attention
from medgemma_export.models.spec import Component, ModelSpec, WeightSource, read_config, read_json
from medgemma_export.ops import Ops
from medgemma_runtime.errors import CheckpointError
from medgemma_runtime.images import from_preprocessor_config
from medgemma_runtime.manifest import Similarity, TensorSpec, TextSpec

__all__ = ["load"]

_SAMPLE_USE = (
    "A small model trained on a few images that packages carry, to show that the toolchain works. "
    "It knows nothing of medicine and must not be used on patients."
)
_INTENDED_USE = (
    "A starting point for developers of medical imaging applications (classification, retrieval). Not "
    "validated for clinical use: outputs are not meant to inform diagnosis, management or treatment without "
    "the developer's own validation."
)


def load(checkpoint: Checkpoint) -> ModelSpec:
    """Describe a SiglipModel checkpoint.

    Raises:
        CheckpointError: If the checkpoint asks for something that this model file does not compute.
    """
    from transformers import SiglipConfig

    # Instantiated, because config.json lists only the values that differ from the class's defaults.
    config = read_config(checkpoint, SiglipConfig)
    vision, text = config.vision_config, config.text_config
    for part, values in (("vision", vision), ("text", text)):
        if values.hidden_act != "gelu_pytorch_tanh":
            raise CheckpointError(
                f"{checkpoint.id}: {part} activation {values.hidden_act!r} is not SigLIP's gelu_pytorch_tanh"
            )
    if not getattr(vision, "vision_use_head", True) or vision.num_channels != 3:
        raise CheckpointError(
            f"{checkpoint.id}: only RGB towers with the attention pooling head are supported"
        )
    if text.projection_size != text.hidden_size or text.hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{checkpoint.id}: image and text embeddings must have one width, and are "
            f"{vision.hidden_size} and {text.projection_size}"
        )
    image_tower, text_tower = _encoder("vision_model", vision), _encoder("text_model", text)
    return ModelSpec(
        architecture="SiglipModel",
        components=(_image_component(image_tower, vision), _text_component(text_tower, text)),
        sources=_pooling_sources(image_tower),
        scalars=("logit_scale", "logit_bias"),
        image=from_preprocessor_config(read_json(checkpoint, "preprocessor_config.json")),
        text=_text_spec(checkpoint, text.max_position_embeddings),
        prompt=None,
        similarity=Similarity(
            scale=math.exp(float(checkpoint.read("logit_scale")[0])),
            bias=float(checkpoint.read("logit_bias")[0]),
        ),
        # transformers.js and ONNX Runtime's samples read these beside the programs.
        extra_files=("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
        licence=_licence(checkpoint),
        intended_use=_SAMPLE_USE if checkpoint.id.startswith("sample:") else _INTENDED_USE,
    )


def _licence(checkpoint: Checkpoint) -> str:
    if checkpoint.id.startswith("sample:"):
        return "Apache-2.0"
    if checkpoint.id.startswith("google/medsiglip"):
        return "Health AI Developer Foundations Terms of Use"
    return "that of the checkpoint; see its model card"


def _encoder(prefix: str, config: Any) -> Encoder:
    return Encoder(
        prefix=prefix,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
    )


def _image_component(tower: Encoder, config: Any) -> Component:
    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        features = encode_patches(
            ops, inputs["pixel_values"], tower, image_size=config.image_size, patch=config.patch_size
        )
        return {"pooler_output": pool_by_attention(ops, features, tower)}

    size = config.image_size
    return Component(
        name="image",
        file_stem="vision_model",
        inputs=(
            TensorSpec(
                name="pixel_values",
                dtype="float32",
                shape=("batch", 3, size, size),
                description="RGB images prepared as the manifest's image spec says",
            ),
        ),
        outputs=(_embedding(tower.width, "image"),),
        forward=forward,
    )


def _text_component(tower: Encoder, config: Any) -> Component:
    length = config.max_position_embeddings

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        pooled = encode_text(ops, inputs["input_ids"], tower, vocabulary=config.vocab_size, length=length)
        return {"pooler_output": pooled}

    return Component(
        name="text",
        file_stem="text_model",
        inputs=(
            TensorSpec(
                name="input_ids",
                dtype="int64",
                shape=("batch", length),
                description=f"token ids, padded to exactly {length} as the manifest's text spec says",
            ),
        ),
        outputs=(_embedding(tower.width, "text"),),
        forward=forward,
    )


def _embedding(width: int, kind: str) -> TensorSpec:
    return TensorSpec(
        name="pooler_output",
        dtype="float32",
        shape=("batch", width),
        description=f"{kind} embedding, not yet of unit length",
    )


def _pooling_sources(tower: Encoder) -> dict[str, WeightSource]:
    """The pooling head is a torch MultiheadAttention, whose q, k and v are the rows of one tensor."""
    attention, width = f"{tower.prefix}.head.attention", tower.width
    sources: dict[str, WeightSource] = {}
    for kind in ("weight", "bias"):
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            sources[f"{attention}.{part}.{kind}"] = WeightSource(
                tensor=f"{attention}.in_proj_{kind}",
                tensor_rows=3 * width,
                rows=slice(index * width, (index + 1) * width),
            )
    return sources


def _text_spec(checkpoint: Checkpoint, length: int) -> TextSpec:
    tokenizer = read_json(checkpoint, "tokenizer.json")
    pieces = tokenizer.get("added_tokens", [])
    ids = {piece["content"]: int(piece["id"]) for piece in pieces if isinstance(piece, dict)}
    if "</s>" not in ids:
        raise CheckpointError(
            f"{checkpoint.id}: tokenizer.json has no </s>, which ends and pads SigLIP's texts"
        )
    return TextSpec(
        tokenizer="tokenizer.json",
        length=length,
        pad_id=ids["</s>"],
        eos_id=ids["</s>"],
        canonicalize="siglip",
        source="transformers tokenization_siglip.py; Google-Health/medsiglip pre_processor_configs",
    )
