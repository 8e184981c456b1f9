import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgemma_benchmarks.bundle import ReferenceBundle, open_bundle, write_bundle
from medgemma_benchmarks.bundle_record import BundleError, ReferencePrompt
from medgemma_runtime.images import medsiglip_processor
from tests.benchmarks.tiny_bundle import (
    IMAGES,
    LABELS,
    PRODUCER,
    arrays_of,
    tiny_opened,
    write_packing_bundle,
    write_tiny_bundle,
)
from tests.runtime import tiny_artifact as tiny

pytest.importorskip("safetensors")


def edit_record(directory: Path, **changes: object) -> None:
    path = directory / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = write_tiny_bundle(tmp_path / "reference")
    opened = open_bundle(tmp_path / "reference")
    assert opened.record == written.record
    assert opened.record.producer == PRODUCER
    assert opened.record.labels == LABELS
    for name, array in arrays_of(IMAGES).items():
        np.testing.assert_array_equal(opened.arrays[name], array)
        assert opened.arrays[name].dtype == array.dtype
    for image, written_image in zip(opened.record.images, IMAGES, strict=True):
        np.testing.assert_array_equal(opened.rgb(image), written_image.rgb)
        assert image.sha256 == hashlib.sha256(written_image.rgb.tobytes()).hexdigest()
    assert opened.sha256 == hashlib.sha256((tmp_path / "reference/bundle.json").read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_an_existing_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    with pytest.raises(BundleError, match="exists"):
        write_tiny_bundle(tmp_path / "reference")
    assert list((tmp_path / "reference").iterdir()) == []


def test_an_interrupted_recording_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tiny_bundle(tmp_path / "reference")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"logits": np.zeros((3, 2), np.float32)}, r"logits must be float32 \[N, M\] = \[3, 3\]"),
        ({"logits": np.zeros((3, 3))}, "is float64"),
        ({"text.input_ids": np.zeros((3, 64), np.int32)}, "text.input_ids must be int64"),
        ({"image.pixel_values": np.zeros((3, 3, 8, 16), np.float32)}, r"\[3, 3, 16, 16\]"),
        ({"text.pooler_output": np.zeros((3, 11), np.float32)}, r"= \[3, 12\] and is float32 \[3, 11\]"),
        ({"image.pooler_output": np.full((3, 12), np.nan, np.float32)}, "36 values that are NaN"),
        ({"image.hidden": np.zeros(3, np.float32)}, "unknown: image.hidden"),
    ],
)
def test_arrays_that_do_not_fit_are_not_written(tmp_path: Path, arrays, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        write_tiny_bundle(tmp_path / "reference", arrays=arrays)
    assert list(tmp_path.iterdir()) == []


def test_names_must_be_unique_and_fit_a_file(tmp_path: Path) -> None:
    twice = (IMAGES[0], IMAGES[0], IMAGES[2])
    with pytest.raises(BundleError, match="image names must be unique"):
        write_tiny_bundle(tmp_path / "reference", images=twice)
    for name in ("../red", "a\\b", ".hidden", "c:red"):
        images = (replace(IMAGES[0], name=name), *IMAGES[1:])
        with pytest.raises(BundleError, match="cannot be a file name"):
            write_tiny_bundle(tmp_path / "reference", images=images)


def test_only_a_packing_reference_names_a_plan(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="packing reference names its plan"):
        write_tiny_bundle(tmp_path / "reference", kind="packing")
    with pytest.raises(BundleError, match="no other reference has one"):
        write_tiny_bundle(tmp_path / "reference", plan_sha256="1" * 64)


def test_a_packing_reference_carries_rounded_outputs_and_exact_programs(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int8")
    with pytest.raises(BundleError, match="packing reference has exact programs"):
        write_tiny_bundle(tmp_path / "reference", kind="packing", plan_sha256="1" * 64)
    with pytest.raises(BundleError, match=r"missing or unknown: text\.rounded_output"):
        write_packing_bundle(
            tmp_path / "reference", artifact, programs={"image": artifact.directory / "image.onnx"}
        )
    bundle = write_packing_bundle(tmp_path / "reference", artifact)
    assert bundle.record.programs == ("image", "text")
    for name in bundle.record.programs:
        assert bundle.program(name).read_bytes() == (artifact.directory / f"{name}.onnx").read_bytes()
    bundle.program("text").write_bytes(b"another program")
    with pytest.raises(BundleError, match=r"programs/text\.onnx in reference is truncated or altered"):
        open_bundle(tmp_path / "reference")


@pytest.mark.parametrize("name", ["arrays.safetensors", "images/green.png"])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_found(tmp_path: Path, name: str) -> None:
    write_tiny_bundle(tmp_path / "reference")
    path = tmp_path / "reference" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} in reference is truncated or altered"):
        open_bundle(tmp_path / "reference")
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match="truncated or altered"):
        open_bundle(tmp_path / "reference")
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing from reference"):
        open_bundle(tmp_path / "reference")


