import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgemma_runtime.errors import ArtifactError
from medgemma_runtime.manifest import (
    MANIFEST_NAME,
    AdapterInfo,
    FileEntry,
    PromptSpec,
    TensorSpec,
    read_manifest,
    write_manifest,
)
from tests.runtime.tiny_artifact import text_spec, tiny_manifest, write_tiny_artifact


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_artifact(tmp_path / "artifact")


def content_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = content_of(directory)
    change(content)
    (directory / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")


def test_reads_back_what_was_written(directory: Path) -> None:
    assert read_manifest(directory) == tiny_manifest(directory)


def test_an_adapter_is_read_back_and_may_be_left_out(directory: Path) -> None:
    """Manifests that were written before there were adapters have no such key."""
    manifest = tiny_manifest(directory)
    model = dataclasses.replace(manifest.model, adapter=AdapterInfo(name="my-lora", sha256="a" * 64))
    write_manifest(dataclasses.replace(manifest, model=model), directory)
    assert read_manifest(directory).model == model
    rewrite(directory, lambda content: content["model"].pop("adapter"))
    assert read_manifest(directory).model.adapter is None


def test_keys_are_in_the_order_of_the_schema(directory: Path) -> None:
    keys = list(content_of(directory))
    assert keys[:2] == ["schema_version", "target"]
    assert keys[-1] == "files"


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1]])
def test_refuses_any_other_version(directory: Path, version: object) -> None:
    rewrite(directory, lambda content: content.update(schema_version=version))
    with pytest.raises(ArtifactError, match=r"schema version .* and this runtime reads version 1"):
        read_manifest(directory)


def test_refuses_a_missing_version(directory: Path) -> None:
    rewrite(directory, lambda content: content.pop("schema_version"))
    with pytest.raises(ArtifactError, match="schema version None"):
        read_manifest(directory)


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda c: c.update(surprise=1), "surprise"),
    "unknown nested key": (lambda c: c["image"].update(gamma=1.0), "image.gamma"),
    "unknown key in a list": (lambda c: c["files"][0].update(mode=7), "files.0.mode"),
    "missing key": (lambda c: c.pop("text"), "text"),
    "missing nested key": (lambda c: c["model"].pop("licence"), "model.licence"),
    "string for a number": (lambda c: c["image"].update(height="448"), "image.height"),
    "float for an integer": (lambda c: c["image"].update(height=448.0), "image.height"),
    "boolean for an integer": (lambda c: c["text"].update(pad_id=True), "text.pad_id"),
    "number for a string": (lambda c: c["model"].update(id=7), "model.id"),
    "null for an object": (lambda c: c.update(model=None), "model"),
    "unknown choice": (lambda c: c["image"].update(fit="crop"), "image.fit"),
    "unknown target": (lambda c: c.update(target="tflite"), "target"),
    "unknown dtype": (
        lambda c: c["components"]["text"]["inputs"][0].update(dtype="string"),
        "components.text.inputs.0.dtype",
    ),
    "two numbers for three": (lambda c: c["image"].update(std=[0.5, 0.5]), "image.std"),
    "infinity": (lambda c: c["similarity"].update(scale=float("inf")), "similarity.scale"),
    "nan": (lambda c: c["similarity"].update(bias=float("nan")), "similarity.bias"),
    "empty size": (
        lambda c: c["components"]["image"]["inputs"][0].update(shape=["batch", 0]),
        "dimension 0",
    ),
    "unnamed dimension": (
        lambda c: c["components"]["image"]["inputs"][0].update(shape=[""]),
        "dimension ''",
    ),
    "adapter without a hash": (lambda c: c["model"].update(adapter={"name": "x"}), "model.adapter.sha256"),
    "adapter with a short hash": (
        lambda c: c["model"].update(adapter={"name": "x", "sha256": "ab"}),
        "64 lower-case",
    ),
    "adapter by name alone": (lambda c: c["model"].update(adapter="x"), "model.adapter"),
    "no components": (lambda c: c.update(components={}), "components is empty"),
    "no pixels": (lambda c: c["image"].update(width=0), "16 x 0 pixels"),
    "division by zero": (lambda c: c["image"].update(std=[0.5, 0.0, 0.5]), "above zero"),
    "no room for tokens": (lambda c: c["text"].update(length=1), "leaves no room"),
    "negative id": (lambda c: c["text"].update(pad_id=-1), "not be negative"),
    "negative size": (lambda c: c["files"][0].update(size_bytes=-1), "size_bytes"),
    "short hash": (lambda c: c["files"][0].update(sha256="ab"), "64 lower-case"),
    "upper-case hash": (lambda c: c["files"][0].update(sha256="A" * 64), "64 lower-case"),
    "file twice": (lambda c: c["files"].append(c["files"][0]), "lists a path twice"),
    "unlisted program": (
        lambda c: c["components"]["image"].update(program="other.onnx"),
        "'other.onnx' is named and not listed",
    ),
    "program outside": (
        lambda c: c["components"]["image"].update(program="../image.onnx"),
        "named and not listed",
    ),
    "unlisted tokenizer": (
        lambda c: c["text"].update(tokenizer="/etc/passwd"),
        "'/etc/passwd' is named and not listed",
    ),
    "another plan": (lambda c: c["quantization"].update(plan_sha256="0" * 64), "plan_sha256"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_refuses_what_is_not_to_the_schema(directory: Path, name: str) -> None:
    change, words = BREAKS[name]
    rewrite(directory, change)
    with pytest.raises(ArtifactError, match="is not to the schema") as caught:
        read_manifest(directory)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        *("../x", "a/../../x", "a/..", "/etc/passwd", "//x", "", ".", "./x", "a//b", "a/", "a/./b"),
        *("a\\b", "..\\x", "C:x", "C:\\x", "a\0b", MANIFEST_NAME),
    ],
)
def test_refuses_a_file_path_that_could_leave_the_artifact(path: str) -> None:
    with pytest.raises(ValueError, match="no plain relative path"):
        FileEntry(path=path, size_bytes=0, sha256="0" * 64)


