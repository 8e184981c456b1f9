"""Engines for tests: scripted workers whose times are chosen, and an artifact that claims to generate."""

import sys
from pathlib import Path

import pytest

from medgemma_benchmarks import engine_process, engines, generation
from medgemma_benchmarks.engine_process import EngineModel
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.manifest import ComponentEntry, PromptSpec
from tests.benchmarks.tiny_bundle import rewritten
from tests.runtime import tiny_artifact as tiny

# In place of worker.py: its engine file holds a function from a request to its answer. It writes down what
# each process is asked, and in which order.
SCRIPTED_WORKER = """
import json, os, sys
scope = {}
exec(open(sys.argv[1]).read(), scope)
for line in sys.stdin:
    request = json.loads(line)
    folder, name = os.path.split(sys.argv[1])
    with open(sys.argv[1] + ".asked", "a") as asked, open(folder + "/turns", "a") as turns:
        asked.write(line)
        turns.write(name + " ")
    answer = scope["answer"](request)
    print(answer if isinstance(answer, str) else json.dumps(answer), flush=True)
"""

STEADY = """
def answer(request):
    if "model" in request:
        return {{"engine": "{name}", "version": "1", "load_seconds": 0.5}}
    steps = request["decode"]
    return {{
        "ids": {first} + [7] * (steps + 1 - len({first})),
        "prefill_seconds": {prefill} * len(request["ids"]),
        "decode_seconds": [{decode}] * steps,
    }}
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Adds an engine that answers by a script; `edge` is what an artifact itself runs with."""
    folder = tmp_path / "engines"
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(SCRIPTED_WORKER)
    monkeypatch.setattr(engine_process, "WORKER", worker)
    monkeypatch.setattr(generation.time, "sleep", lambda seconds: None)
    # The tiny artifact has no tokenizer of Gemma's kind.
    monkeypatch.setattr(generation, "prompt_ids", lambda artifact, tokens: [2, *range(9, tokens + 8)])

    def add(name: str, script: str) -> EngineModel:
        (folder / name).write_text(script)
        monkeypatch.setitem(engines.ENGINES, name, folder / name)
        return EngineModel(engine=name, model=Path(__file__), python=sys.executable)

    return add


def steady(name: str, *, prefill: float, decode: float, first: tuple[int, ...] = ()) -> str:
    """The script of an engine that takes so many seconds a token and begins its answers so."""
    return STEADY.format(name=name, prefill=prefill, decode=decode, first=list(first))


def generating_artifact(directory: Path, *, context: int = 600) -> Artifact:
    """An artifact whose manifest states a decoder; its programs are those of the tiny artifact."""
    tiny.write_tiny_artifact(directory)
    components = tiny.tiny_manifest(directory).components
    decoder = ComponentEntry(
        program=components["text"].program,
        inputs=components["text"].inputs,
        outputs=(tiny.tensor("logits", "float32", "batch", 3000),),
    )
    spec = PromptSpec(
        tokenizer="tokenizer.json",
        template="gemma3",
        context=context,
        bos_id=2,
        stop_ids=(1,),
        image_id=None,
        tokens_per_image=0,
        window=None,
        source="tests",
    )
    return rewritten(
        directory, components={"embed": components["image"], "decoder": decoder}, prompt=spec, text=None
    )
