"""Prefill and decode of an artifact beside other engines: the same ids, threads and counts, in turns.

Every engine runs in a process of its own (`engine_process.py`), because their environments often cannot be
installed together.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from medgemma_benchmarks.device import DeviceDescription, describe_device
from medgemma_benchmarks.engine_process import EngineModel, EngineProcess, Run
from medgemma_benchmarks.identity import ArtifactDescription, describe_artifact
from medgemma_benchmarks.operator_profile import OperatorShare, profile_decoder
from medgemma_benchmarks.timing import PAUSE_SECONDS
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.prompt import load_prompt_tokenizer
from medgemma_runtime.sample_notes import SAMPLE_NOTES, load_note

__all__ = ["EngineSpeed", "GenerationReport", "Spread", "WorkloadSpeed", "measure_generation", "prompt_ids"]

# ONNX Runtime GenAI refuses a cache shorter than the local window, 1024 in the largest Gemma 3.
_CONTEXT_STEP = 1024
_METHOD = (
    "Each engine in a process of its own, with the same token ids, threads and counts, loaded before the "
    "first run. The order is turned around in every other round (A B C, C B A, ...), and "
    f"{PAUSE_SECONDS * 1e3:.0f} ms pass before every run, so that spinning threads of one do not slow the "
    "next. Prefill ends with the first token chosen; decode is the tokens after it, each the most probable "
    "one. A ratio is the artifact's rate by the engine's in the same round."
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The same thing measured in every round."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    median: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class WorkloadSpeed:
    """One engine on one prompt.

    Attributes:
        prompt_tokens: Of the prompt.
        decode_tokens: Timed after it.
        prefill_rate: Tokens a second.
        decode_rate: Tokens a second.
        prefill_ratio: The artifact's rate by this one's: above 1 the artifact is faster. None of itself.
        decode_ratio: The same for decode.
        same_tokens: How many tokens from the first on equal the artifact's. It shows that both run the same
            model, and no more: two roundings of one model part at the first near tie. None of itself.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt_tokens: int
    decode_tokens: int
    prefill_rate: Spread
    decode_rate: Spread
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    same_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """One engine with one model.

    Attributes:
        engine: Its name.
        version: As it states it.
        model: Name of the file or directory.
        size_bytes: Of the file, or of all files in the directory.
        load_seconds: Until the first prompt could be read, the engine's import included.
        peak_rss_bytes: Highest resident memory of its process, mapped pages of the model included; None where
            the system does not tell.
        workloads: In the order asked for.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    engine: str
    version: str
    model: str
    size_bytes: int
    load_seconds: float
    peak_rss_bytes: int | None
    workloads: tuple[WorkloadSpeed, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """An artifact's speed of generation, and that of others beside it.

    Attributes:
        report: Tells this JSON from the other reports'.
        artifact: Which artifact.
        device: Which machine, and the threads of every engine.
        method: How it was measured, for the reader.
        rounds: Runs of every engine on every prompt.
        load_average: Processes that wanted to run in the minute before, a mean; None where the system does
            not tell. On a quiet machine it is near zero.
        ours: The artifact.
        peers: The others.
        profile: Of the artifact, by `prefill N` and `decode after N`, N being the tokens of the prompt: most
            expensive operator first; None when not asked for.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    report: Literal["generation"] = "generation"
    artifact: ArtifactDescription
    device: DeviceDescription
    method: str
    rounds: int
    load_average: float | None
    ours: EngineSpeed
    peers: tuple[EngineSpeed, ...]
    profile: dict[str, tuple[OperatorShare, ...]] | None = None


def prompt_ids(artifact: Artifact, tokens: int) -> list[int]:
    """`<bos>` and the beginning of the project's own clinical notes, over again where they are too short.

    Args:
        artifact: With a prompt spec; its tokenizer cuts the text.
        tokens: Of the prompt.
    """
    spec = artifact.manifest.prompt
    assert spec is not None  # measure_generation has refused it
    tokenizer = load_prompt_tokenizer(artifact.directory, spec)
    ids = [spec.bos_id]
    for note in cycle(SAMPLE_NOTES):
        if len(ids) >= tokens:
            break
        ids += tokenizer.encode_text(load_note(note)).ids[1:].tolist()
    return ids[:tokens]


