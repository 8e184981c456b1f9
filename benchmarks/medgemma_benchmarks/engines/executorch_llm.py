"""ExecuTorch, on a directory with the `model.pte` of a language model that optimum-executorch exported."""

from importlib.metadata import version
from pathlib import Path

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - registers attention and its cache
from executorch.extension.pybindings import portable_lib
from executorch.kernels import quantized  # noqa: F401 - registers the quantized embedding


class ExecuTorch:
    """A `worker.Engine`."""

    name = "executorch"
    version = version("executorch")

    def __init__(self, model: str, *, threads: int, context: int) -> None:
        portable_lib._unsafe_reset_threadpool(threads)
        self._module = portable_lib._load_for_executorch(str(Path(model) / "model.pte"))
        [places] = self._module.run_method("get_max_seq_len", ())
        if places < context:
            raise ValueError(f"it was exported for {places} tokens and {context} are needed")
        # The most tokens that one call takes.
        self._limit = self._module.method_meta("forward").input_tensor_meta(0).sizes()[1]

    def start(self, tokens: int) -> None:
        """See `worker.Engine`."""
        self._length = 0

    def prefill(self, ids: list[int]) -> int:
        """See `worker.Engine`."""
        calls = -(-len(ids) // self._limit)
        for part in torch.tensor([ids]).tensor_split(calls, dim=1):
            end = self._length + part.shape[1]
            [logits] = self._module.forward((part.contiguous(), torch.arange(self._length, end)))
            self._length = end
        return int(logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """See `worker.Engine`."""
        return self.prefill([token])


def load(model: str, *, threads: int, context: int) -> ExecuTorch:
    """Open a directory with a model.pte."""
    return ExecuTorch(model, threads=threads, context=context)
