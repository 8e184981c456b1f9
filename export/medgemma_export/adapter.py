"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), as PEFT saves them, merged into a checkpoint when read.

A tensor becomes `W + scale * B @ A` in float32 when it is asked for, or those rows of it that are asked for:
nothing is merged on disk and no matrix has to be whole in memory. What PEFT calls `modules_to_save` takes the
place of the checkpoint's tensor. Everything that is not plain LoRA is refused.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_export.checkpoint import EXACT_DTYPES, Adapter, Checkpoint, TensorInfo, listed
from medgemma_export.safetensors_checkpoint import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, open_adapter
from medgemma_runtime.errors import CheckpointError

__all__ = ["merge_adapter"]

_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# transformers 4.52 and 5 moved the parts of its models about; these components of a name came and went.
_MOVED = ("base_model", "model", "vision_model")
_HEAD = "lm_head.weight"
_TABLE = "embed_tokens.weight"

# Whatever PEFT's LoraConfig (0.21) can say that makes the weights something else than W + scale * B @ A.
_NOT_PLAIN = (
    "use_dora",
    "bias",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
)
# Every other way to start training also takes something from the base weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_REMEDY = "merge it with PEFT's merge_and_unload and export what that saves"

_COMPARED_VALUES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What of PEFT's LoraConfig decides the merged weights, under PEFT's names.

    Not fan_in_fan_out, which is for modules that hold [inputs, outputs]: none of these models' does, and PEFT
    itself ignores it for the others.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        if min((self.r, *(self.rank_pattern or {}).values())) < 1:
            raise ValueError("a rank is below 1")
        for pattern in (*(self.rank_pattern or {}), *(self.alpha_pattern or {})):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None

    def may_be_saved(self, module: str) -> bool:
        """Whether a module's parameters may be in the file whole."""
        tied = ("lm_head", "embed_tokens") if self.ensure_weight_tying else ()
        return _is_within(module, (*(self.modules_to_save or ()), *tied))

    def rank(self, module: str) -> int:
        """The rank of a module's pair."""
        return int(_of_module(module, self.rank_pattern, self.r))

    def scale(self, module: str) -> float:
        """The factor of a module's product."""
        alpha, rank = _of_module(module, self.alpha_pattern, self.lora_alpha), self.rank(module)
        # "rs" is rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732).
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The adapter's names of A [rank, inputs] and B [outputs, rank], and the factor of their product."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class _Changes:
    """What an adapter does, by name of the checkpoint's tensor; `saved` names the adapter's."""

    pairs: dict[str, _Pair]
    saved: dict[str, str]


