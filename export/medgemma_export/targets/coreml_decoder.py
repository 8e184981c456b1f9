"""The decoder as two functions of one package: `prefill` reads a chunk of tokens, `decode` one.

Both have fixed sizes, as the GPU and the Neural Engine like them, and share weights and caches. What a host
knows anyway is an input: rotary tables, masks, and the rows of the caches that new tokens take. The masks say
which row holds a position that a token sees, so rows may be taken in any order:

- the cache of layers without a window has a row for every position of the context;
- that of layers with a window is a ring. A chunk never wraps: where it does not fit behind the last row
  taken, it starts at row 0 again. With `window + 2 * chunk` rows, what a chunk overwrites, padding included,
  lies outside the window by then.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from medgemma_export.models.spec import Component
from medgemma_export.ops import HeadProjection, Heads, Rotary
from medgemma_export.plan_ops import PlanOps
from medgemma_export.targets.coreml_features import Feature
from medgemma_runtime.manifest import PromptSpec, TensorSpec

__all__ = ["StaticDecoder", "describe_decoder", "prefix", "HIDDEN"]

HIDDEN = -30000.0
"""What a mask adds to the score of a key that is not seen: finite, so that no row becomes NaN."""

_TEXT_CHUNK = 128  # of a model that sees no images; one that does reads an image at once
_ROW_MULTIPLE = 32  # reports of states of other sizes that fail to load: apple/coremltools issue 2631


@dataclass(frozen=True, kw_only=True)
class StaticDecoder:
    """The sizes of a decoder's functions.

    Attributes:
        chunk: Tokens that `prefill` reads.
        context: Positions of a conversation.
        window: Positions that a layer with a window sees, or None.
        layers: For each layer whether it has a window.
        kv: Key heads.
        head_width: D.
        width: H.
        local_rotary: Of layers with a window.
        global_rotary: Of the others.
        is_host_held: Whether a host holds the caches, and not the functions. It writes a position to a row
            of its own choice after the call, so a ring is as long as the window.
    """

    chunk: int
    context: int
    window: int | None
    layers: tuple[bool, ...]
    kv: int
    head_width: int
    width: int
    local_rotary: Rotary | None
    global_rotary: Rotary | None
    is_host_held: bool = False

    def rows(self, *, is_local: bool) -> int:
        """Positions that a cache has room for."""
        beyond = 0 if self.is_host_held else self.chunk
        rows = self.context + beyond
        if is_local and self.window is not None:
            rows = min(rows, max(self.window, self.chunk) + 2 * beyond)
        return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Which kinds of layer there are: with a window, without."""
        return tuple(kind for kind in (True, False) if kind in self.layers)

    def state_shape(self, *, is_local: bool) -> tuple[int, ...]:
        """Of the keys and values of all layers of a kind."""
        return 2 * self.layers.count(is_local), self.kv, self.rows(is_local=is_local), self.head_width

    @property
    def state_bytes(self) -> int:
        """Memory that one conversation takes."""
        return sum(2 * int(np.prod(self.state_shape(is_local=kind))) for kind in self.kinds)

    def facts(self) -> dict[str, Any]:
        """What a host needs to make the inputs."""
        facts: dict[str, Any] = {
            "chunk": self.chunk,
            "context": self.context,
            "window": self.window,
            "hidden": HIDDEN,
        }
        for kind in self.kinds:
            rotary = self.rotary(is_local=kind)
            facts[prefix(is_local=kind)] = {
                "rows": self.rows(is_local=kind),
                "rope_theta": rotary.theta,
                "rope_factor": rotary.factor,
                "rope_width": rotary.width,
            }
        return facts

    def rotary(self, *, is_local: bool) -> Rotary:
        """The rotary embedding of a kind of layer that there is."""
        rotary = self.local_rotary if is_local else self.global_rotary
        if rotary is None:
            raise ValueError("the decoder has no such layers")
        return rotary

    def inputs(self, tokens: int, kind: Literal["float16", "float32"], *, has_last: bool) -> list[Feature]:
        """What a function over so many tokens takes."""
        features = [
            Feature(
                name="inputs_embeds",
                kind=kind,
                shape=(1, tokens, self.width),
                description="scaled token embeddings, image features in their places, then padding",
            )
        ]
        for is_local in self.kinds:
            stem = prefix(is_local=is_local)
            seen = "with a window" if is_local else "without a window"
            for part, what in (("cos", "cosines"), ("sin", "sines")):
                features.append(
                    Feature(
                        name=f"{stem}_{part}",
                        kind=kind,
                        shape=(1, 1, tokens, self.head_width // 2),
                        description=f"{what} of position / factor * theta ** (-2 i / width), layers {seen}",
                    )
                )
            features += [
                Feature(
                    name=f"{stem}_mask",
                    kind=kind,
                    shape=(1, 1, tokens, self.rows(is_local=is_local)),
                    description=f"0 where a token sees what a cache row of layers {seen} holds, "
                    f"else {HIDDEN:g}",
                ),
                Feature(
                    name=f"{stem}_slot",
                    kind="int32",
                    shape=(1,),
                    description=f"first of the cache rows of layers {seen} that the tokens take",
                ),
            ]
        if has_last:
            features.append(
                Feature(
                    name="last",
                    kind="int32",
                    shape=(1,),
                    description="index of the last token that is not padding",
                )
            )
        return features

    def specs(self, kind: Literal["float16", "float32"]) -> tuple[TensorSpec, ...]:
        """The same for a manifest, where the number of tokens is free and chooses the function."""
        specs = []
        for feature in self.inputs(self.chunk, kind, has_last=True):
            shape: tuple[int | str, ...] = feature.shape
            if feature.kind != "int32":
                axis = 1 if feature.name == "inputs_embeds" else 2
                shape = (*shape[:axis], "sequence", *shape[axis + 1 :])
            specs.append(
                TensorSpec(
                    name=feature.name,
                    dtype=feature.kind,  # type: ignore[arg-type]
                    shape=shape,
                    description=feature.description,
                    default=0 if feature.name == "last" else None,
                )
            )
        return tuple(specs)

    def states(self) -> list[Feature]:
        """What stays between calls."""
        return [
            Feature(
                name=f"{prefix(is_local=kind)}_cache",
                kind="float16",
                shape=self.state_shape(is_local=kind),
                description=f"keys and values of layers {'with' if kind else 'without'} a window, by turns",
            )
            for kind in self.kinds
        ]


@dataclass
class _Survey(PlanOps):
    """Notes the rotary embedding of each layer."""

    rotaries: list[Rotary] = field(default_factory=list)

    def project_heads(
        self, x: None, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[None, None, None]:
        self.rotaries.append(rotary)
        return super().project_heads(x, weights, positions, rotary, heads)


def describe_decoder(
    component: Component, prompt: PromptSpec, *, is_host_held: bool = False
) -> StaticDecoder:
    """The fixed sizes that a decoder gets."""
    survey = _Survey()
    component.forward(survey, dict.fromkeys((spec.name for spec in component.inputs), None))
    keys = [spec for spec in component.inputs if spec.name.endswith(".key")]
    layers = tuple(spec.shape[2] == "past_local" for spec in keys)
    rotaries = dict(zip(layers, survey.rotaries, strict=True))
    [embeddings] = [spec for spec in component.inputs if spec.name == "inputs_embeds"]
    return StaticDecoder(
        chunk=prompt.tokens_per_image or _TEXT_CHUNK,
        context=prompt.context,
        window=prompt.window,
        layers=layers,
        kv=int(keys[0].shape[1]),
        head_width=int(keys[0].shape[3]),
        width=int(embeddings.shape[2]),
        local_rotary=rotaries.get(True),
        global_rotary=rotaries.get(False),
        is_host_held=is_host_held,
    )


def prefix(*, is_local: bool) -> str:
    """What the names of inputs and states of a kind of layer begin with."""
    return "local" if is_local else "global"
