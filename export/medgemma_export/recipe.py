"""One build request."""

from dataclasses import dataclass
from pathlib import Path

from medgemma_export.targets import TARGETS, Delegate, Units
from medgemma_quantization.budget import Budget
from medgemma_quantization.calibration import BUILTIN
from medgemma_quantization.methods import METHODS, MethodName
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
        adapter: The directory of a LoRA adapter to merge into the model, as PEFT saves it.
        context: Tokens of prompt and answer together that the artifact allows; None for all the model has.
        method: How integers are found, a name from `METHODS`.
        calibration: A calibration set, as `open_set` takes it; None for none.
        calibration_bytes: Memory for activations; what does not fit goes to the disk.
        units: Whose layout a Core ML program gets; None is the GPU's there, and nothing elsewhere.
        delegate: Who computes in an ExecuTorch program; None is XNNPACK there, and nothing elsewhere.
        separate_weights: Whether weights of an ExecuTorch program get a file of their own.
        budget: How far 8-bit weights may go among those of a 4-bit scheme; None for the scheme as it is.
        sensitivity: A file with what 4 bits on each weight cost; written if it is not there. None keeps none.
    """

    model: str
    revision: str | None
    target: TargetName
    scheme: Scheme
    components: tuple[str, ...]
    out: Path
    adapter: Path | None = None
    context: int | None = None
    method: MethodName = "rtn"
    calibration: str | None = None
    calibration_bytes: int = 2 << 30
    units: Units | None = None
    delegate: Delegate | None = None
    separate_weights: bool = False
    budget: Budget | None = None
    sensitivity: Path | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is unknown; the targets are {', '.join(TARGETS)}")
        if len(set(self.components)) != len(self.components):
            raise ValueError(f"components {list(self.components)} name one twice")
        if self.context is not None and self.context < 2:
            raise ValueError(
                f"context {self.context} leaves no room for a prompt and an answer; name more tokens"
            )
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; the methods are {', '.join(METHODS)}")
        wanted = METHODS[self.method].samples
        if self.scheme.activations == "int8-static":
            wanted = "needed"
            if self.calibration is None:
                raise ValueError(
                    f"scheme {self.scheme.name} has static ranges of activations, which only samples show; "
                    f"name a calibration set: a directory, a manifest file, or {BUILTIN}"
                )
        if wanted == "needed" and self.calibration is None:
            raise ValueError(
                f"method {self.method} needs a calibration set: a directory, a manifest file, or {BUILTIN}"
            )
        if wanted == "none" and self.calibration is not None:
            raise ValueError(
                f"method {self.method} looks at no samples; leave the calibration set out, or choose another"
            )
        if self.budget is not None and self.calibration is None:
            raise ValueError(
                f"a budget needs a calibration set to measure what bits are worth: {BUILTIN} or your own, "
                "with a method that looks at it"
            )
        if self.budget is not None and (self.scheme.decoder or self.scheme.linear).bits != 4:
            raise ValueError(
                f"a budget raises weights from int4 to int8 and the scheme is {self.scheme.name}; choose "
                "precision int4, or scheme mobile"
            )
        if self.budget is not None and METHODS[self.method].factors is not None:
            raise ValueError(
                f"a budget measures what bits cost without the factors of method {self.method}; choose gptq "
                "or search, or name bits in a scheme file"
            )
        if self.sensitivity is not None and self.budget is None:
            raise ValueError("sensitivities are measured for a budget; name one, or leave their file out")
        if self.calibration_bytes < 1:
            raise ValueError(f"calibration_bytes must be above zero and is {self.calibration_bytes}")
