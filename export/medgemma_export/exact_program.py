"""An ONNX program's exact form: the same weight file, without rounding of activations.

Rounding makes end-to-end comparison blunt: two correct implementations differ by a float's last bit, that
moves some activation to its other neighbour, and the difference grows from layer to layer. The exact form
multiplies the very integers and scales that the program ships in float arithmetic, so that what differs is
the weights and nothing else.
"""

from pathlib import Path

import onnx_ir as ir

__all__ = ["write_exact_program"]


def write_exact_program(program: Path, out: Path) -> None:
    """Write the exact form of `program`; it refers to the same external data, by the same file name.

    `DynamicQuantizeMatMul` becomes `DequantizeLinear`, `MatMul` and `Add`; `MatMulNBits` goes to accuracy
    level 0, which leaves activations float.
    """
    model = ir.load(program)
    for node in tuple(model.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "DynamicQuantizeMatMul":
            _replace_rounding_product(model.graph, node)
    ir.save(model, out)


def _replace_rounding_product(graph: ir.Graph, node: ir.Node) -> None:
    x, matrix, scales, _, bias = node.inputs
    weight = ir.node("DequantizeLinear", [matrix, scales], {"axis": 1}, name=f"{node.name}.weight")
    product = ir.node("MatMul", [x, weight.outputs[0]], name=f"{node.name}.product")
    nodes = [weight, product]
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}.sum"))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name = old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
