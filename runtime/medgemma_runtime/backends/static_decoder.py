"""A decoder of fixed sizes behind the interface of every other decoder: any number of tokens at a time."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil import MilProgram
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec
from medgemma_runtime.session import check_inputs
from medgemma_runtime.static_cache import StaticCache, read_sizes

__all__ = ["StaticDecoderSession", "SIZES"]

SIZES = "decoder"
"""Under which key of its metadata a program says how it is fed, see `StaticSizes`."""

_FUNCTIONS = ("prefill", "decode")


class StaticDecoderSession:
    """Feeds a program of fixed sizes: cuts tokens into its chunks, and makes its masks, tables and rows.

    Args:
        session: The program, whose metadata holds `SIZES`.

    Attributes:
        entry: What a caller gives and gets: embeddings, positions and image blocks, and the logits after the
            last token. Position 0 begins another conversation.
        load_seconds: Time that opening the program took.

    Raises:
        ArtifactError: If the program lacks a function, its functions do not share their states, or it does
            not say how it is fed.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(self, session: MilSession) -> None:
        started = time.perf_counter()
        _check_functions(session.program)
        self._session = session
        self._sizes = read_sizes(session.program.metadata.get(SIZES, ""))
        [embeddings] = [spec for spec in session.entry.inputs if spec.name == "inputs_embeds"]
        self._dtype = embeddings.dtype
        self._cache: StaticCache | None = None
        self.entry = ComponentEntry(
            program=session.entry.program,
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
            outputs=session.entry.outputs,
        )
        self.load_seconds = session.load_seconds + time.perf_counter() - started

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
        cache, self._cache = self._begun(positions), None
        for step in cache.steps(blocks):
            _, given = cache.step(embeddings[step], blocks[step])
            outputs = self._session.run(given)
        self._cache = cache
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
        self._session.close()

    def _begun(self, positions: NDArray[np.int64]) -> StaticCache:
        """The conversation that the positions go on with."""
        if positions[0] == 0:
            self._session.reset()
            self._cache = StaticCache(self._sizes, dtype=self._dtype)
        held = 0 if self._cache is None else self._cache.length
        if self._cache is None or (positions != np.arange(held, held + len(positions))).any():
            raise EdgeError(
                f"the decoder holds a conversation of {held} tokens and was given tokens from position "
                f"{positions[0]} on; go on where it stands, or read the conversation from its start"
            )
        return self._cache


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
