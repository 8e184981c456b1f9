"""The operations as Core ML's MIL, for one item at a time and fixed sizes.

Safe in float16 by construction: a norm divides by the largest magnitude before it squares, a mask is finite,
queries are scaled before they meet keys, and indices stay int32.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from medgemma_export.targets.coreml_mil import PACKED_DTYPES, Var, mb
from medgemma_export.targets.coreml_package import WeightFile
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT16, FLOAT32
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["MilOps", "Cache", "CacheSlot", "StepInputs", "identifier", "gain_array", "SCALES"]

SCALES = ".scales"
"""After the name of a weight: its scales in the weight file."""

# 16 heads of 1,024 patches: what is larger is computed for some of the queries at a time.
_MAX_SCORES = 1 << 24


def identifier(name: str) -> str:
    """A weight's name as MIL can spell it."""
    return re.sub(r"\W", "_", name)


def gain_array(stored: NDArray[np.float32], weight: RmsNorm, *, half: bool) -> NDArray[Any]:
    """What an RMS norm multiplies by: Gemma stores it less one."""
    gain = (stored + np.float32(1)) * np.float32(weight.factor)
    return gain.astype(np.float16 if half else np.float32)


@dataclass(kw_only=True)
class Cache:
    """A state: keys and values of several layers, [2 * layers, kv, rows, D] float16, K before V.

    Attributes:
        state: The function's input.
        slot: [1] int32, the first of the rows that the new tokens take.
        current: What the state holds after the layers so far.
        begin: `slot` as an index into the state.
    """

    state: Var
    slot: Var
    current: Var | None = None
    begin: Var | None = None


