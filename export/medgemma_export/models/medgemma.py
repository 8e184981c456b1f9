"""MedGemma: `google/medgemma-*` and every other Gemma 3 checkpoint, with a vision tower or without."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models.gemma3 import (
    Decoder,
    decode,
    decode_head,
    decode_layers,
    embed_tokens,
    norm_before,
)
from medgemma_export.models.siglip import Encoder, encode_patches
from medgemma_export.models.spec import Component, ModelSpec, WeightSource, read_config, read_json
from medgemma_export.ops import Heads, Linear, Ops, RmsNorm, Rotary, Table
from medgemma_runtime.errors import CheckpointError
from medgemma_runtime.images import from_preprocessor_config
from medgemma_runtime.layers import residual_name
from medgemma_runtime.manifest import ImageSpec, PromptSpec, TensorSpec

__all__ = ["load", "load_text_only", "text_decoder", "embed_component", "decoder_component"]

# What the parts are called here, and in checkpoints: as transformers 5 writes them, as Google released them,
# and as transformers 4.52 and later hold them in memory.
_PREFIXES = {
    "language_model": ("model", "language_model.model", "model.language_model"),
    "vision_tower": (
        "vision_tower",
        "vision_tower.vision_model",
        "model.vision_tower",
        "model.vision_tower.vision_model",
    ),
    "multi_modal_projector": ("multi_modal_projector", "model.multi_modal_projector"),
}
# A tensor that every checkpoint with such a part holds.
_LANDMARKS = {
    "language_model": "embed_tokens.weight",
    "vision_tower": "embeddings.patch_embedding.weight",
    "multi_modal_projector": "mm_soft_emb_norm.weight",
}
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_PROJECTION = "multi_modal_projector.mm_input_projection.weight"

_KINDS = ("key", "value")
_ROTARY_KEYS = {"rope_type", "rope_theta", "factor"}

# <eos> and <end_of_turn> of Gemma 3's tokenizer, as google/gemma-3-4b-it's generation_config.json has them.
_STOP_IDS = (1, 106)

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Not in every checkpoint.
_MORE_FILES = ("chat_template.jinja", "generation_config.json")
_LICENCES = {"sample:medgemma-tiny": "Apache-2.0", "sample:gemma3-270m": "Gemma Terms of Use"}
_LICENCE = (
    "that of the checkpoint: Health AI Developer Foundations terms for MedGemma, Gemma terms for Gemma 3"
)
_SAMPLE_USE = (
    "A small model to show that the toolchain works. It knows nothing of medicine and must not be used on "
    "patients."
)
_INTENDED_USE = (
    "A starting point for developers of health applications that read text and medical images. Not validated "
    "for clinical use: outputs are not meant to inform diagnosis, management or treatment without the "
    "developer's own validation."
)


def load(
    checkpoint: Checkpoint, *, residual_scale: float = 1.0, table_bounds: tuple[int, ...] = ()
) -> ModelSpec:
    """Describe a Gemma3ForConditionalGeneration checkpoint: vision tower, embedding and decoder.

    Raises:
        CheckpointError: If the checkpoint asks for something that this model file does not compute.
    """
    from transformers import Gemma3Config

    # Instantiated, because config.json lists only the values that differ from the class's defaults.
    config = read_config(checkpoint, Gemma3Config)
    tied = bool(config.tie_word_embeddings and config.text_config.tie_word_embeddings)
    decoder = text_decoder(checkpoint, config.text_config, tied=tied)
    decoder = replace(decoder, residual_scale=residual_scale, table_bounds=table_bounds)
    components = (
        _vision_component(checkpoint, config, decoder),
        embed_component(decoder, image_id=config.image_token_index),
        decoder_component(decoder),
    )
    image = from_preprocessor_config(read_json(checkpoint, "preprocessor_config.json"))
    return _describe(
        checkpoint,
        "Gemma3ForConditionalGeneration",
        components,
        decoder,
        image=image,
        prompt=_prompt_spec(
            config.text_config,
            stop_ids=_stop_ids(checkpoint),
            image_id=config.image_token_index,
            tokens_per_image=config.mm_tokens_per_image,
        ),
        files=(*_FILES, "preprocessor_config.json"),
    )


def load_text_only(
    checkpoint: Checkpoint, *, residual_scale: float = 1.0, table_bounds: tuple[int, ...] = ()
) -> ModelSpec:
    """Describe a Gemma3ForCausalLM checkpoint: embedding and decoder.

    Raises:
        CheckpointError: If the checkpoint asks for something that this model file does not compute.
    """
    from transformers import Gemma3TextConfig

    config = read_config(checkpoint, Gemma3TextConfig)
    decoder = text_decoder(checkpoint, config, tied=bool(config.tie_word_embeddings))
    decoder = replace(decoder, residual_scale=residual_scale, table_bounds=table_bounds)
    components = (embed_component(decoder, image_id=None), decoder_component(decoder))
    # A GGUF file names one token that ends an answer; llama.cpp finds <end_of_turn> by its spelling.
    is_gguf = all(name.endswith(".gguf") for name in checkpoint.weight_files)
    stop_ids = _STOP_IDS if is_gguf else _stop_ids(checkpoint)
    prompt = _prompt_spec(config, stop_ids=stop_ids, image_id=None, tokens_per_image=0)
    return _describe(
        checkpoint, "Gemma3ForCausalLM", components, decoder, image=None, prompt=prompt, files=_FILES
    )


def text_decoder(checkpoint: Checkpoint, config: Any, *, tied: bool) -> Decoder:
    """Read a Gemma3TextConfig.

    The embedding scale is sqrt(hidden width) rounded to bfloat16, which is what the released model computes
    with: 50.5 for 2560, where float32 has 50.596. transformers takes the dtype it loads the weights in.

    Args:
        checkpoint: Whose config it is; its table of contents decides about the output head.
        config: An instantiated Gemma3TextConfig.
        tied: Whether the config says that the output head is the embedding's table. A head of its own, where
            the checkpoint holds one, is used all the same.

    Raises:
        CheckpointError: If the config asks for something that `gemma3` does not compute.
    """
    _refuse_others(checkpoint, config)
    width = config.hidden_size
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    has_head = any(name in checkpoint.tensors for name in _HEADS)
    return Decoder(
        prefix="language_model",
        width=width,
        mlp_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        heads=Heads(query=config.num_attention_heads, kv=config.num_key_value_heads, width=config.head_dim),
        windows=tuple(windows[kind] for kind in config.layer_types),
        local_rotary=_rotary(checkpoint, config, "sliding_attention"),
        global_rotary=_rotary(checkpoint, config, "full_attention"),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        embedding_scale=float(np.float32(math.sqrt(width)).astype(ml_dtypes.bfloat16)),
        eps=config.rms_norm_eps,
        head="lm_head" if has_head or not tied else None,
    )


def embed_component(decoder: Decoder, *, image_id: int | None) -> Component:
    """Token ids, and image features where the model sees images, to embeddings."""

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        x = embed_tokens(ops, ids, decoder)
        if image_id is not None:
            x = ops.place_images(x, ids, inputs["image_features"], image_id)
        return {"inputs_embeds": x}

    ids = TensorSpec(
        name="input_ids", dtype="int64", shape=("batch", "sequence"), description="token ids, one <bos> first"
    )
    return Component(
        name="embed",
        file_stem="embed_tokens",
        inputs=(ids,) if image_id is None else (ids, replace(_image_features(decoder.width), default=0)),
        outputs=(_embeddings(decoder.width),),
        forward=forward,
    )


def decoder_component(decoder: Decoder) -> Component:
    """Embeddings and the caches so far to the next token's logits and the caches after."""
    layers = range(len(decoder.windows))

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        past = [tuple(inputs[f"past_key_values.{layer}.{kind}"] for kind in _KINDS) for layer in layers]
        logits, present = decode(
            ops,
            inputs["inputs_embeds"],
            inputs["position_ids"],
            inputs["image_blocks"],
            inputs["attention_mask"],
            inputs["local_start"],
            [(key, value) for key, value in past],
            decoder,
        )
        kept = {
            f"present.{layer}.{kind}": cache
            for layer in layers
            for kind, cache in zip(_KINDS, present[layer], strict=True)
        }
        return {"logits": logits, **kept}

    return Component(
        name="decoder",
        file_stem="decoder_model_merged",
        inputs=(
            _embeddings(decoder.width),
            TensorSpec(
                name="attention_mask",
                dtype="int64",
                shape=("batch", "total"),
                description="1 for each token of the conversation so far and of the new ones, 0 for padding",
            ),
            TensorSpec(
                name="position_ids",
                dtype="int64",
                shape=("batch", "sequence"),
                description="position of each token, counted from the start of the conversation",
            ),
            TensorSpec(
                name="image_blocks",
                dtype="int64",
                shape=("batch", "sequence"),
                description="one number for the tokens of one image, -1 for text; an image must not be cut",
                default=-1,
            ),
            TensorSpec(
                name="local_start",
                dtype="int64",
                shape=(1,),
                description="first position that the caches of layers with a window still hold",
                default=0,
            ),
            *_caches(decoder, "past"),
        ),
        outputs=(
            TensorSpec(
                name="logits",
                dtype="float32",
                shape=("batch", 1, decoder.vocabulary),
                description="after the last token of the sequence",
            ),
            *_caches(decoder, "present"),
        ),
        forward=forward,
        layers=len(layers),
        cut=lambda part: _decoder_part(decoder, part) if part else _decoder_head(decoder),
    )


