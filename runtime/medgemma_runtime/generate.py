"""Answers a conversation with images, token by token: options in, result out."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import ArtifactError, TextError
from medgemma_runtime.images import preprocess
from medgemma_runtime.kv_cache import KVCache
from medgemma_runtime.manifest import ImageSpec, PromptSpec
from medgemma_runtime.prompt import Message, Prompt, load_prompt_tokenizer
from medgemma_runtime.session import Session

__all__ = ["Generator", "GenerateOptions", "GenerateResult", "sample_token"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How an answer is drawn.

    Attributes:
        max_tokens: Tokens of the answer at most.
        temperature: 0 takes the most probable token, as every MedGemma notebook does; Gemma 3's own default
            is 1.
        top_k: Of the most probable tokens, how many may be drawn (Gemma 3's default); those as probable as
            the last of them may be, too, as in transformers.
        top_p: Of those, as many as are needed to reach this probability (Gemma 3's default).
        seed: Of the draw; the same seed gives the same answer.
    """

    max_tokens: int = 500
    temperature: float = 0.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.top_k < 1:
            raise ValueError("max_tokens and top_k must be at least 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be finite and not negative, and top_p must be in (0, 1]")
        if self.seed < 0:
            raise ValueError("seed must not be negative")


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """An answer.

    Attributes:
        text: All of it, control tokens such as `<unused95>` included.
        ids: Its tokens, the one that ended it excluded.
        ended: `stop` by the model, `length` by `max_tokens` or the context, `cancel` by the caller.
        prompt_tokens: Tokens of the prompt, images included.
        images_ms: Time of the vision tower, for images that were not cached.
        prefill_ms: Time from the embedded prompt to the first token's logits.
        decode_ms: Time of all later tokens.
    """

    text: str
    ids: tuple[int, ...]
    ended: Literal["stop", "length", "cancel"]
    prompt_tokens: int
    images_ms: float
    prefill_ms: float
    decode_ms: float


