"""From an image file to a model input, exact to the last bit.

This is the only image preprocessing in the project: calibration, parity, the command line and the vectors
that the mobile apps are held against all come through here. `load_image` decodes a file to RGB, `resize`
brings it to the model's size in uint8, `normalize` makes floats of it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from medgemma_runtime.decoder_warnings import warnings_decided
from medgemma_runtime.errors import ImageError
from medgemma_runtime.manifest import ImageSpec

__all__ = [
    "MAX_PIXELS",
    "load_image",
    "preprocess",
    "resize",
    "normalize",
    "gemma3",
    "medsiglip_processor",
    "medsiglip_evaluation",
    "medsiglip_serving",
    "from_preprocessor_config",
]

MAX_PIXELS = 1024**3 // 4 // 3
"""Largest image that is decoded, in pixels (89.5 million, four times the largest mammogram).

As RGB it takes 256 MiB; it is also the size from which Pillow suspects a decompression bomb. Decoding needs
more for a while: measured with 20 million pixels of 16-bit grey, 8 bytes a pixel from DICOM (154 MiB) and 14
from PNG (271 MiB), the RGB result included. Whole-slide images are far larger: cut patches first.
"""

_GREY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_GREY16_STEP = 257  # 65535 / 255: the uint16 grey that stands for one uint8 step
_HALF = (0.5, 0.5, 0.5)
_ONE_255TH = 1 / 255  # prints as 0.00392156862745098, the rescale_factor of every Hugging Face processor
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_WHITE = (255, 255, 255, 255)
# No EPS, which Pillow hands to Ghostscript, and nothing else that runs a program or that nobody sends.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow warns and goes on where the decoded pixels or their orientation can no longer be trusted.
_WARNINGS_THAT_MATTER = ".*(corrupt|truncated)"


def load_image(path: Path, *, frame: int = 0) -> NDArray[np.uint8]:
    """Decode an image file, DICOM or other, to RGB.

    A file is DICOM when it has the `DICM` mark at byte 128 or its name ends in `.dcm`;
    `medgemma_runtime.dicom` renders it. Everything else is read by Pillow as transformers 5.23 reads it: the
    EXIF orientation is applied, transparency is laid on white, every other mode is converted by Pillow; ICC
    profiles are ignored. One thing differs: 16-bit grey, which Pillow's conversion would clip to white, is
    divided by 257 and rounded, so that black and white stay the ends of the file's range. Stretching from
    minimum to maximum instead would make a grey level depend on the rest of the image; Google's MedSigLIP
    service divides by the full range, too.

    Args:
        path: The file.
        frame: Which frame of a multi-frame or animated file, from 0.

    Returns:
        [height, width, 3], red, green, blue.

    Raises:
        ImageError: If the file is absent, no image, damaged, too large, or has no such frame.
        EdgeError: If it is DICOM and pydicom is not installed.
    """
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give the path of an image file")
    if _is_dicom(path):
        from medgemma_runtime.dicom import read_dicom

        return read_dicom(path, frame=frame)
    try:
        # _check_size refuses what Pillow suspects to be a bomb.
        with (
            warnings_decided(_WARNINGS_THAT_MATTER, ignored=Image.DecompressionBombWarning),
            Image.open(path, formats=_FORMATS) as image,
        ):
            _check_size(path, *image.size)
            _seek(path, image, frame)
            _check_size(path, *image.size)  # a later page of a TIFF has a size of its own
            image.load()
            return _to_rgb(path, ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large(path)) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not an image of a known format ({', '.join(_FORMATS)}, DICOM); convert it to PNG "
            "(a DICOM file without preamble must be named .dcm)"
        ) from None
    except Exception as error:  # Pillow's decoders raise some ten types on damaged files
        raise ImageError(
            f"{path} cannot be decoded ({type(error).__name__}: {error}); the file is damaged or of a "
            "kind Pillow cannot read: copy it again or convert it to PNG"
        ) from None


def preprocess(image: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Bring an RGB image to the model's input: `normalize(resize(image))`.

    Shapes:
        image: [H, W, 3]
        result: [3, spec.height, spec.width]
    """
    return normalize(resize(image, spec), spec)