def _decoder_part(decoder: Decoder, layers: range) -> Component:
    """Some layers of the decoder, from the residual stream before them to that after them."""

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        x = inputs["hidden"]
        x, branch, present = decode_layers(
            ops,
            x,
            ops.rms_norm(x, norm_before(decoder, layers.start)),
            inputs["position_ids"],
            inputs["image_blocks"],
            inputs["attention_mask"],
            inputs["local_start"],
            [tuple(inputs[f"past_key_values.{layer}.{kind}"] for kind in _KINDS) for layer in layers],
            decoder,
            layers,
        )
        kept = {
            f"present.{layer}.{kind}": cache
            for layer, pair in zip(layers, present, strict=True)
            for kind, cache in zip(_KINDS, pair, strict=True)
        }
        x = ops.named(ops.residual_add(x, branch), residual_name(layers[-1]))
        return {"hidden": x, **kept}

    whole = decoder_component(decoder)
    inputs = tuple(spec for spec in whole.inputs if _is_of(spec, layers) and spec.name != "inputs_embeds")
    outputs = tuple(spec for spec in whole.outputs if _is_of(spec, layers) and spec.name != "logits")
    hidden = replace(_embeddings(decoder.width), name="hidden", description="the residual stream")
    return Component(
        name=f"decoder_{layers.start}_{layers.stop - 1}",
        file_stem=f"decoder_{layers.start}_{layers.stop - 1}",
        inputs=(hidden, *inputs),
        outputs=(hidden, *outputs),
        forward=forward,
    )


