"""Clinical notes written by hand for this project, for tests, calibration and measurements of quality.

They are invented throughout: no note is about a person, and none was copied from anywhere. They show what
clinical text looks like (headings, abbreviations, numbers with units, tables, six languages); they are no
medical advice. What is measured on `held_out` must never have been calibrated on, so the two splits share no
case.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from medgemma_runtime.errors import EdgeError

__all__ = ["SampleNote", "SAMPLE_NOTES", "NOTES_LICENCE", "load_note"]

NOTES_LICENCE = "Apache-2.0"

Split = Literal["held_out", "calibration"]

# Name to the SHA-256 of the text in UTF-8. A name is its language, what it is, and what it is about.
_HELD_OUT = {
    "en-dermatology-consult": "d7296ac5b66f8390cee1aad0d7640b2311ca72338d7ff1370fd99f77b266e23c",
    "en-discharge-heart-failure": "5d5ca94591836ef6eb991533da5f2751c8e6148c4d374abe354977d4cdfcb3ee",
    "en-ed-triage-chest-pain": "68c4519ff047dc63969ae29f1593d544bb01a3190e6b1662abd508e14c35f450",
    "en-letter-diabetes": "ff9acff84b4c684b3a98779fbdd8dc8bfff1b3a248c8e7b9fc4166e2f018d9e9",
    "en-medication-list": "865c69ee0fb31cb80d7b9a11c6cb93666ded1848463b85c1e70f4058b1ca9b86",
    "en-nursing-shift": "ce7f36cb1993f15a061b027bf8369d67991e4b8b2a0982166b72e471f0dca117",
    "en-operative-cholecystectomy": "65d12c23535b3f1360ee29039e7cc61b2daeaccfe6c6094cfa3d8de92a29c5ae",
    "en-ophthalmology-retina": "1147f53c954b7d4afebc69d2795cf1d9dc6352d800ae6882998653f418a1fcc6",
    "en-paediatric-asthma": "52ccfdbf307345207aa35a2561db2e17499d69b56332781daafec406be24a0f1",
    "en-pathology-colon": "d4e379acfb869689d66ee43418c06fdb380439e1ec01e9fec389325a0d82c9f5",
    "en-radiology-chest-ct": "c2a9964266f7184c33f117fea98ba2ef29d31f970407271d9f5e78676de24e14",
    "de-entlassung-copd": "2adeec62398e65492c6f43fb5a0dac7045bb9aa9ea3b47c068f81add7edbd239",
    "es-triaje-urgencias": "a64b16b79848b9f347f52f21ef92b09bf40c8fe9a7eb9f124056e11475ac8de7",
    "fr-radiologie-abdomen": "2d0423ed0640b844b2f352fa08b3049e9e648e642effa9fe244c2aabc3440553",
    "hi-opd-tb": "e111df917c21f5c29d43a9b446fb4e8f7c59251cbdb27c8f674e39b7cff39720",
    "pt-consulta-diabetes": "0509d41aa485537da8f45f14f6873af5bbf04c588b80ab61f0a9b9f7216f6cd7",
}
_CALIBRATION = {
    "en-dermatology-psoriasis": "cddfda39156813b9aeaedd42800ca83250861304e797394361d0ab69235875c1",
    "en-discharge-pneumonia": "dab9ab49bd0bb59d6516d2b488c145221d52b53546fcdbf19d623b869629c1fc",
    "en-ed-triage-stroke": "c73f0f41a44ebd8d5466042a476b41bbe92943bc0aff91e52b8a3aede5ede8dc",
    "en-letter-rheumatology": "8cddfebb3255d1d21354785c58fbd7a075d5a25bc063bae67d8936df1b7f30e2",
    "en-medication-reconciliation": "91e57588d86747244798e01485eeb3c8708e2668ca4785151af8bdb5f7221c4f",
    "en-nursing-wound-care": "022bce297926be6e852520f17c877b254c2cc04aacdd2d174b64c0c01b072960",
    "en-obstetrics-antenatal": "c94c2c7ab32e45f6d38dea24341eddafd70142049a8f13d5dfe200bee577b68c",
    "en-operative-hip-fracture": "111abf7f8e07c7d06ad6f271d43ba4f806e8d437dbe578051dd3554ca16afee1",
    "en-paediatric-infant": "ad6b16ce2f09b16d70a55d9bfa85bff8f6bae61c5a97110f0241285248d456c7",
    "en-pathology-breast-biopsy": "ecce571f1652d64df8ae21902113c518cc2af949327e20be53f38c7715890bcb",
    "en-radiology-abdominal-ultrasound": "355b3f14283d46bb9dea6b583f685fa29d7dad5925ad000aaf13f14779e87d5d",
    "en-radiology-knee-mri": "0c4bbda28a88fcf737ca919bb5bfdb27c2cc39607c15cccc1011e41058ef0ef3",
    "de-radiologie-wirbelsaeule": "28b0470cb68d7aa15d1e69dcb96c681f2719fb451fbbef27500aa9c67eccf176",
    "es-consulta-pediatria": "e39a96f494bd008c6e08c49066996e8ab8a025b76390066c590ab82b295732a9",
    "fr-lettre-cardiologie": "86d99ab51818f86708b43c71ce8c7aaf3380acd0999fccfa1b1bb8f8119baabe",
    "hi-prasav-chutti": "483e5f4ccbeb90e08d5805d528e2e90259e8201898ec7b445c3c1c08700be74f",
    "pt-nota-operatoria": "cbbbc3123831a08ab59d0a485c1172f17c6780ad95f9c23216b19e956ac2c671",
}
_SPLITS: tuple[tuple[Split, dict[str, str]], ...] = (("held_out", _HELD_OUT), ("calibration", _CALIBRATION))


@dataclass(frozen=True, kw_only=True)
class SampleNote:
    """One note.

    Attributes:
        name: Unique name: its language, what it is, and what it is about.
        split: `held_out` to measure on, `calibration` to calibrate on.
        language: ISO 639-1.
        sha256: Of its text in UTF-8.
    """

    name: str
    split: Split
    language: str
    sha256: str


SAMPLE_NOTES: tuple[SampleNote, ...] = tuple(
    SampleNote(name=name, split=split, language=name[:2], sha256=sha256)
    for split, notes in _SPLITS
    for name, sha256 in notes.items()
)
"""Ordered; the order is part of the calibration data's identity."""


def load_note(note: SampleNote) -> str:
    """The text of a note, every line ended by a newline alone.

    Raises:
        EdgeError: If the installed file is missing or is not the one that was listed.
    """
    path = files("medgemma_runtime") / "notes" / note.split / f"{note.name}.txt"
    try:
        # Universal newlines: a checkout may have written its own kind.
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise EdgeError(
            f"the sample note {note.name} is not installed; run: pip install --force-reinstall medgemma-edge"
        ) from None
    if hashlib.sha256(text.encode()).hexdigest() != note.sha256:
        raise EdgeError(
            f"the sample note {note.name} is not as it was listed; run: "
            "pip install --force-reinstall medgemma-edge"
        )
    return text
