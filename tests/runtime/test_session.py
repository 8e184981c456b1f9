from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry
from medgemma_runtime.session import check_inputs
from tests.runtime.tiny_artifact import LENGTH, tensor, write_tiny_artifact

ENTRY = ComponentEntry(
    program="x",
    inputs=(tensor("a", "float32", "batch", 3, "width"), tensor("b", "int64", "batch")),
    outputs=(),
)


def arrays(batch: int = 2, width: int = 5) -> dict[str, np.ndarray]:
    return {"a": np.zeros((batch, 3, width), np.float32), "b": np.zeros(batch, np.int64)}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return open_artifact(write_tiny_artifact(tmp_path / "artifact"))


def test_takes_arrays_to_the_spec() -> None:
    check_inputs(ENTRY, arrays())
    check_inputs(ENTRY, arrays(batch=7, width=1))


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a", np.zeros((2, 3, 5), np.float64), "float64"),
        ("a", np.zeros((2, 3, 5), ">f4"), ">f4"),
        ("a", np.zeros((2, 3), np.float32), r"\[2, 3\]"),
        ("a", np.zeros((2, 4, 5), np.float32), r"\[2, 4, 5\]"),
        ("a", np.zeros((0, 3, 5), np.float32), r"\[0, 3, 5\]"),
        ("a", np.zeros((2, 3, 0), np.float32), r"\[2, 3, 0\]"),
        ("b", np.zeros(3, np.int64), r"where \{'batch': 2, 'width': 5\} and is int64 \[3\]"),
        ("b", np.zeros(2, np.int32), "must be int64"),
        ("b", np.array(["x", "y"], dtype=object), "object"),
    ],
)
def test_refuses_another_dtype_rank_or_size(name: str, array: np.ndarray, words: str) -> None:
    with pytest.raises(EdgeError, match=words) as caught:
        check_inputs(ENTRY, arrays() | {name: array})
    assert f"input {name!r} must be" in str(caught.value)


def test_refuses_missing_and_unknown_names() -> None:
    given = arrays()
    with pytest.raises(EdgeError, match=r"takes \['a', 'b'\] and was given \['a'\]"):
        check_inputs(ENTRY, {"a": given["a"]})
    with pytest.raises(EdgeError, match="'mask'"):
        check_inputs(ENTRY, given | {"mask": given["b"]})


def test_opens_an_onnx_component(artifact: Artifact) -> None:
    session = open_session(artifact, "text", threads=1)
    ids = np.ones((1, LENGTH), np.int64)
    assert session.run({"input_ids": ids})["pooler_output"].shape == (1, 12)
    assert session.load_seconds > 0
    assert session.entry == artifact.manifest.components["text"]
    session.close()


def test_refuses_an_unknown_component(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="no component 'decoder'; it has image, text"):
        open_session(artifact, "decoder")


def test_only_the_evaluator_of_core_ml_chooses_an_arithmetic(artifact: Artifact) -> None:
    with pytest.raises(EdgeError, match=r"arithmetic 'fp16' is of Core ML programs.*target 'onnx'"):
        open_session(artifact, "text", arithmetic="fp16")
