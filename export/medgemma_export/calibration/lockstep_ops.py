"""The operations computed for all calibration samples at once, layer by layer, in two models side by side.

What passes between operations is one tensor for each sample. Its batch has a part for each model: what the
float model computes, and what the model computes whose weights are rounded so far. A model written over the
operations thus runs once, every weight is read once for all samples, and when a weight is met, all its inputs
are known: with and without the errors of the layers in front of it.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgemma_export.ops import (
    Activation,
    HeadProjection,
    Heads,
    LayerNorm,
    Linear,
    Parameter,
    PatchEmbedding,
    RmsNorm,
    Rotary,
    Table,
)
from medgemma_export.torch_ops import TorchOps
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["LockstepOps", "Samples", "SampleStore", "Memo", "Meet"]

# Rows of a table that are read at a time: 16384 rows of 2560 are 168 MB as float32.
_TABLE_ROWS = 1 << 14


class SampleStore:
    """Keeps tensors in memory as far as a budget goes, and the rest in memory-mapped files.

    The files have no name once they are open: nothing of a sample stays on the disk, however the process
    ends.

    Args:
        budget_bytes: Of memory.
        directory: Where the files go.
        models: Parts of every tensor's batch.
    """

    def __init__(self, budget_bytes: int, directory: Path, *, models: int) -> None:
        self.models = models
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.spilled_bytes = 0
        self._directory = directory

    def keep(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The tensor or one that lies on the disk, and the bytes of memory that it takes."""
        size = tensor.numel() * tensor.element_size()
        if self.held_bytes + size <= self.budget_bytes or size == 0:
            self.held_bytes += size
            return tensor, size
        array = tensor.numpy()
        with tempfile.TemporaryFile(dir=self._directory) as file:
            mapped = np.memmap(file, dtype=array.dtype, mode="w+", shape=array.shape)
        mapped[...] = array
        self.spilled_bytes += size
        return torch.from_numpy(mapped), 0

    def release(self, held_bytes: int) -> None:
        """Memory that is free again."""
        self.held_bytes -= held_bytes


class Samples:
    """One tensor for each sample; what it holds is released when nothing refers to it."""

    def __init__(self, store: SampleStore, tensors: Iterator[Tensor]) -> None:
        self.models = store.models
        self.tensors: list[Tensor] = []
        held = 0
        for tensor in tensors:
            kept, size = store.keep(tensor)
            self.tensors.append(kept)
            held += size
        weakref.finalize(self, store.release, held)

    def rows(self) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """For each sample its vectors in each model, [rows, width]."""
        for tensor in self.tensors:
            yield tuple(part.flatten(0, -2).numpy() for part in _parts(tensor, self.models))


