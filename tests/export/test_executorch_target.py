"""What the ExecuTorch target refuses, and that XNNPACK computes what the packing reference says it does."""

import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.emulation import executorch_integer_linear  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.targets import TARGETS, choose_target  # noqa: E402
from medgemma_export.targets.executorch import ExecutorchTarget  # noqa: E402
from medgemma_quantization.affine import pack_int4, quantize, range_scales  # noqa: E402
from medgemma_quantization.plan import make_plan  # noqa: E402
from medgemma_quantization.scheme import INT4, INT8, INT8_BLOCKS, SCHEMES, Storage  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export, about its own insides


@pytest.fixture(scope="module")
def medgemma():
    return load_model(open_checkpoint("sample:medgemma-tiny"))


def refusal(model, scheme, delegate="xnnpack", **choices):
    with pytest.raises(EdgeError) as caught:
        ExecutorchTarget(delegate=delegate, **choices).check(model, make_plan(scheme, model.weights()))
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_what_the_command_line_offers_is_taken(medgemma, model, precision):
    target = ExecutorchTarget()
    for each in (medgemma, model):
        target.check(each, make_plan(target.scheme(precision), each.weights()))
    ExecutorchTarget(delegate="portable").check(medgemma, make_plan(SCHEMES["fp32"], medgemma.weights()))


