"""Shows the residual stream between the layers of an ExecuTorch program, by what its event tracer records.

What happens inside a delegate's call is recorded by nobody, but what a call was given and gives is. The
artifact says which of these values is which, and how much memory all of them take: the tracer has no choice
of values and no run in parts, so a machine that has less is told before the run, which would end the process.
"""

import json
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.executorch import METHODS, ExecutorchSession
from medgemma_runtime.backends.executorch_times import open_inspector
from medgemma_runtime.errors import ArtifactError, EdgeError, missing_package
from medgemma_runtime.manifest import ComponentEntry

__all__ = ["LAYERS", "MethodLayers", "Place", "ObservedExecutorchSession"]

LAYERS = "layers.json"
"""The file of an artifact that says where its methods show their layers: a `MethodLayers` by method."""

_CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a value is seen.

    Attributes:
        event: What the tracer calls it: `DELEGATE_CALL`, or `native_call_` and the name of a kernel.
        number: Which of the events of this name in a run, from 0.
        argument: Which of its values, counted from the last, -1.
    """

    __pydantic_config__ = _CHECKED

    event: str
    number: int
    argument: int


@dataclass(frozen=True, kw_only=True)
class MethodLayers:
    """Where a method shows its layers.

    Attributes:
        places: By name; values that stay inside a delegate's call are absent.
        debug_bytes: What the tracer records in a run of one image, or of `MAX_TOKENS` tokens at most.
    """

    __pydantic_config__ = _CHECKED

    places: dict[str, Place]
    debug_bytes: int


_ADAPTER: TypeAdapter[dict[str, MethodLayers]] = TypeAdapter(dict[str, MethodLayers])


class ObservedExecutorchSession:
    """A component whose every run loads its program anew: the tracer's records of several runs would add up.

    A decoder's caches are empty at every run, so a run is the beginning of a conversation.

    Args:
        artifact: An opened artifact of target `executorch`.
        component: A name from its manifest.
        show: Told the name and the value of each place in every run.
        threads: As `ExecutorchSession` takes them.

    Attributes:
        entry: The component's inputs and outputs as the manifest states them.
        load_seconds: Time that loading took, of all runs.

    Raises:
        ArtifactError: If the artifact does not say where its layers are seen.
        EdgeError: If there is not the memory, or the temporary disk, for what is recorded.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(
        self,
        artifact: Artifact,
        component: str,
        show: Callable[[str, NDArray[Any]], None],
        *,
        threads: int | None = None,
    ) -> None:
        self.entry = artifact.component(component)
        self.load_seconds = 0.0
        self._artifact, self._component, self._show, self._threads = artifact, component, show, threads
        self._layers = _read_layers(artifact, component)
        _check_room(artifact, component, self._layers.debug_bytes)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`.

        Raises:
            EdgeError: As `ExecutorchSession`, or if nothing was recorded where a layer should be seen.
        """
        with tempfile.TemporaryDirectory() as directory:
            profile, values = Path(directory) / "profile", Path(directory) / "values"
            started = time.perf_counter()
            session = ExecutorchSession(
                self._artifact,
                self._component,
                threads=self._threads,
                profile_to=profile,
                values_to=values,
                values_bytes=self._layers.debug_bytes,
            )
            self.load_seconds += time.perf_counter() - started
            outputs = session.run(inputs)
            session.close()
            recorded = _recorded(profile, values)
        for name, place in self._layers.places.items():
            try:
                value = recorded[place.event][place.number][place.argument]
            except IndexError:
                raise EdgeError(
                    f"ExecuTorch recorded {len(recorded[place.event])} events {place.event} of component "
                    f"{self._component!r} and {name} is in number {place.number}; export again"
                ) from None
            self._show(name, value)
        return outputs

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`."""
        for name, array in self.run(inputs).items():
            outputs[name][...] = array

    def close(self) -> None:
        """See `Session`. Nothing is held between runs."""


def _read_layers(artifact: Artifact, component: str) -> MethodLayers:
    try:
        text = artifact.path(LAYERS).read_text(encoding="utf-8")
        return _ADAPTER.validate_json(text)[METHODS[component]]
    except (KeyError, ValidationError):
        raise ArtifactError(
            f"{LAYERS} of {artifact.directory.name} does not say where {component!r} shows its layers; "
            "export again"
        ) from None
    except (ArtifactError, json.JSONDecodeError):
        raise ArtifactError(
            f"{artifact.directory.name} has no {LAYERS}, which says where an ExecuTorch program shows its "
            "layers; export again"
        ) from None


def _check_room(artifact: Artifact, component: str, recorded_bytes: int) -> None:
    try:
        import psutil
    except ImportError:
        raise missing_package("psutil", extra="bench", purpose="measure the memory for layers") from None
    place = tempfile.gettempdir()
    for what, needed, free in (
        # They are read back as a whole, and taken apart into copies.
        ("memory", 2 * recorded_bytes, psutil.virtual_memory().available),
        (f"disk in {place}", recorded_bytes, shutil.disk_usage(place).free),
    ):
        if needed > free:
            raise EdgeError(
                f"ExecuTorch records all values of a run, and those of component {component!r} of "
                f"{artifact.directory.name} take {needed / 1e9:.1f} GB of {what}, where {free / 1e9:.1f} "
                "are free; free some, or export the same recipe with --target onnx and compare its layers"
            )


def _recorded(profile: Path, values: Path) -> dict[str, list[list[NDArray[Any]]]]:
    """The values of every event, by its name, in the order of the run."""
    found: dict[str, list[list[NDArray[Any]]]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that the file's bytes are not writable
        for block in open_inspector(profile, values).event_blocks:
            for event in block.events:
                if not event.is_delegated_op and event.debug_data:
                    found[event.name].append([_array(value) for value in event.debug_data])
    return found


def _array(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else value
