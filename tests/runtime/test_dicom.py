"""DICOM rendering against pydicom's own transformations, lossless siblings and numbers computed by hand."""

import importlib.util
import io
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medgemma_runtime import dicom, dicom_file
from medgemma_runtime.decoder_warnings import warnings_decided
from medgemma_runtime.dicom import frame_count, read_dicom
from medgemma_runtime.errors import EdgeError, ImageError
from medgemma_runtime.images import load_image

pydicom = pytest.importorskip("pydicom")
for package in ("data_store", "openjpeg", "libjpeg"):
    pytest.importorskip(package)

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402 - after the check that it is installed
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array  # noqa: E402
from pydicom.uid import (  # noqa: E402
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
)


def folder(package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / inside


DATA = folder("data_store", "data")
TESTS = folder("pydicom", "data/test_files")

Elements = dict[str, object]


def written(path: Path, stored: NDArray[np.generic], **elements: object) -> Path:
    """Write a grey (2-D), multi-frame grey (3-D) or RGB (last axis 3) image; None leaves an element out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    dataset.PatientName, dataset.PatientID = "Secret^Name", "4711"
    colour = stored.shape[-1] == 3 and stored.ndim == 3
    dataset.Rows, dataset.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if stored.ndim == 3 and not colour:
        dataset.NumberOfFrames = stored.shape[0]
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.dtype.kind == "f":
        dataset.FloatPixelData = stored.tobytes()
    else:
        dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def levels(path: Path, frame: int = 0) -> list[int]:
    """The first row of a grey rendering."""
    rgb = read_dicom(path, frame=frame)
    assert (rgb[:, :, :1] == rgb).all()
    return rgb[0, :, 0].tolist()


def row(*values: int, dtype: type = np.int16) -> NDArray[np.generic]:
    return np.array([values], dtype=dtype)


def sequence_item(**elements: object) -> list[Dataset]:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return [item]


# --- every file that pydicom brings ---


def test_every_file_gives_an_image_or_an_error_and_no_error_names_a_patient() -> None:
    files = [path for base in (DATA, TESTS) for path in sorted(base.rglob("*")) if path.is_file()]
    rendered = 0
    for path in files:
        try:
            frames = frame_count(path)
            for frame in {0, frames - 1}:
                rgb = read_dicom(path, frame=frame)
                assert rgb.dtype == np.uint8
                assert rgb.ndim == 3
                assert rgb.shape[2] == 3
                assert rgb.size > 0
            rendered += 1
        except ImageError as error:
            assert str(path) in str(error)
            assert "^" not in str(error).replace(str(path), "")  # a person's name in DICOM
    assert len(files) - rendered < 90
    assert rendered > 120


@pytest.mark.parametrize(
    ("folder", "reference", "compressed"),
    [
        (DATA, "RG1_UNCR.dcm", ["RG1_J2KR.dcm"]),
        (DATA, "RG3_UNCR.dcm", ["RG3_J2KR.dcm"]),
        (DATA, "693_UNCR.dcm", ["693_J2KR.dcm"]),
        (DATA, "MR2_UNCR.dcm", ["MR2_J2KR.dcm"]),
        (DATA, "US1_UNCR.dcm", ["US1_J2KR.dcm"]),
        (
            DATA,
            "emri_small.dcm",
            [
                "emri_small_RLE.dcm",
                "emri_small_big_endian.dcm",
                "emri_small_jpeg_2k_lossless.dcm",
                "emri_small_jpeg_ls_lossless.dcm",
            ],
        ),
        (DATA, "OBXXXX1A_2frame.dcm", ["OBXXXX1A_rle_2frame.dcm", "OBXXXX1A_expb_2frame.dcm"]),
        (DATA, "gdcm-US-ALOKA-16.dcm", ["gdcm-US-ALOKA-16_big.dcm"]),
        (DATA, "color-px.dcm", ["color-pl.dcm"]),  # pixel by pixel, plane by plane
        (DATA, "liver.dcm", ["liver_expb.dcm"]),
        (DATA, "SC_rgb.dcm", ["SC_rgb_16bit.dcm", "SC_rgb_32bit.dcm", "SC_rgb_expb_32bit.dcm"]),
        (TESTS, "SC_rgb_rle.dcm", ["SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"]),
        (TESTS, "rtdose.dcm", ["rtdose_expb.dcm", "rtdose_rle.dcm"]),
        (
            TESTS,
            "MR_small.dcm",
            [
                "MR_small_RLE.dcm",
                "MR_small_bigendian.dcm",
                "MR_small_implicit.dcm",
                "MR_small_jp2klossless.dcm",
                "MR_small_jpeg_ls_lossless.dcm",
                "MR_small_padded.dcm",
            ],
        ),
    ],
)
def test_a_lossless_encoding_changes_nothing(folder: Path, reference: str, compressed: list[str]) -> None:
    frames = frame_count(folder / reference)
    for name in compressed:
        assert frame_count(folder / name) == frames
        for frame in range(frames):
            np.testing.assert_array_equal(
                read_dicom(folder / name, frame=frame),
                read_dicom(folder / reference, frame=frame),
                err_msg=f"{name}, frame {frame}",
            )


@pytest.mark.parametrize(
    ("reference", "lossy", "mean_difference"),
    [
        (DATA / "SC_rgb.dcm", DATA / "SC_ybr_full_uncompressed.dcm", 1),
        (DATA / "SC_rgb.dcm", TESTS / "SC_ybr_full_422_uncompressed.dcm", 1),
        (DATA / "SC_rgb.dcm", TESTS / "SC_rgb_jpeg_dcmtk.dcm", 1),
        (DATA / "SC_rgb.dcm", TESTS / "SC_rgb_dcmtk_+eb+cr.dcm", 0.5),
        (DATA / "US1_UNCI.dcm", DATA / "US1_J2KI.dcm", 0.5),
        (DATA / "MR2_UNCI.dcm", DATA / "MR2_J2KI.dcm", 0.5),
    ],
)
def test_colour_spaces_become_rgb(reference: Path, lossy: Path, mean_difference: float) -> None:
    difference = read_dicom(lossy).astype(int) - read_dicom(reference)
    assert np.abs(difference).mean() < mean_difference


# --- windows ---


@pytest.mark.parametrize(
    "name", ["RG1_UNCR", "RG3_UNCR", "693_UNCR", "MR2_UNCR", "MR-SIEMENS-DICOM-WithOverlays", "bad_sequence"]
)
def test_a_linear_window_is_within_the_stated_bound_of_the_standards(name: str) -> None:
    dataset = pydicom.dcmread(DATA / f"{name}.dcm")
    windowed = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, prefer_lut=False)
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
    black, span = lowest * slope + intercept, (2**dataset.BitsStored - 1) * slope
    standard = (windowed - black) / span * 255
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        standard = 255 - standard
    width = float(np.atleast_1d(dataset.WindowWidth)[0])
    difference = np.abs(read_dicom(DATA / f"{name}.dcm")[:, :, 0] - standard)
    assert difference.max() <= 255 / width + 0.5 + 1e-6


@pytest.mark.parametrize(
    ("center", "width", "expected"),
    [
        # stored                 -5   0  20  40  60  80  90
        (40, 80, [0, 0, 64, 128, 191, 255, 255]),  # 127.5 rounds to even, as in Google's services
        (40, 81, [0, 0, 64, 128, 191, 255, 255]),  # 81 // 2 = 40
        (40, 1, [0, 0, 0, 255, 255, 255, 255]),  # a step at 39.5
        (59.5, 1.5, [0, 0, 0, 0, 255, 255, 255]),
    ],
)
def test_linear_by_hand(center: float, width: float, expected: list[int], tmp_path: Path) -> None:
    stored = row(-5, 0, 20, 40, 60, 80, 90)
    path = written(tmp_path / "a.dcm", stored, WindowCenter=center, WindowWidth=width)
    assert levels(path) == expected


def test_linear_as_in_the_official_test(tmp_path: Path) -> None:
    """window_accurate_test.py of Google-Health/medgemma: 124 and 125 in the window 100 to 200."""
    path = written(tmp_path / "a.dcm", row(124, 125), WindowCenter=150, WindowWidth=100)
    assert levels(path) == [61, 64]


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 80), (3.5, 0.5), (-100, 1000)])
def test_other_functions_equal_pydicoms(function: str, center: float, width: float, tmp_path: Path) -> None:
    stored = np.arange(-600, 600, dtype=np.int16).reshape(30, 40)
    path = written(
        tmp_path / "a.dcm", stored, WindowCenter=center, WindowWidth=width, VOILUTFunction=function
    )
    dataset = pydicom.dcmread(path)
    with np.errstate(over="ignore"):
        unit = (apply_voi_lut(stored, dataset) + 32768) / 65535
    np.testing.assert_array_equal(read_dicom(path)[:, :, 0], np.rint(unit * 255))


def test_of_several_windows_the_first_is_used(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(0, 40, 80), WindowCenter=[40, 1000], WindowWidth=[80, 9])
    assert levels(path) == [0, 128, 255]


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowWidth": 0.5},
        {"WindowWidth": 0},
        {"WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowWidth": -3, "VOILUTFunction": "LINEAR_EXACT"},
    ],
)
def test_an_empty_window_is_refused(elements: Elements, tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1, 2), WindowCenter=1, **elements)
    with pytest.raises(ImageError, match="spans no values"):
        read_dicom(path)


def test_an_unknown_window_function_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1), WindowCenter=1, WindowWidth=9, VOILUTFunction="GAMMA")
    with pytest.raises(ImageError, match="unknown VOILUTFunction; known are LINEAR"):
        read_dicom(path)


def test_the_window_applies_to_rescaled_values(tmp_path: Path) -> None:
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1024}
    window = {"WindowCenter": 40, "WindowWidth": 80}
    path = written(tmp_path / "a.dcm", row(512, 532, 552, dtype=np.uint16), **rescale, **window)
    assert levels(path) == [0, 128, 255]


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_half_a_rescale_is_refused(keyword: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1, 2), **{keyword: 1})
    with pytest.raises(ImageError, match="only one of RescaleSlope and RescaleIntercept"):
        read_dicom(path)


def test_monochrome1_is_inverted_after_windowing(tmp_path: Path) -> None:
    elements = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 40, "WindowWidth": 80}
    path = written(tmp_path / "a.dcm", row(-5, 20, 40, 80), **elements)
    assert levels(path) == [255, 191, 127, 0]


# --- without a window ---


def test_without_a_window_the_values_are_stretched(tmp_path: Path) -> None:
    assert levels(written(tmp_path / "a.dcm", row(-10, 0, 10))) == [0, 128, 255]
    inverted = written(tmp_path / "b.dcm", row(-10, 0, 10), PhotometricInterpretation="MONOCHROME1")
    assert levels(inverted) == [255, 127, 0]
    assert levels(written(tmp_path / "c.dcm", row(7, 7))) == [255, 255]  # as in Google's services


def test_frames_share_one_grey_scale(tmp_path: Path) -> None:
    stored = np.array([[[0, 40]], [[50, 200]]], dtype=np.uint16)
    path = written(tmp_path / "a.dcm", stored)
    assert [levels(path, 0), levels(path, 1)] == [[0, 51], [64, 255]]


def test_8_bits_without_a_window_stay_as_they_are(tmp_path: Path) -> None:
    assert levels(written(tmp_path / "a.dcm", row(3, 90, dtype=np.uint8))) == [3, 90]
    identity = {"RescaleSlope": 1, "RescaleIntercept": 0}
    assert levels(written(tmp_path / "b.dcm", row(3, 90, dtype=np.uint8), **identity)) == [3, 90]
    fewer_bits = {"BitsStored": 7, "HighBit": 6}
    assert levels(written(tmp_path / "c.dcm", row(3, 90, dtype=np.uint8), **fewer_bits)) == [0, 255]


def test_ct_without_a_window_shows_the_official_default(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(-1150, 0, 1350), Modality="CT")
    assert levels(path) == [0, 117, 255]
    assert levels(written(tmp_path / "b.dcm", row(0, 50), Modality="CT")) == [117, 122]  # not stretched
    screen = written(tmp_path / "c.dcm", row(3, 90, dtype=np.uint8), Modality="CT")
    assert levels(screen) == [3, 90]


def test_padding_does_not_set_the_range(tmp_path: Path) -> None:
    one = written(tmp_path / "a.dcm", row(-2000, 0, 5, 10), PixelPaddingValue=-2000)
    assert levels(one) == [0, 0, 128, 255]
    limit = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1000}
    assert levels(written(tmp_path / "b.dcm", row(-2000, -1500, -1000, 0, 10), **limit)) == [0, 0, 0, 0, 255]
    everything = written(tmp_path / "c.dcm", row(-2000, -2000), PixelPaddingValue=-2000)
    with pytest.raises(ImageError, match="no pixel but padding"):
        read_dicom(everything)


# --- lookup tables ---


def test_a_modality_table_equals_pydicoms() -> None:
    dataset = pydicom.dcmread(DATA / "mlut_18.dcm")
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    reference = np.rint((values - values.min()) / np.ptp(values) * 255)
    np.testing.assert_array_equal(read_dicom(DATA / "mlut_18.dcm")[:, :, 0], reference)


def test_a_voi_table_equals_pydicoms() -> None:
    dataset = pydicom.dcmread(DATA / "vlut_04.dcm")
    reference = np.rint(apply_voi_lut(dataset.pixel_array, dataset) / 65535 * 255)
    np.testing.assert_array_equal(read_dicom(DATA / "vlut_04.dcm")[:, :, 0], reference)


def voi_table(entries: list[int], *, first: int, bits: int) -> Elements:
    item = sequence_item(LUTDescriptor=[len(entries), first, bits], LUTData=entries)
    item[0]["LUTDescriptor"].VR = "SS"
    item[0]["LUTData"].VR = "US"
    return {"VOILUTSequence": item}


def test_a_voi_table_by_hand(tmp_path: Path) -> None:
    """12 bits; values outside the table take the entry at that end."""
    table = voi_table([0, 1000, 4095], first=-1, bits=12)
    assert levels(written(tmp_path / "a.dcm", row(-9, -1, 0, 1, 9), **table)) == [0, 0, 62, 255, 255]


def test_a_window_goes_before_a_voi_table(tmp_path: Path) -> None:
    table = voi_table([0, 1000, 4095], first=-1, bits=12)
    path = written(tmp_path / "a.dcm", row(0, 40, 80), WindowCenter=40, WindowWidth=80, **table)
    assert levels(path) == [0, 128, 255]


@pytest.mark.parametrize(
    "table",
    [
        voi_table([0, 5000], first=0, bits=12),
        voi_table([0, 1], first=0, bits=7),
        {"VOILUTSequence": sequence_item(LUTExplanation="no table")},
    ],
)
def test_a_broken_table_is_refused(table: Elements, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"LUTDescriptor that does not fit|no complete LUT"):
        read_dicom(written(tmp_path / "a.dcm", row(0, 1), **table))


@pytest.mark.parametrize("name", ["OBXXXX1A.dcm", "gdcm-US-ALOKA-16.dcm", "OT-PAL-8-face.dcm"])
def test_a_palette_equals_pydicoms(name: str) -> None:
    dataset = pydicom.dcmread(DATA / name, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    reference = apply_color_lut(pixel_array(dataset), dataset)
    np.testing.assert_array_equal(read_dicom(DATA / name), reference >> 8)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_by_hand(bits: int, tmp_path: Path) -> None:
    entries = np.array([10, 20, 30], dtype=np.uint8 if bits == 8 else np.uint16)
    elements: Elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for step, colour in enumerate(("Red", "Green", "Blue")):
        table = (entries + step) * (1 if bits == 8 else 257)
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 4, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = table.tobytes() + b"\0" * (table.nbytes % 2)
    path = written(tmp_path / "a.dcm", row(0, 5, 9, dtype=np.uint8), **elements)
    assert read_dicom(path)[0].tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]


def test_a_palette_image_without_palette_is_refused(tmp_path: Path) -> None:
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    with pytest.raises(ImageError, match="no complete RedPaletteColorLookupTable"):
        read_dicom(written(tmp_path / "a.dcm", row(0, 1, dtype=np.uint8), **elements))


@pytest.mark.parametrize(
    ("descriptor", "message"), [([4, 0, 16], "cannot be expanded"), ([4, 0, 9], "no valid")]
)
def test_a_damaged_segmented_palette_is_refused(descriptor: list[int], message: str, tmp_path: Path) -> None:
    elements: Elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = descriptor
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = b"\x09\0\x09\0"
    with pytest.raises(ImageError, match=message):
        read_dicom(written(tmp_path / "a.dcm", row(0, 1, dtype=np.uint8), **elements))


def test_a_supplemental_palette_colours_only_what_it_covers() -> None:
    path = DATA / "eCT_Supplemental.dcm"
    dataset = pydicom.dcmread(path)
    stored, rgb = pixel_array(dataset, index=0), read_dicom(path)
    tables = [
        np.frombuffer(dataset[f"{colour}PaletteColorLookupTableData"].value, "<u2") >> 8
        for colour in ("Red", "Green", "Blue")
    ]
    covered = stored >= 1024
    for channel, table in enumerate(tables):
        reference = table[np.clip(stored[covered].astype(int) - 1024, 0, 99)]
        np.testing.assert_array_equal(rgb[covered][:, channel], reference)
    grey = rgb[~covered]
    assert (grey == grey[:, :1]).all()
    assert 0 < covered.mean() < 1


def test_a_supplemental_palette_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="without a palette"):
        read_dicom(written(tmp_path / "a.dcm", row(0, 1), PixelPresentation="COLOR"))


def test_a_window_is_the_same_for_any_type_of_pixel(tmp_path: Path) -> None:
    """Small integers go through a table, others do not."""
    stored = np.random.default_rng(5).integers(-32768, 32768, (40, 50))
    stored[0, :4] = (-32768, -1, 0, 32767)
    renderings = [
        read_dicom(
            written(
                tmp_path / f"{np.dtype(dtype)}.dcm",
                stored.astype(dtype),
                RescaleSlope=0.7,
                RescaleIntercept=-3.0,
                WindowCenter=50,
                WindowWidth=40001,
            )
        )
        for dtype in (np.int16, np.int32)
    ]
    np.testing.assert_array_equal(*renderings)
    assert len(np.unique(renderings[0])) > 200


def test_the_range_of_all_frames_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = dicom.decode_frame
    monkeypatch.setattr(
        dicom,
        "decode_frame",
        lambda path, dataset, frame: decoded.append(frame) or real(path, dataset, frame),
    )
    path = tmp_path / "x.dcm"
    frames = np.array([[[0, 10]], [[20, 100]], [[40, 60]]], np.int16)
    written(path, frames, Modality="MR")
    assert [levels(path, frame) for frame in range(3)] == [[0, 26], [51, 255], [102, 153]]
    assert sorted(decoded) == [0, 1, 1, 2, 2]
    status = path.stat()
    written(path, np.minimum(frames * 2, 100), Modality="MR")  # as large as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert levels(path, 0) == [0, 51]


# --- frames and functional groups ---


def test_a_frame_is_selected() -> None:
    path = DATA / "color3d_jpeg_baseline.dcm"
    assert frame_count(path) == 120
    assert not np.array_equal(read_dicom(path, frame=0), read_dicom(path, frame=119))
    for frame in (-1, 120):
        with pytest.raises(ImageError, match=f"120 frames and frame {frame} was asked for.*0 to 119"):
            read_dicom(path, frame=frame)
    with pytest.raises(ImageError, match="1 frame and frame 1 was"):
        read_dicom(TESTS / "CT_small.dcm", frame=1)


def test_each_frame_has_its_own_window_and_rescale(tmp_path: Path) -> None:
    stored = np.array([[[0, 40, 60, 80]], [[0, 40, 60, 80]]], dtype=np.uint16)

    def group(**sequences: list[Dataset]) -> Dataset:
        return sequence_item(**sequences)[0]

    elements = {
        "WindowCenter": 9999,
        "WindowWidth": 2,
        "SharedFunctionalGroupsSequence": [
            group(FrameVOILUTSequence=sequence_item(WindowCenter=40, WindowWidth=80))
        ],
        "PerFrameFunctionalGroupsSequence": [
            group(FrameVOILUTSequence=sequence_item(WindowCenter=0, WindowWidth=160)),
            group(PixelValueTransformationSequence=sequence_item(RescaleSlope=2, RescaleIntercept=-40)),
        ],
    }
    path = written(tmp_path / "a.dcm", stored, **elements)
    assert levels(path, 0) == [128, 191, 223, 255]  # its own window, -80 to 80
    assert levels(path, 1) == [0, 128, 255, 255]  # the shared window, over -40, 40, 80 and 120


@pytest.mark.parametrize("count", [0, -1, "1A"])
def test_a_frame_count_that_is_none_is_refused(count: int | str, tmp_path: Path) -> None:
    path = TESTS / "badVR.dcm"  # NumberOfFrames 1A
    if isinstance(count, int):
        path = written(tmp_path / "a.dcm", row(1, 2), NumberOfFrames=count)
    with pytest.raises(ImageError, match="NumberOfFrames"):
        frame_count(path)


def test_fewer_frames_than_stated_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1, 2), NumberOfFrames=3)
    with pytest.raises(ImageError, match="less than expected"):
        read_dicom(path)


# --- stored values ---


def test_bits_above_those_stored_are_ignored(tmp_path: Path) -> None:
    """Old files keep overlays there."""
    window = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 40, "WindowWidth": 80}
    path = written(tmp_path / "a.dcm", row(40, 0xF000 + 40, dtype=np.uint16), **window)
    assert levels(path) == [128, 128]
    signed = written(tmp_path / "b.dcm", row(0x0FD8, 40), **{**window, "WindowCenter": -40})  # 0xFD8 is -40
    assert levels(signed) == [128, 255]


def test_overlays_are_not_drawn() -> None:
    path = DATA / "MR-SIEMENS-DICOM-WithOverlays.dcm"
    dataset = pydicom.dcmread(path)
    assert max(element.tag for element in dataset) > 0x60000000
    reference = np.rint(np.interp(dataset.pixel_array, (450 - 395, 450 + 395), (0, 255)))
    np.testing.assert_array_equal(read_dicom(path)[:, :, 0], reference)


def test_floating_point_pixels(tmp_path: Path) -> None:
    stored = np.array([[-0.5, 0.0, 0.5]], dtype=np.float32)
    bits = {"BitsStored": None, "HighBit": None, "PixelRepresentation": None}
    assert levels(written(tmp_path / "a.dcm", stored, **bits)) == [0, 128, 255]
    stored[0, 1] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        read_dicom(written(tmp_path / "b.dcm", stored, **bits))


def test_colours_of_fewer_than_8_bits_are_refused(tmp_path: Path) -> None:
    stored = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match="colours in 7 bits"):
        read_dicom(written(tmp_path / "a.dcm", stored, BitsStored=7, HighBit=6))


def test_values_that_are_not_in_the_lowest_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="rewrite it with HighBit 11"):
        read_dicom(written(tmp_path / "a.dcm", row(1, 2), BitsStored=12, HighBit=15))


# --- refusals ---


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"PixelData": None}, r"holds no image \(it is CT Image Storage\)"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation; supported are MONOCHROME1"),
        ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "unsupported PhotometricInterpretation"),
        ({"PhotometricInterpretation": "RGB"}, "is RGB with 1 samples per pixel"),
        ({"SamplesPerPixel": None}, "no valid SamplesPerPixel"),
        ({"Rows": None}, "no valid Rows"),
        ({"Columns": 0}, "frames of 0 x 1 pixels"),
        ({"Rows": 65535, "Columns": 65535}, "can be decoded; cut a large image"),
        ({"BitsAllocated": 24}, "cannot be decoded"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "less than expected"),
        ({"PixelData": b""}, "cannot be decoded"),
    ],
)
def test_a_file_that_is_no_image_is_refused(elements: Elements, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1, 2), **elements)
    with pytest.raises(ImageError, match=message) as caught:
        read_dicom(path)
    assert "Secret" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_ybr_rct_outside_jpeg_2000_is_refused(tmp_path: Path) -> None:
    stored = np.zeros((2, 2, 3), dtype=np.uint8)
    path = written(tmp_path / "a.dcm", stored, PhotometricInterpretation="YBR_RCT")
    with pytest.raises(ImageError, match="YBR_RCT after decoding"):
        read_dicom(path)


@pytest.mark.parametrize("keyword", ["WindowCenter", "Rows"])
def test_an_element_that_is_no_number_is_refused_without_its_value(keyword: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", row(1, 2), WindowCenter=1, WindowWidth=2)
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        dataset.add_new(keyword, "LO", "Jane Doe")
        dataset.save_as(path)
    with pytest.raises(ImageError, match=f"a {keyword} that is not a number") as caught:
        read_dicom(path)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("name", ["DICOMDIR", "dicomdirtests/DICOMDIR", "waveform_ecg.dcm", "test-SR.dcm"])
def test_other_kinds_of_dicom_are_named(name: str) -> None:
    path = TESTS / name
    if not path.exists():
        path = TESTS / "dicomdirtests" / name
    with pytest.raises(ImageError, match=r"holds no image \(it is .*Storage\)"):
        read_dicom(path)


@pytest.mark.parametrize(
    "path",
    [
        TESTS / "CT_small.dcm",
        TESTS / "MR_small_jp2klossless.dcm",
        TESTS / "SC_rgb_jpeg_dcmtk.dcm",
        TESTS / "MR_small_RLE.dcm",
        DATA / "emri_small_jpeg_ls_lossless.dcm",
    ],
    ids=lambda path: path.name,
)
def test_a_file_cut_short_never_gives_other_pixels(path: Path, tmp_path: Path) -> None:
    """What is cut off may be padding; then the image is whole."""
    content, whole = path.read_bytes(), read_dicom(path)
    refused = 0
    for kept in (*range(100, len(content), len(content) // 17), *range(len(content) - 160, len(content), 3)):
        (tmp_path / "cut.dcm").write_bytes(content[:kept])
        try:
            np.testing.assert_array_equal(read_dicom(tmp_path / "cut.dcm"), whole, err_msg=f"{kept} bytes")
        except ImageError:
            refused += 1
    assert refused >= 16


def test_compressed_garbage_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(TESTS / "MR_small_jp2klossless.dcm")
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(range(256)) * 4])
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match="pixel data that cannot be decoded"):
        read_dicom(tmp_path / "a.dcm")


def test_a_compression_that_nothing_decodes_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(TESTS / "MR_small_jp2klossless.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match=r"compressed as MPEG2 .* cannot be decoded"):
        read_dicom(tmp_path / "a.dcm")


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.dcm"):
        for read in (read_dicom, frame_count):
            with pytest.raises(ImageError, match="is not a file"):
                read(path)


def test_a_missing_pydicom_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(EdgeError, match=r"pydicom is needed to read DICOM files .*medgemma-edge\[dicom\]"):
        load_image(TESTS / "CT_small.dcm")


@pytest.mark.parametrize(
    ("path", "package"),
    [(DATA / "US1_J2KR.dcm", "pylibjpeg-openjpeg"), (DATA / "JPEG-LL.dcm", "pylibjpeg-libjpeg")],
)
def test_a_missing_decoder_is_named(path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoPlugins:
        available_plugins = ("pillow",)

    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda syntax: NoPlugins())
    with pytest.raises(EdgeError, match=rf"{package} is needed to decode JPEG.*medgemma-edge\[dicom\]"):
        read_dicom(path)


def test_a_file_without_preamble_is_read_by_its_name(tmp_path: Path) -> None:
    content = (TESTS / "MR_small.dcm").read_bytes()
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(content[132:])
    np.testing.assert_array_equal(load_image(bare), load_image(TESTS / "MR_small.dcm"))
    assert load_image(DATA / "OT-PAL-8-face.dcm").shape == (480, 640, 3)


def test_a_pdf_named_dcm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.dcm").write_bytes(b"%PDF-1.7 a report, not an image" * 20)
    with pytest.raises(ImageError, match=r"holds no image|cannot be read as DICOM"):
        load_image(tmp_path / "note.dcm")


def test_the_filters_decide_each_warning() -> None:
    """Damage is an error, the rest is dropped: without the filters both would pass as warnings."""
    with warnings_decided(*dicom_file.WARNINGS_THAT_MATTER, ignored=Warning):
        warnings.warn("Invalid value for VR UI", UserWarning, stacklevel=1)
        for message in (
            "End of file reached before delimiter (FFFE,E0DD) found",
            "The end of the encapsulated pixel data has been reached but fewer frames than expected",
            "The end has been reached but no JPEG EOI/EOC marker was found",
            "matches the expected number for uncompressed data - check that the transfer syntax has been set",
        ):
            with pytest.raises(UserWarning, match=re.escape(message)):
                warnings.warn(message, UserWarning, stacklevel=1)


LARGE = 60_000


@pytest.mark.parametrize(
    ("syntax", "kind", "marker", "sizes"),
    [
        # Of the image and, at no offset, of its one tile: columns and rows (ISO 15444-1, A.5.1, SIZ).
        (
            JPEG2000Lossless,
            "JPEG2000",
            b"\xff\x51\x00\x29\x00\x00",
            2 * LARGE.to_bytes(4, "big") + bytes(8) + 2 * LARGE.to_bytes(4, "big"),
        ),
        # Rows and columns (ISO 10918-1, B.2.2, SOF0).
        (JPEGBaseline8Bit, "JPEG", b"\xff\xc0\x00\x0b\x08", 2 * LARGE.to_bytes(2, "big")),
    ],
)
def test_a_compressed_frame_larger_than_the_file_says_is_refused(
    tmp_path: Path, syntax: UID, kind: str, marker: bytes, sizes: bytes
) -> None:
    """3.6 billion pixels by its own header, and 16 x 16 by Rows and Columns."""
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
    whole = stream.getvalue()
    before, found, after = whole.partition(marker)
    assert found
    for content, name in ((whole, "whole.dcm"), (before + found + sizes + after[len(sizes) :], "bomb.dcm")):
        dataset = pydicom.dcmread(written(tmp_path / "plain.dcm", np.zeros((16, 16), np.uint8)))
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = pydicom.encaps.encapsulate([content])
        dataset.save_as(tmp_path / name)
    assert read_dicom(tmp_path / "whole.dcm").shape == (16, 16, 3)
    with pytest.raises(ImageError, match=r"60000 x 60000 pixels and 89,478,485 at most"):
        read_dicom(tmp_path / "bomb.dcm")


def test_jpeg_2000_is_named_as_pydicom_names_it() -> None:
    """The choice of the package to name rests on it."""
    assert "2000" in JPEG2000Lossless.name