def measure_generation(
    artifact: Artifact,
    ours: EngineModel,
    peers: Sequence[EngineModel],
    *,
    threads: int,
    prompts: Sequence[int] = (17, 512),
    decode: int = 64,
    rounds: int = 6,
    profile: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> GenerationReport:
    """Run an artifact and any number of other engines in turns.

    Args:
        artifact: With the components `embed` and `decoder`.
        ours: That artifact's directory, to be run by this project's runtime.
        peers: What to run beside it.
        threads: For every engine.
        prompts: Tokens of each prompt.
        decode: Tokens timed after each prompt.
        rounds: Runs of every engine on every prompt, after one that does not count; rounded up to an even
            number, so that each goes first as often as last.
        profile: Also share out the artifact's time by operator, in this process and after all rounds.
        progress: Called with what is run, runs done, and runs in all.

    Raises:
        EdgeError: If the artifact generates no text, a count is too small, the tokens do not fit the
            artifact's context, or an engine fails.
    """
    context = _check(artifact, prompts, decode, rounds)
    rounds += rounds % 2
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say = progress if progress is not None else lambda *_: None
    models = [ours, *peers]
    workloads = [prompt_ids(artifact, tokens) for tokens in prompts]
    # By engine and prompt; the first run of each warms up.
    runs: list[list[list[Run]]] = [[[] for _ in workloads] for _ in models]
    done, total = 0, len(models) * len(workloads) * (rounds + 1)
    with ExitStack() as stack:
        engines = []
        for model in models:
            say(f"loading {model.label}", done, total)
            engines.append(stack.enter_context(EngineProcess(model, threads=threads, context=context)))
        turns = list(range(len(models)))
        for turn in range(rounds + 1):
            for workload, ids in enumerate(workloads):
                for index in turns if turn % 2 else turns[::-1]:
                    say(models[index].label, done, total)
                    time.sleep(PAUSE_SECONDS)
                    run = engines[index].run(ids, decode=decode)
                    if turn > 0:
                        runs[index][workload].append(run)
                    done += 1
        speeds = [
            EngineSpeed(
                engine=engine.loaded.engine,
                version=engine.loaded.version,
                model=model.model.name,
                size_bytes=_size_bytes(model.model),
                load_seconds=engine.loaded.load_seconds,
                peak_rss_bytes=engine.peak_rss_bytes(),
                workloads=tuple(
                    _speed(len(ids), own, None if model is ours else mine)
                    for ids, own, mine in zip(workloads, by_workload, runs[0], strict=True)
                ),
            )
            for model, engine, by_workload in zip(models, engines, runs, strict=True)
        ]
    shares: dict[str, tuple[OperatorShare, ...]] | None = {} if profile else None
    if shares is not None:
        for ids in workloads:
            say(f"profiling a prompt of {len(ids)}", done, total)
            found = profile_decoder(artifact, ids, steps=decode, threads=threads)
            shares[f"prefill {len(ids)}"] = found["prefill"]
            shares[f"decode after {len(ids)}"] = found["decode"]
    return GenerationReport(
        artifact=describe_artifact(artifact),
        device=describe_device(threads=threads),
        method=_METHOD,
        rounds=rounds,
        load_average=load_average,
        ours=speeds[0],
        peers=tuple(speeds[1:]),
        profile=shares,
    )


def _check(artifact: Artifact, prompts: Sequence[int], decode: int, rounds: int) -> int:
    """Tokens that every engine makes room for."""
    name, manifest = artifact.directory.name, artifact.manifest
    if manifest.prompt is None or not {"embed", "decoder"} <= manifest.components.keys():
        raise EdgeError(
            f"{name} has the components {', '.join(sorted(manifest.components))} and generating needs embed, "
            "decoder and a prompt; give an artifact of a MedGemma or Gemma 3 model"
        )
    if not prompts or min(*prompts, decode, rounds) < 1:
        raise EdgeError(
            f"prompts of {', '.join(map(str, prompts)) or 'no'} tokens, {decode} further tokens and {rounds} "
            "rounds were asked for and each must be at least 1"
        )
    needed = max(prompts) + decode
    if needed > manifest.prompt.context:
        raise EdgeError(
            f"a prompt of {max(prompts)} tokens and {decode} further ones were asked for and {name} has a "
            f"context of {manifest.prompt.context}; give a shorter --prompt or a smaller --decode"
        )
    return -(-(needed + 1) // _CONTEXT_STEP) * _CONTEXT_STEP


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _speed(prompt_tokens: int, runs: Sequence[Run], ours: Sequence[Run] | None) -> WorkloadSpeed:
    """Rates of one engine, and those of the artifact's runs in the same rounds by them."""
    prefill, decode = _rates(prompt_tokens, runs)
    prefill_ratio = decode_ratio = same_tokens = None
    if ours is not None:
        our_prefill, our_decode = _rates(prompt_tokens, ours)
        prefill_ratio, decode_ratio = _spread(our_prefill / prefill), _spread(our_decode / decode)
        pairs = zip(runs[0].ids, ours[0].ids, strict=True)
        differing = (index for index, (token, other) in enumerate(pairs) if token != other)
        same_tokens = next(differing, len(runs[0].ids))
    return WorkloadSpeed(
        prompt_tokens=prompt_tokens,
        decode_tokens=len(runs[0].decode_seconds),
        prefill_rate=_spread(prefill),
        decode_rate=_spread(decode),
        prefill_ratio=prefill_ratio,
        decode_ratio=decode_ratio,
        same_tokens=same_tokens,
    )


def _rates(prompt_tokens: int, runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Prefill and decode tokens a second, [rounds] each."""
    prefill = np.array([prompt_tokens / run.prefill_seconds for run in runs])
    decode = np.array([len(run.decode_seconds) / sum(run.decode_seconds) for run in runs])
    return prefill, decode


def _spread(values: np.ndarray) -> Spread:
    return Spread(median=float(np.median(values)), min=float(values.min()), max=float(values.max()))