@pytest.mark.parametrize("path", ["x", "a/b.onnx", "..x", "a..b", ".hidden", "a b", "é.onnx"])
def test_takes_a_plain_relative_path(path: str) -> None:
    assert FileEntry(path=path, size_bytes=0, sha256="0" * 64).path == path


def test_a_listed_path_outside_is_refused_on_reading(directory: Path) -> None:
    rewrite(directory, lambda content: content["files"][0].update(path="../image.onnx"))
    with pytest.raises(ArtifactError, match="no plain relative path"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ("1", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('{"schema_version": 1}', "is not to the schema"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' occurs twice"),
    ],
)
def test_refuses_what_is_no_manifest(directory: Path, text: str, words: str) -> None:
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=words):
        read_manifest(directory)


def test_refuses_a_repeated_key_deep_inside(directory: Path) -> None:
    path = directory / MANIFEST_NAME
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"fit":', '"fit": "pad", "fit":'), encoding="utf-8")
    with pytest.raises(ArtifactError, match="'fit' occurs twice"):
        read_manifest(directory)


def test_refuses_bytes_that_are_no_utf8(directory: Path) -> None:
    (directory / MANIFEST_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match="is not UTF-8"):
        read_manifest(directory)


def test_refuses_an_enormous_file_without_reading_it(directory: Path) -> None:
    with (directory / MANIFEST_NAME).open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file: takes no space
    with pytest.raises(ArtifactError, match="too large to be a manifest"):
        read_manifest(directory)


def test_refuses_a_directory_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


def test_refuses_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a directory"):
        read_manifest(tmp_path / "absent")


def test_refuses_a_manifest_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_core_ml_package_is_a_directory_of_listed_files(directory: Path) -> None:
    def use_package(content: dict[str, Any]) -> None:
        entry = content["files"][0]
        content["files"].append(entry | {"path": "image.mlpackage/Data/model.mlmodel"})
        content["components"]["image"]["program"] = "image.mlpackage"

    rewrite(directory, use_package)
    assert read_manifest(directory).components["image"].program == "image.mlpackage"


def test_writes_no_manifest_that_could_not_be_read(directory: Path, tmp_path: Path) -> None:
    manifest = tiny_manifest(directory)
    wrong = dataclasses.replace(manifest, precision="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision"):
        write_manifest(wrong, tmp_path)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_text_outside_ascii_stays_readable(directory: Path) -> None:
    manifest = tiny_manifest(directory)
    model = dataclasses.replace(manifest.model, intended_use="Für Prüfungen")
    write_manifest(dataclasses.replace(manifest, model=model), directory)
    assert "Für Prüfungen" in (directory / MANIFEST_NAME).read_text(encoding="utf-8")
    assert read_manifest(directory).model.intended_use == "Für Prüfungen"


def test_classes_check_themselves_when_a_manifest_is_made() -> None:
    with pytest.raises(ValueError, match="dimension 0"):
        TensorSpec(name="x", dtype="float32", shape=(1, 0), description="")
    with pytest.raises(ValueError, match="leaves no room"):
        dataclasses.replace(text_spec(), length=0)


def prompt_spec() -> PromptSpec:
    return PromptSpec(
        tokenizer="tokenizer.json",
        template="gemma3",
        context=4096,
        bos_id=2,
        stop_ids=(1, 106),
        image_id=262144,
        tokens_per_image=256,
        window=1024,
        source="tests",
    )


def test_reads_back_a_prompt(directory: Path) -> None:
    manifest = dataclasses.replace(tiny_manifest(directory), prompt=prompt_spec())
    write_manifest(manifest, directory)
    assert read_manifest(directory) == manifest
    rewrite(directory, lambda content: content["prompt"].update(tokenizer="other.json"))
    with pytest.raises(ArtifactError, match=r"'other\.json' is named and not listed"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 1}, "leaves no room"),
        ({"stop_ids": ()}, "no answer would end"),
        ({"stop_ids": (1, -1)}, "different and not negative"),
        ({"stop_ids": (1, 1)}, "different and not negative"),
        ({"image_id": 2}, "different and not negative"),
        ({"image_id": None}, "contradict"),
        ({"tokens_per_image": 0}, "contradict"),
        ({"tokens_per_image": -1}, "contradict"),
    ],
)
def test_refuses_a_prompt_that_contradicts_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(prompt_spec(), **changes)
    text_only = dataclasses.replace(prompt_spec(), image_id=None, tokens_per_image=0)
    assert text_only.image_id is None
