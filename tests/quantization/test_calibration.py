"""Calibration sets: what is in them is hashed in order, and what cannot be used is refused, all of it."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgemma_quantization.calibration import BUILTIN, CalibrationSet, is_held_out, open_set
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.sample_images import SAMPLE_IMAGES
from medgemma_runtime.sample_notes import SAMPLE_NOTES, load_note


def write_image(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_image(tmp_path / "b.png", 1)
    write_image(tmp_path / "a.png", 2)
    (tmp_path / "note.txt").write_text("Findings: none.\n", encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"left out")
    return tmp_path


MANIFEST = """
licence = "CC0"
source = "an archive"
[[sample]]
image = "b.png"
modality = "CR"
prompt = "What is seen?"
answer = "Nothing."
[[sample]]
text = "note.txt"
licence = "MIT"
[[sample]]
image = "a.png"
"""


def open_all(place: object) -> CalibrationSet:
    return open_set(str(place), images=True, texts=True)


def test_a_directory_is_read_in_name_order(directory):
    first, second, third = open_all(directory).samples
    assert [first.name, second.name, third.name] == ["a.png", "b.png", "note.txt"]
    assert (third.image, third.text, third.modality) == (None, "Findings: none.\n", "text")
    assert first.text is None
    assert first.prompt is not None
    np.testing.assert_array_equal(first.pixels(), np.array(Image.open(directory / "a.png")))


def test_a_manifest_says_more(directory):
    (directory / "calibration.toml").write_text(MANIFEST, encoding="utf-8")
    samples = open_all(directory)
    first, _, third = samples.samples
    assert (first.modality, first.prompt, first.text) == ("CR", "What is seen?", "Nothing.")
    assert [sample.licence for sample in samples.samples] == ["CC0", "MIT", "CC0"]
    assert third.source == "an archive"
    assert open_all(directory / "calibration.toml") == samples


def test_the_hash_knows_content_and_order_but_no_place(directory, tmp_path_factory):
    (directory / "calibration.toml").write_text(MANIFEST, encoding="utf-8")
    samples = open_all(directory)
    elsewhere = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(directory, elsewhere)
    assert open_all(elsewhere).sha256 == samples.sha256
    assert CalibrationSet(samples=samples.samples[::-1]).sha256 != samples.sha256
    for change in ("Nothing.", "What is seen?", "CR", "CC0"):
        (elsewhere / "calibration.toml").write_text(MANIFEST.replace(change, "other"), encoding="utf-8")
        assert open_all(elsewhere).sha256 != samples.sha256, change
    (elsewhere / "calibration.toml").write_text(MANIFEST, encoding="utf-8")
    write_image(elsewhere / "b.png", 3)
    assert open_all(elsewhere).sha256 != samples.sha256


def test_the_summary_has_counts_and_the_hash_and_nothing_else(directory):
    (directory / "calibration.toml").write_text(MANIFEST, encoding="utf-8")
    samples = open_all(directory)
    assert samples.summary == f"3 samples (1 CR, 1 not stated, 1 text), sha256 {samples.sha256}"


def test_everything_that_cannot_be_used_is_listed(directory):
    (directory / "broken.png").write_bytes((directory / "a.png").read_bytes()[:60])
    (directory / "blank.txt").write_text(" \n")
    (directory / "latin.txt").write_bytes("é".encode("latin-1"))
    (directory / "same.png").write_bytes((directory / "a.png").read_bytes())
    with pytest.raises(EdgeError) as caught:
        open_all(directory)
    message = str(caught.value)
    assert message.startswith("4 of 7 samples")
    for line in (
        "blank.txt: the text is blank",
        "broken.png: ",
        "latin.txt: it is not UTF-8",
        "same.png: it is in the set already",
    ):
        assert line in message


def test_long_lists_are_cut(tmp_path):
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text(" ")
    with pytest.raises(EdgeError, match=r"25 of 25 samples(.|\n)*19\.txt: the text is blank\n  and 5 more"):
        open_all(tmp_path)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('image = "a.png"\nsize = 3', "'size' is unknown"),
        ('image = "a.png"\nframe = "3"', "frame must be int and is str"),
        ('image = "a.png"\ntext = "note.txt"', "either an image or a text"),
        ("modality = 'CT'", "either an image or a text"),
        ('image = "a.png"\nanswer = "yes"', "an answer needs the prompt"),
        ('text = "absent.txt"', "cannot be read"),
        ('image = "absent.png"', "is not a file"),
        ('image = "a.png"\nframe = 4', "frame"),
    ],
)
def test_entries_that_are_off_are_refused_by_number(directory, entry, problem):
    (directory / "calibration.toml").write_text(
        f'[[sample]]\ntext = "note.txt"\n[[sample]]\n{entry}\n', encoding="utf-8"
    )
    with pytest.raises(EdgeError, match="1 of 2 samples") as caught:
        open_all(directory)
    assert "sample 2: " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[[sample", "is no TOML file"),
        ("sample = 3", "is not to the form"),
        ("sample = [3]", "is not to the form"),
        ('name = "x"', "is not to the form"),
        ("", "is empty"),
    ],
)
def test_manifests_that_are_off_are_refused(tmp_path, content, problem):
    (tmp_path / "set.toml").write_text(content)
    with pytest.raises(EdgeError, match=problem):
        open_all(tmp_path / "set.toml")


def test_an_empty_directory_and_an_absent_one_are_refused(tmp_path):
    with pytest.raises(EdgeError, match="is empty; give it images or texts"):
        open_all(tmp_path)
    with pytest.raises(EdgeError, match="does not exist; name a directory, a manifest file, or builtin"):
        open_all(tmp_path / "absent")


def test_what_the_model_cannot_take_is_refused(directory):
    with pytest.raises(EdgeError, match=r"2 of 3 samples(.|\n)*it has an image and the model sees none"):
        open_set(str(directory), images=False, texts=True)
    with pytest.raises(EdgeError, match=r"1 of 3 samples(.|\n)*it is a text and the model reads none"):
        open_set(str(directory), images=True, texts=False)


def test_notes_that_quality_is_measured_on_are_refused(tmp_path):
    held_out = next(note for note in SAMPLE_NOTES if note.split == "held_out")
    (tmp_path / "copied.txt").write_text(load_note(held_out), encoding="utf-8")
    with pytest.raises(EdgeError, match=r"copied\.txt: it is a built-in note that quality is measured on"):
        open_all(tmp_path)


def test_the_built_in_set_shares_nothing_with_what_is_measured_on():
    pytest.importorskip("pydicom")
    pytest.importorskip("skimage")
    samples = open_all(BUILTIN)
    images = [sample for sample in samples.samples if sample.image is not None]
    measured = {sample.file for sample in SAMPLE_IMAGES if is_held_out(sample)}
    # Six files, each of another modality than the next.
    assert len(measured) == 6
    assert {sample.image.name for sample in images}.isdisjoint(measured)
    assert len(images) + sum(is_held_out(sample) for sample in SAMPLE_IMAGES) == len(SAMPLE_IMAGES)
    texts = {
        hashlib.sha256(sample.text.encode()).hexdigest() for sample in samples.samples if not sample.image
    }
    assert texts == {note.sha256 for note in SAMPLE_NOTES if note.split == "calibration"}
    assert {sample.modality for sample in images} >= {"CR", "CT", "MR", "US", "NM", "OP", "SM"}
    assert all(sample.licence and sample.source for sample in samples.samples)
    only_texts = open_set(BUILTIN, images=False, texts=True)
    assert only_texts.samples == samples.samples[len(images) :]


def test_a_text_has_no_pixels(directory):
    sample = replace(open_all(directory).samples[0], image=None)
    with pytest.raises(ValueError, match="has no pixels"):
        sample.pixels()
