import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.ort import OrtSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import read_manifest
from tests.runtime.tiny_artifact import (
    LENGTH,
    SIZE,
    TOKEN_IDS,
    WIDTH,
    image_program,
    tensor,
    text_program,
    text_table,
    write_tiny_artifact,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    directory = write_tiny_artifact(tmp_path / "artifact")
    return Artifact(directory=directory, manifest=read_manifest(directory))


def test_computes_what_the_program_says(artifact: Artifact) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, 3, SIZE, SIZE), dtype=np.float32)
    actual = OrtSession(artifact, "image", threads=1).run({"pixel_values": pixels})
    quarters = pixels.reshape(3, 3, 2, 8, 2, 8).mean(axis=(3, 5)).reshape(3, WIDTH)
    assert list(actual) == ["pooler_output"]
    assert actual["pooler_output"].dtype == np.float32
    np.testing.assert_allclose(actual["pooler_output"], quarters, atol=1e-6)


def test_reads_weights_from_external_data(artifact: Artifact) -> None:
    ids = np.random.default_rng(1).integers(0, len(TOKEN_IDS), (2, LENGTH))
    actual = OrtSession(artifact, "text").run({"input_ids": ids})
    np.testing.assert_allclose(actual["pooler_output"], text_table()[ids].mean(axis=1), rtol=1e-5, atol=1e-7)


def test_the_hand_written_programs_are_valid_onnx(artifact: Artifact) -> None:
    onnx = pytest.importorskip("onnx")
    for name in ("image.onnx", "text.onnx"):
        onnx.checker.check_model(str(artifact.directory / name), full_check=True)


def test_takes_an_array_that_is_not_contiguous(artifact: Artifact) -> None:
    pixels = np.random.default_rng(2).standard_normal((2, SIZE, SIZE, 3), dtype=np.float32)
    channels_first = pixels.transpose(0, 3, 1, 2)
    session = OrtSession(artifact, "image")
    np.testing.assert_array_equal(
        session.run({"pixel_values": channels_first})["pooler_output"],
        session.run({"pixel_values": np.ascontiguousarray(channels_first)})["pooler_output"],
    )


def test_results_are_never_lost_in_a_copy(artifact: Artifact) -> None:
    session = OrtSession(artifact, "image")
    pixels = np.random.default_rng(3).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    in_place, every_second = np.zeros((2, WIDTH), np.float32), np.zeros((2, 2 * WIDTH), np.float32)[:, ::2]
    session.run_into({"pixel_values": pixels}, {"pooler_output": in_place})
    np.testing.assert_array_equal(in_place, session.run({"pixel_values": pixels})["pooler_output"])
    read_only = np.zeros((2, WIDTH), np.float32)
    read_only.flags.writeable = False
    for array in (every_second, read_only):
        with pytest.raises(
            EdgeError, match="'pooler_output' of component 'image' is not contiguous or read-only"
        ):
            session.run_into({"pixel_values": pixels}, {"pooler_output": array})
    assert not read_only.any()


def test_checks_its_inputs(artifact: Artifact) -> None:
    with pytest.raises(EdgeError, match="input 'input_ids' must be int64"):
        OrtSession(artifact, "text").run({"input_ids": np.zeros((1, LENGTH), np.int32)})


def test_a_failing_run_names_the_component(artifact: Artifact) -> None:
    ids = np.full((1, LENGTH), len(TOKEN_IDS), np.int64)  # one past the table
    with pytest.raises(EdgeError, match=r"component 'text' failed while running: .*out of"):
        OrtSession(artifact, "text").run({"input_ids": ids})


