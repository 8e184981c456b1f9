"""What a Core ML package says about the inputs, outputs and states of its functions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Feature", "FunctionFeatures", "FeatureKind"]

FeatureKind = Literal["float16", "float32", "int32", "image"]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What a package says about one input, output or state.

    Attributes:
        name: As the function has it.
        kind: `float16`, `float32`, `int32`, or `image` for an RGB image of the last two dimensions.
        shape: Its dimensions.
        description: For people; Xcode shows it.
    """

    name: str
    kind: FeatureKind
    shape: tuple[int, ...]
    description: str


@dataclass(frozen=True, kw_only=True)
class FunctionFeatures:
    """What goes into a function of a package, comes out of it, and stays in it."""

    inputs: Sequence[Feature]
    outputs: Sequence[Feature]
    states: Sequence[Feature] = field(default=())
