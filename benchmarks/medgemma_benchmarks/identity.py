"""Which artifact a report is about."""

from dataclasses import dataclass

from pydantic import ConfigDict

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.manifest import Precision, TargetName

__all__ = ["ArtifactDescription", "describe_artifact"]


@dataclass(frozen=True, kw_only=True)
class ArtifactDescription:
    """Which artifact was looked at. `manifest_sha256` is its identity: the manifest hashes every file.

    Attributes:
        name: Its directory's name.
        manifest_sha256: Hash of `manifest.json`.
        model_id: Of the checkpoint.
        revision: Of the checkpoint.
        weights_sha256: Of the checkpoint.
        target: Such as `onnx`.
        precision: Such as `int8`.
        scheme: Name of the scheme.
        method: How the integers were found.
        activations: `float`, or how they are quantized at run time.
        bits_per_weight: Mean stored bits, scales included.
        size_bytes: All files.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    manifest_sha256: str
    model_id: str
    revision: str | None
    weights_sha256: str
    target: TargetName
    precision: Precision
    scheme: str
    method: str
    activations: str
    bits_per_weight: float
    size_bytes: int


def describe_artifact(artifact: Artifact) -> ArtifactDescription:
    """The identity and the main facts of an artifact."""
    manifest = artifact.manifest
    return ArtifactDescription(
        name=artifact.directory.resolve().name,
        manifest_sha256=artifact.manifest_sha256,
        model_id=manifest.model.id,
        revision=manifest.model.revision,
        weights_sha256=manifest.model.weights_sha256,
        target=manifest.target,
        precision=manifest.precision,
        scheme=manifest.quantization.scheme,
        method=manifest.quantization.method,
        activations=manifest.quantization.activations,
        bits_per_weight=manifest.quantization.bits_per_weight,
        size_bytes=artifact.size_bytes,
    )