@pytest.mark.parametrize(
    ("scheme", "delegate", "message"),
    [
        (SCHEMES["fp16"], "xnnpack", "float16, and XNNPACK multiplies float32"),
        (SCHEMES["int8"], "xnnpack", "int8 block 32, and XNNPACK multiplies int8 per channel only"),
        (
            replace(SCHEMES["int4"], linear=Storage(bits=4, block=16)),
            "xnnpack",
            "take blocks of 32 or a multiple",
        ),
        (replace(SCHEMES["int4"], activations="float"), "xnnpack", "keeps activations float, and XNNPACK"),
        (
            SCHEMES["int4"],
            "portable",
            "delegate portable multiplies floats only in this version; use --precision fp32",
        ),
        (SCHEMES["int4"], "qnn", "QNN_SDK_ROOT"),
        (SCHEMES["int4"], "vulkan", "glslc"),
        (SCHEMES["int4"], "openvino", "executorch[openvino]"),
        (SCHEMES["fp32"], "coreml", "--target coreml"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(medgemma, scheme, delegate, message):
    assert message in refusal(medgemma, scheme, delegate)


def test_core_ml_takes_floats_only(model):
    ExecutorchTarget(delegate="coreml").check(model, make_plan(SCHEMES["fp32"], model.weights()))
    scheme = ExecutorchTarget().scheme("int8")
    assert "delegate coreml multiplies floats only" in refusal(model, scheme, "coreml")


def test_core_ml_keeps_its_weights_to_itself(model):
    message = refusal(model, SCHEMES["fp32"], "coreml", separate_weights=True)
    assert "delegate coreml keeps weights in its own form; leave the option out" in message


def test_core_ml_without_its_package_is_refused(monkeypatch):
    from medgemma_export.targets.executorch_coreml import coreml_partitioner

    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(EdgeError, match="coremltools"):
        coreml_partitioner()


@pytest.mark.parametrize(
    ("context", "message"), [(20, "a context of 20 tokens holds no question"), (10**7, "4096")]
)
def test_a_context_must_hold_a_question_and_fit_memory(medgemma, context, message):
    limited = replace(medgemma, prompt=replace(medgemma.prompt, context=context))
    assert message in refusal(limited, SCHEMES["int4"])


def test_only_executorch_has_delegates_and_weights_apart():
    assert choose_target("executorch", delegate="portable") == ExecutorchTarget(delegate="portable")
    assert choose_target("executorch", separate_weights=True) == ExecutorchTarget(separate_weights=True)
    assert choose_target("onnx") is TARGETS["onnx"]
    with pytest.raises(EdgeError, match="within --target executorch; onnx has none"):
        choose_target("onnx", delegate="xnnpack")
    with pytest.raises(EdgeError, match="--separate-weights is a choice within --target executorch"):
        choose_target("coreml", separate_weights=True)
    with pytest.raises(EdgeError, match="'cuda' is unknown; choose one of xnnpack"):
        choose_target("executorch", delegate="cuda")


@pytest.mark.parametrize("storage", [INT4, INT8])
def test_the_emulation_equals_the_kernel(storage, tmp_path):
    from executorch.runtime import Runtime

    from medgemma_export.ops import Linear
    from medgemma_export.targets.executorch_lower import lower_program
    from medgemma_export.targets.executorch_ops import ExecutorchOps, IntegerMatrix
    from medgemma_export.targets.executorch_stand_ins import StandIns, late_array

    class Product(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.values, self.scales, self.zeros = (
                weight.values,
                *map(torch.nn.Buffer, (weight.scales, weight.zeros)),
            )

        def forward(self, x):
            held = replace(weight, values=self.values, scales=self.scales, zeros=self.zeros)
            ops = ExecutorchOps(
                floats={},
                matrices={"product.weight": held},
                look_up=None,
                frequencies={},
                averages={},
                step=1,
                context=1,
            )
            return ops.linear(x, Linear(name="product", inputs=96, outputs=48, bias=False))

    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(48, 96)).astype(np.float32)
    tensor = quantize(matrix, storage, range_scales(matrix, storage))
    # Rows on one side of zero, on both, and all zero: each has its own range.
    x = torch.from_numpy(rng.normal(size=(1, 4, 96)).astype(np.float32))
    x = torch.cat((x, x.abs(), -x.abs(), torch.zeros(1, 1, 96)), 1)
    stand_ins = StandIns()
    packed = pack_int4(tensor.values, offset=8) if storage.bits == 4 else tensor.values
    factors = torch.from_numpy(tensor.scales if storage.block else tensor.scales[:, 0].copy())
    weight = IntegerMatrix(
        values=stand_ins.parameter(late_array("product", packed), (48, 96), torch.int8),
        scales=factors,
        zeros=torch.zeros(factors.shape, dtype=torch.int8),
        storage=storage,
    )
    module = Product(weight)
    exported = torch.export.export(module, (x,), strict=False)
    path = tmp_path / "product.pte"
    shares = lower_program({"forward": exported}, {}, path, stand_ins, delegate="xnnpack")
    assert (shares["forward"].kernels, shares["forward"].calls) == (0, 1)
    [actual] = Runtime.get().load_program(path).load_method("forward").execute([x])
    expected = executorch_integer_linear(x, tensor)
    assert (actual - expected).abs().max() < 2e-5
    # XNNPACK's own packing of weights that were there all along.
    whole, path = replace(weight, values=torch.from_numpy(tensor.values)), tmp_path / "whole.pte"
    exported = torch.export.export(Product(whole), (x,), strict=False)
    lower_program({"forward": exported}, {}, path, StandIns(), delegate="xnnpack")
    assert torch.equal(Runtime.get().load_program(path).load_method("forward").execute([x])[0], actual)
    # What the comparison would miss if activations were left alone.
    assert (actual - x @ torch.from_numpy(tensor.dequantize()).T).abs().max() > 1e-2


@pytest.mark.parametrize("storage", [INT4, INT8, INT8_BLOCKS])
def test_a_table_is_looked_up_as_its_integers_say(storage, tmp_path):
    from executorch.runtime import Runtime

    from medgemma_export.targets.executorch_lower import lower_program
    from medgemma_export.targets.executorch_program import look_up, pack_table
    from medgemma_export.targets.executorch_stand_ins import StandIns

    class Rows(torch.nn.Module):
        def __init__(self, values, scales):
            super().__init__()
            self.values, self.scales = torch.nn.Buffer(values), torch.nn.Buffer(scales)

        def forward(self, ids):
            return look_up(self.values, self.scales, ids, storage)

    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(7, 64)).astype(np.float32)
    tensor = quantize(matrix, storage, range_scales(matrix, storage))
    module = Rows(*(torch.from_numpy(part) for part in pack_table(tensor)))
    ids, path = torch.tensor([[6, 0]]), tmp_path / "rows.pte"
    exported = torch.export.export(module, (ids,), strict=False)
    lower_program({"forward": exported}, {}, path, StandIns(), delegate="xnnpack")
    [rows] = Runtime.get().load_program(path).load_method("forward").execute([ids])
    assert np.array_equal(rows[0].numpy(), tensor.dequantize()[[6, 0]])


def test_what_kernels_and_xnnpack_both_read_lies_in_the_file_once(tmp_path):
    from executorch.runtime import Runtime

    from medgemma_export.targets.executorch_file import write_program
    from medgemma_export.targets.executorch_lower import lower_program
    from medgemma_export.targets.executorch_stand_ins import StandIns, late_array

    class Rows(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, ids):
            return torch.nn.functional.embedding(ids, self.table)

    class Product(Rows):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.table)

    table = torch.randn((300, 8), generator=torch.Generator().manual_seed(5))
    stand_ins, late = StandIns(), late_array("table", table.numpy())
    ids, x, path = torch.tensor([[299, 0]]), torch.ones(1, 8), tmp_path / "model.pte"
    programs = {
        name: torch.export.export(
            module(stand_ins.parameter(late, (300, 8), torch.float32)), (given,), strict=False
        )
        for name, module, given in (("rows", Rows, ids), ("product", Product, x))
    }
    shares = lower_program(programs, {"get_bos_id": 2}, path, stand_ins, delegate="xnnpack")
    assert (shares["rows"].calls, shares["product"].calls) == (0, 1)
    assert path.read_bytes().count(table.numpy().tobytes()) == 1
    program = Runtime.get().load_program(path)
    assert torch.equal(program.load_method("rows").execute([ids])[0], table[ids])
    assert (program.load_method("product").execute([x])[0] - x @ table.T).abs().max() < 1e-5
    assert program.load_method("get_bos_id").execute([]) == [2]
    with pytest.raises(AssertionError, match=r"without a place in the program: \['table'\]"):
        write_program(path, tmp_path / "again.pte", stand_ins)  # no mark is left in it


def test_portable_kernels_compute_the_same_and_xnnpack_took_none(tmp_path):
    from executorch.runtime import Runtime

    from medgemma_export.targets.executorch_lower import lower_program
    from medgemma_export.targets.executorch_stand_ins import StandIns

    layer = torch.nn.Linear(8, 4)
    x, path = torch.ones(3, 8), tmp_path / "model.pte"
    exported = torch.export.export(layer, (x,), strict=False)
    share = lower_program({"forward": exported}, {}, path, StandIns(), delegate="portable")["forward"]
    assert (share.delegated, share.calls) == (0, 0)
    assert share.kernels > 0
    [actual] = Runtime.get().load_program(path).load_method("forward").execute([x])
    assert (actual - layer(x)).abs().max() < 1e-5
