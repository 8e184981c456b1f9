import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime.errors import CheckpointError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

import huggingface_hub  # noqa: E402
from huggingface_hub import constants, errors  # noqa: E402

from medgemma_export.checkpoint import check_tensors, open_checkpoint  # noqa: E402
from medgemma_export.safetensors_checkpoint import INDEX_NAME  # noqa: E402

# For a reader in a fresh process: how far does its memory grow while it reads 8 rows, and then 16,384?
# VmHWM is this program's own peak; ru_maxrss would begin at that of the process that started it.
_MEASURE_GROWTH = """
import pathlib, re, sys
from medgemma_export.checkpoint import open_checkpoint

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.read("small")
before = peak_kb()
for rows in (8, 16384):
    values = checkpoint.read("large", rows=slice(1000, 1000 + rows))
    assert values.shape == (rows, 4096) and not values.any()
    print(peak_kb() - before)
"""


def make_tensors(seed: int = 0) -> dict[str, "torch.Tensor"]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.bfloat16": torch.randn(6, 5, generator=generator).bfloat16(),
        "b.float16": torch.randn(7, 3, 2, generator=generator).half(),
        "c.float32": torch.randn(4, generator=generator) * 1e-40,  # subnormal
        "d.scalar": torch.tensor(-10.0),
        "e.empty": torch.zeros(0, 3),
    }


def write_directory(directory: Path, tensors: dict[str, "torch.Tensor"]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "siglip"}')
    safetensors_torch.save_file(tensors, directory / "model.safetensors")
    return directory


