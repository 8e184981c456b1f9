"""The sample notes are whole, in two splits that share nothing, and fit to be a prompt."""

import hashlib
import re
from dataclasses import replace
from importlib.resources import files

import pytest

from medgemma_runtime.errors import EdgeError
from medgemma_runtime.prompt import _check_text
from medgemma_runtime.sample_notes import NOTES_LICENCE, SAMPLE_NOTES, load_note

LANGUAGES = {"en", "de", "es", "fr", "hi", "pt"}


def words(text: str) -> set[tuple[str, ...]]:
    """Every run of seven words."""
    found = text.lower().split()
    return {tuple(found[start : start + 7]) for start in range(len(found) - 6)}


def test_the_table_lists_every_file_once_and_in_both_splits_every_language() -> None:
    names = [note.name for note in SAMPLE_NOTES]
    assert len(set(names)) == len(names)
    assert NOTES_LICENCE == "Apache-2.0"
    folder = files("medgemma_runtime") / "notes"
    present = {f"{split.name}/{file.name}" for split in folder.iterdir() for file in split.iterdir()}
    assert present == {f"{note.split}/{note.name}.txt" for note in SAMPLE_NOTES}
    for split in ("held_out", "calibration"):
        assert {note.language for note in SAMPLE_NOTES if note.split == split} == LANGUAGES


@pytest.mark.parametrize("note", SAMPLE_NOTES, ids=lambda note: note.name)
def test_a_note_is_as_listed_and_can_be_a_prompt(note) -> None:
    text = load_note(note)
    assert hashlib.sha256(text.encode()).hexdigest() == note.sha256
    _check_text(text, note.name)  # no control token
    assert text.endswith("\n")
    assert not re.search(r"[ \t]\n|\r|\n\n\n", text)
    is_hindi = re.search(r"[\u0900-\u097f]", text) is not None
    assert is_hindi == (note.language == "hi")


def test_what_is_measured_was_not_calibrated_on() -> None:
    seen: dict[str, set[tuple[str, ...]]] = {"held_out": set(), "calibration": set()}
    for note in SAMPLE_NOTES:
        seen[note.split] |= words(load_note(note))
    assert not seen["held_out"] & seen["calibration"]
    assert min(map(len, seen.values())) > 3000


def test_another_text_is_refused(monkeypatch) -> None:
    note = SAMPLE_NOTES[0]
    with pytest.raises(EdgeError, match=f"{note.name} is not as it was listed"):
        load_note(replace(note, sha256="0" * 64))
    with pytest.raises(EdgeError, match=r"en-absent is not installed; run: pip install"):
        load_note(replace(note, name="en-absent"))
