"""The samples cut to a few layers: lowering them to ExecuTorch takes a quarter of the time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.models import ModelSpec, load_model

__all__ = ["load_short_model", "write_short_checkpoint"]

_VISION = {"num_hidden_layers": 1}
_DECODER = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def load_short_model(
    checkpoint: Checkpoint, *, residual_scale: float = 1.0, table_bounds: tuple[int, ...] = ()
) -> ModelSpec:
    """A sample, described as if its towers had one layer and its decoder two, the first with a window."""
    short = replace(checkpoint, config=_short(checkpoint))
    return load_model(short, residual_scale=residual_scale, table_bounds=table_bounds)


def write_short_checkpoint(model: str, directory: Path) -> Path:
    """A copy for transformers: the sample's weights, all of them, and a configuration that asks for fewer."""
    checkpoint = open_checkpoint(model)
    shutil.copytree(checkpoint.directory, directory)
    (directory / "config.json").write_text(json.dumps(_short(checkpoint)), encoding="utf-8")
    return directory


def _short(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.config)
    config["vision_config"] = {**config["vision_config"], **_VISION}
    is_decoder = config["architectures"] == ["Gemma3ForConditionalGeneration"]
    config["text_config"] = {**config["text_config"], **(_DECODER if is_decoder else _VISION)}
    return config
