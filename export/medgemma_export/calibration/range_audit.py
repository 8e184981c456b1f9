"""How large activations become on real prompts, and what residual scale lets float16 hold them.

float16 ends at 65,504. Gemma 3's residual stream passes that; its norms undo any factor of the stream, so a
power of two takes the peak away and changes no other bit (`Decoder.residual_scale`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from medgemma_export.calibration.calibrate import ModelInput
from medgemma_export.calibration.lockstep_ops import Samples
from medgemma_export.calibration.observation import observe
from medgemma_export.models import ModelSpec
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["Peak", "RangeAudit", "audit_ranges", "FLOAT16_MAX", "HEADROOM"]

FLOAT16_MAX: Final = float(np.finfo(np.float16).max)

HEADROOM: Final = 4.0
"""How much larger than any seen an activation may become: prompts of tomorrow are not in the set."""

# The parts that a decoder's residual stream runs through.
_SCALED = ("embed", "decoder")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest magnitude at one place.

    Attributes:
        component: The part of the model.
        name: Of an input, the first linear that has it; of a residual sum, the linear whose branch was added
            last, or `COMPONENT.embeddings` before the first.
        kind: What was looked at.
        value: The magnitude.
    """

    component: str
    name: str
    kind: Literal["input", "residual"]
    value: float

    @property
    def share(self) -> float:
        """Of what float16 holds."""
        return self.value / FLOAT16_MAX

    @property
    def layer(self) -> str:
        """The name as far as the number of its layer, or all of it."""
        words = self.name.split(".")
        numbers = [place for place, word in enumerate(words) if word.isdecimal()]
        return ".".join(words[: numbers[0] + 1]) if numbers else self.name

    def residual_scale(self, headroom: float = HEADROOM) -> float | None:
        """The largest power of two, at most 1, that leaves this headroom; None where no scale applies."""
        if self.kind != "residual" or self.component not in _SCALED:
            return None
        return 2.0 ** -max(0, math.ceil(math.log2(max(self.share * headroom, 1))))


@dataclass(frozen=True, kw_only=True)
class RangeAudit:
    """The peaks of a model, in the order in which it computes."""

    peaks: tuple[Peak, ...]

    def residual_scale(self, headroom: float = HEADROOM) -> float | None:
        """That of the whole decoder; None for a model without one."""
        scales = [scale for peak in self.peaks if (scale := peak.residual_scale(headroom)) is not None]
        return min(scales, default=None)

    def layers(self) -> dict[str, list[Peak]]:
        """The peaks of each layer."""
        layers: dict[str, list[Peak]] = {}
        for peak in self.peaks:
            layers.setdefault(peak.layer, []).append(peak)
        return layers


def audit_ranges(
    model: ModelSpec,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    *,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> RangeAudit:
    """Find the peaks at the input of every linear and at every sum of the residual stream, in float32.

    Args:
        model: At a residual scale of 1.
        read: Reads a float weight by name.
        samples: The prompts, as the model takes them.
        memory_bytes: Activations beyond this go to temporary files.
        progress: Called with the matrices met and their number.

    Raises:
        EdgeError: If there is no sample, or an activation is not finite.
    """
    if not samples:
        raise EdgeError("ranges are those of samples and there are none; give images or texts")
    auditor = _Auditor(model, progress or (lambda done, total: None))
    observe(model, read, samples, memory_bytes=memory_bytes, meet=auditor.meet, grown=auditor.grown)
    return RangeAudit(peaks=tuple(auditor.peaks))


@dataclass
class _Auditor:
    """Takes note of what `LockstepOps` shows, and of where that is."""

    model: ModelSpec
    progress: Callable[[int, int], None]
    peaks: list[Peak] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._components = {
            spec.name: component.name
            for component in reversed(self.model.components)
            for spec in component.weights()
        }
        self._total = sum(spec.role in ("linear", "table") for spec in self.model.weights())
        self._met: list[str] = []
        self._place = ("", "")

    def meet(self, names: tuple[str, ...], inputs: Samples | None) -> None:
        """See `Meet`."""
        self._met += names
        self.progress(len(self._met), self._total)
        component, name = self._components[names[0]], names[0].removesuffix(".weight")
        if inputs is not None:
            self._place = (component, names[-1].removesuffix(".weight"))
            self._note(component, name, "input", inputs)

    def grown(self, component: str, stream: Samples) -> None:
        """See `observe`."""
        inside, name = self._place
        name = name if inside == component else f"{component}.embeddings"
        self._note(component, name, "residual", stream)

    def _note(self, component: str, name: str, kind: Literal["input", "residual"], seen: Samples) -> None:
        value = float(np.max([np.abs(tensor.numpy()).max(initial=0) for tensor in seen.tensors]))
        if not math.isfinite(value):
            raise EdgeError(
                f"the {kind} at {name} is not finite, in float32 already; look for the sample that does it, "
                "or get the checkpoint again"
            )
        self.peaks.append(Peak(component=component, name=name, kind=kind, value=value))