def resize(image: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """Bring an RGB image to the size of the model input, still in uint8.

    Two kernels exist. With `antialias` and rounding to `nearest` it is Pillow's `Image.resize`. Without, for
    `bilinear` and `truncate`, it is `tf.image.resize(antialias=False)` followed by a cast to uint8.

    Shapes:
        image: [H, W, 3]
        result: [spec.height, spec.width, 3]

    Raises:
        ImageError: If the image is not uint8 RGB, is empty, or the spec asks for another combination.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            f"an image must be uint8 of shape [height, width, 3] and is {image.dtype} {list(image.shape)}; "
            "use load_image, or convert it to RGB first"
        )
    if spec.fit == "pad":
        image = _pad_to_square(image)
    match spec.antialias, spec.rounding, spec.resample:
        case True, "nearest", _:
            resized = Image.fromarray(image).resize(
                (spec.width, spec.height), resample=_RESAMPLE[spec.resample]
            )
            return np.array(resized)
        case False, "truncate", "bilinear":
            return _bilinear_without_antialias(image, spec.height, spec.width).astype(np.uint8)
        case _:
            raise ImageError(
                f"ImageSpec {spec.name} asks for {spec.resample} with antialias={spec.antialias} and rounding"
                f" {spec.rounding!r}, which no known processor does; use antialias=True with 'nearest', "
                "or bilinear with antialias=False and 'truncate'"
            )


def normalize(resized: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Turn resized pixels into the model's floats.

    In the order of transformers' Pillow processors: multiply by `rescale` in float64, round to float32,
    subtract the float32 mean, divide by the float32 std. An image has only 256 values, so a table of them is
    exact. (The torchvision processors fold `rescale` into mean and std and differ in the last bits.)

    Shapes:
        resized: [height, width, 3]
        result: [3, height, width], contiguous
    """
    levels = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    values = np.empty((3, *resized.shape[:2]), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        table = (levels - np.float32(mean)) / np.float32(std)
        values[channel] = table[resized[:, :, channel]]
    return values


def gemma3(size: int = 896) -> ImageSpec:
    """What MedGemma's processor does: stretch to a square with Pillow's bilinear kernel, scale to [-1, 1]."""
    return _square_spec(
        name="gemma3",
        size=size,
        resample="bilinear",
        source="preprocessor_config.json of google/medgemma-4b-it; transformers Gemma3ImageProcessorPil",
    )


def medsiglip_processor(size: int = 448) -> ImageSpec:
    """What MedSigLIP's Hugging Face processor does: stretch with Pillow's bicubic kernel, scale to [-1, 1].

    A checkpoint's own `preprocessor_config.json` goes before it: see `from_preprocessor_config`.
    """
    return _square_spec(
        name="medsiglip-processor",
        size=size,
        resample="bicubic",
        source="preprocessor_config.json of google/medsiglip-448; transformers SiglipImageProcessorPil",
    )


def medsiglip_evaluation(size: int = 448) -> ImageSpec:
    """What the published MedSigLIP evaluations did: bilinear without antialiasing, truncated to uint8."""
    return _square_spec(
        name="medsiglip-evaluation",
        size=size,
        resample="bilinear",
        antialias=False,
        rounding="truncate",
        source="model card of google/medsiglip-448 and Google-Health/medsiglip "
        "notebooks/quick_start_with_hugging_face.ipynb: tf.image.resize, bilinear, antialias=False",
    )


def medsiglip_serving(size: int = 448) -> ImageSpec:
    """What Google's MedSigLIP service does: pad to a black square, then Pillow's bicubic kernel.

    The service's source calls the padding the method performed in training. It also takes 16-bit input, which
    it reduces to uint8 by truncation before resizing; here the image is uint8 already.
    """
    return _square_spec(
        name="medsiglip-serving",
        size=size,
        fit="pad",
        resample="bicubic",
        source="Google-Health/medsiglip python/serving/predictor.py",
    )


def _square_spec(
    *,
    name: str,
    size: int,
    resample: Literal["bilinear", "bicubic"],
    source: str,
    fit: Literal["stretch", "pad"] = "stretch",
    antialias: bool = True,
    rounding: Literal["nearest", "truncate"] = "nearest",
) -> ImageSpec:
    return ImageSpec(
        name=name,
        height=size,
        width=size,
        fit=fit,
        resample=resample,
        antialias=antialias,
        rounding=rounding,
        rescale=_ONE_255TH,
        mean=_HALF,
        std=_HALF,
        source=source,
    )


_CONFIG_CLASSES = ("Gemma3ImageProcessor", "SiglipImageProcessor")
_CONFIG_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's ids
_CONFIG_READ = ("image_processor_type", "size", "resample", "rescale_factor", "image_mean", "image_std")
_CONFIG_MUST_BE_ON = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_CONFIG_MUST_BE_OFF = ("do_pan_and_scan", "do_center_crop", "do_pad")
# Bookkeeping, and settings of steps that are off; none of them changes a pixel.
_CONFIG_WITHOUT_EFFECT = (
    "processor_class",
    "image_seq_length",
    "data_format",
    "default_to_square",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


def from_preprocessor_config(config: Mapping[str, object]) -> ImageSpec:
    """Read a checkpoint's `preprocessor_config.json`, of a Gemma 3 or SigLIP image processor.

    Args:
        config: The parsed JSON.

    Raises:
        ImageError: If it asks for something an `ImageSpec` does not say, such as pan and scan.
    """
    kind = str(config.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind not in _CONFIG_CLASSES:
        raise _config_error(config, "image_processor_type", f"one of {', '.join(_CONFIG_CLASSES)}")
    for key in _CONFIG_MUST_BE_ON:
        if config.get(key) not in (True, None):  # null leaves the class's default, which is true
            raise _config_error(config, key, "true")
    for key in _CONFIG_MUST_BE_OFF:
        if config.get(key) not in (False, None):
            raise _config_error(config, key, "false")
    known = {*_CONFIG_READ, *_CONFIG_MUST_BE_ON, *_CONFIG_MUST_BE_OFF, *_CONFIG_WITHOUT_EFFECT}
    for key in config:
        if key not in known and config[key] is not None:
            raise _config_error(config, key, "absent: this runtime does not know it")
    size = config.get("size")
    if not isinstance(size, Mapping) or set(size) != {"height", "width"}:
        raise _config_error(config, "size", 'an object with "height" and "width"')
    height, width = size["height"], size["width"]
    if not (_is_count(height) and _is_count(width)):
        raise _config_error(config, "size", "two positive integers")
    resample = config.get("resample")
    if not isinstance(resample, int) or resample not in _CONFIG_RESAMPLE:
        raise _config_error(config, "resample", "2 (bilinear) or 3 (bicubic)")
    rescale = config.get("rescale_factor", _ONE_255TH)
    if not isinstance(rescale, float) or not 0 < rescale < math.inf:
        raise _config_error(config, "rescale_factor", "a positive number")
    return ImageSpec(
        name=f"{kind.removesuffix('ImageProcessor').lower()}-preprocessor-config",
        height=height,
        width=width,
        fit="stretch",
        resample=_CONFIG_RESAMPLE[resample],
        antialias=True,
        rounding="nearest",
        rescale=rescale,
        mean=_three_numbers(config, "image_mean"),
        std=_three_numbers(config, "image_std"),
        source=f"preprocessor_config.json of the checkpoint; transformers {kind}Pil",
    )


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or path.suffix.lower() == ".dcm"


def _check_size(path: Path, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{path} has no pixels ({width} x {height}); give an image with at least one")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(path))


def _too_large(path: Path) -> str:
    return (
        f"{path} has more than {MAX_PIXELS:,} pixels, the most that is decoded; "
        "shrink it or cut it into patches first"
    )


def _seek(path: Path, image: Image.Image, frame: int) -> None:
    frames = getattr(image, "n_frames", 1)  # single-frame formats have no such attribute
    if not 0 <= frame < frames:
        raise ImageError(
            f"{path} has {frames} frame{'s' if frames > 1 else ''} and frame {frame} was asked for; "
            f"give a frame from 0 to {frames - 1}"
        )
    if frames > 1:
        image.seek(frame)


def _to_rgb(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    has_transparency = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode in _GREY16_MODES:
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > np.iinfo(np.uint16).max or has_transparency:
            raise ImageError(
                f"{path} holds grey values from {grey.min()} to {grey.max()}, or a transparent grey, and "
                "only opaque 0 to 65535 has a known black and white; save it as 8-bit or 16-bit grey"
            )
        # 257 is odd: no value lies half-way between two levels, so the direction of rounding cannot matter.
        levels = ((grey.astype(np.uint32) + _GREY16_STEP // 2) // _GREY16_STEP).astype(np.uint8)
        return np.repeat(levels[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(
            f"{path} holds floating-point pixels, which have no known black and white; "
            "save it as 8-bit or 16-bit grey"
        )
    if has_transparency:
        white = Image.new("RGBA", image.size, _WHITE)
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _pad_to_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Centre on a black square; of an odd difference the extra line goes below or to the right."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, 3), dtype=np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def _bilinear_without_antialias(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    """`tf.image.resize(image, method="bilinear", antialias=False)`, operation by operation in float32.

    The order is that of TensorFlow's CPU kernel (tensorflow/core/kernels/image/resize_bilinear_op.cc with
    half-pixel centres): interpolate along x in the upper and in the lower row, then along y, each as
    `a + (b - a) * t` with the product rounded before the sum. It matters: the caller truncates, and a value
    one ulp below an integer becomes the integer before it. A build that fuses multiply and add can differ
    there by one level.
    """
    if image.shape[:2] == (height, width):
        return image.astype(np.float32)
    upper, lower, t_y = _neighbours(image.shape[0], height)
    left, right, t_x = _neighbours(image.shape[1], width)
    t_x, t_y = t_x[None, :, None], t_y[:, None, None]

    def along_x(rows: NDArray[np.intp]) -> NDArray[np.float32]:
        line = image[rows].astype(np.float32)
        start = line[:, left]
        return start + (line[:, right] - start) * t_x

    top = along_x(upper)
    return top + (along_x(lower) - top) * t_y


def _neighbours(n_in: int, n_out: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each output position the two input positions around it and the weight of the second, [n_out]."""
    scale = np.float32(n_in) / np.float32(n_out)
    position = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    first = np.maximum(floor.astype(np.intp), 0)
    second = np.minimum(np.ceil(position).astype(np.intp), n_in - 1)
    return first, second, position - floor


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _three_numbers(config: Mapping[str, object], key: str) -> tuple[float, float, float]:
    match config.get(key):
        case [int() | float() as red, int() | float() as green, int() | float() as blue]:
            values = (float(red), float(green), float(blue))
            if all(map(math.isfinite, values)) and (key == "image_mean" or min(values) > 0):
                return values
    raise _config_error(config, key, "a list of three numbers" + (" above 0" if key == "image_std" else ""))


def _config_error(config: Mapping[str, object], key: str, expected: str) -> ImageError:
    return ImageError(
        f"preprocessor_config.json has {key} = {config.get(key)!r} and an ImageSpec can only say "
        f"{expected}; export with a checkpoint whose processor does that"
    )
