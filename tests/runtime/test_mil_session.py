import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil import NotFiniteTensorError
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.images import normalize
from medgemma_runtime.manifest import ComponentEntry, read_manifest, write_manifest
from tests.runtime.test_mil import CHUNK, GOLDEN, WIDTH, expected
from tests.runtime.tiny_artifact import SIZE, file_entry, tensor, write_tiny_artifact

WEIGHTS = "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
ENTRY = ComponentEntry(
    program="decoder.mlpackage",
    inputs=(tensor("x", "float32", "sequence", WIDTH), tensor("slot", "int64", 1)),
    outputs=(tensor("y", "float32", "sequence", 16),),
)


def write_artifact(directory: Path, package: Path, entry: ComponentEntry) -> Path:
    """The tiny artifact with a Core ML package as its only component."""
    manifest = read_manifest(write_tiny_artifact(directory))
    for name in ("image.onnx", "text.onnx", "text.onnx.data"):
        (directory / name).unlink()
    (directory / "manifest.json").unlink()
    shutil.copytree(package, directory / entry.program)
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    files = tuple(file_entry(directory, name) for name in names)
    write_manifest(
        dataclasses.replace(manifest, target="coreml", components={"decoder": entry}, files=files), directory
    )
    return directory


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return open_artifact(write_artifact(tmp_path / "artifact", GOLDEN, ENTRY))


def step(x: np.ndarray, slot: int) -> dict[str, Any]:
    return {"x": x, "slot": np.array([slot], np.int64)}


def test_picks_the_function_by_size_and_keeps_the_state(artifact: Artifact) -> None:
    x = np.random.default_rng(0).standard_normal((CHUNK + 1, WIDTH), dtype=np.float32)
    session = MilSession(artifact, "decoder")
    first = session.run(step(x[:CHUNK], 0))["y"]
    np.testing.assert_allclose(first, expected(x[:CHUNK], x[:CHUNK]), atol=1e-5)
    np.testing.assert_allclose(session.run(step(x[CHUNK:], CHUNK))["y"], expected(x[CHUNK:], x), atol=1e-5)
    session.reset()
    y = np.empty((1, 16), np.float32)
    session.run_into(step(x[CHUNK:], CHUNK), {"y": y})
    np.testing.assert_allclose(y, expected(x[CHUNK:], x[CHUNK:]), atol=1e-5)
    assert session.load_seconds > 0
    with pytest.raises(EdgeError, match=r"no function .* takes inputs of the shapes .*'x': \[2, 32\]"):
        session.run(step(x[:2], 0))
    with pytest.raises(EdgeError, match="needs an array for every output"):
        session.run_into(step(x[CHUNK:], 0), {})
    with pytest.raises(EdgeError, match="reaches 4294967296, which does not fit int32"):
        session.run(step(x[CHUNK:], 1 << 32))
    with pytest.raises(EdgeError, match="input 'x' must be float32"):
        session.run(step(x.astype(np.float64), 0))
    session.close()
    session.close()
    with pytest.raises(EdgeError, match="component 'decoder' is closed"):
        session.run(step(x[CHUNK:], 0))


def test_is_the_engine_of_the_target(artifact: Artifact) -> None:
    assert isinstance(open_session(artifact, "decoder"), MilSession)
    with pytest.raises(EdgeError, match="takes as many threads as NumPy does"):
        open_session(artifact, "decoder", threads=2)


def test_names_what_leaves_the_range_of_fp16(artifact: Artifact) -> None:
    x = np.full((1, WIDTH), 40000, np.float32)
    MilSession(artifact, "decoder").run(step(x, 0))
    with pytest.raises(NotFiniteTensorError, match="add, fp16"):
        MilSession(artifact, "decoder", mode="fp16").run(step(x, 0))


def test_a_byte_of_a_weight_breaks_the_artifacts_seal(artifact: Artifact) -> None:
    path = artifact.directory / WEIGHTS
    content = bytearray(path.read_bytes())
    content[130] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights/weight.bin does not have the SHA-256"):
        open_artifact(artifact.directory)


def test_refuses_a_program_that_the_manifest_does_not_describe(artifact: Artifact) -> None:
    entry = dataclasses.replace(ENTRY, outputs=(tensor("logits", "float32", 1, 16),))
    manifest = dataclasses.replace(artifact.manifest, components={"decoder": entry})
    other = dataclasses.replace(artifact, manifest=manifest)
    with pytest.raises(ArtifactError, match=r"gives \['y'\], and the manifest says .* and \['logits'\]"):
        MilSession(other, "decoder")


def test_images_are_given_back_their_levels(tmp_path: Path) -> None:
    programs = pytest.importorskip("tests.runtime.mil_programs", reason="coremltools writes the program")
    package = programs.write_program(
        tmp_path / "image.mlpackage",
        {"pixel_values": ((1, 3, SIZE, SIZE), "fp32")},
        lambda v: {"y": programs.mb.reduce_mean(x=v["pixel_values"], axes=[2, 3])},
        images={"pixel_values": "RGB"},
    )
    entry = ComponentEntry(
        program="image.mlpackage",
        inputs=(tensor("pixel_values", "float32", 1, 3, SIZE, SIZE),),
        outputs=(tensor("y", "float32", 1, 3),),
    )
    artifact = open_artifact(write_artifact(tmp_path / "artifact", package, entry))
    image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    assert artifact.manifest.image is not None
    pixels = normalize(image, artifact.manifest.image)[None]
    session = MilSession(artifact, "decoder")
    np.testing.assert_allclose(session.run({"pixel_values": pixels})["y"][0], image.mean((0, 1)), rtol=1e-5)
    with pytest.raises(EdgeError, match="is no image of levels 0 to 255 normalized as"):
        session.run({"pixel_values": pixels + np.float32(0.001)})
    bare = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, image=None))
    with pytest.raises(ArtifactError, match="the manifest has no image spec"):
        MilSession(bare, "decoder").run({"pixel_values": pixels})
