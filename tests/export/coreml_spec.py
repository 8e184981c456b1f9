"""What tests look for in a saved Core ML program."""

import numpy as np

from medgemma_export.targets.coreml_mil import proto


def narrow_or_not_finite(spec):
    """Operators whose results are narrow integers, and constants that are not finite."""
    MIL_pb2 = proto.MIL_pb2  # noqa: N806
    narrow = {MIL_pb2.INT16, MIL_pb2.UINT16, MIL_pb2.INT8, MIL_pb2.UINT8}
    found = []
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if any(output.type.tensorType.dataType in narrow for output in operation.outputs):
                    found.append(operation.type)
                value = operation.attributes["val"].immediateValue.tensor
                floats = [*value.floats.values, *np.frombuffer(value.bytes.values, np.float16)]
                if operation.type == "const" and not np.isfinite(np.array(floats, np.float64)).all():
                    found.append(operation.type)
    return found