def test_a_closed_session_runs_no_more(artifact: Artifact) -> None:
    session = OrtSession(artifact, "text")
    session.close()
    session.close()
    with pytest.raises(EdgeError, match="component 'text' is closed"):
        session.run({"input_ids": np.ones((1, LENGTH), np.int64)})


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"", "No graph was found"),
        (b"garbage" * 20, "parsing failed"),
        (text_program()[:-30], "parsing failed"),
        (text_program(operator="Telepathy"), "Telepathy"),
        (text_program(location="absent.data"), "does not exist"),
        (text_program(location="../outside.data"), "escapes"),
        (text_program(location="/outside.data"), "Absolute path"),
    ],
    ids=["empty", "garbage", "truncated", "operator", "absent data", "outside", "absolute"],
)
def test_a_program_that_cannot_be_loaded_names_the_component(
    artifact: Artifact, program: bytes, words: str
) -> None:
    (artifact.directory.parent / "outside.data").write_bytes(text_table().tobytes())
    (artifact.directory / "text.onnx").write_bytes(program)
    with pytest.raises(ArtifactError, match=words) as caught:
        OrtSession(artifact, "text")
    assert str(caught.value).startswith("component 'text' (text.onnx) cannot be loaded")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "short"])
def test_bad_external_data_names_the_component(artifact: Artifact, change: str) -> None:
    data = artifact.directory / "text.onnx.data"
    if change == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"component 'text' \(text\.onnx\) cannot be loaded"):
        OrtSession(artifact, "text")


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        (("ids", "int64", "batch", LENGTH), None, r"inputs \['input_ids'\] .* \['ids'\]"),
        (("input_ids", "int32", "batch", LENGTH), None, r"tensor\(int64\).*says int32"),
        (("input_ids", "int64", "batch", 77), None, r"\['batch', 64\].*'batch', 77"),
        (("input_ids", "int64", "batch"), None, r"'batch', 64\].*\['batch'\]"),
        (None, ("pooler_output", "float16", "batch", WIDTH), "says float16"),
        (None, ("embedding", "float32", "batch", WIDTH), r"outputs \['pooler_output'\]"),
    ],
)
def test_a_program_other_than_the_manifest_says_is_refused(
    artifact: Artifact, inputs: tuple | None, outputs: tuple | None, words: str
) -> None:
    entry = artifact.manifest.components["text"]
    entry = dataclasses.replace(
        entry,
        inputs=(tensor(*inputs),) if inputs else entry.inputs,
        outputs=(tensor(*outputs),) if outputs else entry.outputs,
    )
    manifest = dataclasses.replace(artifact.manifest, components={"text": entry})
    with pytest.raises(ArtifactError, match=words):
        OrtSession(dataclasses.replace(artifact, manifest=manifest), "text")


@pytest.mark.parametrize("threads", [0, -1])
def test_refuses_no_threads(artifact: Artifact, threads: int) -> None:
    with pytest.raises(EdgeError, match=f"at least 1 and is {threads}"):
        OrtSession(artifact, "text", threads=threads)


def test_leaves_a_profile_where_it_was_asked_for(artifact: Artifact, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    session = OrtSession(artifact, "text", profile_to=profile)
    session.run({"input_ids": np.ones((1, LENGTH), np.int64)})
    assert not profile.exists()
    session.close()
    events = json.loads(profile.read_text(encoding="utf-8"))
    assert any(event.get("args", {}).get("op_name") == "Gather" for event in events)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "profile.json"]


def test_refuses_a_profile_in_no_directory(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="profile cannot be written"):
        OrtSession(artifact, "text", profile_to=tmp_path / "absent" / "profile.json")


def test_onnx_runtime_itself_prints_nothing(artifact: Artifact) -> None:
    """Its own log goes to the process's stderr, past Python: only another process can watch it."""
    (artifact.directory / "image.onnx").write_bytes(image_program()[:-9])
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from medgemma_runtime.artifact import Artifact\n"
        "from medgemma_runtime.errors import EdgeError\n"
        "from medgemma_runtime.manifest import read_manifest\n"
        "from medgemma_runtime.backends.ort import OrtSession\n"
        "directory = Path(sys.argv[1])\n"
        "artifact = Artifact(directory=directory, manifest=read_manifest(directory))\n"
        "ids = np.full((1, 64), 9999)\n"
        "for work in (lambda: OrtSession(artifact, 'image'),\n"
        "             lambda: OrtSession(artifact, 'text').run({'input_ids': ids})):\n"
        "    try:\n"
        "        work()\n"
        "    except EdgeError:\n"
        "        print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact.directory)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("refused\nrefused\n", "")
