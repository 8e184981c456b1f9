"""Preprocessing against transformers, Pillow, torch and numbers computed by hand.

`python -m tests.runtime.test_images` writes the golden file again, after a change that is meant.
"""

import dataclasses
import hashlib
import io
import json
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medgemma_runtime import images
from medgemma_runtime.errors import EdgeError, ImageError
from medgemma_runtime.images import (
    from_preprocessor_config,
    gemma3,
    load_image,
    medsiglip_evaluation,
    medsiglip_processor,
    medsiglip_serving,
    normalize,
    preprocess,
    resize,
)
from medgemma_runtime.manifest import ImageSpec

GOLDEN = Path(__file__).parent / "golden" / "images.json"
VARIANTS = (gemma3(), medsiglip_processor(), medsiglip_evaluation(), medsiglip_serving())
SHAPES = ((1, 1), (1, 7), (9, 1), (31, 17), (448, 448), (300, 897), (3000, 2), (2, 3000))

SIGLIP_CONFIG: dict[str, object] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 448, "width": 448},
}


def pattern(height: int, width: int) -> NDArray[np.uint8]:
    """An image any program can make: see the golden file's `about`."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((3 * x * x + 7 * y * (x + 1) + x * y // 5 + 85 * c) % 256).astype(np.uint8)


# --- against transformers ---


@pytest.mark.parametrize("shape", SHAPES)
def test_gemma3_equals_the_transformers_processor_bit_for_bit(shape: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = module.Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    reference = processor(Image.fromarray(pattern(*shape)), return_tensors="np")["pixel_values"][0]
    actual = preprocess(pattern(*shape), gemma3())
    assert actual.dtype == reference.dtype == np.float32
    np.testing.assert_array_equal(actual, reference)


@pytest.mark.parametrize("rescale", [0.00392156862745098, 0.00392156862])
@pytest.mark.parametrize("shape", SHAPES)
def test_medsiglip_equals_the_transformers_processor_bit_for_bit(
    shape: tuple[int, int], rescale: float
) -> None:
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    config = {**SIGLIP_CONFIG, "rescale_factor": rescale}
    processor = module.SiglipImageProcessorPil(**config)
    reference = processor(Image.fromarray(pattern(*shape)), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(pattern(*shape), from_preprocessor_config(config)), reference)
    if rescale == medsiglip_processor().rescale:
        np.testing.assert_array_equal(preprocess(pattern(*shape), medsiglip_processor()), reference)


@pytest.mark.parametrize("shape", [(31, 17), (300, 897), (3000, 2)])
def test_serving_equals_googles_service_bit_for_bit(shape: tuple[int, int]) -> None:
    """The service scales to 0..1 first, pads, and calls the processor without rescaling."""
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = module.SiglipImageProcessorPil(do_rescale=False, size={"height": 448, "width": 448})
    height, width = shape
    missing = abs(height - width)
    border = (missing // 2, missing - missing // 2)
    unit = pattern(*shape).astype(np.float32) / 255.0
    unit = np.pad(unit, (border, (0, 0), (0, 0)) if height < width else ((0, 0), border, (0, 0)))
    reference = processor(unit, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(pattern(*shape), medsiglip_serving()), reference)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "1", "CMYK", "YCbCr", "HSV", "PA"])
def test_every_mode_becomes_rgb_as_in_transformers(mode: str, tmp_path: Path) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    base = Image.fromarray(np.dstack([pattern(20, 30), pattern(30, 20).reshape(20, 30, 3)[:, :, :1]]), "RGBA")
    image = base.convert("P").convert("PA") if mode == "PA" else base.convert(mode)
    if mode in ("HSV", "PA"):  # no file format keeps these
        actual = images._to_rgb(tmp_path, image)
    else:
        path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
        image.save(path)
        actual, image = load_image(path), Image.open(path)
        assert image.mode == mode
    np.testing.assert_array_equal(actual, transforms.convert_to_rgb(image, return_numpy=True))
    image.close()


def test_torchs_bilinear_kernel_differs_by_at_most_one_level() -> None:
    """torchvision, where installed, resizes with it; the project holds to Pillow's."""
    torch = pytest.importorskip("torch")
    image, spec = pattern(700, 501), gemma3()
    channels_first = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels_first, size=(spec.height, spec.width), mode="bilinear", antialias=True
    )
    difference = np.abs(resized[0].permute(1, 2, 0).numpy().astype(int) - resize(image, spec))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# --- bilinear without antialiasing ---