def _decoder_head(decoder: Decoder) -> Component:
    """The residual stream of the last token to logits."""

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        normed = ops.rms_norm(inputs["hidden"], norm_before(decoder, len(decoder.windows)))
        return {"logits": decode_head(ops, normed, decoder)}

    hidden = replace(_embeddings(decoder.width), name="hidden", description="the residual stream")
    [logits] = [spec for spec in decoder_component(decoder).outputs if spec.name == "logits"]
    return Component(
        name="decoder_head", file_stem="decoder_head", inputs=(hidden,), outputs=(logits,), forward=forward
    )


def _is_of(spec: TensorSpec, layers: range) -> bool:
    """Whether an input or output is of some of the layers, or of all."""
    _, *place = spec.name.split(".")
    return not place or int(place[0]) in layers


def _caches(decoder: Decoder, time: str) -> Iterable[TensorSpec]:
    stem = "past_key_values" if time == "past" else "present"
    for layer, window in enumerate(decoder.windows):
        length = f"{time}_global" if window is None else f"{time}_local"
        limit = "" if window is None else f"; only the last {window - 1} positions are looked at"
        for kind in _KINDS:
            yield TensorSpec(
                name=f"{stem}.{layer}.{kind}",
                dtype="float32",
                shape=("batch", decoder.heads.kv, length, decoder.heads.width),
                description=f"{kind}s of layer {layer}, oldest first{limit}",
                may_be_empty=True,
            )


