"""Runs a component with ExecuTorch's Python runtime.

The package `executorch` brings PyTorch, whose tensors its runtime takes and gives; on a device its C++
runtime reads the same file without either.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, ImageSpec
from medgemma_runtime.session import check_inputs

__all__ = ["ExecutorchSession", "METHODS", "weights_path"]

METHODS = {
    "image": "image_encoder",
    "text": "text_encoder",
    "vision": "vision_encoder",
    "embed": "token_embedding",
    "decoder": "text_decoder",
}
"""What a component's method is called; ExecuTorch's multimodal runner knows the last three."""

_MAX_REASON_CHARS = 300


class ExecutorchSession:
    """One method of an ExecuTorch program.

    Every session loads the program for itself: methods of one loaded program share memory for intermediate
    values, and a decoder's caches would not outlive the next embedding.

    Args:
        artifact: An opened artifact of target `executorch`.
        component: A name from its manifest.
        threads: Threads of ExecuTorch's one thread pool, for this and every other session; None leaves it.
        profile_to: Where `close` leaves ExecuTorch's profile, for `operator_times`; None for none.
        values_to: Where `close` leaves the values of tensors that the profile speaks of; None for none.
        values_bytes: Room for them. ExecuTorch ends the process where it does not suffice.

    Attributes:
        entry: The component's inputs and outputs as the manifest states them.
        load_seconds: Time that reading and packing took.

    Raises:
        ArtifactError: If there is no such component, the program has no such method or cannot be loaded, or
            weights of its own file are missing, damaged, or of another export.
        EdgeError: If ExecuTorch is not installed, or `threads` cannot be.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(
        self,
        artifact: Artifact,
        component: str,
        *,
        threads: int | None = None,
        profile_to: Path | None = None,
        values_to: Path | None = None,
        values_bytes: int = 0,
    ) -> None:
        self.entry = artifact.component(component)
        self._component, self._profile_to, self._values_to = component, profile_to, values_to
        self._image: ImageSpec | None = artifact.manifest.image
        prompt = artifact.manifest.prompt
        self._image_id = None if prompt is None else prompt.image_id
        if threads is not None and threads < 1:
            raise EdgeError(f"threads must be at least 1 and is {threads}")
        runtime = _load_runtime()
        if threads is not None:
            runtime._legacy_module._unsafe_reset_threadpool(threads)
        program, method = artifact.path(self.entry.program), METHODS[component]
        weights = _find_weights(artifact, self.entry.program)
        started = time.perf_counter()
        try:
            self._program = runtime.load_program(
                program,
                enable_etdump=profile_to is not None,
                debug_buffer_size=values_bytes,
                data_path=weights,
            )
            if method not in self._program.method_names:
                raise ArtifactError(
                    f"{self.entry.program} has no method {method!r}, which component {component!r} is; "
                    f"it has {', '.join(sorted(self._program.method_names))}: export again"
                )
            self._method = self._program.load_method(method)
        except RuntimeError as error:
            cause = "the file is damaged or of another version: export again"
            if weights is not None:
                cause = (
                    f"a file is damaged, or {weights.name} is of another export and has not all that "
                    f"{program.name} asks it for: copy both again from one artifact, or export again"
                )
            raise ArtifactError(
                f"component {component!r} ({self.entry.program}) cannot be loaded by ExecuTorch: "
                f"{_reason(error)}; {cause}"
            ) from None
        self.load_seconds = time.perf_counter() - started
        takes = self._method.metadata.num_inputs()
        known = [spec for spec in self.entry.inputs if spec.default is None]
        if takes != len(known):
            raise ArtifactError(
                f"method {method!r} takes {takes} inputs and the manifest says {len(known)}; export again"
            )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`.

        Pixels that are normalized already are taken too, and turned back to the uint8 that they came from.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, the run fails inside ExecuTorch, or the
                session is closed.
        """
        import torch

        if self._method is None:
            raise EdgeError(f"component {self._component!r} is closed; open it again to run it")
        given = dict(inputs)
        pixels = given.get("pixel_values")
        if pixels is not None and pixels.dtype == np.float32 and self._image is not None:
            given["pixel_values"] = _levels(pixels, self._image)
        check_inputs(self.entry, given)
        arguments = [given[spec.name] for spec in self.entry.inputs if spec.default is None]
        try:
            results = self._method.execute(
                [torch.from_numpy(np.ascontiguousarray(item)) for item in arguments]
            )
        except RuntimeError as error:
            raise EdgeError(
                f"component {self._component!r} failed while running: {_reason(error)}; "
                "give it fewer tokens at once, or export the model again"
            ) from None
        outputs: dict[str, NDArray[Any]] = {}
        for spec, result in zip(self.entry.outputs, results, strict=True):
            array = result.numpy()
            # Methods give [1, tokens, width] for image features, as ExecuTorch's runners want them.
            outputs[spec.name] = array.reshape(array.shape[-len(spec.shape) :])
        if self._component == "embed":
            outputs["inputs_embeds"] = self._placed(outputs["inputs_embeds"], given)
        return outputs

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`. Caches are inside the program, so nothing is written but results."""
        results = self.run(inputs)
        if outputs.keys() != results.keys():
            raise EdgeError(f"component {self._component!r} needs an array for every output")
        for name, result in results.items():
            outputs[name][...] = result

    def close(self) -> None:
        """Free the component's memory, and write the profile if one was asked for."""
        if self._program is not None and self._profile_to is not None:
            self._program.write_etdump_result_to_file(
                str(self._profile_to), str(self._values_to or os.devnull)
            )
        self._method = self._program = None

    def _placed(self, embeddings: NDArray[Any], given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Put image features in their places, in order."""
        features = given.get("image_features")
        places = given["input_ids"] == self._image_id if self._image_id is not None else None
        count = 0 if places is None else int(places.sum())
        if features is None and count == 0:
            return embeddings
        if features is None or places is None or len(features) != count:
            raise EdgeError(
                f"component {self._component!r} failed while running: {count} places of image tokens and "
                f"{0 if features is None else len(features)} image features; give one for each"
            )
        placed = embeddings.copy()
        placed[places] = features
        return placed


def weights_path(program: Path) -> Path:
    """Where a program's weights lie that are not in its own file."""
    return program.with_suffix(".ptd")


def _find_weights(artifact: Artifact, program: str) -> Path | None:
    """The file of a program's weights, or None where they are in the program's own.

    Raises:
        ArtifactError: If the manifest lists one that is not there.
    """
    name = weights_path(Path(program)).as_posix()
    if all(entry.path != name for entry in artifact.manifest.files):
        return None
    path = artifact.path(name)
    if not path.is_file():
        raise ArtifactError(f"{name} is missing from {artifact.directory.name}; copy it or export again")
    return path


def _load_runtime() -> Any:
    """ExecuTorch's runtime with the kernels that our programs use."""
    try:
        import executorch.extension.llm.custom_ops.custom_ops  # registers the attention kernel
        import executorch.kernels.quantized  # registers the kernels that look tables up  # noqa: F401
        from executorch.runtime import Runtime
    except ImportError as error:
        raise EdgeError(
            f"ExecuTorch cannot be imported ({error}); install it: pip install 'medgemma-edge[executorch]'"
        ) from None
    return Runtime.get()


def _levels(pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """[N, 3, H, W] normalized floats to the uint8 that they were made of.

    Raises:
        EdgeError: If they were made of no uint8.
    """
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (spec.mean, spec.std))
    levels = (pixels * std + mean) / np.float32(spec.rescale)
    rounded = np.rint(levels)
    if not (np.abs(levels - rounded) < 0.01).all() or rounded.min() < 0 or rounded.max() > 255:
        raise EdgeError(
            "pixel_values are not what the manifest's image spec makes of an 8-bit image; "
            "give the resized image itself, uint8"
        )
    result: NDArray[np.uint8] = rounded.astype(np.uint8)
    return result


def _reason(error: Exception) -> str:
    """The first line of a message of ExecuTorch's."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:_MAX_REASON_CHARS].rstrip(".")