def scalar_kernel(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The kernel again, one pixel at a time in scalar float32."""
    one = np.float32

    def source(index: int, n_in: int, n_out: int) -> tuple[int, int, np.float32]:
        position = (one(index) + one(0.5)) * (one(n_in) / one(n_out)) - one(0.5)
        below = np.floor(position)
        return max(int(below), 0), min(int(np.ceil(position)), n_in - 1), position - below

    result = np.empty((height, width, 3), dtype=np.uint8)
    for y in range(height):
        y0, y1, t_y = source(y, image.shape[0], height)
        for x in range(width):
            x0, x1, t_x = source(x, image.shape[1], width)
            for c in range(3):
                a, b, d, e = (one(image[i, j, c]) for i in (y0, y1) for j in (x0, x1))
                top, bottom = a + (b - a) * t_x, d + (e - d) * t_x
                result[y, x, c] = int(top + (bottom - top) * t_y)
    return result


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (31, 17), (5, 40), (23, 24)])
def test_evaluation_equals_the_kernel_computed_one_pixel_at_a_time(shape: tuple[int, int]) -> None:
    image = pattern(*shape)
    np.testing.assert_array_equal(resize(image, medsiglip_evaluation(24)), scalar_kernel(image, 24, 24))


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_agrees_with_torch(shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = pattern(*shape)
    channels_first = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    reference = torch.nn.functional.interpolate(
        channels_first, size=(448, 448), mode="bilinear", align_corners=False, antialias=False
    )[0]
    actual = images._bilinear_without_antialias(image, 448, 448)
    np.testing.assert_allclose(actual, reference.permute(1, 2, 0).numpy(), rtol=0, atol=0.02)


def test_evaluation_by_hand() -> None:
    """Two pixels to four: at -0.25, 0.25, 0.75 and 1.25 of the way from 100 to 103, truncated."""
    image = np.repeat(np.array([[[100], [103]]], dtype=np.uint8), 3, axis=2)
    actual = resize(image, dataclasses.replace(medsiglip_evaluation(), height=1, width=4))
    assert actual[0, :, 0].tolist() == [100, 100, 102, 103]


def test_evaluation_truncates_float32_and_not_the_exact_value() -> None:
    """Near a whole number the two fall on different sides: the order of operations is part of the result."""
    image = pattern(300, 897)

    def weights(n_in: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        position = (np.arange(448) + 0.5) * n_in / 448 - 0.5
        below = np.floor(position).astype(int)
        return np.maximum(below, 0), np.minimum(below + 1, n_in - 1), position - below

    (y0, y1, t_y), (x0, x1, t_x) = weights(300), weights(897)
    across = image[:, x0] * (1 - t_x[:, None]) + image[:, x1] * t_x[:, None]
    exact = across[y0] * (1 - t_y[:, None, None]) + across[y1] * t_y[:, None, None]
    actual = resize(image, medsiglip_evaluation(448))
    different = actual != np.floor(exact + 1e-10)  # float64 is exact to about 1e-13 here
    assert 0 < different.mean() < 0.01
    assert np.abs(exact - np.rint(exact))[different].max() < 0.02  # of the position in float32, times 255


# --- properties ---


@settings(max_examples=25)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    level=st.integers(0, 255),
    variant=st.sampled_from(VARIANTS),
)
def test_a_constant_image_stays_constant(height: int, width: int, level: int, variant: ImageSpec) -> None:
    spec = dataclasses.replace(variant, height=24, width=37, fit="stretch")
    resized = resize(np.full((height, width, 3), level, dtype=np.uint8), spec)
    assert resized.shape == (24, 37, 3)
    assert (resized == level).all()


@settings(max_examples=25)
@given(height=st.integers(1, 60), width=st.integers(1, 60), variant=st.sampled_from(VARIANTS))
def test_channels_do_not_mix_and_floats_lie_in_the_unit_range(
    height: int, width: int, variant: ImageSpec
) -> None:
    spec = dataclasses.replace(variant, height=20, width=20)
    image = pattern(height, width)
    forward, backward = preprocess(image, spec), preprocess(image[:, :, ::-1].copy(), spec)
    np.testing.assert_array_equal(forward, backward[::-1])
    assert forward.shape == (3, 20, 20)
    assert forward.flags.c_contiguous
    assert -1 <= forward.min() <= forward.max() <= 1


@settings(max_examples=25)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_padding_centres_and_puts_the_odd_line_last(height: int, width: int) -> None:
    side = max(height, width)
    padded = resize(np.full((height, width, 3), 200, np.uint8), medsiglip_serving(side))
    rows, columns = np.nonzero(padded[:, :, 0])
    assert (rows.min(), columns.min()) == ((side - height) // 2, (side - width) // 2)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
    assert set(np.unique(padded)) <= {0, 200}


def test_normalize_by_hand() -> None:
    resized = np.array([[[0, 51, 255]]], dtype=np.uint8)
    actual = normalize(resized, gemma3())
    assert actual.dtype == np.float32
    assert actual[:, 0, 0].tolist() == [-1.0, float(np.float32(np.float32(0.2) - np.float32(0.5)) * 2), 1.0]
    channels = dataclasses.replace(gemma3(), rescale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 7.0, 2.0))
    assert normalize(resized, channels)[:, 0, 0].tolist() == [-1.0, 7.0, 126.0]


# --- decoding ---


def test_grey_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    """Pillow's own conversion would make everything above 255 white."""
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert load_image(tmp_path / name)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]


