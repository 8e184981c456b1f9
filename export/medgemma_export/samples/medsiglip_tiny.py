"""Trains `sample:medsiglip-tiny`, a MedSigLIP small enough to live in the repository.

    python -m medgemma_export.samples.medsiglip_tiny --out DIR

It has MedSigLIP's architecture, files, preprocessing and tokenizer rules at a two-thousandth of the size, and
it learns, with SigLIP's loss (Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training"), to tell
the images of `medgemma_runtime.sample_images` apart by their captions.

It is trained on the very images that the demonstrations classify, one or a few of each kind. That it names
them proves that the plumbing is right, from pixels and words to ranked labels in every format. It knows
nothing of medicine and must not be used on a patient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import SiglipConfig, SiglipModel

from medgemma_export.samples.captions import CAPTIONS
from medgemma_export.samples.siglip_files import build_siglip_tokenizer, write_siglip_files
from medgemma_runtime.images import medsiglip_processor, preprocess
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, SampleImage, load_sample

__all__ = ["SEEN", "HELD_OUT", "Ranking", "train", "rank", "write", "main"]

IMAGE_SIZE = 224
TEXT_LENGTH = 64
PAD_ID = 1


def _frames(name: str, frames: Sequence[int]) -> tuple[SampleImage, ...]:
    """Other frames of the file of a sample image."""
    sample = next(sample for sample in SAMPLE_IMAGES if sample.name == name)
    return tuple(replace(sample, name=f"{sample.label}-{frame}", frame=frame) for frame in frames)


HELD_OUT = (*_frames("heart-first", (15, 45, 60, 75, 105)), *_frames("head-mr-first", (2, 5, 7)))
"""What training never sees: moments of one heart and slices of one head, between those it sees."""

SEEN = (
    *(sample for sample in SAMPLE_IMAGES if sample.name != "heart-middle"),  # frame 60
    *_frames("heart-first", (10, 20, 30, 40, 50, 70, 80, 90, 100, 110)),
    *_frames("head-mr-first", (1, 3, 4, 6, 8)),
)
"""What training sees: the sample images but one, and more frames of the two files that have many."""

# What stays the same kind of image when it is mirrored; abdomen and chest have sides.
_MIRRORED = ("leg-radiograph", "head-ct", "shoulder-mr", "lymph-node-ultrasound", "fundus", "histology")

_STEPS = 1000
_VIEWS = 128
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
# Views are cut from images of at most this size: augmenting two megapixels buys nothing at 224.
_WORKING_SIZE = 448

_CARD = """# medsiglip-tiny

A sample for tests and demonstrations: MedSigLIP's architecture at a two-thousandth of its size, trained on
the very images it is shown (`medgemma_runtime.sample_images`) and captions written for this project. That
it names them shows that the toolchain works. **It knows nothing of medicine; never use it on a patient.**

Zero-shot among the captions of {labels} labels, in float32, with the weights as stored (bfloat16):

{results}

Held-out frames lie between frames seen in training, in the same patient: they are no test of generalization.

Written by `python -m medgemma_export.samples.medsiglip_tiny --out DIR`. Licence: Apache-2.0.
"""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How an image compares with every label's caption.

    Attributes:
        label: The label of the caption that is most similar.
        margin: Cosine similarity of the true label's caption, less the best of the others. Negative if wrong.
    """

    label: str
    margin: float


