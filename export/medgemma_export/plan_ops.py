"""Notes which weights a model asks for, with shape and role, by running it without any numbers."""

from dataclasses import dataclass, field

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
from medgemma_quantization.plan import Role, WeightSpec

__all__ = ["PlanOps"]


@dataclass
class PlanOps:
    """An `Ops[None]` whose only result is `weights`, in the order in which a model asks for them."""

    weights: list[WeightSpec] = field(default_factory=list)

    def patch_embedding(self, pixels: None, weight: PatchEmbedding) -> None:
        """See `Ops`."""
        shape = (weight.width, 3, weight.patch, weight.patch)
        self._note(f"{weight.name}.weight", shape, "patch")
        self._note(f"{weight.name}.bias", (weight.width,), "bias")

    def embed(self, ids: None, table: Table) -> None:
        """See `Ops`."""
        self._note_table(table)

    def add_positions(self, x: None, positions: Parameter) -> None:
        """See `Ops`."""
        self._note(positions.name, positions.shape, "position")

    def linear(self, x: None, weight: Linear) -> None:
        """See `Ops`."""
        self._note_linear(weight)

    def project_together(self, x: None, weights: tuple[Linear, ...]) -> tuple[None, ...]:
        """See `Ops`."""
        for weight in weights:
            self._note_linear(weight)
        return (None,) * len(weights)

    def mlp(self, x: None, up: Linear, down: Linear, activation: Activation) -> None:
        """See `Ops`. The hidden axis is axis 0 of `up` and axis 1 of `down`."""
        self._note_linear(up, padded_axes=(0,))
        self._note_linear(down, padded_axes=(1,))

    def layer_norm(self, x: None, weight: LayerNorm) -> None:
        """See `Ops`."""
        self._note(f"{weight.name}.weight", (weight.width,), "norm")
        self._note(f"{weight.name}.bias", (weight.width,), "norm")

    def residual_add(self, x: None, branch: None) -> None:
        """See `Ops`."""

    def named(self, x: None, name: str) -> None:
        """See `Ops`."""

    def attention(self, q: None, k: None, v: None, heads: Heads, scale: float) -> None:
        """See `Ops`."""

    def expand(self, parameter: Parameter, like: None) -> None:
        """See `Ops`."""
        self._note(parameter.name, parameter.shape, "probe")

    def token(self, x: None, index: int) -> None:
        """See `Ops`."""

    def scaled_embed(self, ids: None, table: Table, scale: float) -> None:
        """See `Ops`."""
        self._note_table(table)

    def place_images(self, embeddings: None, ids: None, features: None, image_id: int) -> None:
        """See `Ops`."""

    def rms_norm(self, x: None, weight: RmsNorm) -> None:
        """See `Ops`."""
        self._note(f"{weight.name}.weight", (weight.width,), "norm")

    def residual_norm(self, x: None, branch: None, weight: RmsNorm) -> tuple[None, None]:
        """See `Ops`."""
        self.rms_norm(x, weight)
        return None, None

    def average_pool(self, x: None, side: int, window: int) -> None:
        """See `Ops`."""

    def join_batch(self, x: None) -> None:
        """See `Ops`."""

    def gated_mlp(self, x: None, gate: Linear, up: Linear, down: Linear, activation: Activation) -> None:
        """See `Ops`. The hidden axis is axis 0 of `gate` and `up` and axis 1 of `down`."""
        self._note_linear(gate, padded_axes=(0,))
        self._note_linear(up, padded_axes=(0,))
        self._note_linear(down, padded_axes=(1,))

    def project_heads(
        self, x: None, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[None, None, None]:
        """See `Ops`."""
        for linear in (weights.query, weights.key, weights.value):
            self._note_linear(linear)
        self.rms_norm(None, weights.query_norm)
        self.rms_norm(None, weights.key_norm)
        return None, None, None

    def mask(
        self, positions: None, blocks: None, attention_mask: None, start: None, window: int | None
    ) -> None:
        """See `Ops`."""

    def cached_attention(
        self,
        q: None,
        k: None,
        v: None,
        past_key: None,
        past_value: None,
        mask: None,
        heads: Heads,
        scale: float,
    ) -> tuple[None, None, None]:
        """See `Ops`."""
        return None, None, None

    def logits(self, x: None, table: Table) -> None:
        """See `Ops`."""
        self._note_table(table)

    def _note_table(self, table: Table) -> None:
        for piece in table.pieces:
            self._note(piece.weight, (piece.stop - piece.start, table.width), "table")

    def _note_linear(self, weight: Linear, padded_axes: tuple[int, ...] = ()) -> None:
        shape = (weight.outputs, weight.inputs)
        self._note(f"{weight.name}.weight", shape, "linear", padded_axes)
        if weight.bias:
            # A bias has the outputs only, so it grows where its matrix grows along axis 0.
            bias_axes = tuple(axis for axis in padded_axes if axis == 0)
            self._note(f"{weight.name}.bias", (weight.outputs,), "bias", bias_axes)

    def _note(self, name: str, shape: tuple[int, ...], role: Role, padded_axes: tuple[int, ...] = ()) -> None:
        self.weights.append(WeightSpec(name=name, shape=shape, role=role, padded_axes=padded_axes))