class Generator:
    """A MedGemma artifact, opened; use as a context manager.

    Args:
        artifact: An artifact with the components `embed` and `decoder`, and `vision` where it sees images.
        threads: Threads for one operator; None leaves the choice to the engine.

    Raises:
        ArtifactError: If the artifact is not of this kind.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        manifest = artifact.manifest
        if manifest.prompt is None or not {"embed", "decoder"} <= manifest.components.keys():
            raise ArtifactError(
                f"{artifact.directory.name} has the components {', '.join(sorted(manifest.components))}; "
                "answering needs embed, decoder and a prompt: give a MedGemma artifact"
            )
        self.spec: PromptSpec = manifest.prompt
        self._image: ImageSpec | None = manifest.image
        self._tokenizer = load_prompt_tokenizer(artifact.directory, self.spec)
        self._artifact, self._threads = artifact, threads
        self._sessions: dict[str, Session] = {}
        self._features: dict[str, NDArray[np.float32]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of all components and the cached image features."""
        self._close_sessions()
        self._features.clear()

    def generate(
        self,
        messages: Sequence[Message],
        images: Sequence[NDArray[np.uint8]] = (),
        *,
        system: str | None = None,
        options: GenerateOptions | None = None,
        on_text: Callable[[str], bool] | None = None,
    ) -> GenerateResult:
        """Answer a conversation.

        Args:
            messages: See `medgemma_runtime.prompt.render`.
            images: [H, W, 3] uint8 RGB, one for each `Image` part, in order.
            system: Instructions before the first message.
            options: How the answer is drawn; None for the defaults.
            on_text: Given each piece of text as it comes; returning False ends the answer.

        Raises:
            TextError: If the conversation is malformed or does not fit the context; before any work.
            EdgeError: If the model's output is not finite.
        """
        prompt = self._tokenizer.encode(messages, system=system, image_count=len(images))
        return self._answer(prompt, images, options or GenerateOptions(), on_text)

    def complete(
        self,
        text: str,
        *,
        options: GenerateOptions | None = None,
        on_text: Callable[[str], bool] | None = None,
    ) -> GenerateResult:
        """Go on with a text as it stands, without the chat template: base models know no chat.

        Args:
            text: What comes after `<bos>`.
            options: How the rest is drawn; None for the defaults.
            on_text: Given each piece of text as it comes; returning False ends the text.

        Raises:
            TextError: If the text contains a control token or does not fit the context; before any work.
            EdgeError: If the model's output is not finite.
        """
        return self._answer(self._tokenizer.encode_text(text), (), options or GenerateOptions(), on_text)

    def _answer(
        self,
        prompt: Prompt,
        images: Sequence[NDArray[np.uint8]],
        options: GenerateOptions,
        on_text: Callable[[str], bool] | None,
    ) -> GenerateResult:
        room = self.spec.context - len(prompt.ids)
        if room < 1:
            raise TextError(f"the prompt fills the context of {self.spec.context} tokens; shorten it")
        limit = min(room, options.max_tokens)
        started = time.perf_counter()
        features = self._image_features(images)
        seen = time.perf_counter()
        decoder = self._open_decoder()
        cache = decoder.new_cache(len(prompt.ids) + limit)
        logits = decoder.read(cache, prompt.ids, image_blocks=prompt.image_blocks, image_features=features)
        read = time.perf_counter()
        ids, text, ended = self._continue(decoder, cache, logits, limit, options, on_text)
        return GenerateResult(
            text=text,
            ids=tuple(ids),
            ended=ended,
            prompt_tokens=len(prompt.ids),
            images_ms=(seen - started) * 1e3,
            prefill_ms=(read - seen) * 1e3,
            decode_ms=(time.perf_counter() - read) * 1e3,
        )

    def _continue(
        self,
        decoder: Decoder,
        cache: KVCache,
        logits: NDArray[np.float32],
        limit: int,
        options: GenerateOptions,
        on_text: Callable[[str], bool] | None,
    ) -> tuple[list[int], str, Literal["stop", "length", "cancel"]]:
        rng = np.random.default_rng(options.seed)
        detokenizer = self._tokenizer.detokenizer()
        ids: list[int] = []
        pieces: list[str] = []
        ended: Literal["stop", "length", "cancel"] = "length"
        while True:
            token = sample_token(logits[: self._tokenizer.token_count], options, rng)
            if token in self.spec.stop_ids:
                ended = "stop"
                break
            ids.append(token)
            pieces.append(detokenizer.push(token))
            if on_text is not None and pieces[-1] and not on_text(pieces[-1]):
                ended = "cancel"
                break
            if len(ids) == limit:
                break
            logits = decoder.read(cache, np.array([token], np.int64))
        pieces.append(detokenizer.finish())
        if on_text is not None and pieces[-1] and ended != "cancel":
            on_text(pieces[-1])
        return ids, "".join(pieces), ended

    def _image_features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        """[tokens, H] for all images, one after the other; those of the last images are kept."""
        keys = [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self._features:
                if self._image is None:
                    raise ArtifactError("this artifact reads text only; give one with a vision component")
                if "vision" not in self._sessions:
                    self._close_sessions()  # the tower and the decoder need not be in memory together
                pixels = preprocess(image, self._image)[None]
                outputs = self._session("vision").run({"pixel_values": pixels})
                self._features[key] = outputs["image_features"]
        if keys:
            # A conversation goes on with the images it has; kept for good, those of 400 films take a GB.
            self._features = {key: self._features[key] for key in keys}
        return np.concatenate([self._features[key] for key in keys]) if keys else None

    def _open_decoder(self) -> Decoder:
        if "vision" in self._sessions:
            self._sessions.pop("vision").close()
        return Decoder(self._session("embed"), self._session("decoder"), self.spec)

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = open_session(self._artifact, name, threads=self._threads)
        return self._sessions[name]

    def _close_sessions(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def sample_token(logits: NDArray[np.float32], options: GenerateOptions, rng: np.random.Generator) -> int:
    """Draw one token: the most probable at temperature 0, else among top-k cut to top-p.

    Shapes:
        logits: [vocabulary]
    """
    if options.temperature == 0:
        return int(logits.argmax())
    top_k = min(options.top_k, len(logits))
    # Partial sorts of indices order equal logits by the vector unit they run on; by value and then id, every
    # machine draws the same.
    candidates = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    candidates = candidates[np.argsort(-logits[candidates], kind="stable")]
    scaled = (logits[candidates] - logits[candidates[0]]).astype(np.float64) / options.temperature
    shares = np.exp(scaled)
    shares /= shares.sum()
    # The token that crosses top-p is kept, so at least one always is.
    kept = int(np.searchsorted(np.cumsum(shares), options.top_p) + 1)
    shares = shares[:kept] / shares[:kept].sum()
    return int(rng.choice(candidates[:kept], p=shares))
