"""Each gate is seen passing on the intact artifact and failing on one that was broken on purpose."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgemma_benchmarks import parity, parity_inputs
from medgemma_benchmarks.parity import check_parity
from medgemma_benchmarks.parity_inputs import ParityError
from medgemma_benchmarks.parity_report import ParityReport
from medgemma_benchmarks.results import read_result, to_json
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Similarity
from tests.benchmarks.tiny_bundle import (
    IMAGES,
    LABELS,
    PRODUCER,
    SCALE,
    arrays_of,
    broken_image,
    decoded_image,
    rewritten,
    tiny_opened,
    write_packing_bundle,
    write_tiny_bundle,
)
from tests.runtime import tiny_artifact as tiny

pytest.importorskip("safetensors")
pytest.importorskip("psutil")


def failed(report: ParityReport) -> set[tuple[str, str, str]]:
    return {(c.question, c.subject, c.metric) for c in report.checks if c.verdict == "FAIL"}


def value(report: ParityReport, question: str, subject: str, metric: str) -> float | None:
    (check,) = [c for c in report.checks if (c.question, c.subject, c.metric) == (question, subject, metric)]
    return check.value


def plan_of(directory: Path) -> str:
    return tiny.file_entry(directory, "quant_plan.json").sha256


def test_the_intact_float_artifact_passes_every_gate_of_lowering(tmp_path: Path) -> None:
    report = check_parity(tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference"))
    assert (report.question, report.verdict) == ("lowering", "PASS")
    assert [(c.question, c.subject, c.metric) for c in report.checks] == [
        ("pixels", "image", "differing_uint8"),
        ("pixels", "image", "max_abs_error"),
        ("tokens", "text", "differing_ids"),
        ("lowering", "image", "max_abs_error"),
        ("lowering", "text", "max_abs_error"),
        ("lowering", "zero-shot", "logit_error"),
        ("lowering", "zero-shot", "agreement"),
        ("lowering", "zero-shot", "near_tie_share"),
        ("lowering", "end-to-end", "logit_error"),
        ("lowering", "end-to-end", "agreement"),
        ("lowering", "end-to-end", "near_tie_share"),
    ]
    assert report.images is not None
    for image, expected in zip(report.images, IMAGES, strict=True):
        assert image.predicted == image.reference_predicted == image.label == expected.name
        # Cosines 1, -1/3 and -1/3 at a scale of 10.
        assert image.probability == pytest.approx(1 / (1 + 2 * np.exp(-SCALE * 4 / 3)), abs=1e-6)
        assert image.margin == pytest.approx(SCALE * 4 / 3, abs=1e-4)
        assert image.agreement == "SAME"
        assert image.thumbnail.startswith("data:image/png;base64,")


def test_the_report_says_what_was_compared_with_what(tmp_path: Path) -> None:
    producer = replace(PRODUCER, device="cuda", device_name="NVIDIA H100", dtype="float32")
    artifact = tiny_opened(tmp_path / "artifact")
    bundle = write_tiny_bundle(tmp_path / "reference", producer=producer)
    report = check_parity(artifact, bundle, threads=1)
    assert (report.reference.device, report.reference.device_name) == ("cuda", "NVIDIA H100")
    assert (report.reference.dtype, report.reference.bundle_sha256) == ("float32", bundle.sha256)
    assert report.artifact.manifest_sha256 == artifact.manifest_sha256
    assert report.device.threads == 1


@pytest.mark.parametrize("operators", [("Tanh",), ("Add",), ("Abs",), ("Add", "Add")])
def test_a_wrong_lowering_fails_on_the_recorded_inputs(tmp_path: Path, operators: tuple[str, ...]) -> None:
    artifact = broken_image(tmp_path / "artifact", *operators)
    report = check_parity(artifact, write_tiny_bundle(tmp_path / "reference"))
    assert report.verdict == "FAIL"
    assert ("lowering", "image", "max_abs_error") in failed(report)
    assert not {"pixels", "tokens"} & {question for question, _, _ in failed(report)}
    assert ("lowering", "text", "max_abs_error") not in failed(report)


def test_a_doubled_embedding_points_the_right_way_and_fails_all_the_same(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "reference")
    for precision, question in (("fp32", "lowering"), ("int8", "scheme"), ("int4", "scheme")):
        artifact = broken_image(tmp_path / precision, "Add", precision=precision)
        report = check_parity(artifact, bundle)
        assert report.components["image"].cosine_min == pytest.approx(1.0)
        metric = "max_abs_error" if question == "lowering" else "relative_error"
        assert failed(report) == {(question, "image", metric)}


def test_swapped_images_fail(tmp_path: Path) -> None:
    arrays = arrays_of(IMAGES)
    swapped = {"image.pooler_output": arrays["image.pooler_output"][[1, 0, 2]]}
    report = check_parity(
        tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference", arrays=swapped)
    )
    assert failed(report) == {("lowering", "image", "max_abs_error")}


def test_swapped_towers_fail(tmp_path: Path) -> None:
    arrays = arrays_of(IMAGES)
    swapped = {
        "image.pooler_output": arrays["text.pooler_output"],
        "text.pooler_output": arrays["image.pooler_output"],
    }
    report = check_parity(
        tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference", arrays=swapped)
    )
    assert {("lowering", "image", "max_abs_error"), ("lowering", "text", "max_abs_error")} <= failed(report)


def test_permuted_labels_fail(tmp_path: Path) -> None:
    logits = arrays_of(IMAGES)["logits"][:, [1, 2, 0]]
    report = check_parity(
        tiny_opened(tmp_path / "artifact"),
        write_tiny_bundle(tmp_path / "reference", arrays={"logits": logits}),
    )
    assert failed(report) == {
        ("lowering", subject, metric)
        for subject in ("zero-shot", "end-to-end")
        for metric in ("logit_error", "agreement")
    }
    assert value(report, "lowering", "end-to-end", "agreement") == 0.0
    assert report.images is not None
    assert {image.agreement for image in report.images} == {"DIFFERENT"}


@pytest.mark.parametrize("similarity", [Similarity(scale=np.log(10), bias=-5), Similarity(scale=10, bias=5)])
def test_a_wrong_scale_or_bias_fails_though_every_label_agrees(
    tmp_path: Path, similarity: Similarity
) -> None:
    artifact = tiny_opened(tmp_path / "artifact", similarity=similarity)
    report = check_parity(artifact, write_tiny_bundle(tmp_path / "reference"))
    assert failed(report) == {
        ("lowering", "zero-shot", "logit_error"),
        ("lowering", "end-to-end", "logit_error"),
    }


@pytest.mark.parametrize(("operators", "words"), [(("Log",), "NaN"), (("Sub",), "length zero")])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_outputs_without_a_metric_fail_and_are_never_zero(
    tmp_path: Path, precision: str, operators: tuple[str, ...], words: str
) -> None:
    artifact = broken_image(tmp_path / "artifact", *operators, precision=precision)
    report = check_parity(artifact, write_tiny_bundle(tmp_path / "reference"))
    assert report.verdict == "FAIL"
    assert words in (report.components["image"].undefined or "")
    assert report.components["image"].cosine_min is None
    judged = {c.subject: c for c in report.checks if c.question in ("lowering", "scheme")}
    for subject in ("image", "zero-shot", "end-to-end"):
        assert (judged[subject].value, judged[subject].verdict) == (None, "FAIL")
    cause = (
        "component 'image' gave NaN"
        if operators == ("Log",)
        else "component 'image' gave a vector of length 0"
    )
    for subject in ("zero-shot", "end-to-end"):
        assert judged[subject].detail.startswith(cause)
    assert report.images is not None
    assert {(image.predicted, image.probability) for image in report.images} == {(None, None)}
    json.loads(to_json(report), parse_constant=pytest.fail)


def test_only_a_lack_of_direction_becomes_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runtime refuses for another reason is an error, not a row of NaN without its cause."""

    def refuse(self: object, texts: object) -> None:
        raise EdgeError("the tokenizer is damaged")

    monkeypatch.setattr(parity.Embedder, "embed_texts", refuse)
    with pytest.raises(EdgeError, match="the tokenizer is damaged"):
        check_parity(tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference"))


def test_one_pixel_one_level_off_fails_as_pixels_and_not_as_lowering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact = parity_inputs.resize

    def off_by_one(rgb: np.ndarray, spec: object) -> np.ndarray:
        resized = intact(rgb, spec).copy()
        resized[3, 5, 0] ^= 1
        return resized

    monkeypatch.setattr(parity_inputs, "resize", off_by_one)
    report = check_parity(tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference"))
    assert failed(report) == {("pixels", "image", "differing_uint8"), ("pixels", "image", "max_abs_error")}
    assert value(report, "pixels", "image", "differing_uint8") == len(IMAGES)


def test_another_image_spec_fails_as_pixels_and_names_the_difference(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    assert artifact.manifest.image is not None
    bilinear = replace(artifact.manifest.image, resample="bilinear")
    artifact = rewritten(tmp_path / "artifact", image=bilinear)
    noise = replace(IMAGES[0], rgb=np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    bundle = write_tiny_bundle(tmp_path / "reference", images=(noise, *IMAGES[1:]))
    report = check_parity(artifact, bundle)
    assert ("pixels", "image", "differing_uint8") in failed(report)
    assert ("lowering", "image", "max_abs_error") not in failed(report)
    # End to end sees it, as it must; the recorded inputs do not.
    assert ("lowering", "end-to-end", "logit_error") in failed(report)
    assert ("lowering", "zero-shot", "logit_error") not in failed(report)
    assert "red; resample: artifact bilinear, reference bicubic" in report.checks[0].detail


def test_a_shift_too_small_for_uint8_is_seen_in_the_floats(tmp_path: Path) -> None:
    pixels = arrays_of(IMAGES)["image.pixel_values"] + np.float32(1e-4)
    report = check_parity(
        tiny_opened(tmp_path / "artifact"),
        write_tiny_bundle(tmp_path / "reference", arrays={"image.pixel_values": pixels}),
    )
    assert ("pixels", "image", "max_abs_error") in failed(report)
    assert ("pixels", "image", "differing_uint8") not in failed(report)


def test_another_id_fails_as_tokens(tmp_path: Path) -> None:
    ids = arrays_of(IMAGES)["text.input_ids"].copy()
    ids[2, 3:] = 0  # padding with <pad> instead of </s>
    report = check_parity(
        tiny_opened(tmp_path / "artifact"),
        write_tiny_bundle(tmp_path / "reference", arrays={"text.input_ids": ids}),
    )
    assert value(report, "tokens", "text", "differing_ids") == tiny.LENGTH - 3
    (check,) = [c for c in report.checks if c.question == "tokens"]
    assert (check.verdict, check.detail) == ("FAIL", "blue")


def near_tie_setup(directory: Path, gap: float) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """An image half red and half green, whose reference logits say green by `gap`."""
    images = (decoded_image("both", "red", "green"), *IMAGES)
    arrays = arrays_of(images)
    arrays["logits"] = arrays["logits"].copy()
    arrays["logits"][0, 0] = arrays["logits"][0, 1] - gap
    return arrays, images


def test_a_near_tie_of_the_reference_is_neither_pass_nor_fail(tmp_path: Path) -> None:
    # The artifact says red first of two equal logits.
    arrays, images = near_tie_setup(tmp_path, gap=0.05)
    bundle = write_tiny_bundle(tmp_path / "reference", images=images, arrays=arrays)
    report = check_parity(tiny_opened(tmp_path / "artifact", precision="int8"), bundle)
    assert report.verdict == "NEAR_TIE"
    (check,) = [c for c in report.checks if (c.subject, c.metric) == ("end-to-end", "agreement")]
    assert (check.verdict, check.value, check.detail) == (
        "NEAR_TIE",
        1.0,
        "3 of 4 decided; 1 near tie: both",
    )
    assert (report.near_ties, report.tie_margin_logits) == (1, 0.1)
    assert value(report, "scheme", "end-to-end", "near_tie_share") == 0.25
    assert report.images is not None
    assert [image.agreement for image in report.images] == ["NEAR_TIE", "SAME", "SAME", "SAME"]


@pytest.mark.parametrize(("tied", "share"), [(2, 0.4), (5, 1.0)])
def test_too_many_near_ties_fail_though_none_of_them_does(tmp_path: Path, tied: int, share: float) -> None:
    """With every image tied, nothing was decided: that is no result to exit with 0 for."""
    both = tuple(decoded_image(f"both-{number}", "red", "green") for number in range(tied))
    images = (*both, *IMAGES[: 5 - tied])
    arrays = arrays_of(images)
    arrays["logits"] = arrays["logits"].copy()
    arrays["logits"][:tied, 0] = arrays["logits"][:tied, 1] - 0.05
    bundle = write_tiny_bundle(tmp_path / "reference", images=images, arrays=arrays)
    report = check_parity(tiny_opened(tmp_path / "artifact", precision="int8"), bundle)
    assert report.verdict == "FAIL"
    assert failed(report) == {("scheme", where, "near_tie_share") for where in ("zero-shot", "end-to-end")}
    assert value(report, "scheme", "end-to-end", "near_tie_share") == share
    assert value(report, "scheme", "end-to-end", "agreement") == (None if tied == len(images) else 1.0)


def test_beyond_the_tie_margin_the_same_difference_fails(tmp_path: Path) -> None:
    arrays, images = near_tie_setup(tmp_path, gap=0.2)
    bundle = write_tiny_bundle(tmp_path / "reference", images=images, arrays=arrays)
    report = check_parity(tiny_opened(tmp_path / "artifact", precision="int8"), bundle)
    assert {subject for _, subject, metric in failed(report) if metric == "agreement"} == {
        "zero-shot",
        "end-to-end",
    }
    assert value(report, "scheme", "zero-shot", "agreement") == pytest.approx(3 / 4)


def test_a_near_tie_does_not_excuse_another_image(tmp_path: Path) -> None:
    arrays, images = near_tie_setup(tmp_path, gap=0.05)
    arrays["logits"][2, 0] += 20
    bundle = write_tiny_bundle(tmp_path / "reference", images=images, arrays=arrays)
    report = check_parity(tiny_opened(tmp_path / "artifact", precision="int8"), bundle)
    assert report.verdict == "FAIL"
    assert value(report, "scheme", "end-to-end", "agreement") == pytest.approx(2 / 3)


def test_packing_is_asked_exactly_and_as_shipped(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int8")
    report = check_parity(artifact, write_packing_bundle(tmp_path / "reference", artifact))
    assert (report.question, report.verdict) == ("packing", "PASS")
    assert [(c.subject, c.metric) for c in report.checks if c.question == "packing"] == [
        ("image", "max_abs_error"),
        ("image", "rounded_cosine_min"),
        ("text", "max_abs_error"),
        ("text", "rounded_cosine_min"),
    ]
    assert (report.zero_shot, report.images) == (None, None)


def test_one_wrong_byte_of_weights_fails_as_packing(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int4")
    bundle = write_packing_bundle(tmp_path / "reference", artifact)
    table = tiny.text_table()
    weights = tmp_path / "artifact/text.onnx.data"
    content = bytearray(weights.read_bytes())
    # One bit in the third byte of a little-endian float32: 1 becomes 1.03, and cosines do not notice.
    content[table.itemsize * (tiny.TOKEN_IDS["▁green"] * tiny.WIDTH) + 2] ^= 0x04
    weights.write_bytes(content)
    report = check_parity(rewritten(tmp_path / "artifact", precision="int4"), bundle)
    assert failed(report) == {("packing", "text", "max_abs_error")}


def test_a_shipped_program_that_computes_something_else_fails_as_packing(tmp_path: Path) -> None:
    intact = tiny_opened(tmp_path / "artifact", precision="int8")
    bundle = write_packing_bundle(tmp_path / "reference", intact)
    # The exact form and the weights are right; the program beside them is not.
    broken = broken_image(tmp_path / "broken", "Neg", precision="int8")
    assert failed(check_parity(broken, bundle)) == {("packing", "image", "rounded_cosine_min")}
    undefined = broken_image(tmp_path / "undefined", "Log", precision="int8")
    report = check_parity(undefined, bundle)
    assert failed(report) == {("packing", "image", "rounded_cosine_min")}
    assert "NaN" in next(c.detail for c in report.checks if c.verdict == "FAIL")


def test_packing_of_one_component_is_checked_alone(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int8")
    exact = arrays_of(IMAGES)
    calls: list[tuple[str, int, int]] = []
    bundle = write_tiny_bundle(
        tmp_path / "reference",
        kind="packing",
        plan_sha256=plan_of(tmp_path / "artifact"),
        programs={"text": artifact.directory / "text.onnx"},
        arrays={"text.rounded_output": exact["text.pooler_output"]},
    )
    report = check_parity(artifact, bundle, progress=lambda *call: calls.append(call))
    assert (list(report.components), list(report.rounded)) == (["text"], ["text"])
    n = 2 * len(LABELS)
    assert [(done, total) for _, done, total in calls] == [(step, n) for step in range(n)]
    image_alone = without(tmp_path / "artifact", "text")
    with pytest.raises(ParityError, match="the artifact has image and the reference holds text"):
        check_parity(image_alone(precision="int8"), bundle)


def test_a_scheme_that_is_too_coarse_fails(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = arrays_of(IMAGES)["image.pooler_output"]
    for noise, precision, passes in ((0.02, "int8", True), (0.1, "int8", False), (0.1, "int4", True)):
        arrays = {
            "image.pooler_output": (image + noise * rng.standard_normal(image.shape)).astype(np.float32)
        }
        place = tmp_path / f"{noise}-{precision}"
        place.mkdir()
        report = check_parity(
            tiny_opened(place / "artifact", precision=precision),
            write_tiny_bundle(place / "reference", arrays=arrays),
        )
        assert (("scheme", "image", "cosine_min") not in failed(report)) is passes


BAD_PAIRS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "another checkpoint": ({}, {"weights_sha256": "7" * 64}, "weights 000000000000 .* weights 777777777777"),
    "a coarse reference": (
        {},
        {"producer": replace(PRODUCER, dtype="bfloat16")},
        "computed in bfloat16, whose own error .* record the reference in float32",
    ),
    "a coarse reference of a scheme": (
        {"precision": "int8"},
        {"producer": replace(PRODUCER, dtype="float16")},
        "computed in float16, whose own error",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, name: str) -> None:
    artifact_changes, bundle_changes, words = BAD_PAIRS[name]
    artifact = tiny_opened(tmp_path / "artifact", **artifact_changes)
    bundle = write_tiny_bundle(tmp_path / "reference", **bundle_changes)
    with pytest.raises(ParityError, match=words):
        check_parity(artifact, bundle)


@pytest.mark.parametrize(
    ("precision", "words"),
    [("int8", "packs plan .* carries plan 999999999999"), ("fp32", "fp32, which packs no integers")],
)
def test_a_packing_reference_of_another_plan_is_refused(tmp_path: Path, precision: str, words: str) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision=precision)
    bundle = write_packing_bundle(tmp_path / "reference", artifact, plan_sha256="9" * 64)
    with pytest.raises(ParityError, match=words):
        check_parity(artifact, bundle)


def without(artifact_directory: Path, component: str) -> Callable[..., object]:
    manifest = tiny.tiny_manifest(artifact_directory)
    components = {name: entry for name, entry in manifest.components.items() if name != component}
    return lambda **changes: rewritten(artifact_directory, components=components, **changes)


@pytest.mark.parametrize(("absent", "present"), [("image", "text"), ("text", "image")])
def test_one_tower_alone_is_checked_without_labels(tmp_path: Path, absent: str, present: str) -> None:
    tiny.write_tiny_artifact(tmp_path / "artifact")
    report = check_parity(without(tmp_path / "artifact", absent)(), write_tiny_bundle(tmp_path / "reference"))
    assert list(report.components) == [present]
    assert (report.zero_shot, report.images, report.verdict) == (None, None, "PASS")


def test_progress_counts_to_its_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    check_parity(
        tiny_opened(tmp_path / "artifact"),
        write_tiny_bundle(tmp_path / "reference"),
        progress=lambda what, done, total: calls.append((what, done, total)),
    )
    # Images: preprocessing, recorded, end to end; captions: recorded, end to end.
    n = 3 * len(IMAGES) + 2 * len(LABELS)
    assert [(done, total) for _, done, total in calls] == [(step, n) for step in range(n)]


def test_a_report_survives_json(tmp_path: Path) -> None:
    report = check_parity(tiny_opened(tmp_path / "artifact"), write_tiny_bundle(tmp_path / "reference"))
    (tmp_path / "parity.json").write_text(to_json(report))
    assert read_result(tmp_path / "parity.json") == [report]
    (tmp_path / "both.json").write_text(to_json([report, report]))
    assert read_result(tmp_path / "both.json") == [report, report]


def test_images_of_the_user_are_counted_and_not_shown(tmp_path: Path) -> None:
    """A report is passed on: neither pixels nor file names of a patient go with it unless asked."""
    artifact = broken_image(tmp_path / "artifact", "Neg")
    private = tuple(
        replace(image, name=f"{image.name} DOE^JANE.dcm", is_sample=False) for image in IMAGES[1:]
    )
    bundle = write_tiny_bundle(tmp_path / "reference", images=(IMAGES[0], *private))
    report = check_parity(artifact, bundle)
    assert report.images is not None
    assert [image.name for image in report.images] == ["red", "image 2", "image 3"]
    assert [image.thumbnail is not None for image in report.images] == [True, False, False]
    assert any("3 different: red, image 2, image 3" in check.detail for check in report.checks)
    assert "DOE" not in to_json(report)

    shown = check_parity(artifact, bundle, show_images=True)
    assert shown.images is not None
    assert shown.images[1].name == "green DOE^JANE.dcm"
    assert all(image.thumbnail for image in shown.images)


def test_pixels_that_differ_do_not_name_an_image_of_the_user(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    assert artifact.manifest.image is not None
    artifact = rewritten(tmp_path / "artifact", image=replace(artifact.manifest.image, resample="bilinear"))
    rgb = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    private = replace(IMAGES[0], name="DOE^JANE.dcm", rgb=rgb, is_sample=False)
    report = check_parity(artifact, write_tiny_bundle(tmp_path / "reference", images=(private, *IMAGES[1:])))
    assert report.checks[0].detail.startswith("image 1; resample")
    assert "DOE" not in to_json(report)


def test_one_label_is_no_choice_and_passes_no_gate(tmp_path: Path) -> None:
    """Every image would be given it, by a broken artifact too."""
    one = {name: arrays_of(IMAGES)[name][:1] for name in ("text.input_ids", "text.pooler_output")}
    one["logits"] = arrays_of(IMAGES)["logits"][:, :1]
    report = check_parity(
        tiny_opened(tmp_path / "artifact"),
        write_tiny_bundle(tmp_path / "reference", labels=LABELS[:1], arrays=one),
    )
    assert report.zero_shot is None
    assert all(check.metric != "agreement" for check in report.checks)
