"""What the exporter's tests share: the trained sample, its reference in transformers, and inputs for both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.models import ModelSpec, load_model

SAMPLE = "sample:medsiglip-tiny"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Inputs of every component, and what transformers' SiglipModel makes of them in float32."""

    inputs: dict[str, dict[str, NDArray[Any]]]
    pooled: dict[str, NDArray[np.float32]]
    logits: NDArray[np.float32]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint(SAMPLE)


@pytest.fixture(scope="session")
def model(checkpoint: Checkpoint) -> ModelSpec:
    return load_model(checkpoint)


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> Reference:
    torch = pytest.importorskip("torch")
    from transformers import SiglipModel

    rng = np.random.default_rng(7)
    network = SiglipModel.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    size = network.config.vision_config.image_size
    # Smooth images, as images are: white noise averages out in the patch embedding.
    coarse = rng.uniform(-1, 1, (1, 3, 7, 7)).astype(np.float32)
    pixels = np.kron(coarse, np.ones((size // 7, size // 7), np.float32))
    ids = rng.integers(3, network.config.text_config.vocab_size, (1, 64))
    ids[0, 12:] = 1
    with torch.inference_mode():
        output = network(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels))
    return Reference(
        inputs={"image": {"pixel_values": pixels}, "text": {"input_ids": ids}},
        pooled={
            "image": output.vision_model_output.pooler_output.numpy(),
            "text": output.text_model_output.pooler_output.numpy(),
        },
        logits=output.logits_per_image.numpy(),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifact"
