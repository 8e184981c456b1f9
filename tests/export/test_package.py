"""What an export will need is known before it starts: held against what it takes."""

import shutil
import tracemalloc
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from medgemma_export import package  # noqa: E402
from medgemma_export.build import build, decide  # noqa: E402
from medgemma_export.package import (  # noqa: E402
    Needs,
    available_memory_bytes,
    open_package,
    predict_needs,
    require_resources,
)
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.samples import sample_path  # noqa: E402
from medgemma_quantization import weights  # noqa: E402
from medgemma_quantization.plan import WeightSpec, make_plan  # noqa: E402
from medgemma_quantization.scheme import INT8_BLOCKS, SCHEMES, Scheme  # noqa: E402
from medgemma_runtime.errors import EdgeError  # noqa: E402

# What a program with few layers takes beside its weights, in memory and on disk.
REST_BYTES = 2_000_000

INT8_BLOCKS_ONLY = Scheme(
    name="int8-blocks", linear=INT8_BLOCKS, table=INT8_BLOCKS, activations="int8-dynamic"
)


@pytest.fixture(scope="module", params=["table", "matrix"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A Gemma 3 in which one weight dwarfs the others, the table or a matrix of the MLP."""
    directory = tmp_path_factory.mktemp(request.param)
    vocabulary, mlp_width = {"table": (40_000, 512), "matrix": (2_000, 24_000)}[request.param]
    config = transformers.Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=mlp_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=32,
    )
    transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path("sample:medgemma-tiny") / name, directory / name)
    return directory


@pytest.mark.parametrize(
    "scheme",
    [*(scheme for scheme in SCHEMES.values() if not scheme.linear.palette), INT8_BLOCKS_ONLY],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.parametrize("piece_values", [1 << 16, 1 << 24], ids=["lowering binds", "rounding binds"])
def test_what_is_predicted_is_what_it_takes(checkpoint, tmp_path, monkeypatch, scheme, piece_values):
    """Memory and disk, each without the allowance for what does not grow with the model."""
    monkeypatch.setattr(weights, "_PIECE_VALUES", piece_values)
    out = tmp_path / "work" / "artifact"
    recipe = Recipe(
        model=str(checkpoint), revision=None, target="onnx", scheme=scheme, components=(), out=out
    )
    needs = decide(recipe).needs
    on_disk: list[int] = []

    def measure(what: str, done: int, total: int) -> None:
        if what == "hash the artifact":
            on_disk.append(sum(path.stat().st_blocks * 512 for path in out.parent.rglob("*")))

    tracemalloc.start()
    build(recipe, progress=measure)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert needs.memory_bytes - package._REST_BYTES < 1.3 * peak
    assert peak < needs.memory_bytes - package._REST_BYTES + REST_BYTES
    assert needs.disk_bytes - package._SMALL_FILES_BYTES < 1.2 * on_disk[0]
    assert on_disk[0] < needs.disk_bytes - package._SMALL_FILES_BYTES + REST_BYTES
    is_rounded = not scheme.linear.is_float and piece_values == 1 << 24
    assert needs.heaviest.startswith("to round" if is_rounded else "to lower")


def test_what_is_predicted_of_calibration_is_what_it_takes(tmp_path):
    """A layer of 3,072 inputs: second moment, drift and factors are 340 MB, and all else is small."""
    directory = tmp_path / "model"
    config = transformers.Gemma3TextConfig(
        vocab_size=1832,
        hidden_size=64,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=32,
    )
    transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path("sample:medgemma-tiny") / name, directory / name)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "note.txt").write_text("No acute findings.")
    recipe = Recipe(
        model=str(directory),
        revision=None,
        target="onnx",
        scheme=SCHEMES["int4"],
        components=(),
        out=tmp_path / "artifact",
        method="gptq",
        calibration=str(notes),
        calibration_bytes=1 << 20,
    )
    needs = decide(recipe).needs
    assert needs.heaviest == "to calibrate language_model.layers.0.mlp.down_proj.weight"
    tracemalloc.start()
    build(recipe, progress=lambda *step: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert needs.memory_bytes - package._REST_BYTES < 1.3 * peak
    assert peak < needs.memory_bytes


def test_4b_calibrates_within_8_gb():
    """Its widest layer reads 10,240 inputs; activations may take 2 GB."""
    matrix = WeightSpec(name="down_proj", shape=(2_560, 10_240), role="linear")
    needs = predict_needs(make_plan(SCHEMES["int4"], [matrix]), calibration_bytes=2 << 30)
    assert needs.heaviest == "to calibrate down_proj"
    # 36 bytes for each pair of inputs, and strips of 1,024.
    pairs, strips = 36 * 10_240**2, 32 * 10_240 * 1_024
    assert needs.memory_bytes > (2 << 30) + pairs + strips
    assert needs.memory_bytes < 8e9
    assert predict_needs(make_plan(SCHEMES["int4"], [matrix])).memory_bytes < 1e9


def test_needs_of_the_largest_models_by_hand():
    """27B's table at int4: 1,409,630,208 values at 4 bits twice, and scales as float32 and float16."""
    table = WeightSpec(name="table", shape=(262_208, 5_376), role="table")
    needs = predict_needs(make_plan(SCHEMES["int4"], [table]))
    scales = 262_208 * 5_376 // 32
    assert needs.memory_bytes == 1_409_630_208 + 8 * scales + package._REST_BYTES
    assert needs.heaviest == "to lower table"
    slack = 2 * package._SLACK_BYTES + package._SMALL_FILES_BYTES
    assert needs.disk_bytes == 1_409_630_208 + (4 + 2) * scales + slack


def test_a_traced_program_holds_scales_and_tables_but_no_matrices():
    weights = [
        WeightSpec(name="matrix", shape=(1 << 20, 64), role="linear"),
        WeightSpec(name="table", shape=(1 << 20, 64), role="table"),
    ]
    plan = make_plan(SCHEMES["int4"], weights)
    needs = predict_needs(plan, is_traced=True)
    # A table of 4 bits with a float16 scale for each 32, and eight bytes for each scale of both.
    table, scales = (64 << 20) * 9 // 16, 8 * 2 * (2 << 20)
    held = table + scales + package._EXPORTER_BYTES + package._TRACED_BYTES
    assert needs.memory_bytes == held + package._REST_BYTES
    assert needs.heaviest == "to trace and lower the program"
    assert needs.disk_bytes == predict_needs(plan).disk_bytes + table + scales


NEEDS = Needs(disk_bytes=3_000_000_000, memory_bytes=2_000_000_000, heaviest="to lower x.weight")


def test_enough_is_enough(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=NEEDS.disk_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(package, "available_memory_bytes", lambda: NEEDS.memory_bytes)
    require_resources(tmp_path / "new" / "out", NEEDS)


def test_too_little_memory_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13))
    monkeypatch.setattr(package, "available_memory_bytes", lambda: NEEDS.memory_bytes - 1)
    with pytest.raises(EdgeError) as caught:
        require_resources(tmp_path / "out", NEEDS)
    assert str(caught.value) == (
        "the export needs about 2.0 GB of memory (to lower x.weight) and 2.0 GB are available; close other "
        "programs, choose a lower --precision, fewer --components or a smaller --calibration-memory, or use "
        "a machine with more memory"
    )


def test_what_an_interrupted_export_left_is_no_shortage(tmp_path, monkeypatch):
    """It is taken over, or removed before new integers are made."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), open_package(out, key="a") as begun:
        begun.weights.mkdir()
        (begun.weights / "x.values.npy").write_bytes(bytes(1_000_000))
        raise KeyboardInterrupt
    usage = shutil.disk_usage(tmp_path)._replace(free=2_500_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(package, "available_memory_bytes", lambda: 1 << 40)
    require_resources(out, Needs(disk_bytes=3_400_000, memory_bytes=0, heaviest=""))
    with pytest.raises(EdgeError, match="of disk"):
        require_resources(out, Needs(disk_bytes=3_600_000, memory_bytes=0, heaviest=""))


def write_group(directory: Path, files: dict[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(f"{content}\n")


def membership(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def machine_bytes(monkeypatch) -> int:
    """What the machine has free."""
    psutil = pytest.importorskip("psutil")
    memory = psutil.virtual_memory()._replace(available=9_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return 9_000


def test_without_control_groups_the_machine_counts(tmp_path, machine_bytes):
    assert available_memory_bytes(tmp_path) == machine_bytes
    membership(tmp_path, "0::/")
    assert available_memory_bytes(tmp_path) == machine_bytes


def test_the_tightest_group_above_counts(tmp_path, machine_bytes):
    """Version 2: what is used counts against the limit, less the file pages that can be taken back."""
    membership(tmp_path, "0::/outer/inner")
    groups = tmp_path / "sys/fs/cgroup"
    used = {"memory.current": 3_000, "memory.stat": "anon 5\ninactive_file 1000"}
    write_group(groups / "outer/inner", {"memory.max": "max", **used})
    write_group(groups / "outer", {"memory.max": 7_000, **used})
    assert available_memory_bytes(tmp_path) == 7_000 - (3_000 - 1_000)
    write_group(groups / "outer/inner", {"memory.max": 2_500})
    assert available_memory_bytes(tmp_path) == 500
    write_group(groups / "outer/inner", {"memory.max": 1_000})
    assert available_memory_bytes(tmp_path) == 0
    write_group(groups / "outer", {"memory.max": 70_000})
    write_group(groups / "outer/inner", {"memory.max": 70_000})
    assert available_memory_bytes(tmp_path) == machine_bytes


def test_groups_of_the_first_version_count_too(tmp_path, machine_bytes):
    """In a container the path is that of the host, and only the group itself is there to be seen."""
    membership(tmp_path, "5:cpu:/docker/1", "4:memory:/docker/1", "0::/")
    used = {"memory.usage_in_bytes": 3_000, "memory.stat": "cache 7\ntotal_inactive_file 1000"}
    write_group(tmp_path / "sys/fs/cgroup/memory", {"memory.limit_in_bytes": 6_000, **used})
    assert available_memory_bytes(tmp_path) == 4_000


def test_this_machine_has_memory():
    assert 10_000_000 < available_memory_bytes() < 1 << 50


def test_a_wrong_prediction_is_seen(checkpoint, tmp_path, monkeypatch):
    """The comparison above can fail: forget one copy of the packed integers."""
    monkeypatch.setattr(package, "_lowering_bytes", lambda row: weights.rounding_bytes(row) // 40)
    monkeypatch.setattr(weights, "_PIECE_VALUES", 1 << 16)
    with pytest.raises(AssertionError):
        test_what_is_predicted_is_what_it_takes(checkpoint, tmp_path, monkeypatch, SCHEMES["int4"], 1 << 16)
