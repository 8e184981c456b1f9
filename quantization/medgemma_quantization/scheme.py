"""What the user wishes: bits and granularity for each kind of weight."""

import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from medgemma_runtime.errors import EdgeError

__all__ = [
    "Scheme",
    "SchemeName",
    "Storage",
    "Activations",
    "RangeMethod",
    "SCHEMES",
    "load_scheme",
    "FLOAT32",
    "FLOAT16",
    "INT8",
    "INT8_BLOCKS",
    "INT4",
    "LUT6",
    "LUT4",
]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How one weight is stored.

    Attributes:
        bits: 32 or 16 for float, 8 or 4 for integers, 6 or 4 for a palette.
        block: Inputs that share one scale; 0 is one scale for each output channel (the whole row).
        palette: Output channels that share a palette of `2 ** bits` values; 0 for no palette but scales.
    """

    bits: Literal[32, 16, 8, 6, 4]
    block: int = 0
    palette: int = 0

    def __post_init__(self) -> None:
        if self.palette:
            if self.bits not in (6, 4) or self.block or self.palette < 1:
                raise ValueError(
                    "a palette has 6 or 4 bits, is of at least 1 output and has no block; these are "
                    f"{self.bits} bits, {self.palette} outputs and block {self.block}"
                )
            return
        if self.bits not in (32, 16, 8, 4):
            raise ValueError(f"bits must be 32, 16, 8 or 4, or 6 or 4 of a palette, and are {self.bits}")
        if self.block and (self.is_float or self.block < 16 or self.block & (self.block - 1)):
            raise ValueError(f"block must be 0 or a power of two of at least 16 and is {self.block}")

    @property
    def is_float(self) -> bool:
        """Whether values are stored as they are, rounded at most, and have no scales."""
        return self.bits in (32, 16)

    def __str__(self) -> str:
        if self.is_float:
            return f"float{self.bits}"
        if self.palette:
            return f"lut{self.bits} group {self.palette}"
        return f"int{self.bits} " + (f"block {self.block}" if self.block else "per channel")


FLOAT32 = Storage(bits=32)
FLOAT16 = Storage(bits=16)
INT8 = Storage(bits=8)
INT8_BLOCKS = Storage(bits=8, block=32)
INT4 = Storage(bits=4, block=32)

# With 2,560 inputs the palettes of groups of 8 cost 0.01 bits a weight at 4 bits, 0.05 at 6.
LUT6 = Storage(bits=6, palette=8)
LUT4 = Storage(bits=4, palette=8)

Activations = Literal["float", "float16", "int8-dynamic", "int8-static"]
RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]
SchemeName = Literal["fp32", "fp16", "int8", "int4", "mobile", "lut6", "lut4"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantization wish, for any model and any target.

    Attributes:
        name: For people and file names.
        linear: Storage of matrices that multiply activations.
        table: Storage of embedding tables.
        activations: `float16` computes throughout in float16, and so rounds every vector to it;
            `int8-dynamic` quantizes the input of every integer matrix at run time; `int8-static` does so by
            ranges that calibration has found, as NPUs want it.
        ranges: How static ranges are chosen; of no effect otherwise.
        residual_scale: Factor of a decoder's residual stream, a power of two of at most 1: float16 engines
            overflow without it.
        decoder: Storage of a decoder's matrices, where other than `linear`.
        overrides: `(regular expression, storage)`; the first that matches the whole weight name wins.
    """

    name: str
    linear: Storage
    table: Storage
    activations: Activations
    ranges: RangeMethod = "minmax"
    residual_scale: float = 1.0
    decoder: Storage | None = None
    overrides: tuple[tuple[str, Storage], ...] = field(default=())

    def __post_init__(self) -> None:
        # The name becomes part of a directory's name.
        if not self.name or self.name.startswith(".") or any(char in self.name for char in "/\\:\0"):
            raise ValueError(f"name {self.name!r} cannot be part of a file name")
        if self.activations not in get_args(Activations):
            raise ValueError(
                f"activations must be one of {get_args(Activations)} and are {self.activations!r}"
            )
        if self.ranges not in get_args(RangeMethod):
            raise ValueError(f"ranges must be one of {get_args(RangeMethod)} and are {self.ranges!r}")
        if not 0 < self.residual_scale <= 1 or math.frexp(self.residual_scale)[0] != 0.5:
            raise ValueError(
                f"residual_scale must be a power of two of at most 1 and is {self.residual_scale}"
            )
        for pattern, _ in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"override {pattern!r} is no regular expression: {error}") from None


# Of 64, not 32: kernels keep 8 to 12 bytes with each block, so blocks decide what a decoder takes in memory,
# and how fast it answers (benchmarks/README.md).
_INT4_WIDE = Storage(bits=4, block=64)

# Tables are stored in blocks whatever their bits: kernels look rows up in blocks, and a table that is also
# the output head then serves both with the same bytes.
SCHEMES: dict[SchemeName, Scheme] = {
    "fp32": Scheme(name="fp32", linear=FLOAT32, table=FLOAT32, activations="float"),
    "fp16": Scheme(name="fp16", linear=FLOAT16, table=FLOAT16, activations="float"),
    "int8": Scheme(name="int8", linear=INT8, table=INT8_BLOCKS, activations="int8-dynamic"),
    "int4": Scheme(name="int4", linear=INT4, table=INT4, activations="int8-dynamic"),
    # A tenth of MedGemma's weights are the image tower's, where four bits would save little.
    "mobile": Scheme(
        name="mobile", linear=INT8, decoder=_INT4_WIDE, table=_INT4_WIDE, activations="int8-dynamic"
    ),
    "lut6": Scheme(name="lut6", linear=LUT6, table=INT8_BLOCKS, activations="float"),
    "lut4": Scheme(name="lut4", linear=LUT4, table=INT8_BLOCKS, activations="float"),
}


def load_scheme(path: Path) -> Scheme:
    """Read a scheme from a TOML file.

    The keys are those of `Scheme`; a storage is `{ bits = 4, block = 32 }`, or `{ bits = 6, palette = 8 }`.
    Overrides are `[[override]]` tables with `match` and such a storage's keys.

    Raises:
        EdgeError: If the file is absent, no TOML, or not to this form.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        overrides = tuple((row.pop("match"), Storage(**row)) for row in data.pop("override", []))
        for key in {"linear", "table", *(data.keys() & {"decoder"})}:
            data[key] = Storage(**data[key])
        return Scheme(**data, overrides=overrides)
    except OSError as error:
        raise EdgeError(f"scheme {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeError(f"scheme {path} is no TOML file: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise EdgeError(
            f"scheme {path} is not to the form: {error}; it needs name, linear, table, activations "
            "and may have [[override]] tables with match, bits, and block or palette"
        ) from None
