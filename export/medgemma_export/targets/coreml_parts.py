"""The decoder for the Neural Engine: layers in a chain of programs, and the output head in one of its own.

A program has the functions `prefill`, over a chunk of tokens, and `decode`, over one; both take the residual
stream, rotary tables, masks and the caches of their layers, and give the stream and the new keys and values,
which the host writes to its caches. The head takes the stream of one token and gives logits in pieces.
"""

from dataclasses import dataclass
from typing import Literal

from medgemma_export.models.spec import Component
from medgemma_export.targets.coreml_decoder import HIDDEN, StaticDecoder, prefix
from medgemma_export.targets.coreml_features import Feature
from medgemma_quantization.plan import QuantPlan
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import TensorSpec

__all__ = ["DecoderPart", "MAX_PROGRAM_BYTES", "cut_decoder", "stored_bytes"]

MAX_PROGRAM_BYTES = 950_000_000
"""Of a program for the Neural Engine. Above 1 GB and somewhat more, reports say, a program leaves it without
a word; what keeps below 950 MB was seen to stay (Anemll 0.3.5; john-rocky/CoreML-LLM)."""

_KINDS = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class DecoderPart:
    """A program of the chain.

    Attributes:
        component: What it computes.
        layers: Those that are in it; none are in the head.
        decoder: The sizes of all of it.
    """

    component: Component
    layers: range
    decoder: StaticDecoder

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Which kinds of layer it has: with a window, without."""
        return tuple(
            kind
            for kind in self.decoder.kinds
            if any(self.decoder.layers[layer] is kind for layer in self.layers)
        )

    def inputs(self, tokens: int) -> list[Feature]:
        """What a function over so many tokens takes."""
        features = [self._hidden("hidden", tokens)]
        for is_local in self.kinds:
            stem, seen = prefix(is_local=is_local), "with a window" if is_local else "without a window"
            features += [
                _feature(
                    f"{stem}_{part}",
                    (1, 1, self.decoder.head_width // 2, tokens),
                    f"{what} of position / factor * theta ** (-2 i / width), layers {seen}",
                )
                for part, what in (("cos", "cosines"), ("sin", "sines"))
            ]
            features.append(
                _feature(
                    f"{stem}_mask",
                    (1, self.decoder.rows(is_local=is_local) + tokens, 1, tokens),
                    f"0 where a token sees what a cache row of layers {seen} holds, or, behind the rows, "
                    f"a new token; else {HIDDEN:g}",
                )
            )
        for layer in self.layers:
            rows = self.decoder.rows(is_local=self.decoder.layers[layer])
            features += [
                _feature(
                    f"{kind}_cache_{layer}",
                    (1, self._cache_width, 1, rows),
                    f"{kind}s of layer {layer}, a column for each position held",
                )
                for kind in _KINDS
            ]
        return features

    def outputs(self, tokens: int) -> list[Feature]:
        """What it gives."""
        return [
            self._hidden("next_hidden", tokens),
            *(
                _feature(
                    f"{kind}_{layer}",
                    (1, self._cache_width, 1, tokens),
                    f"{kind}s of layer {layer} for the new tokens, to be written to its cache",
                )
                for layer in self.layers
                for kind in _KINDS
            ),
        ]

    def specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs for a manifest, where the number of tokens is free and chooses the function."""
        chunk = self.decoder.chunk
        inputs, outputs = (
            tuple(_spec(feature, chunk) for feature in features)
            for features in (self.inputs(chunk), self.outputs(chunk))
        )
        return inputs, outputs

    @property
    def _cache_width(self) -> int:
        return self.decoder.kv * self.decoder.head_width

    def _hidden(self, name: Literal["hidden", "next_hidden"], tokens: int) -> Feature:
        what = "before" if name == "hidden" else "after"
        start = " (before layer 0: scaled token embeddings, image features in their places, then padding)"
        return _feature(
            name,
            (1, self.decoder.width, 1, tokens),
            f"the residual stream {what} these layers{start if name == 'hidden' else ''}",
        )


def cut_decoder(component: Component, decoder: StaticDecoder, plan: QuantPlan) -> list[DecoderPart]:
    """The decoder as a chain: as many layers to a program as `MAX_PROGRAM_BYTES` allow, and then the head.

    Raises:
        EdgeError: If one layer or the head is too large.
    """
    if component.cut is None:
        raise ValueError(f"component {component.name} has no layers to cut between")
    parts: list[range] = []
    start = total = 0
    for layer in range(component.layers):
        size = stored_bytes(component.cut(range(layer, layer + 1)), plan)
        _refuse_large(f"layer {layer} of the decoder", size)
        if total + size > MAX_PROGRAM_BYTES:
            parts.append(range(start, layer))
            start, total = layer, 0
        total += size
    parts += [range(start, component.layers), range(0)]  # the head
    cut = [DecoderPart(component=component.cut(part), layers=part, decoder=decoder) for part in parts]
    _refuse_large("the decoder's output head", stored_bytes(cut[-1].component, plan))
    return cut


def stored_bytes(component: Component, plan: QuantPlan) -> int:
    """What the weights of a component take."""
    return sum(plan.by_name[weight.name].stored_bits for weight in component.weights()) // 8


def _refuse_large(what: str, size: int) -> None:
    if size > MAX_PROGRAM_BYTES:
        raise EdgeError(
            f"{what} takes {size / 1e6:.0f} MB, and the Neural Engine keeps programs below "
            f"{MAX_PROGRAM_BYTES / 1e6:.0f} MB; use fewer bits, or --units gpu"
        )


def _feature(name: str, shape: tuple[int, ...], description: str) -> Feature:
    return Feature(name=name, kind="float16", shape=shape, description=description)


def _spec(feature: Feature, chunk: int) -> TensorSpec:
    shape: tuple[int | str, ...] = feature.shape
    if not feature.name.startswith(tuple(f"{kind}_cache_" for kind in _KINDS)):
        shape = (*shape[:3], "sequence")
    if feature.name.endswith("_mask"):
        shape = (1, f"{feature.name.removesuffix('_mask')}_keys", 1, "sequence")
    return TensorSpec(name=feature.name, dtype="float16", shape=shape, description=feature.description)