def write_shards(directory: Path, tensors: dict[str, "torch.Tensor"]) -> Path:
    """The first two tensors in one file, the others in a second, and the index."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    names = list(tensors)
    weight_map = {}
    for number, shard in enumerate((names[:2], names[2:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors_torch.save_file({name: tensors[name] for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def edit_index(directory: Path, **weight_map: str | None) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    for name, file in weight_map.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (directory / INDEX_NAME).write_text(json.dumps(index))


def write_header_only(path: Path, header: dict[str, object], size: int) -> None:
    """A sparse file: it claims `size` bytes of zeros and takes almost no room on disk."""
    encoded = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(stream.tell() + size)


@pytest.mark.parametrize("write", [write_directory, write_shards])
def test_values_equal_torchs_own_reading_bit_for_bit(tmp_path, write):
    tensors = make_tensors()
    checkpoint = open_checkpoint(str(write(tmp_path / "model", tensors)))
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        values = checkpoint.read(name)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous and values.flags.writeable
        assert values.shape == tuple(expected.shape) == checkpoint.tensors[name].shape
        assert values.tobytes() == expected.float().numpy().tobytes()


def test_rows_are_those_of_the_whole_tensor(tmp_path):
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", make_tensors())))
    for name in ("a.bfloat16", "b.float16", "c.float32"):
        whole = checkpoint.read(name)
        for rows in (slice(1, 3), slice(None, 2), slice(-2, None), slice(3, 99), slice(2, 2), slice(3, 1)):
            part = checkpoint.read(name, rows=rows)
            assert part.flags.c_contiguous
            np.testing.assert_array_equal(part, whole[rows])


def test_rows_with_a_step_or_of_a_scalar_are_refused(tmp_path):
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", make_tensors())))
    with pytest.raises(ValueError, match="without a step"):
        checkpoint.read("a.bfloat16", rows=slice(0, 4, 2))
    with pytest.raises(ValueError, match="no rows"):
        checkpoint.read("d.scalar", rows=slice(0, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_rows_of_a_file_of_8_gb_takes_little_memory(tmp_path):
    rows, width = 1 << 20, 4096
    end = rows * width * 2
    write_header_only(
        tmp_path / "model.safetensors",
        {
            "large": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, end]},
            "small": {"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]},
        },
        end + 16,
    )
    (tmp_path / "config.json").write_text("{}")
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE_GROWTH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    few, many = map(int, result.stdout.split())
    assert few < 32_000  # kB; the tensor has 8,388,608
    assert many >= 262_144  # what these rows have as float32: the measurement sees what is read


def test_opening_reads_no_weight_and_reading_names_what_is_not_finite(tmp_path):
    tensors = {"good": torch.ones(3), "nan": torch.tensor([0.0, float("nan")]), "inf": torch.ones(2, 2)}
    tensors["inf"][1, 0] = -float("inf")
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", tensors)))
    checkpoint.read("good")
    checkpoint.read("inf", rows=slice(0, 1))
    for name in ("nan", "inf"):
        with pytest.raises(
            CheckpointError, match=f"{name} in model.safetensors of model holds NaN or infinite"
        ):
            checkpoint.read(name)


def test_the_id_is_never_a_path(tmp_path, monkeypatch):
    directory = write_directory(tmp_path / "my-model", make_tensors())
    monkeypatch.chdir(directory)
    for spelled in (str(directory), str(directory) + "/", "."):
        checkpoint = open_checkpoint(spelled)
        assert checkpoint.id == "my-model"
        assert checkpoint.revision is None
    assert checkpoint.config == {"model_type": "siglip"}


def test_the_hash_is_that_of_all_weight_files_in_name_order(tmp_path):
    single = open_checkpoint(str(write_directory(tmp_path / "single", make_tensors())))
    content = (tmp_path / "single" / "model.safetensors").read_bytes()
    assert single.weights_sha256() == hashlib.sha256(content).hexdigest()

    sharded = open_checkpoint(str(write_shards(tmp_path / "sharded", make_tensors())))
    assert sharded.weight_files == tuple(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    content = b"".join((tmp_path / "sharded" / name).read_bytes() for name in sharded.weight_files)
    steps: list[int] = []
    assert sharded.weights_sha256(progress=steps.append) == hashlib.sha256(content).hexdigest()
    assert sum(steps) == len(content)


def test_files_beside_the_weights_are_found_or_named(tmp_path):
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", make_tensors())))
    assert checkpoint.file("config.json") == tmp_path / "model" / "config.json"
    with pytest.raises(CheckpointError, match=r"model has no tokenizer\.json; copy it"):
        checkpoint.file("tokenizer.json")


def test_an_unknown_tensor_is_named_with_the_nearest_one(tmp_path):
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", make_tensors())))
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.bfloat61' \(did you mean 'a\.bfloat16'\?\)"):
        checkpoint.read("a.bfloat61")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "int64", "float64"])
def test_a_dtype_that_does_not_convert_exactly_is_refused_when_read(tmp_path, dtype):
    tensors = {"a": torch.ones(4).to(getattr(torch, dtype))}
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", tensors)))
    with pytest.raises(CheckpointError, match="only F32, F16, BF16 convert to float32 exactly"):
        checkpoint.read("a")


def test_a_dtype_that_the_library_does_not_know_is_refused(tmp_path):
    header = {"a": {"dtype": "I4", "shape": [8], "data_offsets": [0, 4]}}
    write_header_only(tmp_path / "model.safetensors", header, 4)
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors .*I4"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x04\x00\x00\x00\x00\x00\x00\x00nope",
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors"):
        open_checkpoint(str(tmp_path))


def test_a_truncated_file_is_refused_when_opened(tmp_path):
    path = write_directory(tmp_path / "model", make_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the download is incomplete"):
        open_checkpoint(str(path.parent))


def test_a_missing_shard_is_named(tmp_path):
    directory = write_shards(tmp_path / "model", make_tensors())
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-00002-of-00002.safetensors"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": "model-00001-of-00002.safetensors"}, "lists f, which the shards do not hold"),
        ({"a.bfloat16": None}, "holds a.bfloat16, which .* places in no file"),
        (
            {"a.bfloat16": "model-00002-of-00002.safetensors"},
            "holds a.bfloat16, which .* places in model-00002",
        ),
        ({"a.bfloat16": "../elsewhere.safetensors"}, "lies outside the directory"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path, change, message):
    directory = write_shards(tmp_path / "model", make_tensors())
    safetensors_torch.save_file(make_tensors(), tmp_path / "elsewhere.safetensors")
    edit_index(directory, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(directory))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = make_tensors()
    directory = write_shards(tmp_path / "model", tensors)
    names = list(tensors)
    second = {name: tensors[name] for name in names[1:]}  # repeats the second tensor
    safetensors_torch.save_file(second, directory / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00002.* holds b.float16, which .* places in model-00001"
    ):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(str(tmp_path))


def test_an_index_beside_a_single_file_is_refused(tmp_path):
    directory = write_shards(tmp_path / "model", make_tensors())
    safetensors_torch.save_file(make_tensors(), directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_missing_or_broken_config_is_named(tmp_path, content, message):
    directory = write_directory(tmp_path / "model", make_tensors())
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_pickled_files_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for asked in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name} .*is a pickled checkpoint.*save_pretrained"):
            open_checkpoint(str(asked))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "it holds no .safetensors file"),
        (("adapter_config.json", "adapter_model.safetensors"), "holds an adapter and no base weights"),
        (("consolidated.safetensors", "q4.gguf"), "it holds consolidated.safetensors, q4.gguf"),
    ],
)
def test_a_directory_without_a_model_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


def test_what_names_nothing_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match=r"neither a directory nor a .gguf file"):
        open_checkpoint(str(tmp_path / "model.onnx"))
    for model in (str(tmp_path / "absent"), "absent", "./some/where", "google/absent.gguf"):
        with pytest.raises(CheckpointError, match="hub id such as google/medsiglip-448"):
            open_checkpoint(model)
    with pytest.raises(CheckpointError, match=r"did you mean sample:medsiglip-tiny\?"):
        open_checkpoint("sample:medsiglip-tny")


def test_a_revision_belongs_to_a_hub_id(tmp_path):
    directory = write_directory(tmp_path / "model", make_tensors())
    for model in (str(directory), "sample:medsiglip-tiny"):
        with pytest.raises(CheckpointError, match="does not come from the hub"):
            open_checkpoint(model, revision="main")


def test_check_tensors_accepts_the_right_model(tmp_path):
    tensors = make_tensors()
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", tensors)))
    expected = {name: tuple(value.shape) for name, value in tensors.items()}
    check_tensors(checkpoint, expected)
    del expected["a.bfloat16"]
    check_tensors(checkpoint, expected, ignored=("a.*",))


def test_check_tensors_names_every_fault_at_once(tmp_path):
    tensors = make_tensors()
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", tensors)))
    expected = {name: tuple(value.shape) for name, value in tensors.items()}
    expected["a.bfloat61"] = expected.pop("a.bfloat16")
    expected["c.float32"] = (5,)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(checkpoint, expected)
    message = str(caught.value)
    assert "a.bfloat61 (did you mean 'a.bfloat16'?) missing" in message
    assert "a.bfloat16 (model.safetensors) not part of the model" in message
    assert "c.float32 (model.safetensors) is [4] and should be [5] of another shape" in message
    assert "Check that config.json and the weights belong to the same checkpoint" in message


def test_check_tensors_refuses_a_quantized_weight(tmp_path):
    tensors = {"a": torch.ones(2).to(torch.float8_e5m2)}
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", tensors)))
    with pytest.raises(CheckpointError, match=r"a .model.safetensors, F8_E5M2. of a dtype"):
        check_tensors(checkpoint, {"a": (2,)})
    check_tensors(checkpoint, {}, ignored=("a",))


def test_check_tensors_does_not_flood(tmp_path):
    checkpoint = open_checkpoint(str(write_directory(tmp_path / "model", {"a": torch.ones(1)})))
    with pytest.raises(CheckpointError, match="x0, x1, x2, x3 and 96 more missing"):
        check_tensors(checkpoint, {f"x{number}": (1,) for number in range(100)}, ignored=("*",))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill_hub_cache(hub_cache: Path, commit: str) -> Path:
    """A repository as the hub's client lays it out: blobs, snapshots of links to them, refs."""
    repository = hub_cache / "models--example--siglip"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    blobs = write_shards(repository / "blobs", make_tensors())
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    return snapshot


