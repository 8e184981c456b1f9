"""An ONNX program's exact form: the same weight file, without rounding of activations.

Rounding makes end-to-end comparison blunt: two correct implementations differ by a float's last bit, that
moves some activation to its other neighbour, and the difference grows from layer to layer. The exact form
multiplies the very integers and scales that the program ships in float arithmetic, so that what differs is
the weights and nothing else.
"""

from pathlib import Path

import onnx_ir as ir

from medgemma_runtime.errors import ArtifactError

__all__ = ["write_exact_program"]


def write_exact_program(program: Path, out: Path) -> None:
    """Write the exact form of `program`; it refers to the same external data, by the same file name.

    `DynamicQuantizeMatMul` and `MatMulIntegerToFloat` become `DequantizeLinear`, `MatMul` and `Add`;
    `MatMulNBits` goes to accuracy level 0, which leaves activations float.
    """
    model = ir.load(program)
    for node in tuple(model.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "DynamicQuantizeMatMul":
            x, matrix, scales, _, bias = node.inputs
            _replace_rounding_product(model.graph, node, x, matrix, scales, bias)
        elif node.op_type == "MatMulIntegerToFloat":
            rounded, matrix, _, scales, _, _, bias = node.inputs
            rounding = None if rounded is None else rounded.producer()
            if rounding is None:
                raise ArtifactError(f"{program.name} multiplies integers that nothing rounded; export again")
            _replace_rounding_product(model.graph, node, rounding.inputs[0], matrix, scales, bias)
    # Inputs that several products share were rounded once; nothing reads that any more.
    for node in tuple(model.graph):
        if node.op_type == "QuantizeLinear" and not node.outputs[0].uses():
            known = [value for value in node.inputs[1:] if value is not None]
            model.graph.remove(node, safe=True)
            for value in known:
                if value.name is not None and not value.uses():
                    del model.graph.initializers[value.name]
    ir.save(model, out)


def _replace_rounding_product(
    graph: ir.Graph,
    node: ir.Node,
    x: ir.Value | None,
    matrix: ir.Value | None,
    scales: ir.Value | None,
    bias: ir.Value | None,
) -> None:
    weight = ir.node("DequantizeLinear", [matrix, scales], {"axis": 1}, name=f"{node.name}.weight")
    product = ir.node("MatMul", [x, weight.outputs[0]], name=f"{node.name}.product")
    nodes = [weight, product]
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}.sum"))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name = old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