def test_grey_of_32_bits_is_taken_within_16_and_refused_beyond(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "fits.tif")
    assert load_image(tmp_path / "fits.tif")[0].tolist() == [[0] * 3, [255] * 3]
    for value in (-1, 65536):
        Image.fromarray(np.array([[0, value]], dtype=np.int32)).save(tmp_path / "beyond.tif")
        with pytest.raises(ImageError, match="0 to 65535"):
            load_image(tmp_path / "beyond.tif")


def test_transparent_grey_of_16_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 9]], dtype=np.uint16)).save(tmp_path / "clear.png", transparency=9)
    with pytest.raises(ImageError, match="transparent grey"):
        load_image(tmp_path / "clear.png")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="floating-point"):
        load_image(tmp_path / "float.tif")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = pattern(4, 6)
    turns: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # stored turned left: shown turned right
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), upright)


def test_a_frame_is_selected(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((2, 3, 3), level, np.uint8)) for level in (10, 20, 30)]
    for name in ("frames.tif", "frames.gif", "frames.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert [int(load_image(tmp_path / name, frame=i)[0, 0, 0]) for i in (0, 2, 1)] == [10, 30, 20]
        for frame in (-1, 3):
            with pytest.raises(ImageError, match=f"3 frames and frame {frame} was asked for.*0 to 2"):
                load_image(tmp_path / name, frame=frame)
    frames[0].save(tmp_path / "one.png")
    with pytest.raises(ImageError, match="1 frame and frame 1"):
        load_image(tmp_path / "one.png", frame=1)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a file"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="is not a file"):
        load_image(tmp_path / "absent.png")
    for content in (b"", b"a note, not an image", bytes(200)):
        (tmp_path / "note.png").write_bytes(content)
        with pytest.raises(ImageError, match="not an image of a known format"):
            load_image(tmp_path / "note.png")


def test_postscript_is_never_run(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    Image.new("RGB", (4, 4)).save(tmp_path / "chest.png", format="EPS")
    with pytest.raises(ImageError, match="not an image of a known format"):
        load_image(tmp_path / "chest.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp", "jp2"])
def test_an_image_cut_short_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(pattern(64, 64)).save(path)
    content = path.read_bytes()
    load_image(path)
    for length in (len(content) // 2, len(content) // 10):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError):
            load_image(path)


def test_a_flipped_byte_in_a_png_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped.png"
    Image.fromarray(pattern(64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(path)


@pytest.mark.filterwarnings("ignore")  # as in an app, where a warning is not an error by itself
def test_a_damaged_orientation_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    Image.fromarray(pattern(8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with pytest.raises(ImageError, match="EXIF"):
        load_image(path)


def test_threads_do_not_take_away_each_others_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, whole = tmp_path / "exif.jpg", tmp_path / "whole.png"
    Image.fromarray(pattern(8, 8)).save(damaged, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    Image.fromarray(pattern(8, 8)).save(whole)
    inside, leave = threading.Event(), threading.Event()
    original = images.ImageOps.exif_transpose

    def waits(image: Image.Image) -> Image.Image:
        """The other thread comes in before this one leaves, and leaves after it."""
        if threading.current_thread() is first:
            inside.set()
            leave.wait(0.2)  # in vain: the other thread waits for this one
        elif not leave.is_set():
            leave.set()
            first.join()
        return original(image)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", waits)
    first = threading.Thread(target=load_image, args=(whole,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in an app, where a warning is not an error by itself
        before = list(warnings.filters)
        first.start()
        inside.wait()
        with pytest.raises(ImageError, match=r"exif\.jpg cannot be decoded"):
            load_image(damaged)
        first.join()
        assert warnings.filters == before


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9460, 20_000])  # Pillow warns about the first and refuses the second
def test_a_decompression_bomb_is_refused(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match="more than 89,478,485 pixels"):
        load_image(tmp_path / "bomb.png")


def test_the_pixel_limit_holds_without_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_header(9460, 9460))
    with pytest.raises(ImageError, match="more than 89,478,485 pixels"):
        load_image(tmp_path / "bomb.png")


def test_the_pixel_limit_holds_for_every_page(tmp_path: Path) -> None:
    small, large = Image.new("1", (8, 8)), Image.new("1", (10_000, 9_000))  # 4 kB, compressed
    path = tmp_path / "pages.tif"
    small.save(path, save_all=True, append_images=[large], compression="group4")
    assert load_image(path).shape == (8, 8, 3)
    with pytest.raises(ImageError, match="more than 89,478,485 pixels"):
        load_image(path, frame=1)


def test_an_image_without_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.ppm").write_bytes(b"P6 0 4 255\n")
    with pytest.raises(ImageError):
        load_image(tmp_path / "empty.ppm")
    with pytest.raises(ImageError, match="no pixels"):
        images._check_size(tmp_path / "empty.ppm", 0, 4)


def test_an_icc_profile_changes_nothing(tmp_path: Path) -> None:
    image_cms = pytest.importorskip("PIL.ImageCms")
    profile = image_cms.ImageCmsProfile(image_cms.createProfile("LAB")).tobytes()
    Image.fromarray(pattern(5, 5)).save(tmp_path / "profile.png", icc_profile=profile)
    np.testing.assert_array_equal(load_image(tmp_path / "profile.png"), pattern(5, 5))


def test_dicom_is_recognized_by_its_mark_and_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import medgemma_runtime.dicom

    monkeypatch.setattr(
        medgemma_runtime.dicom, "read_dicom", lambda path, *, frame: np.full((1, 1, 3), frame, np.uint8)
    )
    (tmp_path / "scan").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "scan.DCM").write_bytes(b"\x08\0")
    assert load_image(tmp_path / "scan", frame=5)[0, 0, 0] == 5
    assert load_image(tmp_path / "scan.DCM", frame=6)[0, 0, 0] == 6


# --- refusals ---


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
)
def test_resize_refuses_what_is_no_rgb_image(image: NDArray[np.generic]) -> None:
    for spec in VARIANTS:
        with pytest.raises(ImageError, match=r"must be uint8 of shape \[height, width, 3\]"):
            resize(image, spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"rounding": "truncate"},
        {"antialias": False},
        {"antialias": False, "rounding": "truncate", "resample": "bicubic"},
    ],
)
def test_resize_refuses_combinations_that_no_processor_has(change: dict[str, str | bool]) -> None:
    spec = dataclasses.replace(gemma3(), **change)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="no known processor"):
        resize(pattern(4, 4), spec)


def test_a_preprocessor_config_is_read() -> None:
    gemma = {
        **SIGLIP_CONFIG,
        "image_processor_type": "Gemma3ImageProcessorFast",
        "do_pan_and_scan": None,
        "pan_and_scan_max_num_crops": 4,
        "image_seq_length": 256,
        "resample": 2,
        "crop_size": None,
        "size": {"height": 896, "width": 896},
    }
    for config, reference in ((gemma, gemma3()), (SIGLIP_CONFIG, medsiglip_processor())):
        actual = from_preprocessor_config(config)
        assert dataclasses.replace(actual, name=reference.name, source=reference.source) == reference
    truncated = from_preprocessor_config({**SIGLIP_CONFIG, "rescale_factor": 0.00392156862})
    assert truncated.rescale == 0.00392156862


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_processor_type", "CLIPImageProcessor"),
        ("image_processor_type", None),
        ("do_pan_and_scan", True),
        ("do_center_crop", True),
        ("do_pad", True),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_convert_rgb", False),
        ("size", {"shortest_edge": 448}),
        ("size", {"height": 448, "width": 0}),
        ("size", {"height": 448, "width": True}),
        ("size", 448),
        ("resample", 1),
        ("resample", None),
        ("resample", "bicubic"),
        ("rescale_factor", "1/255"),
        ("rescale_factor", -1.0),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_mean", None),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, "0.5", 0.5]),
        ("do_flip", True),
    ],
)
def test_a_preprocessor_config_that_says_more_is_refused(key: str, value: object) -> None:
    with pytest.raises(ImageError, match=f"preprocessor_config.json has {key} = "):
        from_preprocessor_config({**SIGLIP_CONFIG, key: value})


