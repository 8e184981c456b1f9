"""A decoder of fixed sizes behind the interface of every other decoder: any number of tokens at a time."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil import MilProgram
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec
from medgemma_runtime.session import check_inputs
from medgemma_runtime.static_cache import StaticCache, read_sizes

__all__ = ["StaticDecoderSession", "StaticDecoder", "StatefulDecoder", "Conversation", "SIZES"]

SIZES = "decoder"
"""Under which key of its metadata a program says how it is fed, see `StaticSizes`."""

_FUNCTIONS = ("prefill", "decode")


class Conversation(Protocol):
    """What a decoder has read so far.

    Attributes:
        length: Positions.
    """

    length: int

    def steps(self, blocks: NDArray[np.int64]) -> Iterator[slice]:
        """Cut new tokens, of which [S] blocks say which belong to one image, as `read` takes them."""
        ...

    def read(self, embeddings: NDArray[Any], blocks: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Append [S, H] embeddings; the outputs after the last."""
        ...


class StaticDecoder(Protocol):
    """Programs of fixed sizes that are a decoder.

    Attributes:
        entry: The decoder as the manifest has it; `inputs_embeds` and `logits` are what this uses of it.
        load_seconds: Time that opening took.
    """

    entry: ComponentEntry
    load_seconds: float

    def begin(self) -> Conversation:
        """A new conversation, which ends the one before."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class StaticDecoderSession:
    """Feeds a decoder of fixed sizes any number of tokens at a time.

    Args:
        decoder: Its programs.

    Attributes:
        entry: What a caller gives and gets: embeddings, positions and image blocks, and the logits after the
            last token. Position 0 begins another conversation.
        load_seconds: Time that opening the programs took.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(self, decoder: StaticDecoder) -> None:
        self._decoder = decoder
        [embeddings] = [spec for spec in decoder.entry.inputs if spec.name == "inputs_embeds"]
        self._conversation: Conversation | None = None
        self.entry = ComponentEntry(
            program=decoder.entry.program,
            inputs=(
                TensorSpec(
                    name="inputs_embeds",
                    dtype="float32",
                    shape=(1, "sequence", embeddings.shape[2]),
                    description="scaled token embeddings, image features in their places",
                ),
                TensorSpec(
                    name="cache_position",
                    dtype="int64",
                    shape=("sequence",),
                    description="positions of the tokens, the first after those read before",
                ),
                TensorSpec(
                    name="image_blocks",
                    dtype="int64",
                    shape=(1, "sequence"),
                    description="the same number for the tokens of one image, -1 for text",
                    default=-1,
                ),
            ),
            outputs=decoder.entry.outputs,
        )
        self.load_seconds = decoder.load_seconds

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, the positions do not go on where the
                conversation stands, or the session is closed.
            TextError: If the conversation becomes longer than the caches.
            NotFiniteError: If a tensor leaves its format.
        """
        check_inputs(self.entry, inputs)
        embeddings, positions = inputs["inputs_embeds"][0], inputs["cache_position"]
        blocks = inputs["image_blocks"][0] if "image_blocks" in inputs else np.full(len(positions), -1)
        # A conversation that fails in the middle of a step is over: its caches hold half of the step.
        conversation, self._conversation = self._begun(positions), None
        for step in conversation.steps(blocks):
            outputs = conversation.read(embeddings[step], blocks[step])
        self._conversation = conversation
        return outputs

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`.

        Raises:
            EdgeError: As `run`.
        """
        if outputs.keys() != {spec.name for spec in self.entry.outputs}:
            raise EdgeError("the decoder needs an array for every output")
        for name, array in self.run(inputs).items():
            np.copyto(outputs[name], array)

    def close(self) -> None:
        """See `Session`."""
        self._decoder.close()

    def _begun(self, positions: NDArray[np.int64]) -> Conversation:
        """The conversation that the positions go on with."""
        if positions[0] == 0:
            self._conversation = self._decoder.begin()
        held = 0 if self._conversation is None else self._conversation.length
        if self._conversation is None or (positions != np.arange(held, held + len(positions))).any():
            raise EdgeError(
                f"the decoder holds a conversation of {held} tokens and was given tokens from position "
                f"{positions[0]} on; go on where it stands, or read the conversation from its start"
            )
        return self._conversation


class StatefulDecoder:
    """A program whose functions keep keys and values in states that they share.

    Args:
        session: The program, whose metadata holds `SIZES`.

    Raises:
        ArtifactError: If the program lacks a function, its functions do not share their states, or it does
            not say how it is fed.
    """

    def __init__(self, session: MilSession) -> None:
        _check_functions(session.program)
        self._session = session
        self._sizes = read_sizes(session.program.metadata.get(SIZES, ""))
        [embeddings] = [spec for spec in session.entry.inputs if spec.name == "inputs_embeds"]
        self._dtype = embeddings.dtype
        self.entry, self.load_seconds = session.entry, session.load_seconds

    def begin(self) -> Conversation:
        """See `StaticDecoder`."""
        self._session.reset()
        return _StatefulConversation(self._session, StaticCache(self._sizes, dtype=self._dtype))

    def close(self) -> None:
        """See `StaticDecoder`."""
        self._session.close()


class _StatefulConversation:
    """See `Conversation`."""

    def __init__(self, session: MilSession, cache: StaticCache) -> None:
        self._session, self._cache, self.length = session, cache, 0

    def steps(self, blocks: NDArray[np.int64]) -> Iterator[slice]:
        return self._cache.steps(blocks)

    def read(self, embeddings: NDArray[Any], blocks: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        _, given = self._cache.step(embeddings, blocks)
        self.length = self._cache.length
        return self._session.run(given)


def _check_functions(program: MilProgram) -> None:
    missing = [name for name in _FUNCTIONS if name not in program.functions]
    if missing:
        raise ArtifactError(
            f"the decoder has no function {missing[0]!r}, only {', '.join(sorted(program.functions))}; "
            "export again"
        )
    prefill, decode = (program.functions[name].states for name in _FUNCTIONS)
    if prefill != decode:
        raise ArtifactError(
            f"the decoder's prefill keeps the states {sorted(prefill)} and decode {sorted(decode)}, so one "
            "would not read what the other wrote; export again"
        )
