"""Core ML for iPhone, iPad and Mac, written on any machine.

- encoders and the vision tower: a package each, with one function for one image or text. An image is given
  as such; scale and bias are in the program;
- the decoder: a package with the functions `prefill` and `decode` over the same weights and caches;
- the embedding: rows that a host looks up, described by a JSON file;
- int4 and int8 weights are `constexpr_blockwise_shift_scale`, palettes `constexpr_lut_to_dense`, which
  engines take apart as they need them.
  What multiplies them is float16, or float32 with `--precision fp32`: activations are never integers.

Programs are for iOS 18 and macOS 15, and laid out for the GPU: blocks of int4, fused attention. With
`--units ane` they are laid out for the Neural Engine: convolutions, int8 per channel or palettes, the decoder
in parts below 950 MB whose caches the host holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from medgemma_export.models.spec import Component, ModelSpec
from medgemma_export.targets.coreml_decoder import describe_decoder
from medgemma_export.targets.coreml_parts import MAX_PROGRAM_BYTES, cut_decoder, stored_bytes
from medgemma_quantization.plan import PackedWeight, QuantPlan
from medgemma_quantization.scheme import (
    FLOAT16,
    FLOAT32,
    INT8,
    INT8_BLOCKS,
    SCHEMES,
    Activations,
    Scheme,
    SchemeName,
)
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["CoremlTarget", "Units"]

Units = Literal["gpu", "ane"]
"""The GPU, or the Neural Engine."""

# Internal parts of it are used, see `coreml_mil`.
_COREMLTOOLS = "9.0"

# apple/coremltools issue 1807: a program whose tensors reach 2 GiB does not load.
_MAX_TENSOR_BYTES = (1 << 31) - 1
# Of a phone's 8 GB, an app gets about half.
_MAX_STATE_BYTES = 1 << 30


@dataclass(frozen=True)
class CoremlTarget:
    """See `Target`.

    Attributes:
        units: Whose layout programs get.
    """

    cuts_tables: ClassVar[bool] = True
    units: Units = "gpu"

    def scheme(self, name: SchemeName) -> Scheme:
        """See `Target`. Core ML rounds weights only; what is not fp32 computes in float16.

        Tables that are output heads are multiplied, and the Neural Engine multiplies no blocks.
        """
        activations: Activations = "float" if name == "fp32" else "float16"
        scheme = replace(SCHEMES[name], activations=activations)
        has_int8_blocks = self.units == "ane" and scheme.table == INT8_BLOCKS
        return replace(scheme, table=INT8) if has_int8_blocks else scheme

    def check(self, model: ModelSpec, plan: QuantPlan) -> None:
        """See `Target`."""
        _check_coremltools()
        if plan.activations in ("int8-dynamic", "int8-static"):
            raise EdgeError(
                f"scheme {plan.scheme} rounds activations to int8, and Core ML multiplies integer weights "
                'by float activations; say activations = "float16", or "float"'
            )
        computed = FLOAT16 if plan.activations == "float16" else FLOAT32
        for row in plan.rows:
            if row.storage.is_float and row.storage != computed:
                raise EdgeError(
                    f"{row.name}: the plan asks for {row.storage}, and with activations "
                    f'"{plan.activations}" a Core ML program has {computed} throughout; leave the override '
                    "out, or change activations"
                )
            if row.storage.palette and row.role == "table":
                raise EdgeError(
                    f"{row.name}: the plan asks for {row.storage}, and a host looks rows up by their scales; "
                    "give the table int8 or int4"
                )
            if row.stored_bits // 8 > _MAX_TENSOR_BYTES:
                raise EdgeError(
                    f"{row.name} takes {row.stored_bits / 8e9:.1f} GB as {row.storage}, and Core ML loads no "
                    "tensor of 2 GiB; choose a lower --precision"
                )
        if self.units == "ane":
            _check_ane(model, plan)
        for component in model.components:
            if component.name == "decoder":
                _check_decoder(component, model, plan, self.units)

    def lower(
        self,
        model: ModelSpec,
        weights: QuantizedWeights,
        directory: Path,
        *,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, ComponentEntry], list[PackedWeight]]:
        """See `Target`."""
        from medgemma_export.targets.coreml_lower import Lowering  # coremltools takes seconds to import

        packed: list[PackedWeight] = []

        def note(weight: PackedWeight) -> None:
            packed.append(weight)
            progress(min(len(packed), len(weights.plan.rows)), len(weights.plan.rows))

        lowering = Lowering(model=model, weights=weights, directory=directory, note=note, units=self.units)
        # The embedding comes last: it points to rows that the decoder's package holds.
        order = sorted(model.components, key=lambda component: component.name == "embed")
        entries: dict[str, ComponentEntry] = {}
        for component in order:
            entries |= lowering.component(component)
        own = [component.name for component in model.components]
        return {name: entries[name] for name in dict.fromkeys((*own, *entries))}, packed

    def integer_linear(self) -> "IntegerLinear":
        """See `Target`."""
        from medgemma_export.torch_ops import weight_only

        return weight_only


def _check_coremltools() -> None:
    try:
        found = version("coremltools")
    except PackageNotFoundError:
        found = "none"
    if found != _COREMLTOOLS:
        raise EdgeError(
            f"Core ML packages are written with coremltools {_COREMLTOOLS} and {found} is installed; "
            "pip install 'medgemma-edge[coreml]'"
        )


def _check_ane(model: ModelSpec, plan: QuantPlan) -> None:
    if plan.activations != "float16":
        raise EdgeError(
            f"scheme {plan.scheme} computes in {plan.activations}, and the Neural Engine in float16 only; "
            "use --units gpu, or another precision"
        )
    for component in model.components:
        rows = {weight.name: plan.by_name[weight.name] for weight in component.weights()}
        for row in rows.values():
            is_head = row.role == "table" and component.name == "decoder"
            if (row.role == "linear" or is_head) and row.storage.block:
                raise EdgeError(
                    f"{row.name}: the plan asks for {row.storage}, and blocks came out wrong or not at all "
                    "on the Neural Engine; use --precision int8, lut6 or lut4"
                )
        size = stored_bytes(component, plan)
        if component.name not in ("decoder", "embed") and size > MAX_PROGRAM_BYTES:
            raise EdgeError(
                f"component {component.name} takes {size / 1e6:.0f} MB, and the Neural Engine keeps programs "
                f"below {MAX_PROGRAM_BYTES / 1e6:.0f} MB; use --precision int8, lut6 or lut4"
            )


def _check_decoder(component: Component, model: ModelSpec, plan: QuantPlan, units: Units) -> None:
    if model.prompt is None:
        raise EdgeError(
            f"{model.architecture} has a decoder and no prompt spec, which says how long it may be"
        )
    decoder = describe_decoder(component, model.prompt, is_host_held=units == "ane")
    if decoder.state_bytes > _MAX_STATE_BYTES:
        raise EdgeError(
            f"Core ML's caches have a fixed size, and {decoder.context} tokens take "
            f"{decoder.state_bytes / 1e9:.1f} GB; name a shorter --context, such as 4096"
        )
    if units == "ane":
        cut_decoder(component, decoder, plan)
