"""Finds the folds of a model, by running it without any numbers.

What passes between operations says what made it, as long as factors can be taken back there. Whatever reads
it otherwise than by a matrix (a sum, a norm, scores of an attention, an output of the component) rules the
fold out. So q and k never fold: their norms and rotations stand in between.
"""

from dataclasses import dataclass, field

from medgemma_export.models import ModelSpec
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
from medgemma_quantization.folds import Fold, SourceKind
from medgemma_quantization.plan import QuantPlan

__all__ = ["FoldOps", "Origin", "find_folds", "planned_folds"]


@dataclass(eq=False)
class Origin:
    """What made an activation, and what has read it so far."""

    source: str
    kind: SourceKind
    factors: int
    head_width: int = 0
    group: int = 1
    readers: list[str] = field(default_factory=list)
    is_read_otherwise: bool = False


@dataclass
class FoldOps:
    """An `Ops[Origin | None]`."""

    origins: list[Origin] = field(default_factory=list)

    def patch_embedding(self, pixels: Origin | None, weight: PatchEmbedding) -> None:
        """See `Ops`."""

    def embed(self, ids: Origin | None, table: Table) -> None:
        """See `Ops`."""

    def add_positions(self, x: Origin | None, positions: Parameter) -> None:
        """See `Ops`."""
        self.read_otherwise(x)

    def linear(self, x: Origin | None, weight: Linear) -> Origin | None:
        """See `Ops`."""
        return self.project_together(x, (weight,))[0]

    def project_together(self, x: Origin | None, weights: tuple[Linear, ...]) -> tuple[Origin | None, ...]:
        """See `Ops`."""
        self._read(x, *weights)
        return tuple(self._made(weight.name, "rows", weight.outputs) for weight in weights)

    def mlp(self, x: Origin | None, up: Linear, down: Linear, activation: Activation) -> Origin | None:
        """See `Ops`. The activation lets no factor through."""
        self._read(x, up)
        return self.linear(None, down)

    def layer_norm(self, x: Origin | None, weight: LayerNorm) -> Origin:
        """See `Ops`."""
        self.read_otherwise(x)
        return self._made(weight.name, "gain", weight.width)

    def residual_add(self, x: Origin | None, branch: Origin | None) -> None:
        """See `Ops`."""
        self.read_otherwise(x, branch)

    def named(self, x: Origin | None, name: str) -> Origin | None:
        """See `Ops`."""
        return x

    def attention(
        self, q: Origin | None, k: Origin | None, v: Origin | None, heads: Heads, scale: float
    ) -> Origin | None:
        """See `Ops`. Means of values have the values' factors."""
        self.read_otherwise(q, k)
        if v is not None:
            v.head_width, v.group = heads.width, heads.query // heads.kv
        return v

    def expand(self, parameter: Parameter, like: Origin | None) -> None:
        """See `Ops`. Of `like` only the size is read."""

    def token(self, x: Origin | None, index: int) -> Origin | None:
        """See `Ops`."""
        return x

    def scaled_embed(self, ids: Origin | None, table: Table, scale: float) -> None:
        """See `Ops`."""

    def place_images(
        self, embeddings: Origin | None, ids: Origin | None, features: Origin | None, image_id: int
    ) -> None:
        """See `Ops`."""
        self.read_otherwise(embeddings, features)

    def rms_norm(self, x: Origin | None, weight: RmsNorm) -> Origin:
        """See `Ops`."""
        self.read_otherwise(x)
        return self._made(weight.name, "gain less one", weight.width)

    def residual_norm(self, x: Origin | None, branch: Origin | None, weight: RmsNorm) -> tuple[None, Origin]:
        """See `Ops`."""
        self.read_otherwise(x, branch)
        return None, self.rms_norm(None, weight)

    def average_pool(self, x: Origin | None, side: int, window: int) -> Origin | None:
        """See `Ops`."""
        return x

    def join_batch(self, x: Origin | None) -> Origin | None:
        """See `Ops`."""
        return x

    def gated_mlp(
        self, x: Origin | None, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Origin | None:
        """See `Ops`. What is multiplied by the opened gate comes from `up` as it is."""
        self._read(x, gate, up)
        return self.linear(self._made(up.name, "rows", up.outputs), down)

    def project_heads(
        self,
        x: Origin | None,
        weights: HeadProjection,
        positions: Origin | None,
        rotary: Rotary,
        heads: Heads,
    ) -> tuple[None, None, Origin]:
        """See `Ops`. Only the values are what their matrix gave."""
        self._read(x, weights.query, weights.key, weights.value)
        return None, None, self._made(weights.value.name, "rows", weights.value.outputs)

    def mask(
        self,
        positions: Origin | None,
        blocks: Origin | None,
        attention_mask: Origin | None,
        start: Origin | None,
        window: int | None,
    ) -> None:
        """See `Ops`."""

    def cached_attention(
        self,
        q: Origin | None,
        k: Origin | None,
        v: Origin | None,
        past_key: Origin | None,
        past_value: Origin | None,
        mask: Origin | None,
        heads: Heads,
        scale: float,
    ) -> tuple[Origin | None, None, None]:
        """See `Ops`. Cached values keep their factors: only this attention ever reads them."""
        return self.attention(q, k, v, heads, scale), None, None

    def logits(self, x: Origin | None, table: Table) -> None:
        """See `Ops`. Columns of a table cannot change: its rows are looked up, too."""
        self.read_otherwise(x)

    def read_otherwise(self, *values: Origin | None) -> None:
        """Take note that something other than a matrix reads these."""
        for value in values:
            if value is not None:
                value.is_read_otherwise = True

    def _made(self, source: str, kind: SourceKind, factors: int) -> Origin:
        origin = Origin(source=source, kind=kind, factors=factors)
        self.origins.append(origin)
        return origin

    def _read(self, x: Origin | None, *weights: Linear) -> None:
        if x is not None:
            x.readers += [f"{weight.name}.weight" for weight in weights]


def find_folds(model: ModelSpec) -> tuple[Fold, ...]:
    """The folds of all components, in the order in which a model computes."""
    folds: list[Fold] = []
    for component in model.components:
        ops = FoldOps()
        outputs = component.forward(ops, dict.fromkeys((spec.name for spec in component.inputs), None))
        ops.read_otherwise(*outputs.values())
        folds += [
            Fold(
                source=origin.source,
                kind=origin.kind,
                readers=tuple(origin.readers),
                factors=origin.factors,
                head_width=origin.head_width,
                group=origin.group,
            )
            for origin in ops.origins
            if origin.readers and not origin.is_read_otherwise
        ]
    return tuple(folds)


def planned_folds(model: ModelSpec, plan: QuantPlan) -> tuple[Fold, ...]:
    """The folds with a reader that the plan stores as integers: the others gain nothing."""
    return tuple(
        fold
        for fold in find_folds(model)
        if any(name in plan.by_name and not plan.by_name[name].storage.is_float for name in fold.readers)
    )
