"""The weight file and the package around it, held against coremltools' own writer and reader."""

import json

import numpy as np
import pytest

mil = pytest.importorskip("medgemma_export.targets.coreml_mil")

from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter  # noqa: E402

from medgemma_export.ops import RmsNorm  # noqa: E402
from medgemma_export.targets.coreml_builder import MilBuilder  # noqa: E402
from medgemma_export.targets.coreml_features import Feature, FunctionFeatures  # noqa: E402
from medgemma_export.targets.coreml_ops import MilOps  # noqa: E402
from medgemma_export.targets.coreml_package import (  # noqa: E402
    MODEL_PATH,
    WEIGHTS_PATH,
    WeightFile,
    write_package,
)
from medgemma_quantization.affine import pack_int4  # noqa: E402
from medgemma_quantization.plan import WeightSpec, make_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_quantization.weights import QuantizedWeights  # noqa: E402
from medgemma_runtime.backends.mil import MilProgram  # noqa: E402

WIDTH = 64
EPS = 1e-6


def tensors(rng):
    return {
        "half": ("float16", rng.normal(size=33).astype(np.float16)),
        "single": ("float32", rng.normal(size=(3, 5)).astype(np.float32)),
        "bytes": ("int8", rng.integers(-127, 128, 130).astype(np.int8)),
        "nibbles": ("int4", rng.integers(-8, 8, (6, 32)).astype(np.int8)),
    }


def test_the_weight_file_is_what_coremltools_writes(tmp_path):
    arrays = tensors(np.random.default_rng(1))
    with WeightFile(tmp_path / "ours" / "weight.bin") as ours:
        for name, (kind, array) in arrays.items():
            ours.add(name, kind, pack_int4(array) if kind == "int4" else array)
            ours.add(name, kind, array[:0])  # of a second function: there already
    theirs = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    offsets = {
        "half": theirs.write_fp16_data(arrays["half"][1].view(np.uint16)),
        "single": theirs.write_float_data(arrays["single"][1].reshape(-1)),
        "bytes": theirs.write_int8_data(arrays["bytes"][1]),
        "nibbles": theirs.write_int4_data(arrays["nibbles"][1].reshape(-1)),
    }
    del theirs
    assert ours.offsets == offsets
    written = (tmp_path / "ours" / "weight.bin").read_bytes()
    assert written == (tmp_path / "weight.bin").read_bytes()[: len(written)]
    reader = _BlobStorageReader(str(tmp_path / "ours" / "weight.bin"))
    found = np.array(reader.read_int4_data(offsets["nibbles"]))
    assert (found.reshape(6, 32) == arrays["nibbles"][1]).all()
    assert written[ours.starts["bytes"] :][:130] == arrays["bytes"][1].tobytes()


def write_norm(directory, gain, *, half, scale=1.0):
    """A package whose one function is an RMS norm over [1, 4, WIDTH]."""
    directory.mkdir()
    scheme = SCHEMES["fp16" if half else "fp32"]
    scheme = type(scheme)(
        name="norm", linear=scheme.linear, table=scheme.table, activations="float16" if half else "float"
    )
    plan = make_plan(scheme, [WeightSpec(name="n.weight", shape=(WIDTH,), role="norm")])
    weights = QuantizedWeights(plan=plan, directory=directory, read=lambda name, rows=None: gain)
    kind = "float16" if half else "float32"
    placeholder = mil.Placeholder((1, 4, WIDTH), dtype=mil.types.fp16 if half else mil.types.fp32)
    function = mil.new_function({"x": placeholder})
    packed = []
    with WeightFile(directory / WEIGHTS_PATH) as file, function:
        ops = MilOps(mil=MilBuilder(weights=weights, file=file, note=packed.append, half=half))
        norm = RmsNorm(name="n", width=WIDTH, eps=EPS * scale**2, factor=scale)
        function.set_outputs([ops.output(ops.rms_norm(function.inputs["x"], norm), "y")])
    program = mil.Program()
    program.add_function("main", function)
    shape = (1, 4, WIDTH)
    features = FunctionFeatures(
        inputs=[Feature(name="x", kind=kind, shape=shape, description="rows")],
        outputs=[Feature(name="y", kind="float32", shape=shape, description="normalized rows")],
    )
    write_package(
        directory,
        program,
        file,
        {"main": features},
        summary="A norm.",
        licence="Apache-2.0",
        version="1.2.3",
        facts={"made": "for a test"},
    )
    return packed


