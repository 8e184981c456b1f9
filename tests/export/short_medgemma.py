"""MedGemma's sample cut to two decoder layers, one with a window and one without: quicker to lower."""

from dataclasses import replace

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models import ModelSpec, load_model
from medgemma_export.models.medgemma import decoder_component, text_decoder

__all__ = ["load_short_model"]


def load_short_model(checkpoint: Checkpoint, *, residual_scale: float = 1.0) -> ModelSpec:
    """`sample:medgemma-tiny`, described as if it had two layers."""
    from transformers import Gemma3Config

    config = Gemma3Config.from_dict(dict(checkpoint.config))
    whole = text_decoder(checkpoint, config.text_config, tied=True)
    [window, *_] = [window for window in whole.windows if window is not None]
    decoder = decoder_component(replace(whole, windows=(window, None)))
    model = load_model(checkpoint)
    kept = tuple(component for component in model.components if component.name != "decoder")
    return replace(model, components=(*kept, decoder))
