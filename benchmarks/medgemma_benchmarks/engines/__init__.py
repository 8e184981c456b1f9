"""Stand-alone scripts that generate tokens with one engine each, run by the Python that has that engine.

Only `worker.py` and one engine file are read by that Python, which need not have this project installed.
"""

from pathlib import Path

__all__ = ["ENGINES", "WORKER"]

_HERE = Path(__file__).parent

WORKER = _HERE / "worker.py"
"""The script to run: `PYTHON -I worker.py ENGINE_FILE`; its docstring states what it is told and answers."""

ENGINES: dict[str, Path] = {
    "edge": _HERE / "edge.py",
    "genai": _HERE / "genai.py",
    "llama": _HERE / "llama.py",
    "executorch": _HERE / "executorch_llm.py",
}
"""The engine files by the names that the command line takes; `edge` is this project's runtime."""
