"""Loads one engine and times its generation, told by JSON lines on stdin, answering by JSON lines on stdout.

    PYTHON -I worker.py ENGINE_FILE

An engine file defines `load(model, *, threads, context)`, which returns an `Engine`. The first request and
its answer, and every later one:

    {"model": PATH, "threads": N, "context": N}
    {"engine": NAME, "version": VERSION, "load_seconds": T}

    {"ids": [...], "decode": N}
    {"ids": [...], "prefill_seconds": T, "decode_seconds": [...]}

The ids answered are the most probable token after the prompt and after each of the N tokens that follow. What
cannot be done is answered by {"error": ...}. It needs Python's own library only, 3.9 or later.
"""

import gc
import json
import os
import runpy
import sys
import time
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: Of the engine.
        version: Of the engine.
    """

    name: str
    version: str

    def start(self, tokens: int) -> None:
        """Forget the conversation; the next may have so many tokens. Not timed."""

    def prefill(self, ids: "list[int]") -> int:
        """Read a prompt and return the most probable next token."""

    def step(self, token: int) -> int:
        """Append that token and return the most probable next one."""


def answer(engine: Engine, ids: "list[int]", decode: int) -> "dict[str, object]":
    """Time one prompt and `decode` further tokens."""
    engine.start(len(ids) + decode)
    decode_seconds = []
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        token = engine.prefill(ids)
        read = time.perf_counter()
        chosen = [token]
        before = read
        for _ in range(decode):
            token = engine.step(token)
            now = time.perf_counter()
            chosen.append(token)
            decode_seconds.append(now - before)
            before = now
    finally:
        gc.enable()
    return {"ids": chosen, "prefill_seconds": read - started, "decode_seconds": decode_seconds}


def serve(engine_file: str, requests: Any, answers: Any) -> None:
    """Answer each line of `requests` by a line of `answers`, until the requests end."""
    engine = None
    for line in requests:
        request = json.loads(line)
        try:
            if engine is None:
                started = time.perf_counter()
                load = runpy.run_path(engine_file)["load"]
                model = request.pop("model")
                engine = load(model, **request)
                reply = {
                    "engine": engine.name,
                    "version": engine.version,
                    "load_seconds": time.perf_counter() - started,
                }
            else:
                reply = answer(engine, **request)
        except Exception as error:  # whatever an engine raises is for the one who asked
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Engines print what they like; only answers may reach the real stdout.
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, _answers)
