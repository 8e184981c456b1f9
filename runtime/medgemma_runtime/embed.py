"""MedSigLIP at work: embeddings of images and texts, zero-shot classification, nearest images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil import Mode
from medgemma_runtime.errors import ArtifactError, EdgeError, TextError
from medgemma_runtime.images import preprocess
from medgemma_runtime.manifest import Similarity
from medgemma_runtime.session import Session
from medgemma_runtime.text import Tokenize, load_tokenizer

__all__ = [
    "BATCHED_ACTIVATIONS",
    "Embedder",
    "NoDirectionError",
    "ZeroShot",
    "unit_length",
    "zero_shot",
    "logits",
    "top_k",
]

BATCHED_ACTIVATIONS = ("float", "int8-static")
"""What artifacts do to activations, as manifests say it, where no item of a batch can change another."""

Progress = Callable[[int], None]

# The name of both encoders' output in transformers' SiglipModel.
_OUTPUT = "pooler_output"


class NoDirectionError(EdgeError):
    """An encoder's output that no length can be given to: NaN, infinite, or zero."""


class Embedder:
    """Embeds images and texts with one artifact; each encoder is loaded when it is first needed.

    Every embedding has unit length in float32, so that a dot product is a cosine. (The programs'
    own output, `pooler_output`, has not.)

    Args:
        artifact: An opened artifact with the components `image` and `text`.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: How much of a Core ML program's fp16 is honoured; None for nothing, and for other targets.
    """

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, arithmetic: Mode | None = None
    ) -> None:
        self.artifact = artifact
        self._threads, self._arithmetic = threads, arithmetic
        self._sessions: dict[str, Session] = {}
        self._tokenize: Tokenize | None = None

    @property
    def similarity(self) -> Similarity:
        """The model's own scale and bias, for `logits`.

        Raises:
            ArtifactError: If the artifact states none.
        """
        similarity = self.artifact.manifest.similarity
        if similarity is None:
            raise ArtifactError(_lacks(self.artifact, "similarity"))
        return similarity

    def embed_images(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Embed decoded images.

        Args:
            images: RGB images `[H, W, 3]` of any size, as `images.load_image` gives them.
            batch_size: Images in one run. More cost memory and, on a CPU, save little time. An artifact
                that rounds activations by ranges it finds at run time takes one: a range may be that of the
                whole run, and one image would change another's embedding.
            progress: Called with the number of images done since the last call.

        Returns:
            `[N, D]`.

        Raises:
            ArtifactError: If the artifact has no image encoder or states no ImageSpec.
            ImageError: If an array is no image.
            EdgeError: If the encoder fails or its output cannot be normalised.
        """
        spec = self.artifact.manifest.image
        if spec is None:
            raise ArtifactError(_lacks(self.artifact, "image"))
        return self._embed(
            "image",
            "pixel_values",
            len(images),
            lambda start, stop: np.stack([preprocess(image, spec) for image in images[start:stop]]),
            batch_size=batch_size,
            progress=progress,
        )

    def embed_pixels(
        self, pixels: NDArray[np.float32], *, batch_size: int = 1, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Embed model inputs `[N, 3, H, W]` that are preprocessed already; see `embed_images`."""
        return self._embed(
            "image",
            "pixel_values",
            len(pixels),
            lambda start, stop: pixels[start:stop],
            batch_size=batch_size,
            progress=progress,
        )

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        truncate: bool = False,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: The texts.
            truncate: Cut texts that are too long instead of refusing them.
            batch_size: Texts in one run.
            progress: Called with the number of texts done since the last call.

        Returns:
            `[N, D]`.

        Raises:
            ArtifactError: If the artifact has no text encoder or states no TextSpec.
            TextError: If a text cannot be encoded.
            EdgeError: If the encoder fails or its output cannot be normalised.
        """
        ids = self._tokenizer().encode(texts, truncate=truncate)
        return self.embed_ids(ids, batch_size=batch_size, progress=progress)

    def embed_labels(self, labels: Sequence[str], *, progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed the labels of one zero-shot question.

        Args:
            labels: At least one; a sentence such as "a chest x-ray with effusion" works better than
                a word, as the model was trained on captions.
            progress: Called with the number of labels done since the last call.

        Returns:
            `[M, D]`.

        Raises:
            TextError: If there is none, one is too long or says nothing, or two are the same to the
                model, which reads neither case nor punctuation: they would share one answer.
        """
        if not labels:
            raise TextError("zero-shot classification needs at least one label; give some")
        ids = self._tokenizer().encode(labels)
        seen: dict[bytes, str] = {}
        for label, row in zip(labels, ids, strict=True):
            if row[0] == self._tokenizer().spec.eos_id:
                raise TextError(f"the label {label!r} has no word in it; give a text")
            key = row.tobytes()
            if key in seen:
                raise TextError(
                    f"the labels {seen[key]!r} and {label!r} are the same to the model; remove one"
                )
            seen[key] = label
        return self.embed_ids(ids, progress=progress)

    def embed_ids(
        self, ids: NDArray[np.int64], *, batch_size: int = 1, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Embed token ids `[N, length]`, as `text.Tokenize` gives them; see `embed_texts`."""
        return self._embed(
            "text",
            "input_ids",
            len(ids),
            lambda start, stop: ids[start:stop],
            batch_size=batch_size,
            progress=progress,
        )

    def close(self) -> None:
        """Free both encoders; the next use loads them again."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _embed(
        self,
        component: str,
        input_name: str,
        count: int,
        batch: Callable[[int, int], NDArray[Any]],
        *,
        batch_size: int,
        progress: Progress | None,
    ) -> NDArray[np.float32]:
        if batch_size < 1:
            raise EdgeError(f"batch_size must be at least 1 and is {batch_size}")
        activations = self.artifact.manifest.quantization.activations
        if batch_size > 1 and activations not in BATCHED_ACTIVATIONS:
            raise EdgeError(
                f"batch_size is {batch_size} and {self.artifact.directory.name} rounds activations "
                f"({activations}), so that one item could change another's embedding; use batch_size 1"
            )
        width = self._width(component)
        if component not in self._sessions:
            self._sessions[component] = open_session(
                self.artifact, component, threads=self._threads, arithmetic=self._arithmetic
            )
        session = self._sessions[component]
        rows = np.empty((count, width), dtype=np.float32)
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            outputs = session.run({input_name: batch(start, stop)})
            rows[start:stop] = unit_length(outputs[_OUTPUT], component)
            if progress is not None:
                progress(stop - start)
        return rows

    def _width(self, component: str) -> int:
        """The width D of an encoder's output, as the manifest states it."""
        for spec in self.artifact.component(component).outputs:
            if spec.name == _OUTPUT and len(spec.shape) == 2 and isinstance(spec.shape[1], int):
                return spec.shape[1]
        raise ArtifactError(
            f"component {component!r} of {self.artifact.directory.name} states no output "
            f"{_OUTPUT!r} of a fixed width, so it is no encoder; give an artifact of MedSigLIP"
        )

    def _tokenizer(self) -> Tokenize:
        if self._tokenize is None:
            spec = self.artifact.manifest.text
            if spec is None:
                raise ArtifactError(_lacks(self.artifact, "text"))
            self._tokenize = load_tokenizer(self.artifact.directory, spec)
        return self._tokenize


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """How well each of M labels fits each of N images; every array is `[N, M]` float32.

    Attributes:
        logits: `scale * cos + bias`, as the model was trained.
        softmax_over_labels: The labels compared with each other; a row adds up to 1 whatever the
            image shows. The MedSigLIP model card's quick start shows this.
        sigmoid_per_label: Each label judged alone, the probability of the training loss (SigLIP,
            arXiv 2303.15343); low for every label when none fits.
    """

    logits: NDArray[np.float32]
    softmax_over_labels: NDArray[np.float32]
    sigmoid_per_label: NDArray[np.float32]


def logits(
    image_embeddings: NDArray[np.float32],
    text_embeddings: NDArray[np.float32],
    similarity: Similarity,
) -> NDArray[np.float32]:
    """`scale * cos + bias` of every image with every text.

    Shapes:
        image_embeddings: [N, D], unit length
        text_embeddings:  [M, D], unit length
        result:           [N, M]
    """
    cosines = image_embeddings @ text_embeddings.T
    return cosines * np.float32(similarity.scale) + np.float32(similarity.bias)


def zero_shot(
    image_embeddings: NDArray[np.float32],
    text_embeddings: NDArray[np.float32],
    similarity: Similarity,
) -> ZeroShot:
    """Classify N images by M labels without training; shapes as in `logits`."""
    values = logits(image_embeddings, text_embeddings, similarity)
    # Neither exponential below has a positive argument, so neither can overflow.
    shares = np.exp(values - values.max(axis=-1, keepdims=True))
    falling = np.exp(-np.abs(values))
    return ZeroShot(
        logits=values,
        softmax_over_labels=shares / shares.sum(axis=-1, keepdims=True),
        sigmoid_per_label=np.where(values < 0, falling, np.float32(1)) / (1 + falling),
    )


def top_k(
    query: NDArray[np.float32], index: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest rows by cosine, the nearest first; of equal ones the earlier row.

    Args:
        query: `[D]` or `[Q, D]`, unit length.
        index: `[N, D]`, unit length.
        k: How many, from 1 to N.

    Returns:
        Row numbers and cosines, `[k]` or `[Q, k]`.

    Raises:
        EdgeError: If `k` or the widths do not fit.
    """
    if not 1 <= k <= len(index):
        raise EdgeError(f"asked for the {k} nearest of {len(index)}; give a number within that")
    if query.shape[-1] != index.shape[-1]:
        raise EdgeError(
            f"the query is {query.shape[-1]} wide and the index {index.shape[-1]}; "
            "embed both with the same artifact"
        )
    cosines = query @ index.T
    rows = np.argsort(-cosines, axis=-1, kind="stable")[..., :k]
    return rows, np.take_along_axis(cosines, rows, axis=-1)


def unit_length(vectors: NDArray[Any], component: str) -> NDArray[np.float32]:
    """An encoder's outputs `[N, D]` at unit length, in float32.

    Args:
        vectors: `pooler_output` of a run.
        component: The encoder, for the message.

    Raises:
        NoDirectionError: If a value is not finite, or a row has no length.
    """
    vectors = vectors.astype(np.float32, copy=False)
    if not np.isfinite(vectors).all():
        raise NoDirectionError(
            f"component {component!r} gave NaN or infinity; the artifact is not fit for this "
            "machine: export it with a higher precision"
        )
    with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise NoDirectionError(
            f"component {component!r} gave a vector of length {lengths.min()}, which has no "
            "direction; the artifact is damaged or its weights are: export it again"
        )
    result: NDArray[np.float32] = vectors / lengths
    return result


def _lacks(artifact: Artifact, field: str) -> str:
    return (
        f"{artifact.directory.name} states no {field!r} in its manifest, so this is no artifact "
        "of MedSigLIP; give one that medgemma-export made from it"
    )
