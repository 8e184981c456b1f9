"""One build request."""

from dataclasses import dataclass
from pathlib import Path

from medgemma_export.targets import TARGETS
from medgemma_quantization.scheme import Scheme
from medgemma_runtime.manifest import TargetName

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to export, how, and where to.

    Attributes:
        model: A directory, a Hugging Face hub id, a GGUF file, or `sample:NAME`.
        revision: Hub revision, or None for its main branch.
        target: A name from `TARGETS`.
        scheme: How weights are quantized.
        components: The components to export; empty means all.
        out: The artifact's directory, which must not exist yet.
    """

    model: str
    revision: str | None
    target: TargetName
    scheme: Scheme
    components: tuple[str, ...]
    out: Path

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is unknown; the targets are {', '.join(TARGETS)}")
        if len(set(self.components)) != len(self.components):
            raise ValueError(f"components {list(self.components)} name one twice")
