"""The errors a user is meant to read.

Every message has three parts: what was asked, what is true, what to do. The command lines print it
without a traceback and exit with 2; any other exception is a defect of ours.
"""

__all__ = [
    "EdgeError",
    "ArtifactError",
    "CheckpointError",
    "ImageError",
    "TextError",
    "NotFiniteError",
    "missing_package",
]


class EdgeError(Exception):
    """A request that cannot be met, for a reason the user can act on."""


class ArtifactError(EdgeError):
    """An artifact that is absent, incomplete, altered, or of an unknown version."""


class CheckpointError(EdgeError):
    """A model checkpoint that is absent, incomplete, damaged or of an unsupported kind."""


class ImageError(EdgeError):
    """An image file, DICOM or other, that cannot become model input."""


class TextError(EdgeError):
    """A text or tokenizer that cannot become model input."""


class NotFiniteError(EdgeError):
    """A computation that left the range of its numbers: what follows is NaN or infinite, and no answer."""


def missing_package(package: str, *, extra: str, purpose: str) -> EdgeError:
    """The error for an optional dependency that is not installed.

    Args:
        package: The distribution's name on PyPI.
        extra: The extra of medgemma-edge that brings it.
        purpose: What it is needed for, as the end of "... is needed to".
    """
    return EdgeError(
        f"{package} is needed to {purpose} and is not installed; run: pip install 'medgemma-edge[{extra}]'"
    )