# --- golden file ---


def golden_files() -> dict[str, bytes]:
    """Files that any program can decode without loss, by name."""
    grey16 = (np.arange(40 * 33, dtype=np.int64).reshape(33, 40) * 7919 % 65536).astype(np.uint16)
    alpha = np.dstack([pattern(25, 31), pattern(31, 25).reshape(25, 31, 3)[:, :, 0]])
    palette = Image.fromarray(pattern(27, 45)[:, :, 0] // 16).convert("L")
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette(pattern(1, 16)[0].tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6

    def png(image: Image.Image, **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "PNG", **options)
        return stream.getvalue()

    rgb = {f"rgb-{height}x{width}": png(Image.fromarray(pattern(height, width))) for height, width in SHAPES}
    return {
        **rgb,
        "grey-37x29": png(Image.fromarray(np.ascontiguousarray(pattern(37, 29)[:, :, 0]))),
        "grey16-33x40": png(Image.fromarray(grey16)),
        "rgba-25x31": png(Image.fromarray(alpha)),
        "palette-27x45": png(palette),
        "palette-clear-27x45": png(palette, transparency=3),
        "exif6-21x50": png(Image.fromarray(pattern(21, 50)), exif=exif),
    }


def sha256(array: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def golden_record() -> dict[str, object]:
    entries = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in golden_files().items():
            path = Path(folder) / f"{name}.png"
            path.write_bytes(content)
            decoded = load_image(path)
            entries[name] = {
                "shape": list(decoded.shape),
                "decoded": sha256(decoded),
                "resized": {spec.name: sha256(resize(decoded, spec)) for spec in VARIANTS},
            }
    return {
        "about": "SHA-256 of RGB bytes, rows from the top. An rgb-HxW image has at row y, column x, channel "
        "c the value (3xx + 7y(x + 1) + floor(xy / 5) + 85c) mod 256; tests/runtime/test_images.py makes the "
        "others. Resized: to 896 x 896 for gemma3 and to 448 x 448 for the others.",
        "images": entries,
    }


def test_golden_file() -> None:
    assert golden_record() == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "change", [{"resample": "bicubic"}, {"antialias": False, "rounding": "truncate"}, {"fit": "pad"}]
)
def test_the_golden_hashes_tell_the_variants_apart(change: dict[str, str | bool]) -> None:
    image = pattern(31, 17)
    other = dataclasses.replace(gemma3(), **change)  # type: ignore[arg-type]
    assert sha256(resize(image, gemma3())) != sha256(resize(image, other))


def test_pillows_other_warnings_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only warnings that put the pixels in doubt are made errors; none is swallowed."""
    Image.fromarray(pattern(3, 3)).save(tmp_path / "fine.png")
    original = Image.open

    def warns(path: Path, **options: object) -> Image.Image:
        warnings.warn("odd metadata", UserWarning, stacklevel=2)
        return original(path, **options)

    monkeypatch.setattr(images.Image, "open", warns)
    with pytest.warns(UserWarning, match="odd metadata"):
        load_image(tmp_path / "fine.png")


def test_errors_are_edge_errors() -> None:
    assert issubclass(ImageError, EdgeError)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_record(), indent=1) + "\n", encoding="utf-8")
