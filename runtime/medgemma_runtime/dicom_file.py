"""Opens DICOM files and decodes their frames; `medgemma_runtime.dicom` makes pictures of them.

pydicom decodes, with one fixed plugin for each compression, so that the same file gives the same pixels on
every machine. Values that could identify a patient never enter an error message.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import ImageError, missing_package
from medgemma_runtime.images import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

__all__ = [
    "Stored",
    "read_dataset",
    "count_frames",
    "decode_frame",
    "functional_group",
    "element",
    "element_numbers",
    "whole_number",
    "WARNINGS_THAT_MATTER",
]

Stored = NDArray[np.number[Any]]  # any integer type or, rarely, floats

_COLOURS = ("PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GREYS = ("MONOCHROME1", "MONOCHROME2")
# pydicom warns and goes on where the pixels can no longer be trusted. Its other warnings are about elements
# that rendering does not read, or about padding.
WARNINGS_THAT_MATTER = (
    ".*end of file reached",
    ".*fewer frames than expected",
    ".*no JPEG EOI/EOC marker",
    ".*check that the transfer syntax",
)


def read_dataset(path: Path) -> "Dataset":
    """Parse the file and check that it holds an image this module can render."""
    try:
        from pydicom import dcmread
    except ModuleNotFoundError:
        raise missing_package("pydicom", extra="dicom", purpose="read DICOM files") from None
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give the path of a DICOM file")
    try:
        dataset = dcmread(path, force=True)  # force: a file may lack the preamble
    except Exception as error:  # pydicom raises whatever the damaged bytes lead to
        raise ImageError(
            f"{path} cannot be read as DICOM ({type(error).__name__}); it is damaged or incomplete: "
            "copy it again"
        ) from None
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = dataset.file_meta.get("MediaStorageSOPClassUID", element(path, dataset, "SOPClassUID"))
        name = getattr(kind, "name", None)
        known = f" (it is {name})" if name else ""
        raise ImageError(f"{path} holds no image{known}; give a DICOM image file")
    photometric = element(path, dataset, "PhotometricInterpretation")
    if photometric not in (*_GREYS, *_COLOURS):
        raise ImageError(
            f"{path} has a missing or unsupported PhotometricInterpretation; "
            f"supported are {', '.join((*_GREYS, *_COLOURS))}"
        )
    samples = whole_number(path, dataset, "SamplesPerPixel")
    if samples != (1 if photometric in (*_GREYS, "PALETTE COLOR") else 3):
        raise ImageError(f"{path} is {photometric} with {samples} samples per pixel, which is no valid image")
    rows, columns = whole_number(path, dataset, "Rows"), whole_number(path, dataset, "Columns")
    if not 0 < rows * columns <= MAX_PIXELS:
        raise ImageError(
            f"{path} has frames of {columns} x {rows} pixels and 1 to {MAX_PIXELS:,} pixels can be decoded; "
            "cut a large image into patches first"
        )
    if "PixelData" in dataset:
        bits = whole_number(path, dataset, "BitsStored")
        if samples == 3 and bits < 8:
            raise ImageError(f"{path} stores colours in {bits} bits; 8 to 32 are supported")
        if element_numbers(path, dataset, "HighBit") not in ([], [bits - 1]):
            raise ImageError(
                f"{path} does not store its values in the lowest bits; rewrite it with HighBit {bits - 1}"
            )
    return dataset


def count_frames(path: Path, dataset: "Dataset") -> int:
    """How many frames the file has; 1 for the kinds that have no such element."""
    if element(path, dataset, "NumberOfFrames") is None:
        return 1
    frames = whole_number(path, dataset, "NumberOfFrames")
    if frames < 1:
        raise ImageError(f"{path} has NumberOfFrames {frames}; a DICOM image has at least one frame")
    return frames


def decode_frame(path: Path, dataset: "Dataset", frame: int) -> tuple[Stored, str]:
    """Stored values of a frame, [rows, columns] or [rows, columns, 3], and what they mean after decoding."""
    from pydicom.pixels import get_decoder

    syntax = _transfer_syntax(dataset)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(
            f"{path} is compressed as {syntax.name}, which cannot be decoded; "
            "convert it to Explicit VR Little Endian"
        ) from None
    plugin = _decoding_plugin(syntax)
    if plugin and plugin not in decoder.available_plugins:
        package = "pylibjpeg-openjpeg" if "2000" in syntax.name else "pylibjpeg-libjpeg"
        raise missing_package(package, extra="dicom", purpose=f"decode {syntax.name}")
    try:
        if plugin == "pylibjpeg":
            _check_header(path, dataset, frame, syntax)
        stored, properties = decoder.as_array(dataset, index=frame, decoding_plugin=plugin)
    except ImageError:
        raise
    except Exception as error:  # the decoders raise whatever the damaged bytes lead to
        reason = " ".join(str(error).split())  # about pixel data only, no element that identifies a patient
        raise ImageError(
            f"{path} has pixel data that cannot be decoded ({reason}); copy the file again, "
            "or convert it to Explicit VR Little Endian"
        ) from None
    photometric = str(properties["photometric_interpretation"])
    if photometric not in (*_GREYS, "PALETTE COLOR", "RGB"):
        raise ImageError(
            f"{path} is {photometric} after decoding, which {syntax.name} does not allow; convert it to RGB"
        )
    return stored, photometric


def _check_header(path: Path, dataset: "Dataset", frame: int, syntax: "UID") -> None:
    """Hold a compressed frame's own size against the limit; decoders make room by it, not by Rows."""
    from pydicom.encaps import get_frame

    table = None
    if "ExtendedOffsetTable" in dataset:
        table = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    frames = count_frames(path, dataset)
    codestream = get_frame(dataset.PixelData, frame, extended_offsets=table, number_of_frames=frames)
    header: Mapping[str, Any]
    if "2000" in syntax.name:
        from openjpeg import utils as openjpeg

        header = openjpeg.get_parameters(codestream)
    else:
        from libjpeg import utils as libjpeg

        header = libjpeg.get_parameters(codestream)
    rows, columns = int(header["rows"]), int(header["columns"])
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            f"{path} has pixel data of {columns} x {rows} pixels and {MAX_PIXELS:,} at most can be decoded; "
            "cut a large image into patches first"
        )


