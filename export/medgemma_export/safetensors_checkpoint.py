"""Reads safetensors directories as Hugging Face lays them out, whole models and adapters, without unpickling.

One file or an index and its shards; the table of contents is read when a directory is opened, a weight when
it is asked for.
"""

import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path

# Importing ml_dtypes teaches numpy the name "bfloat16", which safetensors asks numpy for.
import ml_dtypes  # noqa: F401
import numpy as np
from numpy.typing import NDArray

from medgemma_export.checkpoint import EXACT_DTYPES, Checkpoint, TensorInfo, listed
from medgemma_runtime.errors import CheckpointError

__all__ = [
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHTS_NAME",
    "open_directory",
    "open_adapter",
    "is_pickled",
    "pickled_error",
]

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# Formats that run code when they are loaded, or that hide it.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def open_directory(directory: Path, *, id: str, revision: str | None) -> Checkpoint:
    """Open a whole model.

    Raises:
        CheckpointError: If the directory is incomplete or damaged, or holds something else.
    """
    return _checkpoint(
        directory,
        id=id,
        revision=revision,
        tensors=_table_of_contents(directory, id),
        config=_read_json_object(directory / "config.json", id),
    )


def open_adapter(directory: Path) -> Checkpoint:
    """Open what PEFT's `save_pretrained` writes: as a checkpoint whose config is adapter_config.json.

    Raises:
        CheckpointError: If the directory is incomplete or damaged, or holds something else.
    """
    id = directory.resolve().name
    if not directory.is_dir():
        raise CheckpointError(
            f"adapter {directory} is no directory; name one that holds {ADAPTER_CONFIG_NAME} and "
            f"{ADAPTER_WEIGHTS_NAME}, as PEFT's save_pretrained writes them"
        )
    config = _read_json_object(directory / ADAPTER_CONFIG_NAME, id)
    if not (directory / ADAPTER_WEIGHTS_NAME).is_file():
        names = sorted(entry.name for entry in os.scandir(directory))
        if pickled := [name for name in names if is_pickled(name)]:
            raise pickled_error(pickled, holder=id)
        raise CheckpointError(f"{id} has no {ADAPTER_WEIGHTS_NAME}; save the adapter with PEFT again")
    tensors = _read_header(directory / ADAPTER_WEIGHTS_NAME)
    return _checkpoint(directory, id=id, revision=None, tensors=tensors, config=config)


def is_pickled(name: str) -> bool:
    """Whether a file of this name would be unpickled by those who load it."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLED)


def pickled_error(names: Sequence[str], *, holder: str) -> CheckpointError:
    """The refusal of pickled files, with the remedy."""
    return CheckpointError(
        f"{listed(names)} ({holder}) is a pickled checkpoint, which can run code when it is loaded; "
        "convert it on a machine you can lose, with save_pretrained of transformers or PEFT, which writes "
        "safetensors"
    )


def _checkpoint(
    directory: Path,
    *,
    id: str,
    revision: str | None,
    tensors: dict[str, TensorInfo],
    config: dict[str, object],
) -> Checkpoint:
    def read(info: TensorInfo, rows: slice | None) -> NDArray[np.float32]:
        return _read_safetensors(directory / info.file, info, rows)

    return Checkpoint(
        id=id, revision=revision, config=config, tensors=tensors, directory=directory, reader=read
    )


def _table_of_contents(directory: Path, id: str) -> dict[str, TensorInfo]:
    """All tensors of a directory, from its one weight file or from its index and every shard."""
    index_path, single_path = directory / INDEX_NAME, directory / WEIGHTS_NAME
    if index_path.exists() and single_path.exists():
        raise CheckpointError(
            f"{id} holds both {INDEX_NAME} and {WEIGHTS_NAME}, which may differ; "
            "remove the one you do not mean"
        )
    if single_path.exists():
        return _read_header(single_path)
    if not index_path.exists():
        raise _no_weights_error(directory, id)

    weight_map = _read_json_object(index_path, id).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{INDEX_NAME} of {id} has no weight_map of names to files; copy it again")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{INDEX_NAME} of {id} names {file!r}, which lies outside the directory")
        if not (directory / file).is_file():
            raise CheckpointError(f"{id} lacks the shard {file} that {INDEX_NAME} names; copy it again")
        for name, info in _read_header(directory / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{file} of {id} holds {name}, which {INDEX_NAME} places in "
                    f"{weight_map.get(name, 'no file')}; index and shards are not of one checkpoint: "
                    "copy all of them again"
                )
            tensors[name] = info
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{INDEX_NAME} of {id} lists {listed(absent)}, which the shards do not hold; "
            "index and shards are not of one checkpoint: copy all of them again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: TensorInfo(
                    name=name, shape=tuple(part.get_shape()), dtype=part.get_dtype(), file=path.name
                )
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors ({error}); the download is incomplete, or the "
            "file is damaged or only a Git LFS pointer: get it again"
        ) from error


def _read_safetensors(path: Path, info: TensorInfo, rows: slice | None) -> NDArray[np.float32]:
    """One tensor; the library maps the file, copies the asked bytes and unmaps it again."""
    from safetensors import safe_open

    if info.dtype not in EXACT_DTYPES:
        raise CheckpointError(
            f"{info.name} in {info.file} is stored as {info.dtype}; only {', '.join(EXACT_DTYPES)} convert "
            "to float32 exactly: use the original, unquantized checkpoint"
        )
    with safe_open(path, framework="numpy") as stored:
        values = stored.get_tensor(info.name) if rows is None else stored.get_slice(info.name)[rows]
    return np.ascontiguousarray(values.astype(np.float32, copy=False)).reshape(values.shape)


def _read_json_object(path: Path, id: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{id} has no {path.name}; copy it from the model's repository into the checkpoint's directory"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} of {id} is not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} of {id} is not a JSON object; copy it again")
    return content


def _no_weights_error(directory: Path, id: str) -> CheckpointError:
    names = sorted(entry.name for entry in os.scandir(directory))
    pickled = [name for name in names if is_pickled(name)]
    if pickled:
        return pickled_error(pickled, holder=id)
    if ADAPTER_CONFIG_NAME in names:
        return CheckpointError(
            f"{id} holds an adapter and no base weights; name the base checkpoint as "
            "--model and this one as --adapter"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    held = f"it holds {listed(others)}" if others else "it holds no .safetensors file"
    return CheckpointError(
        f"{id} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; {held}: name the directory or .gguf file of one "
        "whole model"
    )