def merge_adapter(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """A checkpoint whose tensors are those of a base and an adapter together.

    A table or an output head that the adapter saved whole unties the two, as in PEFT: the head is then the
    tensor `lm_head.weight`. If both were saved and are equal they stay tied.

    Args:
        checkpoint: The base that the adapter was trained on.
        directory: Holds adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: If the adapter is incomplete, damaged, not plain LoRA or of another base, or if one
            of its tensors has no place in the base.
    """
    adapter = open_adapter(directory)
    settings = _read_settings(adapter)
    _check_base(checkpoint, adapter, settings)
    # Of every tensor the one of the base that it is made of.
    origins = dict(checkpoint.tensors)
    table = _tied_table(checkpoint)
    if table is not None:
        origins[_HEAD] = checkpoint.tensors[table]
    changes = _place_tensors(checkpoint, adapter, settings, origins)
    if table is not None and _stays_tied(adapter, settings, changes, table):
        del origins[_HEAD]

    def read(info: TensorInfo, rows: slice | None) -> NDArray[np.float32]:
        if info.name in changes.saved:
            return adapter.read(changes.saved[info.name], rows=rows)
        values = checkpoint.reader(origins[info.name], rows)
        if pair := changes.pairs.get(info.name):
            product = adapter.read(pair.b, rows=rows) @ adapter.read(pair.a)
            product *= np.float32(pair.scale)
            values += product
        return values

    paths = (directory / ADAPTER_CONFIG_NAME, directory / ADAPTER_WEIGHTS_NAME)
    return replace(
        checkpoint,
        tensors={name: replace(info, name=name) for name, info in origins.items()},
        reader=read,
        adapter=Adapter(name=adapter.id, paths=paths),
    )


def _read_settings(adapter: Checkpoint) -> _Settings:
    config = adapter.config
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"adapter {adapter.id} is of type {config.get('peft_type')!r} and only LORA is merged; {_REMEDY}"
        )
    for field in _NOT_PLAIN:
        if config.get(field) not in (None, False, "none", [], {}):
            raise CheckpointError(
                f"adapter {adapter.id} has {field} {config[field]!r} and only plain LoRA is merged; {_REMEDY}"
            )
    start = config.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _PLAIN_STARTS):
        raise CheckpointError(
            f"adapter {adapter.id} has init_lora_weights {start!r}, which changed the base before training, "
            f"and only plain LoRA is merged; {_REMEDY}"
        )
    try:
        return TypeAdapter(_Settings).validate_json(json.dumps(config), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "a field"
        raise CheckpointError(
            f"{ADAPTER_CONFIG_NAME} of {adapter.id} is not to the form: {where}: {first['msg']}; "
            "save the adapter with PEFT again"
        ) from None


def _check_base(checkpoint: Checkpoint, adapter: Checkpoint, settings: _Settings) -> None:
    """By name alone: MedGemma 1.0 and 1.5 have the same shapes."""
    stated = PurePosixPath((settings.base_model_name_or_path or "").replace("\\", "/")).name
    names = {PurePosixPath(checkpoint.id.removeprefix("sample:")).name, checkpoint.directory.name}
    if stated and stated not in names:
        raise CheckpointError(
            f"adapter {adapter.id} was trained on {stated} and the model is {checkpoint.id}; name that base "
            f"as --model or, if the two are one, correct base_model_name_or_path in {ADAPTER_CONFIG_NAME}"
        )


def _tied_table(checkpoint: Checkpoint) -> str | None:
    """The table that is the output head too, if there is one."""
    if any(name.endswith(_HEAD) for name in checkpoint.tensors):
        return None
    return next((name for name in checkpoint.tensors if name.endswith(_TABLE)), None)


def _place_tensors(
    checkpoint: Checkpoint, adapter: Checkpoint, settings: _Settings, origins: Mapping[str, TensorInfo]
) -> _Changes:
    """Find what each of the adapter's tensors changes.

    Raises:
        CheckpointError: One error that names every tensor without a place, and every place without a tensor.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    parts = _sort_tensors(adapter, settings, origins, faults)
    changes = _Changes(pairs={}, saved={})
    shapes: dict[str, tuple[int, ...]] = {}
    for place, names in parts.items():
        shape = origins[place].shape
        match sorted(names):
            case ["A", "B"]:
                module, _ = _split_name(names["A"])
                changes.pairs[place] = _Pair(a=names["A"], b=names["B"], scale=settings.scale(module))
                rank = settings.rank(module)
                shapes |= {names["A"]: (rank, *shape[1:]), names["B"]: (shape[0], rank)}
            case ["A"] | ["B"]:
                faults["without the other half of the pair"].extend(names.values())
            case [part]:
                changes.saved[place] = names[part]
                shapes[names[part]] = shape
            case _:
                faults["for one weight, which cannot be both a pair and saved"].extend(names.values())
    faults["named in modules_to_save and not in the file"].extend(
        name
        for name in origins
        if _is_within(_split_name(name)[0], settings.modules_to_save) and name not in changes.saved
    )
    faults["of another shape"].extend(
        f"{name} is {list(adapter.tensors[name].shape)} and should be {list(shape)}"
        for name, shape in shapes.items()
        if adapter.tensors[name].shape != shape
    )
    found = [f"{listed(names)} {what}" for what, names in faults.items() if names]
    if found or not parts:
        raise CheckpointError(
            f"adapter {adapter.id} does not fit {checkpoint.id}: {'; '.join(found) or 'it holds no tensor'}. "
            "Check that it was trained on this model, and save it with PEFT again"
        )
    return changes


def _sort_tensors(
    adapter: Checkpoint,
    settings: _Settings,
    origins: Mapping[str, TensorInfo],
    faults: dict[str, list[str]],
) -> dict[str, dict[str, str]]:
    """By the base's tensor, and then by part as `_split_name` says it; what fits nowhere goes to `faults`."""
    places = {_spelling(name): name for name in origins}
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, info in adapter.tensors.items():
        module, part = _split_name(name)
        is_half = part in ("A", "B")
        place = places.get(_spelling(f"{module}.{'weight' if is_half else part}"))
        if info.dtype not in EXACT_DTYPES:
            faults["of a dtype that does not convert to float32 exactly"].append(f"{name} ({info.dtype})")
        elif module.endswith(("lm_head", "embed_tokens")) and part != "weight":
            faults["part of a LoRA pair on table or head, which only modules_to_save may change"].append(name)
        elif place is None:
            faults["without a place in the model"].append(name)
        elif not is_half and not settings.may_be_saved(module):
            faults["neither half of a LoRA pair nor part of modules_to_save"].append(name)
        elif part in parts[place]:
            faults["for a weight that another tensor changes too"].append(name)
        else:
            parts[place][part] = name
    return parts


def _stays_tied(adapter: Checkpoint, settings: _Settings, changes: _Changes, table: str) -> bool:
    """Whether the output head is the table still: neither is saved, or both are and are equal.

    Raises:
        CheckpointError: If PEFT was told to keep them tied and did not.
    """
    names = [changes.saved[place] for place in (table, _HEAD) if place in changes.saved]
    is_one = not names or (len(names) == 2 and _are_equal(adapter, *names))
    if settings.ensure_weight_tying and not is_one:
        raise CheckpointError(
            f"adapter {adapter.id} says ensure_weight_tying, and table and output head are not equal in it; "
            "save it with PEFT again"
        )
    return is_one


def _are_equal(adapter: Checkpoint, first: str, second: str) -> bool:
    rows, width = adapter.tensors[first].shape
    step = max(1, _COMPARED_VALUES // width)
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    return all(
        np.array_equal(adapter.read(first, rows=piece), adapter.read(second, rows=piece)) for piece in pieces
    )


def _split_name(name: str) -> tuple[str, str]:
    """A tensor's module, and "A" or "B" for half of a pair, or else the parameter's own name."""
    path = name.removeprefix(_PREFIX)
    if half := _HALF.fullmatch(path):
        return half["module"], half["half"]
    module, _, parameter = path.rpartition(".")
    return module, parameter


def _is_within(module: str, endings: Iterable[str] | None) -> bool:
    """Whether a module, or one that it is in, ends in one of these: as in PEFT, "norm" means q_norm too."""
    return any(f"{ending}." in f"{module}." for ending in endings or ())


def _spelling(name: str) -> str:
    """A tensor's name, the same in every version of transformers."""
    parts = [part for part in name.split(".") if part not in _MOVED]
    return ".".join(parts).replace("language_model.lm_head", "lm_head")


def _of_module(module: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
    """The value of the pattern that matches, as in PEFT, the whole name or its end from a dot on.

    Raises:
        CheckpointError: If several match and differ. PEFT takes the first, and saves them in the order of the
            alphabet: which one was trained with is lost.
    """
    matches = {
        pattern: value
        for pattern, value in (patterns or {}).items()
        if re.match(rf"(.*\.)?({pattern})$", module)
    }
    if len(set(matches.values())) > 1:
        raise CheckpointError(
            f"{ADAPTER_CONFIG_NAME} gives {module} several ranks or alphas, by {listed(list(matches))}; "
            "which it was trained with is not on record: correct the patterns so that one matches"
        )
    return next(iter(matches.values()), otherwise)
