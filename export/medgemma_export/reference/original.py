"""How the original model runs: with transformers, in the plain implementation, on a device that is named."""

import importlib.metadata
import platform
from typing import Any, Literal

from medgemma_runtime.errors import EdgeError, missing_package
from medgemma_runtime.manifest import ImageSpec

__all__ = [
    "ATTENTION",
    "Device",
    "Dtype",
    "import_transformers",
    "device_name",
    "package_versions",
    "compute_in_full",
    "describe_processor",
]

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "float16", "bfloat16"]

# The plain implementation: every step of it is in transformers' source, and it is the same on every device.
ATTENTION = "eager"
_PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "pillow", "numpy")


def import_transformers() -> Any:
    """The module, silenced.

    Raises:
        EdgeError: If it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", extra="export", purpose="record a reference") from None
    # It warns of token ids that SiglipModel never reads, and draws a progress bar over ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def device_name(device: Device) -> str:
    """The product's name of the device.

    Raises:
        EdgeError: If it is `cuda` and torch can use none.
    """
    from medgemma_benchmarks.device import describe_device

    if device == "cpu":
        return describe_device(threads=None).cpu
    import torch

    if not torch.cuda.is_available():
        raise EdgeError(
            "device cuda was asked for and this machine has no CUDA device that torch can use; "
            "record on the CPU with --device cpu, or on a machine with one"
        )
    return torch.cuda.get_device_name(0)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what the original computes."""
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | found


def compute_in_full() -> None:
    """Keep CUDA from TF32, which has 10 bits of each float32 product.

    cuDNN convolutions, such as the patch embedding, use it unless told otherwise.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def describe_processor(processor: Any) -> ImageSpec:
    """What one of transformers' image processors was set to do."""
    resample: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
    mean, std = (tuple(float(x) for x in values) for values in (processor.image_mean, processor.image_std))
    return ImageSpec(
        name="siglip-reference",
        height=processor.size["height"],
        width=processor.size["width"],
        fit="stretch",
        resample=resample[int(processor.resample)],
        antialias=True,
        rounding="nearest",
        rescale=float(processor.rescale_factor),
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
        source=f"transformers {importlib.metadata.version('transformers')} {type(processor).__name__}",
    )