def exact(x, gain, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + gain.astype(np.float64))


@pytest.fixture
def rows():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 4, WIDTH)).astype(np.float32)
    x[0, 0] *= 10_000  # squares overflow float16 by far
    x[0, 0, 3] = 65_000
    x[0, 1] *= 5e-4  # the mean square is of the size of eps
    x[0, 2] = 0
    x[0, 3, 7] = 300  # one channel dwarfs the others
    return x.astype(np.float16).astype(np.float32)


def test_the_norm_neither_overflows_nor_distorts_eps(tmp_path, rows):
    gain = np.random.default_rng(3).normal(size=WIDTH).astype(np.float16).astype(np.float32)
    expected = exact(rows, gain, EPS)
    write_norm(tmp_path / "single", gain, half=False)
    single = MilProgram.open(tmp_path / "single").run("main", {"x": rows})["y"]
    np.testing.assert_allclose(single, expected, rtol=2e-6, atol=1e-7)
    write_norm(tmp_path / "half", gain, half=True)
    program = MilProgram.open(tmp_path / "half")
    for mode in ("fp16", "fp16_accumulate"):
        half = program.run("main", {"x": rows}, mode=mode)["y"]
        np.testing.assert_allclose(half, expected, rtol=2e-2, atol=2e-4)


def test_a_scaled_stream_gives_the_scaled_norm_exactly(tmp_path, rows):
    gain = np.random.default_rng(3).normal(size=WIDTH).astype(np.float32)
    write_norm(tmp_path / "plain", gain, half=False)
    write_norm(tmp_path / "scaled", gain, half=False, scale=0.125)
    plain = MilProgram.open(tmp_path / "plain").run("main", {"x": rows})["y"]
    scaled = MilProgram.open(tmp_path / "scaled").run("main", {"x": rows * np.float32(0.125)})["y"]
    assert (scaled == plain * np.float32(0.125)).all()


def test_coremltools_reads_the_package(tmp_path):
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    packed = write_norm(tmp_path / "norm.mlpackage", np.zeros(WIDTH, np.float32), half=True)
    assert [(weight.name, weight.storage.bits) for weight in packed] == [("n.weight", 16)]
    model = coremltools.models.MLModel(str(tmp_path / "norm.mlpackage"), skip_model_load=True)
    spec = model.get_spec()
    assert (model.license, model.version, model.short_description) == ("Apache-2.0", "1.2.3", "A norm.")
    assert dict(spec.description.metadata.userDefined) == {"made": "for a test"}
    assert spec.description.input[0].shortDescription == "rows"
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    gains = [op for op in program.functions["main"].operations if op.name == "n_weight"]
    assert gains[0].outputs[0].val.tolist() == [1.0] * WIDTH


def test_equal_programs_are_equal_files(tmp_path):
    for name in ("a", "b"):
        write_norm(tmp_path / name, np.zeros(WIDTH, np.float32), half=True)
    for path in (MODEL_PATH, WEIGHTS_PATH, "Manifest.json"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    listed = json.loads((tmp_path / "a" / "Manifest.json").read_text())
    assert listed["rootModelIdentifier"] in listed["itemInfoEntries"]
    for entry in listed["itemInfoEntries"].values():
        assert (tmp_path / "a" / "Data" / entry["path"]).exists()
