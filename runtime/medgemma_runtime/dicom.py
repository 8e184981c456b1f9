"""Renders DICOM files to RGB, as the official MedSigLIP and MedGemma services do where they do it.

Two reasons to follow Google's services (generic_dicom_handler.py of Google-Health/medsiglip and medgemma) and
not the letter of DICOM PS3.3 C.11.2: they are the only public record of how the models' images were windowed,
and a result should not change with the place the model runs in. Where the services stop (VOI LUTs, SIGMOID,
palettes, functional groups ...) the standard decides. Overlays, shutters and ICC profiles are not applied.

`medgemma_runtime.dicom_file` reads the files and decodes the pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.decoder_warnings import warnings_decided
from medgemma_runtime.dicom_file import (
    WARNINGS_THAT_MATTER,
    Stored,
    count_frames,
    decode_frame,
    element,
    element_numbers,
    functional_group,
    read_dataset,
    whole_number,
)
from medgemma_runtime.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["read_dicom", "frame_count"]

_Values = NDArray[np.float64]

_WHITE = 255
_DEFAULT_CT_WINDOW = (100.0, 2500.0)  # centre, width in HU: medsiglip generic_dicom_handler.py

_ranges: dict[str, tuple[float, float]] = {}  # SHA-256 of at most one file; see _value_range


@dataclass(frozen=True, kw_only=True)
class _Window:
    center: float
    width: float
    function: str


@dataclass(frozen=True, kw_only=True)
class _LookupTable:
    """Maps `first`, `first + 1` ... to the entries, and what lies outside to the entry at that end.

    Shapes:
        entries: [n], unsigned integers of `bits` bits
    """

    first: int
    bits: int
    entries: NDArray[np.int64]

    def __call__(self, values: Stored) -> NDArray[np.int64]:
        index = np.rint(values).astype(np.int64) - self.first
        mapped: NDArray[np.int64] = self.entries[np.clip(index, 0, len(self.entries) - 1)]
        return mapped


def read_dicom(path: Path, *, frame: int = 0) -> NDArray[np.uint8]:
    """Render one frame of a DICOM file.

    Grey images: the modality transformation, then the first of these that the file has: a window (of several
    the first), a VOI LUT, 8 bits that need no window, the window -1150 to 1350 HU if it is CT, or else the
    range from the smallest to the largest value of the file, pixel padding excluded, over all frames so that
    they share one grey scale. MONOCHROME1 is inverted after that. A frame's functional groups go before
    elements of the whole file.

    A LINEAR window spans from center - width // 2 to center + width // 2, both ends included, as Google's
    services have it. The standard's span is one value narrower and lies half a value lower; for whole widths
    the two differ by at most 255 / width grey levels before rounding. For a width under 2, where the span of
    the services collapses, the standard's step at center - 0.5 is taken. LINEAR_EXACT and SIGMOID are the
    standard's.

    Colour images become RGB; of more than 8 bits the highest 8 are taken, as Pillow does for PNG.

    Args:
        path: The file.
        frame: Which frame of a multi-frame file, from 0.

    Returns:
        [rows, columns, 3], red, green, blue.

    Raises:
        ImageError: If the file is absent, holds no image, is damaged, or is of a kind not supported.
        EdgeError: If pydicom or a decoder it needs is not installed.
    """
    with warnings_decided(*WARNINGS_THAT_MATTER, ignored=Warning):
        dataset = read_dataset(path)
        frames = count_frames(path, dataset)
        if not 0 <= frame < frames:
            raise ImageError(
                f"{path} has {frames} frame{'s' if frames > 1 else ''} and frame {frame} was asked for; "
                f"give a frame from 0 to {frames - 1}"
            )
        stored, photometric = decode_frame(path, dataset, frame)
        match photometric:
            case "MONOCHROME1" | "MONOCHROME2":
                levels = _grey_levels(path, dataset, frame, stored)
                if photometric == "MONOCHROME1":
                    levels = _WHITE - levels
                rgb = np.repeat(levels[:, :, None], 3, axis=2)
                return _with_supplemental_palette(path, dataset, stored, rgb)
            case "PALETTE COLOR":
                return _through_palette(path, dataset, stored)
            case _:
                bits = whole_number(path, dataset, "BitsStored")
                return (stored.astype(np.uint64) >> (bits - 8)).astype(np.uint8)


def frame_count(path: Path) -> int:
    """How many frames a DICOM image has; 1 for the kinds that have no such element.

    Raises:
        ImageError: If the file is absent, holds no image or is damaged.
        EdgeError: If pydicom is not installed.
    """
    with warnings_decided(*WARNINGS_THAT_MATTER, ignored=Warning):
        return count_frames(path, read_dataset(path))


def _grey_levels(path: Path, dataset: "Dataset", frame: int, stored: Stored) -> NDArray[np.uint8]:
    """Each stored value's grey level, worked out once for each value that occurs where that saves memory."""
    if not _is_small_integer(stored):
        return _display(path, dataset, frame, stored, stored)
    distinct = np.unique(stored)
    # Negative values index from the end, by their two's complement.
    table = np.zeros(2 ** (8 * stored.itemsize), dtype=np.uint8)
    table[distinct] = _display(path, dataset, frame, distinct, stored)
    levels = np.empty(stored.shape, dtype=np.uint8)
    for row, line in zip(levels, stored, strict=True):  # numpy makes 8-byte indices of all it is given
        row[:] = table[line]
    return levels