def _transfer_syntax(dataset: "Dataset") -> "UID":
    """As the file states it, or, in a file without meta header, as it was found to be readable."""
    from pydicom import uid

    if stated := dataset.file_meta.get("TransferSyntaxUID"):
        return stated
    implicit, little = dataset.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _decoding_plugin(syntax: "UID") -> str:
    """The one plugin for a compression, so that lossy images do not depend on what else is installed."""
    from pydicom.uid import RLELossless

    if not syntax.is_encapsulated:
        return ""
    return "pydicom" if syntax == RLELossless else "pylibjpeg"


def functional_group(path: Path, dataset: "Dataset", frame: int, sequence: str) -> "Dataset":
    """Where a frame's own elements are: its functional group, the shared one, or the file as a whole."""
    per_frame = list(element(path, dataset, "PerFrameFunctionalGroupsSequence") or ())
    shared = list(element(path, dataset, "SharedFunctionalGroupsSequence") or ())
    for groups in (*per_frame[frame : frame + 1], *shared[:1]):
        if items := element(path, groups, sequence):
            return items[0]
    return dataset


def element(path: Path, item: "Dataset", keyword: str) -> Any:
    """The value of an element, or None if it is absent or empty."""
    try:
        value = item.get(keyword)
    except Exception:  # pydicom parses a value when it is first asked for
        raise ImageError(
            f"{path} has a {keyword} that is not to the DICOM standard; export it again"
        ) from None
    return None if value == "" else value


def element_numbers(path: Path, item: "Dataset", keyword: str) -> list[float]:
    """The values of a numeric element, none if it is absent."""
    value = element(path, item, keyword)
    if value is None:
        return []
    try:
        numbers = [float(number) for number in np.atleast_1d(np.asarray(value))]
    except (TypeError, ValueError):
        numbers = [np.nan]
    if not np.isfinite(numbers).all():
        raise ImageError(f"{path} has a {keyword} that is not a number; export it again")
    return numbers


def whole_number(path: Path, dataset: "Dataset", keyword: str) -> int:
    """The value of an element that an image must have, a whole number."""
    numbers = element_numbers(path, dataset, keyword)
    if len(numbers) != 1 or not numbers[0].is_integer():
        raise ImageError(f"{path} has no valid {keyword}, which a DICOM image must have; export it again")
    return int(numbers[0])
