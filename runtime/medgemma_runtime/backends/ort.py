"""Runs a component with ONNX Runtime on the CPU."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import ref

from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.onnx_outputs import with_outputs
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec
from medgemma_runtime.session import check_inputs

__all__ = ["OrtSession"]

# By id, an array that is not kept alive, and ONNX Runtime's view of it.
_Seen = dict[int, tuple["ref[NDArray[Any]]", Any]]

# ONNX Runtime's names of the element types that a TensorSpec can state.
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}

# Level 4 is fatal. Lower levels repeat on stderr what is raised as an error here, or warn about
# choices of the exporter that a user cannot change.
_LOG_FATAL = 4

_MAX_REASON_CHARS = 300


class OrtSession:
    """One component in ONNX Runtime's CPU execution provider.

    The weights of a program with external data are mapped, not read; what ONNX Runtime packs for
    its kernels it holds as a copy, so that memory peaks at about the size of the weights.

    Args:
        artifact: An opened artifact of target `onnx`.
        component: A name from its manifest.
        threads: Threads for one operator; None lets ONNX Runtime take one for each physical core.
        profile_to: Where `close` leaves ONNX Runtime's profile, JSON in Chrome's trace format with
            the time of every operator of every run. Profiling slows the runs a little.
        exact_program: A program to run in place of the component's own, over the component's weight
            file: its exact form, which a packing reference carries. Nothing is optimized then,
            because ONNX Runtime would turn its float products into rounding ones again.
        shown: Names of values inside the program to show in every run. ONNX Runtime fuses no operators over
            them, so the program is not quite the one that ships.
        show: Told the name and the value of each.

    Attributes:
        entry: The component's inputs and outputs as the manifest states them.
        load_seconds: Time that reading, optimizing and packing the program took.

    Raises:
        ArtifactError: If there is no such component, its program cannot be loaded, or it is not the
            program that the manifest describes.
        EdgeError: If `threads` or `profile_to` cannot be.
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
        exact_program: Path | None = None,
        shown: tuple[str, ...] = (),
        show: Callable[[str, NDArray[Any]], None] | None = None,
    ) -> None:
        import onnxruntime

        self.entry = artifact.component(component)
        self._component = component
        self._profile_to = profile_to
        program = artifact.path(self.entry.program)
        # Official builds report usage to Microsoft unless told otherwise.
        onnxruntime.disable_telemetry_events()
        options = _session_options(threads=threads, profile_to=profile_to)
        source: str | bytes = str(program)
        self._shown, self._show = shown, show
        if exact_program is not None:
            source = exact_program.read_bytes()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if shown:
            source = with_outputs(program.read_bytes() if isinstance(source, str) else source, shown)
        if not isinstance(source, str):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(program.parent)
            )
        started = time.perf_counter()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime's exceptions have no common base but Exception.
            raise ArtifactError(
                f"component {component!r} ({self.entry.program}) cannot be loaded by ONNX Runtime "
                f"{onnxruntime.__version__}: {_reason(error)}; export again, or install the "
                "ONNX Runtime it was made for"
            ) from None
        self.load_seconds = time.perf_counter() - started
        self._run_options = onnxruntime.RunOptions()
        self._seen: _Seen = {}
        self._device = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
        for kind, specs, nodes in (
            (
                "inputs",
                self.entry.inputs,
                self._session.get_inputs() + self._session.get_overridable_initializers(),
            ),
            (
                "outputs",
                self.entry.outputs,
                [node for node in self._session.get_outputs() if node.name not in shown],
            ),
        ):
            _check_signature(component, kind, specs, {node.name: node for node in nodes})

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, the run fails inside ONNX
                Runtime, or the session is closed.
        """
        self._check(inputs)
        names = [spec.name for spec in self.entry.outputs]
        try:
            outputs = self._session.run([*names, *self._shown], dict(inputs))
        except Exception as error:
            raise self._failed(error) from None
        if self._show is not None:
            for name, value in zip(self._shown, outputs[len(names) :], strict=True):
                self._show(name, value)
        return dict(zip(names, outputs[: len(names)], strict=True))

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`.

        Raises:
            EdgeError: As `run`.
        """
        self._check(inputs)
        if outputs.keys() != {spec.name for spec in self.entry.outputs}:
            raise EdgeError(f"component {self._component!r} needs an array for every output")
        for name, array in outputs.items():
            # ONNX Runtime would write into a copy of the one, and into the other nevertheless.
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise EdgeError(
                    f"the array for {name!r} of component {self._component!r} is not contiguous or read-only "
                    "and results are written in place; give another"
                )
        if self._show is not None:
            for name, value in self.run(inputs).items():
                outputs[name][...] = value
            return
        seen, self._seen = self._seen, {}
        try:
            # Not by an IoBinding, which refuses inputs that have a default.
            self._session.run_with_ortvaluevector(
                self._run_options,
                list(inputs),
                self._views(inputs.values(), seen),
                list(outputs),
                self._views(outputs.values(), seen),
                [self._device] * len(outputs),
            )
        except Exception as error:
            raise self._failed(error) from None

    def _views(self, arrays: Iterable[NDArray[Any]], seen: _Seen) -> Any:
        """ONNX Runtime's views of arrays: the same memory, so a kernel can see that it may work in place.

        Those of the run before are used again: caches are the same arrays at every step, and making dozens of
        views takes a twentieth of a small model's step.
        """
        # The wrappers in the package's root take longer than all else that happens here.
        from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue, OrtValueVector

        views = OrtValueVector()
        for array in arrays:
            key = id(array)
            if key not in self._seen:
                known, view = seen.get(key, (None, None))
                if known is None or known() is not array:
                    known, view = ref(array), OrtValue.ortvalue_from_numpy(array, self._device)
                self._seen[key] = known, view
            views.push_back(self._seen[key][1])
        return views

    def _check(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        if self._session is None:
            raise EdgeError(f"component {self._component!r} is closed; open it again to run it")
        check_inputs(self.entry, inputs)

    def _failed(self, error: Exception) -> EdgeError:
        return EdgeError(
            f"component {self._component!r} failed while running: {_reason(error)}; "
            "give it fewer items at once, or export the model again"
        )

    def close(self) -> None:
        """Free the component's memory, and write the profile if one was asked for."""
        if self._session is None:
            return
        if self._profile_to is not None:
            Path(self._session.end_profiling()).replace(self._profile_to)
        self._session = None
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give freed pages back to the system: glibc keeps half a GB of a closed vision tower otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _session_options(*, threads: int | None, profile_to: Path | None) -> Any:
    """ONNX Runtime's options, where its default is not ours.

    Measured with ONNX Runtime 1.32 on 24 MLP pairs of MedSigLIP's width, batch 1, two cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    # The arena keeps what one run needed for ever: 30 MB here, for no difference in time.
    options.enable_cpu_mem_arena = False
    # Threads spin between operators (without it a run takes a quarter longer) and stop when the run
    # ends: by default they go on spinning, which drains a battery between two images.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        if threads < 1:
            raise EdgeError(f"threads must be at least 1 and is {threads}")
        options.intra_op_num_threads = threads
    if profile_to is not None:
        if not profile_to.parent.is_dir():
            raise EdgeError(f"the profile cannot be written: {profile_to.parent} is no directory")
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to.with_suffix(""))
    return options


def _check_signature(
    component: str, kind: str, specs: tuple[TensorSpec, ...], nodes: Mapping[str, Any]
) -> None:
    """Hold the loaded program against the manifest: names, types, and sizes that both fix."""
    if set(nodes) != {spec.name for spec in specs}:
        raise ArtifactError(
            f"component {component!r} has the {kind} {sorted(nodes)} and the manifest says "
            f"{sorted(spec.name for spec in specs)}; export again"
        )
    for spec in specs:
        node = nodes[spec.name]
        is_same = node.type == _ORT_TYPES[spec.dtype] and len(node.shape) == len(spec.shape)
        if not is_same or any(
            isinstance(stated, int) and isinstance(actual, int) and stated != actual
            for stated, actual in zip(spec.shape, node.shape, strict=True)
        ):
            raise ArtifactError(
                f"component {component!r} has {spec.name!r} as {node.type} {node.shape} and the "
                f"manifest says {spec.dtype} {list(spec.shape)}; export again"
            )


def _reason(error: Exception) -> str:
    """The first line of an ONNX Runtime message, without its numbered prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("[ONNXRuntimeError] : ", maxsplit=1)[-1][:_MAX_REASON_CHARS].rstrip(".")