def _is_small_integer(stored: Stored) -> bool:
    return np.issubdtype(stored.dtype, np.integer) and stored.itemsize <= 2


def _display(
    path: Path, dataset: "Dataset", frame: int, stored: Stored, whole_frame: Stored
) -> NDArray[np.uint8]:
    """Grey levels of stored values, of any shape, that come from the frame `whole_frame`."""
    values = _modality_values(path, dataset, frame, stored)
    display = functional_group(path, dataset, frame, "FrameVOILUTSequence")
    window = _stated_window(path, display)
    if window is not None:
        return _apply_window(path, values, window)
    if tables := element(path, display, "VOILUTSequence"):
        table = _lookup_table(path, dataset, tables[0], "LUTDescriptor", "LUTData")
        return _interpolate(table(values).astype(np.float64), 0, 2**table.bits - 1)
    if (
        stored.dtype == np.uint8
        and element(path, dataset, "BitsStored") == 8
        and np.array_equal(values, stored)
    ):
        return values.astype(np.uint8)
    if element(path, dataset, "Modality") == "CT":
        center, width = _DEFAULT_CT_WINDOW
        return _apply_window(path, values, _Window(center=center, width=width, function="LINEAR"))
    return _interpolate(values, *_value_range(path, dataset, frame, whole_frame))


def _modality_values(path: Path, dataset: "Dataset", frame: int, stored: Stored) -> _Values:
    """Stored values in the unit of the modality, such as HU: PS3.3 C.11.1."""
    group = functional_group(path, dataset, frame, "PixelValueTransformationSequence")
    if tables := element(path, group, "ModalityLUTSequence"):
        table = _lookup_table(path, dataset, tables[0], "LUTDescriptor", "LUTData")
        return table(stored).astype(np.float64)
    slope, intercept = (
        element_numbers(path, group, "RescaleSlope"),
        element_numbers(path, group, "RescaleIntercept"),
    )
    if bool(slope) != bool(intercept):
        raise ImageError(f"{path} has only one of RescaleSlope and RescaleIntercept; a DICOM image has both")
    values = stored.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(f"{path} has pixels that are not finite numbers; replace them before rendering")
    return values * slope[0] + intercept[0] if slope else values


def _stated_window(path: Path, display: "Dataset") -> _Window | None:
    centers, widths = (
        element_numbers(path, display, "WindowCenter"),
        element_numbers(path, display, "WindowWidth"),
    )
    if not centers or not widths:
        return None
    function = str(element(path, display, "VOILUTFunction") or "LINEAR").upper()
    return _Window(center=centers[0], width=widths[0], function=function)


