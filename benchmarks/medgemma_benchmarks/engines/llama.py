"""llama.cpp by llama-cpp-python's low-level calls, on a GGUF file."""

import ctypes

import llama_cpp
import numpy as np


class Llama:
    """A `worker.Engine`."""

    name = "llama-cpp-python"
    version = llama_cpp.__version__

    def __init__(self, model: str, *, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp cannot load this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False  # local layers keep their window only, as llama.cpp's own programs do
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, tokens: int) -> None:
        """See `worker.Engine`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def prefill(self, ids: list[int]) -> int:
        """See `worker.Engine`."""
        # Positions follow on, and only the last token's logits are computed.
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary))
        return int(np.frombuffer(address.contents, np.float32).argmax())

    def step(self, token: int) -> int:
        """See `worker.Engine`."""
        return self.prefill([token])


def load(model: str, *, threads: int, context: int) -> Llama:
    """Open a GGUF file."""
    return Llama(model, threads=threads, context=context)
