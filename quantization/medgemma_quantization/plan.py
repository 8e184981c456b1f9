"""The decision: one row for every weight of a model, with its reason.

A plan is made from names and shapes alone, before any weight is read and for no particular target. It travels
in the artifact, and what a target packed is compared with it row by row.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_quantization.scheme import FLOAT16, FLOAT32, Activations, RangeMethod, Scheme, Storage
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision

__all__ = [
    "QuantPlan",
    "PlanRow",
    "PackedWeight",
    "WeightSpec",
    "Role",
    "make_plan",
    "note_unreached",
    "read_plan",
    "compare_packed",
    "refuse_palettes",
]

Role = Literal["linear", "table", "patch", "norm", "bias", "position", "probe"]

_PRECISIONS: dict[int, Precision] = {32: "fp32", 16: "fp16", 8: "int8", 4: "int4"}
_PALETTE_PRECISIONS: dict[int, Precision] = {6: "lut6", 4: "lut4"}
_SCALE_BITS = 16  # every scale fits float16; what a target widens it to is the target's cost
_PALETTE_INPUTS = 4  # whose indices, 6 bits each, fill whole bytes
_FLOAT_REASONS: dict[str, str] = {
    "patch": "reads pixels directly; under 0.1 % of the weights",
    "norm": "gain or shift of a normalization; a vector",
    "bias": "added once for each output; a vector",
    "position": "added to every activation; the error would be permanent",
    "probe": "a single learned query",
}


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """A weight that a model asks for.

    Attributes:
        name: As the model names it.
        shape: Its true shape.
        role: What it is used for.
        padded_axes: Axes that may grow by zeros without changing the model's output.
        part: Whether a decoder uses it, which reads token by token, or an encoder.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    padded_axes: tuple[int, ...] = ()
    part: Literal["encoder", "decoder"] = "encoder"


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What happens to one weight.

    Attributes:
        name: As the model names it.
        role: What it is used for.
        shape: Its shape in the checkpoint.
        stored_shape: Its shape after zero padding.
        storage: How it is stored.
        reason: Why.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    role: Role
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    storage: Storage
    reason: str

    @property
    def scale_count(self) -> int:
        """How many scales the weight has, or values of its palettes."""
        if self.storage.is_float:
            return 0
        if self.storage.palette:
            return self.stored_shape[0] // self.storage.palette << self.storage.bits
        return math.prod(self.stored_shape) // (self.storage.block or self.stored_shape[-1])

    @property
    def stored_bits(self) -> int:
        """Bits that integers (or floats) and scales occupy, padding included."""
        return math.prod(self.stored_shape) * self.storage.bits + self.scale_count * _SCALE_BITS


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Every weight's row, in the order in which the model asks for them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    scheme: str
    method: str
    activations: Activations
    rows: tuple[PlanRow, ...]
    ranges: RangeMethod | None = None
    residual_scale: float = 1.0

    @cached_property
    def by_name(self) -> dict[str, PlanRow]:
        """Rows by weight name."""
        return {row.name: row for row in self.rows}

    @property
    def weight_count(self) -> int:
        """Numbers in the model, padding excluded."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def precision(self) -> Precision:
        """The short name of how most weights of matrices are stored."""
        counts: Counter[Precision] = Counter()
        for row in self.rows:
            if row.role in ("linear", "table"):
                names = _PALETTE_PRECISIONS if row.storage.palette else _PRECISIONS
                counts[names[row.storage.bits]] += math.prod(row.shape)
        [(precision, _)] = counts.most_common(1)
        return precision

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over all weights, scales and padding included."""
        return sum(row.stored_bits for row in self.rows) / self.weight_count

    def to_json(self) -> str:
        """The plan as it stands in an artifact: one line for each row."""
        head = {
            "scheme": self.scheme,
            "method": self.method,
            "activations": self.activations,
            **({} if self.ranges is None else {"ranges": self.ranges}),
            "residual_scale": self.residual_scale,
        }
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        return json.dumps(head)[:-1] + f', "rows": [\n{rows}\n]}}\n'

    @property
    def sha256(self) -> str:
        """SHA-256 of `to_json`, which is also the hash of the plan's file in an artifact."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """What a target says it wrote for one weight, read from what it wrote rather than from the plan."""

    name: str
    storage: Storage
    shape: tuple[int, ...]


def make_plan(scheme: Scheme, weights: Iterable[WeightSpec], *, method: str = "rtn") -> QuantPlan:
    """Decide the storage of every weight.

    Raises:
        EdgeError: If a block divides a weight's inputs neither as they are nor padded, or a palette's group
            not its outputs, if an override matches no weight, if it asks for integers where only float is
            possible, or if the method finds no palettes.
    """
    unused = {pattern for pattern, _ in scheme.overrides}
    rows: dict[str, PlanRow] = {}
    specs = list(weights)
    for spec in specs:
        if spec.name not in rows:
            rows[spec.name] = _decide(scheme, spec, unused)
    if unused:
        raise EdgeError(
            f"scheme {scheme.name}: no weight matches {sorted(unused)}; "
            f"names look like {specs[0].name!r}, and a pattern must match the whole name"
        )
    palettes = [row for row in rows.values() if row.storage.palette]
    if palettes and method != "rtn":
        raise EdgeError(
            f"{palettes[0].name}: the plan asks for {palettes[0].storage}, and k-means finds palettes; leave "
            f"--method {method} out"
        )
    padded = _pad_to_blocks(specs, rows)
    return QuantPlan(
        scheme=scheme.name,
        method=method,
        activations=scheme.activations,
        ranges=scheme.ranges if scheme.activations == "int8-static" else None,
        residual_scale=scheme.residual_scale,
        rows=tuple(padded.values()),
    )


def note_unreached(plan: QuantPlan, names: Iterable[str]) -> QuantPlan:
    """The plan with a note on the integer weights that no calibration sample reaches."""
    unreached = set(names)
    rows = tuple(
        replace(
            row, reason=f"{row.reason}; no calibration sample reaches it: scale search on the weight alone"
        )
        if row.name in unreached and not row.storage.is_float
        else row
        for row in plan.rows
    )
    return replace(plan, rows=rows)


def _decide(scheme: Scheme, spec: WeightSpec, unused: set[str]) -> PlanRow:
    storage = FLOAT16 if scheme.activations == "float16" else FLOAT32
    reason = _FLOAT_REASONS.get(spec.role, "")
    if spec.role in ("linear", "table"):
        storage, reason = scheme.table, f"scheme {scheme.name}: every {spec.role}"
        if spec.role == "linear":
            storage = scheme.linear
            if scheme.decoder is not None and spec.part == "decoder":
                storage, reason = scheme.decoder, f"scheme {scheme.name}: every linear of the decoder"
    for pattern, wanted in scheme.overrides:
        if re.fullmatch(pattern, spec.name):
            unused.discard(pattern)
            if wanted != FLOAT32 and spec.role not in ("linear", "table"):
                raise EdgeError(
                    f"scheme {scheme.name}: {pattern!r} asks for {wanted} for {spec.name}, a {spec.role}; "
                    "only linear and table weights can be other than float32"
                )
            storage, reason = wanted, f"scheme {scheme.name}: override {pattern!r}"
            break
    return PlanRow(
        name=spec.name,
        role=spec.role,
        shape=spec.shape,
        stored_shape=spec.shape,
        storage=storage,
        reason=reason,
    )


def _pad_to_blocks(specs: list[WeightSpec], rows: dict[str, PlanRow]) -> dict[str, PlanRow]:
    """Grow hidden axes to a multiple of the block, the same for both matrices and the bias that share one.

    SigLIP's MLP width 4304 is no multiple of 32; XNNPACK refuses smaller blocks. Rows of zeros in the first
    matrix meet columns of zeros in the second, so the output is unchanged.
    """
    multiples: dict[str, int] = {}
    for spec in specs:
        block = rows[spec.name].storage.block
        if block and len(spec.shape) - 1 in spec.padded_axes:
            multiples[_owner(spec)] = math.lcm(block, multiples.get(_owner(spec), 1))
    padded: dict[str, PlanRow] = {}
    for spec in specs:
        row, multiple = rows[spec.name], multiples.get(_owner(spec), 1)
        shape = tuple(
            -(-size // multiple) * multiple if axis in spec.padded_axes else size
            for axis, size in enumerate(spec.shape)
        )
        if row.storage.block and shape[-1] % row.storage.block:
            raise EdgeError(
                f"{spec.name} has {spec.shape[-1]} inputs, no multiple of the block {row.storage.block}, "
                "and they cannot be padded; choose another block or an override to int8 per channel"
            )
        if row.storage.palette and (shape[0] % row.storage.palette or shape[-1] % _PALETTE_INPUTS):
            raise EdgeError(
                f"{spec.name} has {shape[0]} outputs and {shape[-1]} inputs, and {row.storage} takes "
                f"multiples of {row.storage.palette} and {_PALETTE_INPUTS}; choose another group, or an "
                "override to int8"
            )
        if row.storage.palette and shape != spec.shape:
            raise EdgeError(
                f"{spec.name} would be padded with zeros to a multiple of {multiple}, which {row.storage} "
                "does not hold exactly; give every matrix a palette, or none"
            )
        reason = row.reason
        if shape != spec.shape:
            reason += f"; hidden axis padded with zeros to a multiple of {multiple}"
        padded[spec.name] = replace(row, stored_shape=shape, reason=reason)
    return padded


def _owner(spec: WeightSpec) -> str:
    """The module, such as an MLP, whose matrices share the hidden axis: `NAME` of `NAME.fc1.weight`."""
    return spec.name.rpartition(".")[0].rpartition(".")[0]


def refuse_palettes(plan: QuantPlan, engine: str) -> None:
    """What targets say whose engine has no palettes.

    Raises:
        EdgeError: Naming the first weight with one.
    """
    for row in plan.rows:
        if row.storage.palette:
            raise EdgeError(
                f"{row.name}: the plan asks for {row.storage}, and {engine} has no palettes; use --target "
                "coreml, or --precision int4 or int8"
            )


def read_plan(path: Path) -> QuantPlan:
    """Read a plan that an artifact carries.

    Raises:
        EdgeError: If the file is absent or not a plan.
    """
    try:
        return TypeAdapter(QuantPlan).validate_json(path.read_text(encoding="utf-8"), strict=True)
    except OSError as error:
        raise EdgeError(f"plan {path} cannot be read: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise EdgeError(f"{path} is no QuantPlan: {str(error).splitlines()[0]}") from None


def compare_packed(plan: QuantPlan, packed: Iterable[PackedWeight]) -> None:
    """Hold what a target packed against the plan: every weight, once or more, as decided.

    Raises:
        RuntimeError: On any difference; a target that skips, widens or reshapes a weight is defective.
    """
    seen: set[str] = set()
    for weight in packed:
        row = plan.by_name.get(weight.name)
        if row is None:
            raise RuntimeError(f"{weight.name} was packed and is not in the plan")
        if (weight.storage, weight.shape) != (row.storage, row.stored_shape):
            raise RuntimeError(
                f"{weight.name} was packed as {weight.storage} {weight.shape} and the plan says "
                f"{row.storage} {row.stored_shape}"
            )
        seen.add(weight.name)
    missing = plan.by_name.keys() - seen
    if missing:
        raise RuntimeError(f"{len(missing)} weights of the plan were not packed, such as {min(missing)}")