def _vision_component(checkpoint: Checkpoint, config: Any, decoder: Decoder) -> Component:
    vision = config.vision_config
    if vision.hidden_act != "gelu_pytorch_tanh" or vision.num_channels != 3:
        raise CheckpointError(
            f"{checkpoint.id}: the vision tower has activation {vision.hidden_act!r} and "
            f"{vision.num_channels} channels; only SigLIP's gelu_pytorch_tanh on RGB is supported"
        )
    size, patch = vision.image_size, vision.patch_size
    side, pooled = size // patch, math.isqrt(config.mm_tokens_per_image)
    if pooled**2 != config.mm_tokens_per_image or side % pooled:
        raise CheckpointError(
            f"{checkpoint.id}: {side} x {side} patches cannot be pooled to "
            f"{config.mm_tokens_per_image} tokens"
        )
    tower = Encoder(
        prefix="vision_tower",
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        eps=vision.layer_norm_eps,
    )
    norm = RmsNorm(
        name="multi_modal_projector.mm_soft_emb_norm",
        width=tower.width,
        eps=vision.layer_norm_eps,
        factor=decoder.residual_scale,
    )
    projection = Linear(
        name=_PROJECTION.removesuffix(".weight"), inputs=tower.width, outputs=decoder.width, bias=False
    )

    def forward(ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        x = encode_patches(ops, inputs["pixel_values"], tower, image_size=size, patch=patch)
        x = ops.rms_norm(ops.average_pool(x, side, side // pooled), norm)
        return {"image_features": ops.join_batch(ops.linear(x, projection))}

    return Component(
        name="vision",
        file_stem="vision_encoder",
        inputs=(
            TensorSpec(
                name="pixel_values",
                dtype="float32",
                shape=("images", 3, size, size),
                description="RGB images prepared as the manifest's image spec says",
            ),
        ),
        outputs=(_image_features(decoder.width),),
        forward=forward,
    )


def _image_features(width: int) -> TensorSpec:
    return TensorSpec(
        name="image_features",
        dtype="float32",
        shape=("image_tokens", width),
        description="what stands at the places of image tokens, one image after the other",
        may_be_empty=True,
    )


def _embeddings(width: int) -> TensorSpec:
    return TensorSpec(
        name="inputs_embeds",
        dtype="float32",
        shape=("batch", "sequence", width),
        description="scaled token embeddings, and image features in their places",
    )


def _stop_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """What ends an answer: generation_config.json says it, or else config.json, or else Gemma's defaults."""
    stated: Any = checkpoint.config.get("eos_token_id")  # transformers' default would be <eos> alone
    if (checkpoint.directory / "generation_config.json").is_file():
        stated = read_json(checkpoint, "generation_config.json").get("eos_token_id", stated)
    if stated is None:
        stated = _STOP_IDS
    return (stated,) if isinstance(stated, int) else tuple(stated)


def _prompt_spec(
    config: Any, *, stop_ids: tuple[int, ...], image_id: int | None, tokens_per_image: int
) -> PromptSpec:
    return PromptSpec(
        tokenizer="tokenizer.json",
        template="gemma3",
        context=config.max_position_embeddings,
        bos_id=config.bos_token_id,
        stop_ids=stop_ids,
        image_id=image_id,
        tokens_per_image=tokens_per_image,
        window=config.sliding_window if "sliding_attention" in config.layer_types else None,
        source="transformers processing_gemma3.py and the chat template of google/gemma-3-4b-it",
    )


def _rotary(checkpoint: Checkpoint, config: Any, kind: str) -> Rotary:
    values = config.rope_parameters[kind]
    if values["rope_type"] not in ("default", "linear") or not values.keys() <= _ROTARY_KEYS:
        raise CheckpointError(
            f"{checkpoint.id}: rope_parameters of {kind} are {values}; only the types default and linear, "
            f"with {', '.join(sorted(_ROTARY_KEYS))}, are supported"
        )
    factor = values["factor"] if values["rope_type"] == "linear" else 1.0
    return Rotary(theta=float(values["rope_theta"]), factor=float(factor), width=config.head_dim)


def _refuse_others(checkpoint: Checkpoint, config: Any) -> None:
    """Whatever a Gemma3TextConfig can say and no released Gemma 3 does."""
    for name, wanted in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
        ("use_bidirectional_attention", False),
    ):
        if getattr(config, name) != wanted:
            raise CheckpointError(
                f"{checkpoint.id}: {name} is {getattr(config, name)!r}; "
                f"only Gemma 3's {wanted!r} is supported"
            )


def _describe(
    checkpoint: Checkpoint,
    architecture: str,
    components: tuple[Component, ...],
    decoder: Decoder,
    *,
    image: ImageSpec | None,
    prompt: PromptSpec | None,
    files: tuple[str, ...],
) -> ModelSpec:
    more_files = tuple(name for name in _MORE_FILES if (checkpoint.directory / name).is_file())
    return ModelSpec(
        architecture=architecture,
        components=components,
        sources=_sources(checkpoint, components, decoder.table),
        scalars=(),
        image=image,
        text=None,
        prompt=prompt,
        similarity=None,
        extra_files=files + more_files,
        licence=_LICENCES.get(checkpoint.id, _LICENCE),
        intended_use=_SAMPLE_USE if checkpoint.id in _LICENCES else _INTENDED_USE,
    )


def _sources(
    checkpoint: Checkpoint, components: Iterable[Component], table: Table
) -> dict[str, WeightSource]:
    """Where each weight lies in this checkpoint: the parts' names have changed over the years."""
    prefixes = {
        part: next(
            (prefix for prefix in known if f"{prefix}.{_LANDMARKS[part]}" in checkpoint.tensors), known[0]
        )
        for part, known in _PREFIXES.items()
    }
    head = next((name for name in _HEADS if name in checkpoint.tensors), _HEADS[0])
    sources = {"lm_head.weight": WeightSource(tensor=head)}
    for weight in (weight for component in components for weight in component.weights()):
        part, _, rest = weight.name.partition(".")
        if weight.name == _PROJECTION:
            tensor = f"{prefixes[part]}.mm_input_projection_weight"
            sources[weight.name] = WeightSource(tensor=tensor, transposed=True)
        elif part in prefixes:
            sources[weight.name] = WeightSource(tensor=f"{prefixes[part]}.{rest}")
    if table.bounds:
        tensor = f"{prefixes['language_model']}.{_LANDMARKS['language_model']}"
        for piece in table.pieces:
            rows = slice(piece.start, piece.stop)
            sources[piece.weight] = WeightSource(tensor=tensor, tensor_rows=table.rows, rows=rows)
    return sources
