"""Nodes, constants, and the products with weights as ONNX Runtime's kernels take them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.external_data import ExternalData
from medgemma_quantization.activations import ActivationRange
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["OnnxBuilder", "Attribute", "DOMAIN", "JOINT"]

DOMAIN = "com.microsoft"

JOINT = "+"
"""Between the names of weights that one tensor holds."""

# A weight of more bytes is multiplied in pieces, whose rows keep the file's alignment.
_PIECE_BYTES = 96 << 20
_PIECE_ROWS = 1 << 14

Attribute = int | float | str | Sequence[int] | ir.TensorProtocol
_Emitted = TypeVar("_Emitted")


@dataclass(kw_only=True)
class OnnxBuilder:
    """Emits nodes, and writes weights as it meets them.

    Attributes:
        weights: Where weights come from.
        data: Where they go.
        note: Told what was written for each weight.
        nodes: In topological order.
        initializers: The weights and constants that the nodes refer to.
    """

    weights: QuantizedWeights
    data: ExternalData
    note: Callable[[PackedWeight], None]
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    _values: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Attribute] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """A node with one result."""
        return self.results(operator, inputs, attributes, domain)[0]

    def results(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Attribute] | None = None,
        domain: str = "",
        outputs: int = 1,
        unused: Sequence[int] = (),
    ) -> Sequence[ir.Value]:
        """A node with several results; those that are `unused` have no name, as ONNX says it."""
        name = f"{operator}.{len(self.nodes)}"
        node = ir.node(operator, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = "" if index in unused else f"{name}.output.{index}"
        self.nodes.append(node)
        return node.outputs

    def once(self, key: tuple[Hashable, ...], emit: Callable[[], _Emitted]) -> _Emitted:
        """A value that several layers use, emitted by the first, or several such."""
        if key not in self._values:
            self._values[key] = emit()
        found: _Emitted = self._values[key]
        return found

    def shape(self, sizes: list[int]) -> ir.Value:
        """A constant of sizes, or of indices."""
        return self.integers(np.array(sizes))

    def integers(self, array: NDArray[np.integer[Any]]) -> ir.Value:
        """A constant of integers."""
        return self._constant(f"constant.{len(self.initializers)}", array)

    def floats(self, values: float | NDArray[np.float32]) -> ir.Value:
        """A constant of float32."""
        return self._constant(f"constant.{len(self.initializers)}", np.asarray(values, np.float32))

    def to_float32(self, x: ir.Value) -> ir.Value:
        """The same values as float32."""
        return self.node("Cast", [x], {"to": ir.DataType.FLOAT.value})

    def storage(self, name: str) -> Storage:
        """How the plan stores a weight."""
        return self.weights.plan.by_name[name].storage

    def vector(self, name: str) -> ir.Value:
        """A weight that stays float32."""
        array = self.weights.float(name)
        return self.weight(name, array, FLOAT32, array.shape)

    def weight(self, name: str, array: NDArray[Any], storage: Storage, shape: tuple[int, ...]) -> ir.Value:
        """A weight by itself, in the form that is given."""
        self.note(PackedWeight(name=name, storage=storage, shape=shape))
        return self._constant(name, array)

    def stored_float(self, names: Sequence[str], array: NDArray[np.float32]) -> ir.Value:
        """Weights that stay float as one tensor, in the width that the plan says."""
        is_half = self.storage(names[0]).bits == 16
        return self._joined(names, array.astype(np.float16) if is_half else array)

    def stored_scales(self, names: Sequence[str], scales: NDArray[np.float32]) -> ir.Value:
        """Half the bytes on disk: float16 holds every scale exactly."""
        return self._constant(f"{JOINT.join(names)}.scales", scales.astype(np.float16))

    def unsigned(self, name: str) -> NDArray[np.uint8]:
        """Integers as the block kernels store them, around 8 or 128: each one's sign bit turned."""
        is_packed = self.storage(name).bits == 4
        return self.weights.stored_values(name).view(np.uint8) ^ np.uint8(0x88 if is_packed else 0x80)

    def float_product(self, x: ir.Value, names: Sequence[str]) -> ir.Value:
        """The product with float matrices, whose rows lie one after the other."""
        array = np.concatenate([self.weights.float(name) for name in names]).T
        matrix = self.stored_float(names, array)
        if self.storage(names[0]).bits == 16:
            matrix = self.to_float32(matrix)
        return self.node("MatMul", [x, matrix])

    def channel_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        """The product with int8 matrices of one scale an output."""
        tensors = [self.weights.quantized(name) for name in names]
        matrix = self._joined(names, np.concatenate([tensor.values for tensor in tensors]).T)
        scales = self._scales(names, np.concatenate([tensor.scales[:, 0] for tensor in tensors]))
        known = self.weights.inputs.get(names[0])
        if known is None:
            return self.node("DynamicQuantizeMatMul", [x, matrix, scales, None, bias], domain=DOMAIN)
        rounded, scale, zero = self.once(("rounded", id(x), known), lambda: self._rounded(x, known))
        return self.node(
            "MatMulIntegerToFloat", [rounded, matrix, scale, scales, zero, None, bias], domain=DOMAIN
        )

    def block_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        """The product with int4 or int8 matrices in blocks."""
        rows = [self.weights.plan.by_name[name] for name in names]
        storage, inputs = rows[0].storage, rows[0].stored_shape[1]
        scales = np.concatenate([self.weights.scales(name) for name in names])
        values = np.concatenate([self.unsigned(name) for name in names]).reshape(*scales.shape, -1)
        attributes: dict[str, Attribute] = {
            "K": inputs,
            "N": len(values),
            "bits": storage.bits,
            "block_size": storage.block,
            "accuracy_level": 4,
        }
        if values.nbytes > _PIECE_BYTES and bias is None:
            return self._product_in_pieces(x, names, values, scales, attributes)
        matrix, stored = self._joined(names, values), self._scales(names, scales)
        return self.node("MatMulNBits", [x, matrix, stored, None, None, bias], attributes, DOMAIN)

    def _rounded(self, x: ir.Value, known: ActivationRange) -> tuple[ir.Value, ir.Value, ir.Value]:
        """An activation as uint8, for all matrices that share it, with scale and zero point."""
        scale = self.floats(known.scale)
        zero = self._constant(f"constant.{len(self.initializers)}", np.array(known.zero, np.uint8))
        return self.node("QuantizeLinear", [x, scale, zero]), scale, zero

    def _product_in_pieces(
        self,
        x: ir.Value,
        names: Sequence[str],
        values: NDArray[np.uint8],
        scales: NDArray[np.float32],
        attributes: dict[str, Attribute],
    ) -> ir.Value:
        """One product for every so many rows: ONNX Runtime copies each weight as it loads it."""
        rows = -(-len(values) * _PIECE_BYTES // values.nbytes // _PIECE_ROWS) * _PIECE_ROWS
        self._note_joined(names)
        name = JOINT.join(names)
        matrices = self.data.add_in_pieces(name, values, rows)
        halves = self.data.add_in_pieces(f"{name}.scales", scales.astype(np.float16), rows)
        parts = []
        for matrix, half in zip(matrices, halves, strict=True):
            sizes = attributes | {"N": matrix.shape.numpy()[0]}
            stored = self.to_float32(self._initializer(half))
            parts.append(self.node("MatMulNBits", [x, self._initializer(matrix), stored], sizes, DOMAIN))
        return self.node("Concat", parts, {"axis": -1})

    def _scales(self, names: Sequence[str], scales: NDArray[np.float32]) -> ir.Value:
        """As the kernels take them; the cast is folded when the program is loaded."""
        return self.to_float32(self.stored_scales(names, scales))

    def _joined(self, names: Sequence[str], array: NDArray[Any]) -> ir.Value:
        """Weights of one storage that lie as one: the rows of the first, then those of the next."""
        self._note_joined(names)
        return self._constant(JOINT.join(names), array)

    def _note_joined(self, names: Sequence[str]) -> None:
        for name in names:
            row = self.weights.plan.by_name[name]
            self.note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self._initializer(self.data.add(name, array))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value
