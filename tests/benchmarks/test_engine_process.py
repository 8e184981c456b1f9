import subprocess
import sys
import threading
from pathlib import Path

import pytest

from medgemma_benchmarks.engine_process import EngineModel, EngineProcess, parse_engine
from medgemma_benchmarks.engines import ENGINES, WORKER
from medgemma_runtime.errors import EdgeError
from tests.benchmarks.engines import scripted, steady  # noqa: F401 - a fixture

# Counts up from the sum of what it was given; noisy, as engines are.
COUNTING = """
import ctypes, os, sys

class Counting:
    name, version = "counting", "2"

    def start(self, tokens):
        self.room, self.taken = tokens, []

    def take(self, *tokens):
        self.taken += tokens
        if len(self.taken) > self.room:
            raise ValueError("more than was announced")
        print("a line on Python's stdout")
        os.write(1, b"{}\\n")
        return sum(self.taken)

    def prefill(self, ids):
        return self.take(*ids)

    def step(self, token):
        return self.take(token)

def load(model, *, threads, context):
    if context < 10:
        raise MemoryError(f"no {context}")
    return Counting()
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineModel:
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setitem(ENGINES, "counting", tmp_path / "counting.py")
    return EngineModel(engine="counting", model=tmp_path, python=sys.executable)


def test_the_worker_loads_once_and_answers_prompt_after_prompt(counting: EngineModel) -> None:
    with EngineProcess(counting, threads=1, context=10) as process:
        assert (process.loaded.engine, process.loaded.version) == ("counting", "2")
        assert process.loaded.load_seconds > 0
        assert process.run([1, 2], decode=3).ids == (3, 6, 12, 24)
        second = process.run([5], decode=1)
        assert second.ids == (5, 10)
        assert len(second.decode_seconds) == 1
        if sys.platform == "linux":
            assert process.peak_rss_bytes() > 1 << 20
    assert process._process.returncode is not None


def test_what_an_engine_raises_is_the_error(counting: EngineModel) -> None:
    with pytest.raises(EdgeError, match=r"^counting \(.*\) failed: MemoryError: no 9$"):
        EngineProcess(counting, threads=1, context=9)


def test_the_worker_needs_nothing_but_python(counting: EngineModel) -> None:
    # Without site-packages: as in an environment that has an engine and not this project.
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(WORKER), str(ENGINES["counting"])],
        input='{"model": "m", "threads": 1, "context": 10}\n{"ids": [4], "decode": 0}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, answered = ended.stdout.splitlines()
    assert '"engine": "counting"' in loaded
    assert answered.startswith('{"ids": [4], ')
    assert "a line on Python's stdout" in ended.stderr


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"edge"}))
def test_a_python_without_the_engine_is_named(engine: str, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = next((tmp_path / "bare").glob("bin/python"), tmp_path / "bare/Scripts/python.exe")
    with pytest.raises(EdgeError, match=f"{engine} .* failed: ModuleNotFoundError: No module named"):
        EngineProcess(EngineModel(engine=engine, model=tmp_path, python=str(python)), threads=1, context=64)


LOADED = '{"engine": "e", "version": "1", "load_seconds": 0.5}'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('no such kernel')", "ended with exit status 1: no such kernel$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL$"),
        ("def answer(request): return 'Loading ...'", "an answer that is none: 'Loading ...'$"),
        ("def answer(request): return {'engine': 'e'}", "an answer that is none"),
        ("def answer(request): return 3", "an answer that is none: '3'"),
        ("def answer(request): return {'error': 'too big'}", "failed: too big$"),
        ("def answer(request): import time; time.sleep(60)", "no answer for 0.5 s and was ended"),
    ],
)
def test_an_engine_that_does_not_load_is_one_sentence(scripted, script: str, words: str) -> None:  # noqa: F811
    with pytest.raises(EdgeError, match=rf"^bad \(engines?_?\w*\.py\) .*{words}") as caught:
        EngineProcess(
            scripted("bad", script), threads=1, context=64, timeout_seconds=0.5 if "sleep" in script else 60
        )
    assert "\n" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("{'ids': [1, 2], 'prefill_seconds': 1.0, 'decode_seconds': [0.1, 0.1]}", "an answer that is none"),
        ("{'ids': [1, 2], 'prefill_seconds': 1.0, 'decode_seconds': [0.0]}", "an answer that is none"),
        ("{'ids': [1, 2], 'prefill_seconds': -1.0, 'decode_seconds': [0.1]}", "an answer that is none"),
        ("{'ids': ['1', 2], 'prefill_seconds': 1.0, 'decode_seconds': [0.1]}", "an answer that is none"),
        (
            "{'ids': [1, 2], 'prefill_seconds': float('nan'), 'decode_seconds': [0.1]}",
            "an answer that is none",
        ),
        ("{'ids': [1, 2], 'prefill_seconds': 1.0, 'decode_seconds': [0.1]}", "2 further tokens and timed 1"),
        ("exit(4)", "ended with exit status 4"),
        ("{'error': 'out of memory'}", "failed: out of memory"),
    ],
)
def test_a_run_that_is_not_to_be_believed_is_refused(scripted, answer: str, words: str) -> None:  # noqa: F811
    script = f"def answer(request): return {LOADED} if 'model' in request else {answer}"
    with (
        EngineProcess(scripted("bad", script), threads=1, context=64) as process,
        pytest.raises(EdgeError, match=words),
    ):
        process.run([2, 3], decode=2)


def test_a_worker_that_died_between_two_runs_is_refused(scripted) -> None:  # noqa: F811
    model = scripted("steady", steady("steady", prefill=0.1, decode=0.1))
    with EngineProcess(model, threads=1, context=64) as process:
        process.run([2, 3], decode=2)
        process._process.kill()
        process._process.wait()
        with pytest.raises(EdgeError, match=r"ended by SIGKILL$"):
            process.run([2, 3], decode=2)


def test_a_python_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    model = EngineModel(engine="llama", model=tmp_path, python=str(tmp_path / "python"))
    with pytest.raises(EdgeError, match=r"cannot be started with .*python: No such file"):
        EngineProcess(model, threads=1, context=64)


def test_an_engine_of_the_command_line(tmp_path: Path) -> None:
    model = tmp_path / "a@b=c.gguf"
    model.touch()
    parsed = parse_engine(f"llama={model}@{sys.executable}")
    # Not resolved: a virtual environment is known by the path of its Python.
    assert parsed == EngineModel(engine="llama", model=model, python=sys.executable)
    assert parsed.label == "llama (a@b=c.gguf)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama", "is not ENGINE=MODEL@PYTHON"),
        ("llama=model.gguf", "is not ENGINE=MODEL@PYTHON"),
        ("llama=@python", "is not ENGINE=MODEL@PYTHON"),
        ("llama={here}@", "is not ENGINE=MODEL@PYTHON"),
        ("tensorrt={here}@python", "no such engine; choose from edge, genai, llama"),
        ("llama={here}/none.gguf@python", "none.gguf does not exist"),
        ("llama={here}@{here}/bin/python", "bin/python is no program"),
        ("llama={here}@{here}", "is no program"),
    ],
)
def test_what_is_no_engine_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        parse_engine(text.format(here=tmp_path))