class Memo:
    """A reader that keeps what it has read until it is told to forget: all samples use it in turn.

    Of weights that are read in pieces it keeps the last piece, which several models may ask for.
    """

    def __init__(self, read: ReadWeight) -> None:
        self._read = read
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._piece: tuple[str, slice, NDArray[np.float32]] | None = None

    def __call__(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Read a weight, or some rows of it."""
        if rows is not None:
            if self._piece is None or self._piece[:2] != (name, rows):
                self._piece = None  # before the next is read, so that memory holds one
                self._piece = (name, rows, self._read(name, rows))
            return self._piece[2]
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name]

    def forget(self) -> None:
        """Forget all weights."""
        self._kept.clear()
        self._piece = None


class Meet(Protocol):
    """What happens when weights are met, before they are used."""

    def __call__(self, names: tuple[str, ...], inputs: Samples | None) -> None:
        """Take note of the inputs that these weights share; None for a table, where ids are looked up."""
        ...


@dataclass(frozen=True, kw_only=True)
class LockstepOps:
    """An `Ops[Samples]`.

    Attributes:
        models: What computes: one for each part of the batch.
        memos: Where they read; these forget after every operation.
        store: Keeps what passes between operations.
        meet: Called with every weight that may be integers, before it is used.
        predict: Called instead of the output head, with its weights and the inputs that every token has
            there: a decoder that reads a text predicts at each token, not only after the last. None for a
            component without head.
        grown: Called with the residual stream when it begins and whenever something has been added to it.
    """

    models: tuple[TorchOps, ...]
    memos: tuple[Memo, ...]
    store: SampleStore
    meet: Meet
    predict: Callable[[tuple[str, ...], Samples], None] | None = None
    grown: Callable[[Samples], None] | None = None
    _head_inputs: list[Samples] = field(default_factory=list)

    def patch_embedding(self, pixels: Samples, weight: PatchEmbedding) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.patch_embedding(x, weight), pixels)

    def embed(self, ids: Samples, table: Table) -> Samples:
        """See `Ops`."""
        return self.scaled_embed(ids, table, 1.0)

    def add_positions(self, x: Samples, positions: Parameter) -> Samples:
        """See `Ops`."""
        return self._grow(self._one(lambda ops, x: ops.add_positions(x, positions), x))

    def linear(self, x: Samples, weight: Linear) -> Samples:
        """See `Ops`."""
        return self.project_together(x, (weight,))[0]

    def project_together(self, x: Samples, weights: tuple[Linear, ...]) -> tuple[Samples, ...]:
        """See `Ops`."""
        if any(x is inputs for inputs in self._head_inputs):
            return (self._predict((f"{weights[0].name}.weight",), x),)
        self._meet(x, *weights)
        return self._several(lambda ops, x: ops.project_together(x, weights), x)

    def mlp(self, x: Samples, up: Linear, down: Linear, activation: Activation) -> Samples:
        """See `Ops`."""
        self._meet(x, up)
        hidden = self._one(lambda ops, x: _activate(ops.linear(x, up)), x)
        return self.linear(hidden, down)

    def layer_norm(self, x: Samples, weight: LayerNorm) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.layer_norm(x, weight), x)

    def residual_add(self, x: Samples, branch: Samples) -> Samples:
        """See `Ops`."""
        return self._grow(self._one(lambda ops, x, y: ops.residual_add(x, y), x, branch))

    def named(self, x: Samples, name: str) -> Samples:
        """See `Ops`."""
        return x

    def attention(self, q: Samples, k: Samples, v: Samples, heads: Heads, scale: float) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, q, k, v: ops.attention(q, k, v, heads, scale), q, k, v)

    def expand(self, parameter: Parameter, like: Samples) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.expand(parameter, x), like)

    def token(self, x: Samples, index: int) -> Samples:
        """See `Ops`; every token where they all predict."""
        if self.predict is None:
            return self._one(lambda ops, x: ops.token(x, index), x)
        self._head_inputs.append(x)
        return x

    def scaled_embed(self, ids: Samples, table: Table, scale: float) -> Samples:
        """See `Ops`. Tables are read in pieces, of which few rows are used."""
        self.meet(tuple(piece.weight for piece in table.pieces), None)
        wanted = torch.unique(torch.cat([tensor.flatten() for tensor in ids.tensors]))
        tables = [rows * scale for rows in self._gather(wanted, table)]

        def look_up(ids: Tensor) -> Tensor:
            places = torch.searchsorted(wanted, ids)
            parts = _parts(places, self.store.models)
            return torch.cat([rows[part] for rows, part in zip(tables, parts, strict=True)])

        return self._grow(Samples(self.store, (look_up(tensor) for tensor in ids.tensors)))

    def place_images(self, embeddings: Samples, ids: Samples, features: Samples, image_id: int) -> Samples:
        """See `Ops`."""
        placed = self._one(
            lambda ops, x, ids, features: ops.place_images(x, ids, features, image_id),
            embeddings,
            ids,
            features,
        )
        return self._grow(placed)

    def rms_norm(self, x: Samples, weight: RmsNorm) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.rms_norm(x, weight), x)

    def residual_norm(self, x: Samples, branch: Samples, weight: RmsNorm) -> tuple[Samples, Samples]:
        """See `Ops`."""
        total, normed = self._several(lambda ops, x, y: ops.residual_norm(x, y, weight), x, branch)
        return self._grow(total), normed

    def average_pool(self, x: Samples, side: int, window: int) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.average_pool(x, side, window), x)

    def join_batch(self, x: Samples) -> Samples:
        """See `Ops`."""
        return self._one(lambda ops, x: ops.join_batch(x), x)

    def gated_mlp(
        self, x: Samples, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Samples:
        """See `Ops`."""
        self._meet(x, gate, up)
        hidden = self._one(lambda ops, x: _activate(ops.linear(x, gate)) * ops.linear(x, up), x)
        return self.linear(hidden, down)

    def project_heads(
        self, x: Samples, weights: HeadProjection, positions: Samples, rotary: Rotary, heads: Heads
    ) -> tuple[Samples, Samples, Samples]:
        """See `Ops`."""
        self._meet(x, weights.query, weights.key, weights.value)
        q, k, v = self._several(
            lambda ops, x, at: ops.project_heads(x, weights, at, rotary, heads), x, positions
        )
        return q, k, v

    def mask(
        self,
        positions: Samples,
        blocks: Samples,
        attention_mask: Samples,
        start: Samples | None,
        window: int | None,
    ) -> Samples:
        """See `Ops`. The caches are empty, so the first position is 0."""
        return self._one(
            lambda ops, at, blocks, seen: ops.mask(at, blocks, seen, None, window),
            positions,
            blocks,
            attention_mask,
        )

    def cached_attention(
        self,
        q: Samples,
        k: Samples,
        v: Samples,
        past_key: Samples,
        past_value: Samples,
        mask: Samples,
        heads: Heads,
        scale: float,
    ) -> tuple[Samples, Samples, Samples]:
        """See `Ops`. Nothing is kept: every sample is read in one step."""
        result = self._one(
            lambda ops, *parts: ops.cached_attention(*parts, heads, scale)[0],
            q,
            k,
            v,
            past_key,
            past_value,
            mask,
        )
        return result, past_key, past_value

    def logits(self, x: Samples, table: Table) -> Samples:
        """See `Ops`."""
        return self._predict(tuple(piece.weight for piece in table.pieces), x)

    def _predict(self, names: tuple[str, ...], x: Samples) -> Samples:
        """Nothing reads a decoder's logits afterwards, and those of every token would be large."""
        if self.predict is None:
            raise RuntimeError(f"{names[0]} is an output head, and this component was said to have none")
        self.predict(names, x)
        return x

    def _grow(self, x: Samples) -> Samples:
        if self.grown is not None:
            self.grown(x)
        return x

    def _meet(self, x: Samples, *weights: Linear) -> None:
        self.meet(tuple(f"{weight.name}.weight" for weight in weights), x)

    def _gather(self, wanted: Tensor, table: Table) -> list[Tensor]:
        """The wanted rows of a table in each model, [wanted, width].

        Raises:
            EdgeError: If the table does not have them all.
        """
        if int(wanted.max()) >= table.rows:
            raise EdgeError(
                f"a sample has the token {int(wanted.max())} and {table.name} has {table.rows} rows; give "
                "the checkpoint the tokenizer that it was trained with"
            )
        found = [torch.empty(len(wanted), table.width) for _ in self.models]
        for piece in table.pieces:
            for start in range(piece.start, piece.stop, _TABLE_ROWS):
                stop = min(start + _TABLE_ROWS, piece.stop)
                inside = (wanted >= start) & (wanted < stop)
                if inside.any():
                    part = slice(start - piece.start, stop - piece.start)
                    for rows, ops in zip(found, self.models, strict=True):
                        values = torch.from_numpy(ops.weights.read(piece.weight, part))
                        rows[inside] = values[wanted[inside] - start]
        return found

    def _one(self, compute: Callable[..., Tensor], *inputs: Samples) -> Samples:
        """One operation on every sample in every model."""
        [result] = self._several(lambda ops, *parts: (compute(ops, *parts),), *inputs)
        return result

    def _several(self, compute: Callable[..., tuple[Tensor, ...]], *inputs: Samples) -> tuple[Samples, ...]:
        """One operation with several results."""
        columns: list[list[Tensor]] = []
        for tensors in zip(*(samples.tensors for samples in inputs), strict=True):
            parts = zip(*(_parts(tensor, self.store.models) for tensor in tensors), strict=True)
            results = [compute(ops, *part) for ops, part in zip(self.models, parts, strict=True)]
            columns.append([torch.cat(pair) for pair in zip(*results, strict=True)])
        for memo in self.memos:
            memo.forget()
        return tuple(Samples(self.store, iter(column)) for column in zip(*columns, strict=True))


def _parts(tensor: Tensor, models: int) -> list[Tensor]:
    """The batch of each model; it may be empty, as image features are where there is no image."""
    size = len(tensor) // models
    return [tensor[model * size : (model + 1) * size] for model in range(models)]


def _activate(x: Tensor) -> Tensor:
    """The only `Activation` that there is."""
    return functional.gelu(x, approximate="tanh")