def test_a_file_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "reference")
    (tmp_path / "reference/notes.txt").write_text("?")
    with pytest.raises(BundleError, match=r"notes\.txt is in reference and not in its bundle\.json"):
        open_bundle(tmp_path / "reference")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema version 2 and this program reads version 1"),
        ({"schema_version": None}, "schema version None"),
        ({"kind": "guess"}, "not to the schema: kind"),
        ({"extra": 1}, "not to the schema: extra"),
        ({"labels": []}, "label names must be unique and at least one"),
        ({"files": []}, "does not list the files it needs"),
        ({"timings": {"image": {"p50_ms": float("nan"), "runs": 1}}}, "not to the schema: timings"),
    ],
)
def test_a_record_that_is_not_to_the_schema_is_refused(tmp_path: Path, changes, words: str) -> None:
    write_tiny_bundle(tmp_path / "reference")
    edit_record(tmp_path / "reference", **changes)
    with pytest.raises(BundleError, match=words):
        open_bundle(tmp_path / "reference")


def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(tmp_path)
    for content in ("[]", "{", "\udcff"):
        (tmp_path / "bundle.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(BundleError, match="not a JSON object"):
            open_bundle(tmp_path)


def test_a_record_whose_arrays_are_of_another_one_is_refused(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "reference")
    record = json.loads((tmp_path / "reference/bundle.json").read_text())
    edit_record(tmp_path / "reference", labels=record["labels"][:2])
    with pytest.raises(BundleError, match=r"text.input_ids must be int64 \[M, L\] = \[2, 64\]"):
        open_bundle(tmp_path / "reference")


def test_pixels_of_another_image_are_found(tmp_path: Path) -> None:
    opened = write_tiny_bundle(tmp_path / "reference")
    stranger = replace(opened.record.images[0], sha256="0" * 64)
    with pytest.raises(BundleError, match=r"images/red\.png do not have the recorded SHA-256"):
        opened.rgb(stranger)


def generative(out: Path, *, prompts: tuple[ReferencePrompt, ...], **changes: Any) -> ReferenceBundle:
    """Two prompts of five and four tokens, the first about an image, of a model of three tokens."""
    arguments: dict[str, Any] = {
        "kind": "generative",
        "images": IMAGES[:1],
        "labels": (),
        "prompts": prompts,
        "embedding_scale": 1.5,
    }
    arrays = {
        "decoder.input_ids": np.arange(9),
        "decoder.hidden_states": np.ones((5, 2), np.float32),
        "decoder.head": np.ones((3, 2), np.float32),
        "vision.pixel_values": np.zeros((1, 3, tiny.SIZE, tiny.SIZE), np.float32),
        "vision.image_features": np.ones((2, 2), np.float32),
    }
    whole = arguments | changes
    return write_bundle(
        out,
        model_id="test:tiny",
        revision=None,
        weights_sha256="0" * 64,
        plan_sha256=whole.pop("plan_sha256", None),
        producer=PRODUCER,
        image=whole.pop("image", medsiglip_processor(tiny.SIZE)),
        timings={},
        arrays=arrays | whole.pop("arrays", {}),
        **whole,
    )


def prompt(name: str, *, given: int, tokens: int, images: tuple[str, ...] = ()) -> ReferencePrompt:
    return ReferencePrompt(
        name=name,
        images=images,
        question="What?" if images else None,
        text="text",
        source="tests",
        licence="CC0",
        tokens=tokens,
        given_tokens=given,
    )


PROMPTS = (prompt("asked", given=3, tokens=5, images=("red",)), prompt("text", given=1, tokens=4))


def test_a_generative_reference_comes_back(tmp_path: Path) -> None:
    bundle = generative(tmp_path / "reference", prompts=PROMPTS)
    assert bundle.record.prompts == PROMPTS
    assert bundle.record.embedding_scale == 1.5
    assert [p.predictions for p in bundle.record.prompts] == [2, 3]
    np.testing.assert_array_equal(bundle.rgb(bundle.record.images[0]), IMAGES[0].rgb)


def test_a_generative_reference_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "reference"
    hidden = {"decoder.hidden_states": np.ones((4, 2), np.float32)}
    with pytest.raises(BundleError, match=r"hidden_states must be float32 \[T, D\] = \[5, 2\]"):
        generative(out, prompts=PROMPTS, arrays=hidden)
    with pytest.raises(BundleError, match="prompt names must be unique"):
        generative(out, prompts=(PROMPTS[0], PROMPTS[0]))
    with pytest.raises(BundleError, match="prompt names must be unique and at least one"):
        generative(out, prompts=())
    with pytest.raises(BundleError, match="the images of a generative reference are those of its prompts"):
        generative(out, prompts=PROMPTS[1:])
    with pytest.raises(BundleError, match="states its embedding scale"):
        generative(out, prompts=PROMPTS, embedding_scale=None)
    with pytest.raises(BundleError, match="an image spec goes with images"):
        generative(out, prompts=PROMPTS, image=None)
    with pytest.raises(BundleError, match="prompts belong to a generative reference"):
        generative(out, prompts=PROMPTS, labels=LABELS)
    with pytest.raises(BundleError, match="no other reference has one"):
        generative(out, prompts=PROMPTS, plan_sha256="0" * 64)
    with pytest.raises(BundleError, match="prompts belong to a generative reference"):
        write_tiny_bundle(out, prompts=PROMPTS[1:])
    assert not out.exists()


@pytest.mark.parametrize(("given", "tokens"), [(0, 3), (3, 3), (4, 3)])
def test_something_is_given_and_something_predicted(given: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"of the {tokens} tokens of 'x', {given} are given"):
        prompt("x", given=given, tokens=tokens)