def test_a_hub_id_is_opened_from_the_cache_without_the_network(hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    fill_hub_cache(hub_cache, commit)
    for revision in (None, "main", commit):
        checkpoint = open_checkpoint("example/siglip", revision=revision)
        assert checkpoint.id == "example/siglip"
        assert checkpoint.revision == commit
        assert checkpoint.read("a.bfloat16").shape == (6, 5)


def test_a_directory_goes_before_a_hub_id(hub_cache, tmp_path):
    fill_hub_cache(hub_cache, "0" * 40)
    (tmp_path / "example").mkdir()
    write_directory(tmp_path / "example" / "siglip", {"mine": torch.ones(1)})
    assert set(open_checkpoint("example/siglip").tensors) == {"mine"}


def test_an_interrupted_download_is_refused(hub_cache):
    snapshot = fill_hub_cache(hub_cache, "0" * 40)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="example/siglip lacks the shard model-00002"):
        open_checkpoint("example/siglip")


def test_offline_without_a_copy_is_one_sentence(hub_cache):
    with pytest.raises(CheckpointError, match=r"example/absent at revision v2 is not complete .* go online"):
        open_checkpoint("example/absent", revision="v2")


def make_hub_error(kind: type[Exception]) -> Exception:
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")
    http = sys.modules[errors.HTTPError.__module__.split(".")[0]]
    response = http.Response(403, request=http.Request("GET", "https://hub.invalid"))
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "a/b is gated and your account has no access; accept the terms"),
        (errors.RepositoryNotFoundError, "a/b is neither a directory here nor a repository on the hub"),
        (errors.RevisionNotFoundError, "a/b has no revision v1"),
        (errors.HfHubHTTPError, r"a/b at revision v1 could not be downloaded \(HfHubHTTPError\)"),
        (ConnectionResetError, r"a/b at revision v1 could not be downloaded \(ConnectionResetError\)"),
    ],
)
def test_the_hubs_refusals_become_one_sentence(monkeypatch, kind, message):
    def refuse(*args: object, **options: object) -> str:
        raise make_hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("a/b", revision="v1")


def test_only_what_an_export_needs_is_downloaded(monkeypatch, tmp_path):
    asked: dict[str, object] = {}

    def pretend(id: str, **options: object) -> str:
        asked.update(options, id=id)
        return str(write_directory(tmp_path / "commit", make_tensors()))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", pretend)
    assert open_checkpoint("a/b").revision == "commit"
    files = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "onnx/config.json",
        "flax_model.msgpack",
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == files[:6]


def test_nothing_but_a_hub_id_reaches_for_the_hub(monkeypatch, tmp_path):
    def refuse(*args: object, **options: object) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    open_checkpoint("sample:medsiglip-tiny")
    open_checkpoint(str(write_directory(tmp_path / "model", make_tensors())))
    with pytest.raises(CheckpointError):
        open_checkpoint("no-slash")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path / "model"))