@dataclass(frozen=True, kw_only=True)
class CacheSlot:
    """Where one layer's keys and values lie: what stands for `past_key` and `past_value`."""

    cache: Cache
    layer: int


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a decoder's function is given beside embeddings.

    Attributes:
        rotary: For each rotary embedding cosines and sines, [1, 1, S, D / 2].
        masks: What is added to scores, [1, 1, S, rows]: of layers with a window (True) and without.
        last: [1] int32, the index of the last token; None where there is one token only.
    """

    rotary: Mapping[Rotary, tuple[Var, Var]]
    masks: Mapping[bool, Var]
    last: Var | None


@dataclass(kw_only=True)
class MilOps:
    """An `Ops[Var]` that adds to the function being built, and writes weights as it meets them.

    Attributes:
        weights: Where weights come from.
        file: Where they go.
        note: Told what was written for each weight.
        half: Whether the program computes in float16, or in float32.
        step: Of a decoder.
    """

    weights: QuantizedWeights
    file: WeightFile
    note: Callable[[PackedWeight], None]
    half: bool
    step: StepInputs | None = None
    _constants: dict[str, Var] = field(default_factory=dict)
    _tiled: dict[int, Var] = field(default_factory=dict)
    _count: int = 0

    def normalize_pixels(self, pixels: Var, scale: NDArray[np.float32], bias: NDArray[np.float32]) -> Var:
        """[1, 3, rows, columns] float32 of an image from 0 to 255 to a model's input; scale and bias are [3].

        In float32, which has no part in what follows: it costs nothing, and a level stays what it is.
        """
        scaled = self._emit("mul", x=pixels, y=scale.reshape(1, 3, 1, 1))
        return self.cast(self._emit("add", x=scaled, y=bias.reshape(1, 3, 1, 1)))

    def cast(self, x: Var) -> Var:
        """To what the program computes in."""
        return self._emit("cast", x=x, dtype="fp16") if self.half else x

    def output(self, x: Var, name: str) -> Var:
        """A result as float32, under the name that is declared."""
        if self.half:
            return mb.cast(x=x, dtype="fp32", name=name)
        return mb.identity(x=x, name=name)

    def patch_embedding(self, pixels: Var, weight: PatchEmbedding) -> Var:
        """See `Ops`."""
        patches = self._emit(
            "conv",
            x=pixels,
            weight=self._float(f"{weight.name}.weight"),
            bias=self._float(f"{weight.name}.bias"),
            strides=[weight.patch, weight.patch],
            pad_type="valid",
        )
        flat = self._emit("reshape", x=patches, shape=[1, weight.width, -1])
        return self._emit("transpose", x=flat, perm=[0, 2, 1])

    def embed(self, ids: Var, table: Table) -> Var:
        """See `Ops`."""
        rows = self._matrix(f"{table.name}.weight")
        return self._emit("gather", x=rows, indices=ids, axis=0, validate_indices=False)

    def add_positions(self, x: Var, positions: Parameter) -> Var:
        """See `Ops`."""
        return self._emit("add", x=x, y=self._float(positions.name))

    def linear(self, x: Var, weight: Linear) -> Var:
        """See `Ops`."""
        matrix = self._matrix(f"{weight.name}.weight")
        bias = self._float(f"{weight.name}.bias") if weight.bias else self._zeros(matrix.shape[0])
        return self._emit("linear", x=x, weight=matrix, bias=bias)

    def project_together(self, x: Var, weights: tuple[Linear, ...]) -> tuple[Var, ...]:
        """See `Ops`. One product each."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Var, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        return self.linear(self._gelu(self.linear(x, up)), down)

    def layer_norm(self, x: Var, weight: LayerNorm) -> Var:
        """See `Ops`."""
        return self._emit(
            "layer_norm",
            x=x,
            axes=[-1],
            gamma=self._float(f"{weight.name}.weight"),
            beta=self._float(f"{weight.name}.bias"),
            epsilon=self._number(weight.eps),
        )

    def residual_add(self, x: Var, branch: Var) -> Var:
        """See `Ops`."""
        return self._emit("add", x=x, y=branch)

    def attention(self, q: Var, k: Var, v: Var, heads: Heads, scale: float) -> Var:
        """See `Ops`. A few queries at a time, so that no full array of scores is ever in memory."""
        if heads.query != heads.kv:
            raise NotImplementedError("attention without a cache has no grouped heads")
        q = self._split(self._emit("mul", x=q, y=self._number(scale)), heads)
        k, v = self._split(k, heads), self._split(v, heads)
        queries, keys = q.shape[2], k.shape[2]
        step = math.ceil(queries / math.ceil(heads.query * queries * keys / _MAX_SCORES))
        parts = []
        for start in range(0, queries, step):
            size = min(step, queries - start)
            some = q
            if size < queries:
                begin, sizes = [0, 0, start, 0], [1, heads.query, size, heads.width]
                some = self._emit("slice_by_size", x=q, begin=begin, size=sizes)
            scores = self._emit("matmul", x=some, y=k, transpose_y=True)
            parts.append(self._emit("matmul", x=self._emit("softmax", x=scores, axis=-1), y=v))
        whole = parts[0] if len(parts) == 1 else self._emit("concat", values=parts, axis=2)
        return self._join(whole)

    def expand(self, parameter: Parameter, like: Var) -> Var:
        """See `Ops`. There is one item."""
        return self._float(parameter.name)

    def token(self, x: Var, index: int) -> Var:
        """See `Ops`. The last token of a chunk is the last that is not padding."""
        if x.shape[1] == 1:
            return x
        if index == -1 and self.step is not None:
            return self._emit("gather", x=x, indices=self.step.last, axis=1, validate_indices=False)
        begin = [0, index % x.shape[1], 0]
        return self._emit("slice_by_size", x=x, begin=begin, size=[1, 1, x.shape[2]])

    def scaled_embed(self, ids: Var, table: Table, scale: float) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are looked up outside Core ML")

    def place_images(self, embeddings: Var, ids: Var, features: Var, image_id: int) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are put together outside Core ML")

    def rms_norm(self, x: Var, weight: RmsNorm) -> Var:
        """See `Ops`.

        x / sqrt(mean(x^2) + eps) = (x / m) / sqrt(mean((x / m)^2) + (sqrt(eps) / m)^2) for every m. With m
        the largest magnitude, or sqrt(eps) where that is larger, nothing that is squared exceeds 1, and the
        sum of squares is at least 1 / width or the root is of eps itself.
        """
        root = self._number(math.sqrt(weight.eps))
        peak = self._emit("reduce_max", x=self._emit("abs", x=x), axes=[-1], keep_dims=True)
        peak = self._emit("maximum", x=peak, y=root)
        small = self._emit("real_div", x=x, y=peak)
        mean = self._emit("reduce_mean", x=self._emit("square", x=small), axes=[-1], keep_dims=True)
        eps = self._emit("square", x=self._emit("real_div", x=root, y=peak))
        inverse = self._emit("rsqrt", x=self._emit("add", x=mean, y=eps), epsilon=self._number(0))
        unit = self._emit("mul", x=small, y=inverse)
        return self._emit("mul", x=unit, y=self._gain(weight))

    def residual_norm(self, x: Var, branch: Var, weight: RmsNorm) -> tuple[Var, Var]:
        """See `Ops`."""
        total = self._emit("add", x=x, y=branch)
        return total, self.rms_norm(total, weight)

    def average_pool(self, x: Var, side: int, window: int) -> Var:
        """See `Ops`."""
        width = x.shape[2]
        grid = self._emit("transpose", x=x, perm=[0, 2, 1])
        grid = self._emit("reshape", x=grid, shape=[1, width, side, side])
        sizes = {"kernel_sizes": [window, window], "strides": [window, window]}
        pooled = self._emit("avg_pool", x=grid, pad_type="valid", **sizes)
        flat = self._emit("reshape", x=pooled, shape=[1, width, (side // window) ** 2])
        return self._emit("transpose", x=flat, perm=[0, 2, 1])

    def join_batch(self, x: Var) -> Var:
        """See `Ops`."""
        return self._emit("reshape", x=x, shape=list(x.shape[1:]))

    def gated_mlp(self, x: Var, gate: Linear, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        opened = self._gelu(self.linear(x, gate))
        return self.linear(self._emit("mul", x=opened, y=self.linear(x, up)), down)

    def project_heads(
        self, x: Var, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[Var, Var, Var]:
        """See `Ops`. The results stay apart in heads, [1, heads, S, D]: `cached_attention` takes them so."""
        q = self._pieces(self.linear(x, weights.query), heads.query, heads.width)
        k = self._pieces(self.linear(x, weights.key), heads.kv, heads.width)
        v = self._pieces(self.linear(x, weights.value), heads.kv, heads.width)
        q, k = self.rms_norm(q, weights.query_norm), self.rms_norm(k, weights.key_norm)
        q, k, v = (self._emit("transpose", x=part, perm=[0, 2, 1, 3]) for part in (q, k, v))
        return self._rotate(q, rotary), self._rotate(k, rotary), v

    def mask(
        self, positions: None, blocks: None, attention_mask: None, start: None, window: int | None
    ) -> Var:
        """See `Ops`. It is an input: the host knows which row of a cache holds which position."""
        return self._given().masks[window is not None]

    def cached_attention(
        self,
        q: Var,
        k: Var,
        v: Var,
        past_key: CacheSlot,
        past_value: CacheSlot,
        mask: Var,
        heads: Heads,
        scale: float,
    ) -> tuple[Var, CacheSlot, CacheSlot]:
        """See `Ops`. New keys and values take their rows in the state, and all rows are looked at.

        The fused kernel knows no groups: the queries that share a key head are stacked as more queries.
        """
        keys, values = self._update(past_key, k, v)
        tokens, group = q.shape[2], heads.query // heads.kv
        # The kernel's own factor is width ** -0.5.
        if not math.isclose(factor := scale * math.sqrt(heads.width), 1, rel_tol=1e-6):
            q = self._emit("mul", x=q, y=self._number(factor))
        q = self._emit("reshape", x=q, shape=[1, heads.kv, group * tokens, heads.width])
        if group > 1:
            if id(mask) not in self._tiled:
                self._tiled[id(mask)] = self._emit("concat", values=[mask] * group, axis=2)
            mask = self._tiled[id(mask)]
        y = self._emit("scaled_dot_product_attention", query=q, key=keys, value=values, attn_mask=mask)
        y = self._emit("reshape", x=y, shape=[1, heads.query, tokens, heads.width])
        return self._join(y), past_key, past_value

    def logits(self, x: Var, table: Table) -> Var:
        """See `Ops`."""
        return self._emit(
            "linear", x=x, weight=self._matrix(f"{table.name}.weight"), bias=self._zeros(table.rows)
        )

    def _update(self, slot: CacheSlot, k: Var, v: Var) -> tuple[Var, Var]:
        """Write a layer's new rows into its state; all keys and values of the layer, [1, kv, rows, D]."""
        cache, first = slot.cache, 2 * slot.layer
        if cache.current is None or cache.begin is None:
            cache.current = self._emit("read_state", input=cache.state)
            zero = np.zeros(1, np.int32)
            cache.begin = self._emit("concat", values=[zero, zero, cache.slot, zero], axis=0)
        both = self._emit("concat", values=[k, v], axis=0)
        if not self.half:
            both = self._emit("cast", x=both, dtype="fp16")  # a state holds nothing else
        begin = self._emit("add", x=cache.begin, y=np.array([first, 0, 0, 0], np.int32))
        end = self._emit("add", x=begin, y=np.array(both.shape, np.int32))
        updated = self._emit("slice_update", x=cache.current, update=both, begin=begin, end=end)
        cache.current = self._emit("coreml_update_state", state=cache.state, value=updated)
        shape = cache.current.shape
        layer = [
            self._emit("slice_by_size", x=cache.current, begin=[first + part, 0, 0, 0], size=[1, *shape[1:]])
            for part in (0, 1)
        ]
        if not self.half:
            layer = [self._emit("cast", x=part, dtype="fp32") for part in layer]
        return layer[0], layer[1]

    def _rotate(self, x: Var, rotary: Rotary) -> Var:
        cosine, sine = self._given().rotary[rotary]
        first, second = self._emit("split", x=x, num_splits=2, axis=-1)
        turned = [
            self._emit("sub", x=self._emit("mul", x=first, y=cosine), y=self._emit("mul", x=second, y=sine)),
            self._emit("add", x=self._emit("mul", x=second, y=cosine), y=self._emit("mul", x=first, y=sine)),
        ]
        return self._emit("concat", values=turned, axis=-1)

    def _given(self) -> StepInputs:
        if self.step is None:
            raise NotImplementedError("only a decoder's functions have caches")
        return self.step

    def _gelu(self, x: Var) -> Var:
        return self._emit("gelu", x=x, mode="TANH_APPROXIMATION")

    def _split(self, x: Var, heads: Heads) -> Var:
        """[1, S, heads * D] to [1, heads, S, D]."""
        return self._emit("transpose", x=self._pieces(x, heads.query, heads.width), perm=[0, 2, 1, 3])

    def _pieces(self, x: Var, count: int, width: int) -> Var:
        return self._emit("reshape", x=x, shape=[1, x.shape[1], count, width])

    def _join(self, x: Var) -> Var:
        """[1, heads, S, D] to [1, S, heads * D]."""
        x = self._emit("transpose", x=x, perm=[0, 2, 1, 3])
        return self._emit("reshape", x=x, shape=[1, x.shape[1], x.shape[2] * x.shape[3]])

    def _matrix(self, name: str) -> Var:
        """A matrix or table: as it is, or as integers and scales that the engine puts together."""
        row = self.weights.plan.by_name[name]
        if row.storage.is_float:
            return self._float(name)
        if name not in self._constants:
            kind = f"{'uint' if row.storage.palette else 'int'}{row.storage.bits}"
            values, scales = self.weights.stored_values(name), self._cast(self.weights.scales(name))
            self.note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))
            stored = self._constant(f"{name}.values", kind, values, row.stored_shape, key=name)
            if row.storage.palette:  # one for some outputs and all inputs, of single values
                scales = scales[:, None, :, None]
            beside = self._constant(f"{name}{SCALES}", self._kind, scales, scales.shape)
            self._constants[name] = (
                mb.constexpr_lut_to_dense(indices=stored, lut=beside, name=identifier(name))
                if row.storage.palette
                else mb.constexpr_blockwise_shift_scale(data=stored, scale=beside, name=identifier(name))
            )
        return self._constants[name]

    def _gain(self, weight: RmsNorm) -> Var:
        name = f"{weight.name}.weight"
        return self._stored(name, gain_array(self.weights.float(name), weight, half=self.half))

    def _float(self, name: str) -> Var:
        return self._stored(name, self._cast(self.weights.float(name)))

    def _stored(self, name: str, array: NDArray[Any]) -> Var:
        if name not in self._constants:
            storage = FLOAT16 if self.half else FLOAT32
            self.note(PackedWeight(name=name, storage=storage, shape=array.shape))
            self._constants[name] = self._constant(name, self._kind, array, array.shape)
        return self._constants[name]

    def _zeros(self, size: int) -> Var:
        """The bias of linears without one, which the operator needs all the same."""
        name = f"zeros.{size}"
        if name not in self._constants:
            array = self._cast(np.zeros(size, np.float32))
            self._constants[name] = self._constant(name, self._kind, array, array.shape)
        return self._constants[name]

    def _constant(
        self, name: str, kind: str, array: NDArray[Any], shape: tuple[int, ...], *, key: str | None = None
    ) -> Var:
        key = key or name
        self.file.add(key, kind, array)
        # Packed integers are bytes with a note in their dtype, which a view keeps and a conversion drops.
        dtype = PACKED_DTYPES.get(kind) or np.dtype(kind)
        stand_in = np.broadcast_to(np.zeros((), f"{dtype.kind}{dtype.itemsize}"), shape)
        value = mb.const(val=stand_in.view(dtype), name=identifier(name))
        value.op.weight_id = key
        return value

    @property
    def _kind(self) -> str:
        return "float16" if self.half else "float32"

    def _cast(self, array: NDArray[np.float32]) -> NDArray[Any]:
        return array.astype(np.float16 if self.half else np.float32)

    def _number(self, value: float) -> Any:
        return np.float16(value) if self.half else np.float32(value)

    def _emit(self, operator: str, **arguments: Any) -> Any:
        self._count += 1
        return getattr(mb, operator)(name=f"{operator}_{self._count}", **arguments)