def _apply_window(path: Path, values: _Values, window: _Window) -> NDArray[np.uint8]:
    center, width = window.center, window.width
    if width < (1 if window.function == "LINEAR" else np.finfo(np.float64).tiny):
        raise ImageError(f"{path} has a {window.function} window of width {width:g}, which spans no values")
    match window.function:
        case "LINEAR" if width < 2:
            return np.where(values > center - 0.5, _WHITE, 0).astype(np.uint8)
        case "LINEAR":
            return _interpolate(values, center - width // 2, center + width // 2)
        case "LINEAR_EXACT":
            return _interpolate(values, center - width / 2, center + width / 2)
        case "SIGMOID":
            # 1 / (1 + exp(-4 z)) without its overflow
            sigmoid = (1 + np.tanh(2 * (values - center) / width)) / 2
            return np.rint(_WHITE * sigmoid).astype(np.uint8)
        case _:
            raise ImageError(
                f"{path} has an unknown VOILUTFunction; known are LINEAR, LINEAR_EXACT and SIGMOID"
            )


def _interpolate(values: _Values, low: float, high: float) -> NDArray[np.uint8]:
    """Black at `low` and below, white at `high` and above; white everywhere if they are equal.

    In float64 as `255 / (high - low) * (value - low)`, rounded half to even, as the services do it.
    """
    return np.rint(np.interp(values, (low, high), (0, _WHITE))).astype(np.uint8)


def _value_range(path: Path, dataset: "Dataset", frame: int, stored: Stored) -> tuple[float, float]:
    """`_measured_range`, remembered for the last file of many frames, which are read one after the other."""
    if count_frames(path, dataset) == 1:
        return _measured_range(path, dataset, frame, stored)
    content = sha256_file(path)  # a name and a date could be those of another file written since
    known = _ranges.get(content)
    if known is None:
        known = _measured_range(path, dataset, frame, stored)
        _ranges.clear()
        _ranges[content] = known
    return known


def _measured_range(path: Path, dataset: "Dataset", decoded: int, stored: Stored) -> tuple[float, float]:
    """Smallest and largest value over all frames, without the pixels that only fill the rectangle.

    Frame `decoded` is given as `stored`, the others are decoded here.
    """
    padding = element_numbers(path, dataset, "PixelPaddingValue")
    limit = element_numbers(path, dataset, "PixelPaddingRangeLimit") or padding
    extremes: list[float] = []
    for frame in range(count_frames(path, dataset)):
        pixels = stored if frame == decoded else decode_frame(path, dataset, frame)[0]
        if _is_small_integer(pixels):
            pixels = np.unique(pixels)
        values = _modality_values(path, dataset, frame, pixels)
        if padding:
            low, high = sorted((padding[0], limit[0]))
            values = values[(pixels < low) | (pixels > high)]
        if values.size:
            extremes += (float(values.min()), float(values.max()))
    if not extremes:
        raise ImageError(f"{path} has no pixel but padding; there is nothing to render")
    return min(extremes), max(extremes)


def _through_palette(path: Path, dataset: "Dataset", stored: Stored) -> NDArray[np.uint8]:
    """Look up each colour; of 16-bit entries the high byte, exact for both ways of storing 8 bits in them."""
    channels = [table(stored) >> (table.bits - 8) for table in _palette(path, dataset)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _palette(path: Path, dataset: "Dataset") -> list[_LookupTable]:
    """The red, the green and the blue table."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        return _segmented_palette(path, dataset)
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    return [_lookup_table(path, dataset, dataset, f"{name}Descriptor", f"{name}Data") for name in names]


def _segmented_palette(path: Path, dataset: "Dataset") -> list[_LookupTable]:
    """Let pydicom expand the segments (PS3.3 C.7.9.2), by looking up every value that the tables have."""
    from pydicom.pixels.processing import apply_color_lut

    descriptor = element_numbers(path, dataset, "RedPaletteColorLookupTableDescriptor")
    if len(descriptor) != 3 or descriptor[2] not in (8, 16):
        raise ImageError(f"{path} has no valid RedPaletteColorLookupTableDescriptor; export it again")
    first, bits = int(descriptor[1]), int(descriptor[2])
    n_entries = min(int(descriptor[0]) or 2**16, 2**bits)  # pydicom indexes in the type of the entries
    try:
        entries = apply_color_lut(np.arange(first, first + n_entries), dataset).astype(np.int64)
    except Exception:  # damaged segments make it raise whatever they lead to
        raise ImageError(f"{path} has a segmented palette that cannot be expanded; export it again") from None
    return [_LookupTable(first=first, bits=bits, entries=entries[:, channel]) for channel in range(3)]


def _with_supplemental_palette(
    path: Path, dataset: "Dataset", stored: Stored, rgb: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Colour the stored values that a supplemental palette covers (PS3.3 C.8.16.2.1.1.1), no others."""
    if element(path, dataset, "PixelPresentation") not in ("COLOR", "MIXED"):
        return rgb
    first = element_numbers(path, dataset, "RedPaletteColorLookupTableDescriptor")
    if len(first) != 3:
        raise ImageError(f"{path} is a coloured grey image without a palette; export it again")
    covered = stored >= first[1]
    return np.where(covered[:, :, None], _through_palette(path, dataset, stored), rgb)


def _lookup_table(
    path: Path, dataset: "Dataset", item: "Dataset", descriptor: str, data: str
) -> _LookupTable:
    """Read a lookup table; entries are words of the file's byte order, or bytes if there are only so many."""
    numbers = element_numbers(path, item, descriptor)
    content = element(path, item, data)
    if len(numbers) != 3 or content is None:
        raise ImageError(f"{path} has no complete {descriptor.removesuffix('Descriptor')}; export it again")
    n_entries, first, bits = int(numbers[0]) or 2**16, int(numbers[1]), int(numbers[2])
    if isinstance(content, bytes):
        if len(content) >= 2 * n_entries:
            _, little = dataset.original_encoding
            entries = np.frombuffer(content, dtype="<u2" if little else ">u2")[:n_entries]
        else:
            bits, entries = 8, np.frombuffer(content, dtype=np.uint8)[:n_entries]
    else:
        entries = np.atleast_1d(np.asarray(content))[:n_entries]
    if len(entries) != n_entries or not 8 <= bits <= 16 or int(entries.max()) >= 2**bits:
        raise ImageError(f"{path} has a {descriptor} that does not fit its data; export it again")
    return _LookupTable(first=first, bits=bits, entries=entries.astype(np.int64))
