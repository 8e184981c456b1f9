"""Files that let transformers.js find an artifact's programs, as the sources of its version 4.3 read them."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from medgemma_export.models.spec import ModelSpec
from medgemma_runtime.manifest import ComponentEntry

__all__ = ["write_js_files"]

# Its precisions, by the endings that it gives file names.
_DTYPES = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_q4": "q4"}


def write_js_files(model: ModelSpec, entries: Mapping[str, ComponentEntry], directory: Path) -> None:
    """Say in `config.json` which precision each program has and that its weights lie in a file beside it.

    For a model that sees images also the size of an image in tokens and the chat template, where transformers
    keeps them today; older checkpoints have the template in `tokenizer_config.json`.

    Args:
        model: What was lowered.
        entries: The components that lie in `directory`.
        directory: Of the artifact, with the checkpoint's own files.
    """
    paths = {name: PurePosixPath(entry.program) for name, entry in entries.items()}
    stems = {component.name: component.file_stem for component in model.components}
    settings = {
        "dtype": {stem: _DTYPES[paths[name].stem.removeprefix(stem)] for name, stem in stems.items()},
        "use_external_data_format": {path.name: 1 for path in paths.values()},
    }
    _write_json(
        directory / "config.json",
        {**_read_json(directory / "config.json"), "transformers.js_config": settings},
    )
    if model.prompt is None or "vision" not in entries:
        return
    _write_json(
        directory / "processor_config.json",
        {"processor_class": "Gemma3Processor", "image_seq_length": model.prompt.tokens_per_image},
    )
    template = directory / "chat_template.jinja"
    stored = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if not template.exists() and isinstance(stored, str):
        template.write_text(stored, encoding="utf-8")


def _read_json(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
