"""One engine in a process of its own, under the Python that has it: loaded once, then asked for runs."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ConfigDict, TypeAdapter

from medgemma_benchmarks.engines import ENGINES, WORKER
from medgemma_benchmarks.process_cost import peak_rss_bytes_of
from medgemma_runtime.errors import EdgeError

__all__ = ["EngineModel", "EngineProcess", "Loaded", "Run", "parse_engine"]

_MAX_REASON_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """A model in an engine's own format, and the Python to run it with.

    Attributes:
        engine: A name from `ENGINES`.
        model: A file, or a directory.
        python: Of an environment that has the engine installed.
    """

    engine: str
    model: Path
    python: str

    @property
    def label(self) -> str:
        """What a reader knows it by."""
        return f"{self.engine} ({self.model.name})"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A worker's answer when its model is loaded."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    engine: str
    version: str
    load_seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A worker's answer to one prompt.

    Attributes:
        ids: The most probable token after the prompt and after each one that followed it.
        prefill_seconds: From the prompt to the first of them.
        decode_seconds: To each further one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.decode_seconds) + 1:
            raise ValueError(f"{len(self.ids)} ids and {len(self.decode_seconds)} times between them")
        if min(self.prefill_seconds, *self.decode_seconds) <= 0:
            raise ValueError("a time is not above zero")


T = TypeVar("T", Loaded, Run)


def parse_engine(text: str) -> EngineModel:
    """Read `ENGINE=MODEL@PYTHON` of the command line.

    Raises:
        EdgeError: If it is not of that form, or there is no such engine, model or Python.
    """
    engine, equals, rest = text.partition("=")
    model, at, python = rest.rpartition("@")
    if not (engine and equals and model and at and python):
        raise EdgeError(
            f"--against {text!r} is not ENGINE=MODEL@PYTHON; give it as llama=model.gguf@env/bin/python"
        )
    if engine not in ENGINES:
        raise EdgeError(f"--against {engine}: there is no such engine; choose from {', '.join(ENGINES)}")
    if not Path(model).exists():
        raise EdgeError(
            f"--against {engine}: {model} does not exist; give a model in that engine's own format"
        )
    found = shutil.which(python)
    if found is None:
        raise EdgeError(
            f"--against {engine}: {python} is no program; give the Python of an environment with that engine"
        )
    # Not resolved: what makes a virtual environment is the path that its Python is started by.
    return EngineModel(engine=engine, model=Path(model), python=found)


class EngineProcess:
    """A worker, started and loaded; use as a context manager.

    Args:
        model: What to run, and where.
        threads: For the engine.
        context: Tokens that a prompt and what follows it may have together.
        timeout_seconds: Longest wait for one answer.

    Attributes:
        loaded: What the worker said of itself.

    Raises:
        EdgeError: If it cannot be started, ends, says no or answers nonsense; and so by `run`.
    """

    loaded: Loaded

    def __init__(
        self, model: EngineModel, *, threads: int, context: int, timeout_seconds: float = 600.0
    ) -> None:
        self._label = model.label
        self._timeout_seconds = timeout_seconds
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                # -I: the engine's environment alone, whatever this one's variables and directory hold.
                [model.python, "-I", str(WORKER), str(ENGINES[model.engine])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                encoding="utf-8",
            )
        except OSError as error:
            self._said.close()
            raise EdgeError(
                f"{self._label} cannot be started with {model.python}: {error.strerror}"
            ) from None
        try:
            request = {"model": str(model.model), "threads": threads, "context": context}
            self.loaded = self._ask(request, Loaded)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, ids: list[int], *, decode: int) -> Run:
        """Read a prompt and generate `1 + decode` tokens greedily, a stop token among them or not."""
        run = self._ask({"ids": ids, "decode": decode}, Run)
        if len(run.decode_seconds) != decode:
            raise EdgeError(
                f"{self._label} was asked for {decode} further tokens and timed {len(run.decode_seconds)}; "
                "its engine file is at fault"
            )
        return run

    def peak_rss_bytes(self) -> int | None:
        """Highest resident memory of the worker so far; None where the system does not tell."""
        return peak_rss_bytes_of(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            # A worker that has died leaves a pipe that cannot be flushed any more.
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                continue
        self._process.wait()
        self._said.close()

    def _ask(self, request: dict[str, object], kind: type[T]) -> T:
        assert self._process.stdin is not None and self._process.stdout is not None
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(self._timeout_seconds, give_up)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
            timer.join()
        if timed_out.is_set():
            raise EdgeError(f"{self._label} gave no answer for {self._timeout_seconds:g} s and was ended")
        if not line.endswith("\n"):
            raise EdgeError(f"{self._label} {self._ending()}")
        try:
            if isinstance(answer := json.loads(line), dict) and "error" in answer:
                raise EdgeError(f"{self._label} failed: {str(answer['error'])[:_MAX_REASON_CHARS]}")
            return TypeAdapter(kind).validate_json(line, strict=True)
        except ValueError:  # pydantic's ValidationError is one
            raise EdgeError(
                f"{self._label} gave an answer that is none: {line.strip()[:_MAX_REASON_CHARS]!r}"
            ) from None

    def _ending(self) -> str:
        """How the process ended, and what it said last."""
        code = self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended {how}" + (f": {lines[-1][:_MAX_REASON_CHARS]}" if lines else "")