def siglip_config(vocabulary: int) -> SiglipConfig:
    """MedSigLIP's architecture: both towers, pooling head, an MLP width that is no multiple of 32."""
    width = {"hidden_size": 64, "intermediate_size": 216, "num_attention_heads": 4}
    return SiglipConfig(
        text_config={
            **width,
            "num_hidden_layers": 3,
            "vocab_size": vocabulary,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_size": 64,
            "pad_token_id": PAD_ID,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        vision_config={**width, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 14},
    )


def augment(rgb: NDArray[np.uint8], *, mirror: bool, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random view: turned by up to 12 degrees, cropped to 55-100 % of the area, other exposure.

    Shapes:
        rgb: [H, W, 3]
        result: [H', W', 3]
    """
    image = Image.fromarray(rgb).rotate(rng.uniform(-12, 12), resample=Image.Resampling.BILINEAR)
    scale, aspect = rng.uniform(0.55, 1.0) ** 0.5, rng.uniform(0.9, 1.1)
    width = min(image.width, round(image.width * scale * aspect))
    height = min(image.height, round(image.height * scale / aspect))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    if mirror and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 1.25))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.75, 1.25))
    return np.asarray(image)


def make_views(
    images: Sequence[NDArray[np.uint8]], *, count: int, mirror: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Augmented model inputs, taking the images in turn.

    Shapes:
        result: [count, 3, IMAGE_SIZE, IMAGE_SIZE], float32
    """
    spec = medsiglip_processor(IMAGE_SIZE)
    views = [
        preprocess(augment(images[index % len(images)], mirror=mirror, rng=rng), spec)
        for index in range(count)
    ]
    return torch.from_numpy(np.stack(views))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, cut and padded to exactly 64 as MedSigLIP requires: it pools position 63.

    Shapes:
        result: [texts, 64], int64
    """
    rows = [tokenizer.encode(text).ids[: TEXT_LENGTH - 1] for text in texts]
    return torch.tensor([row + [PAD_ID] * (TEXT_LENGTH - len(row)) for row in rows])


def train(
    samples: Sequence[SampleImage],
    captions: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    *,
    seed: int,
    steps: int = _STEPS,
    report: Callable[[int, float], None],
) -> SiglipModel:
    """Fit both towers to images and captions, on the CPU.

    Args:
        samples: Images, at least one of each label.
        captions: Texts by label.
        tokenizer: Turns captions into ids.
        seed: Of the weights, the views and their order.
        steps: How many batches; each holds one view and one caption of each label.
        report: Called with the number of steps done and the last loss.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    labels = list(captions)
    views = torch.stack(
        [
            make_views(
                [_shrink(load_sample(sample)) for sample in samples if sample.label == label],
                count=_VIEWS,
                mirror=label in _MIRRORED,
                rng=rng,
            )
            for label in labels
        ]
    )
    ids = [encode(tokenizer, captions[label]) for label in labels]
    signs = 2 * torch.eye(len(labels)) - 1  # [views, captions]

    model = SiglipModel(siglip_config(tokenizer.get_vocab_size())).train()
    with torch.no_grad():
        # Where the SigLIP paper starts both (section 3.2).
        model.logit_scale.fill_(np.log(10.0))
        model.logit_bias.fill_(-10.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        pixels = views[torch.arange(len(labels)), torch.from_numpy(rng.integers(_VIEWS, size=len(labels)))]
        texts = torch.stack([rows[int(rng.integers(len(rows)))] for rows in ids])
        logits = model(input_ids=texts, pixel_values=pixels).logits_per_image
        loss = -functional.logsigmoid(logits * signs).sum(dim=1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    return model.eval()


@torch.no_grad()
def rank(model: SiglipModel, tokenizer: Tokenizer, samples: Sequence[SampleImage]) -> list[Ranking]:
    """Classify images by the captions of all labels, zero-shot, in float32."""
    spec = medsiglip_processor(IMAGE_SIZE)
    pixels = torch.from_numpy(np.stack([preprocess(load_sample(sample), spec) for sample in samples]))
    labels = list(LABELS)
    output = model.float()(input_ids=encode(tokenizer, list(LABELS.values())), pixel_values=pixels)
    similarity = output.image_embeds @ output.text_embeds.T
    rankings = []
    for row, sample in zip(similarity, samples, strict=True):
        true = labels.index(sample.label)
        others = torch.cat([row[:true], row[true + 1 :]])
        rankings.append(Ranking(label=labels[int(row.argmax())], margin=float(row[true] - others.max())))
    return rankings


def write(directory: Path, model: SiglipModel, tokenizer: Tokenizer) -> None:
    """Lay out a checkpoint as google/medsiglip-448 is, with bfloat16 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    write_siglip_files(directory, tokenizer, image_size=IMAGE_SIZE)


def main(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    seed: Annotated[int, typer.Option(help="Of weights, views and order.")] = 0,
) -> None:
    """Train the sample model, write it, and say what it can do."""
    torch.set_num_threads(2)
    captions = {label: (caption, *CAPTIONS[label]) for label, caption in LABELS.items()}
    tokenizer = build_siglip_tokenizer(text for texts in captions.values() for text in texts)
    model = train(SEEN, captions, tokenizer, seed=seed, report=_show_progress)
    write(out, model, tokenizer)
    results = [
        _describe(what, rank(model, tokenizer, samples))
        for what, samples in (
            ("Images seen in training", SEEN),
            ("Held-out frames of the same clips", HELD_OUT),
        )
    ]
    card = _CARD.format(labels=len(LABELS), results="\n".join(f"- {result}" for result in results))
    (out / "README.md").write_text(card, encoding="utf-8")
    typer.echo(card)


def _describe(what: str, rankings: Sequence[Ranking]) -> str:
    right = sum(ranking.margin > 0 for ranking in rankings)
    smallest = min(ranking.margin for ranking in rankings)
    return f"{what}: {right} of {len(rankings)} right, smallest cosine margin {smallest:.2f}."


def _show_progress(step: int, loss: float) -> None:
    if step % 50 == 0:
        typer.echo(f"step {step}: loss {loss:.3f}")


def _shrink(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(rgb)
    image.thumbnail((_WORKING_SIZE, _WORKING_SIZE))
    return np.asarray(image)


if __name__ == "__main__":
    typer.run(main)
