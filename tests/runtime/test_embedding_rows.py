import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.embedding_rows import EmbeddingRows
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, read_manifest
from tests.runtime.test_mil_session import GOLDEN, write_artifact
from tests.runtime.tiny_artifact import file_entry, tensor

ROWS, WIDTH, IMAGE = 10, 8, 7
ENTRY = ComponentEntry(
    program="coreml/embedding.json",
    inputs=(
        tensor("input_ids", "int64", 1, "sequence"),
        dataclasses.replace(
            tensor("image_features", "float32", "image_tokens", WIDTH), default=0, may_be_empty=True
        ),
    ),
    outputs=(tensor("inputs_embeds", "float32", 1, "sequence", WIDTH),),
)
SKIP = 64  # bytes of something else before the values


def table(bits: int, block: int) -> tuple[bytes, np.ndarray]:
    """A file of values and scales, and the rows they stand for, computed element by element."""
    rng = np.random.default_rng(bits)
    scales = rng.uniform(0.01, 0.1, (ROWS, WIDTH // block)).astype(np.float16)
    if bits in (16, 32):
        rows = rng.normal(size=(ROWS, WIDTH)).astype(f"float{bits}")
        return bytes(SKIP) + rows.tobytes(), rows.astype(np.float32)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    integers = rng.integers(low, high, (ROWS, WIDTH))
    stored = integers.astype(np.int8).tobytes()
    if bits == 4:
        pairs = integers.reshape(-1, 2) & 0xF
        stored = (pairs[:, 0] + 16 * pairs[:, 1]).astype(np.uint8).tobytes()
    rows = np.array(
        [[integers[r, j] * np.float32(scales[r, j // block]) for j in range(WIDTH)] for r in range(ROWS)]
    )
    return bytes(SKIP) + stored + scales.tobytes(), rows.astype(np.float32)


def write(directory: Path, *stored_bits: int, **changes: Any) -> tuple[Artifact, np.ndarray]:
    """An artifact of a table with a piece of `ROWS` rows for each of the bits, and the rows."""
    content, pieces, rows = b"", [], []
    for bits in stored_bits:
        block = 4 if bits == 4 else WIDTH
        values = len(content) + SKIP
        piece: dict[str, Any] = {
            "rows": ROWS,
            "bits": bits,
            "block": block,
            "file": "coreml/embedding.bin",
            "values_offset": values,
            "scales_offset": None if bits > 8 else values + ROWS * WIDTH * bits // 8,
            "scales_dtype": None if bits > 8 else "float16",
        }
        more, found = table(bits, block)
        content += more
        pieces.append(piece | changes)
        rows.append(found)
    facts = {"width": WIDTH, "scale": 3.5, "image_id": IMAGE, "pieces": pieces}
    root = write_artifact(directory, GOLDEN, dataclasses.replace(ENTRY, program="decoder.mlpackage"))
    shutil.rmtree(root / "decoder.mlpackage")
    (root / "coreml").mkdir()
    (root / "coreml/embedding.bin").write_bytes(content)
    (root / "coreml/embedding.json").write_text(json.dumps(facts))
    manifest = read_manifest(root)
    files = [file_entry(root, f"coreml/embedding.{kind}") for kind in ("bin", "json")]
    files += [entry for entry in manifest.files if not entry.path.startswith("decoder.mlpackage")]
    manifest = dataclasses.replace(manifest, components={"embed": ENTRY}, files=tuple(files))
    return Artifact(directory=root, manifest=manifest), np.concatenate(rows)


@pytest.mark.parametrize("bits", [(4,), (8,), (16,), (32,), (8, 4), (4, 8, 4)])
def test_rows_are_what_the_layout_says(tmp_path: Path, bits: tuple[int, ...]) -> None:
    artifact, rows = write(tmp_path / "a", *bits)
    session = open_session(artifact, "embed")
    assert isinstance(session, EmbeddingRows)
    ids = np.array([[9, 0, 0, 3, len(rows) - 1, len(rows) - ROWS, 9]])
    found = session.run({"input_ids": ids})["inputs_embeds"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows[ids] * np.float32(3.5))
    written = np.empty_like(found)
    session.run_into({"input_ids": ids}, {"inputs_embeds": written})
    assert (written == found).all()
    assert session.load_seconds > 0
    session.close()
    with pytest.raises(EdgeError, match="component 'embed' is closed"):
        session.run({"input_ids": ids})


def test_image_features_take_their_places_unscaled(tmp_path: Path) -> None:
    artifact, rows = write(tmp_path / "a", 8)
    session = EmbeddingRows(artifact, "embed")
    features = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    ids = np.array([[1, IMAGE, IMAGE, 2]])
    found = session.run({"input_ids": ids, "image_features": features})["inputs_embeds"][0]
    assert (found[1:3] == features).all()
    np.testing.assert_array_equal(found[[0, 3]], rows[[1, 2]] * np.float32(3.5))
    with pytest.raises(EdgeError, match="2 places of image tokens and 1 image features"):
        session.run({"input_ids": ids, "image_features": features[:1]})
    with pytest.raises(EdgeError, match="2 places of image tokens and 0 image features"):
        session.run({"input_ids": ids})
    with pytest.raises(EdgeError, match="0 places of image tokens and 2"):
        session.run({"input_ids": ids[:, :1], "image_features": features})


@pytest.mark.parametrize("token", [-1, ROWS])
def test_an_id_outside_the_table_is_refused(tmp_path: Path, token: int) -> None:
    artifact, _ = write(tmp_path / "a", 4)
    with pytest.raises(EdgeError, match=rf"input_ids reach .*{token}.* has 10 rows"):
        EmbeddingRows(artifact, "embed").run({"input_ids": np.array([[3, token]])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "not to the form"),
        ({"more": 1}, "not to the form"),
        ({"rows": 0}, "not to the form"),
        ({"block": 0}, "not to the form"),
        ({"block": 3}, "not to the form"),
        ({"scales_dtype": None}, "not to the form"),
        ({"scales_offset": None}, "not to the form"),
        ({"rows": 400}, "should end at byte .* of a file of"),
        ({"scales_offset": 1 << 20}, "should end at byte"),
        ({"values_offset": -8}, "should end at byte"),
        ({"file": "../secret"}, "lists no file"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    artifact, _ = write(tmp_path / "a", 4, **changes)
    with pytest.raises(ArtifactError, match=message):
        EmbeddingRows(artifact, "embed")


@pytest.mark.parametrize("changes", [{"width": 0}, {"width": -8}, {"scale": float("nan")}])
def test_a_table_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    artifact, _ = write(tmp_path / "a", 8)
    path = artifact.path("coreml/embedding.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtifactError, match="not to the form"):
        EmbeddingRows(artifact, "embed")
