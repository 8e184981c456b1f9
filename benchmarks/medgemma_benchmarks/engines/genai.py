"""ONNX Runtime GenAI, on a directory that its model builder wrote."""

import json

import numpy as np
import onnxruntime_genai as genai


class GenAi:
    """A `worker.Engine`."""

    name = "onnxruntime-genai"
    version = genai.__version__

    def __init__(self, model: str, *, threads: int, context: int) -> None:
        # Official builds report usage to Microsoft unless told otherwise.
        genai.disable_telemetry_events()
        config = genai.Config(model)
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
        )
        self._model = genai.Model(config)
        self._context = context

    def start(self, tokens: int) -> None:
        """See `worker.Engine`."""
        params = genai.GeneratorParams(self._model)
        # The cache has as many places as `max_length`. A stop token must not end a run early.
        params.set_search_options(do_sample=False, max_length=self._context, min_length=tokens + 1)
        self._generator = genai.Generator(self._model, params)

    def prefill(self, ids: list[int]) -> int:
        """See `worker.Engine`."""
        self._generator.append_tokens(np.array(ids, np.int32))
        return self._next()

    def step(self, token: int) -> int:
        """See `worker.Engine`."""
        # The generator itself has appended the token that it chose last.
        return self._next()

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def load(model: str, *, threads: int, context: int) -> GenAi:
    """Open a directory with a genai_config.json."""
    return GenAi(model, threads=threads, context=context)
