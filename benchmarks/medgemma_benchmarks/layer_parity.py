"""Finds the first layer whose output departs from the reference's: where a wrong artifact goes wrong.

The reference holds the residual stream between the layers of a few inputs. The artifact's own program is run
on the same inputs, and shows the same values; an error stays small until the layer that makes it. Last comes
the component's own result: its head is judged by it, and before it a layer that an engine does not show.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.bundle_record import ReferencePrompt
from medgemma_benchmarks.judge import Judge, compare_component
from medgemma_benchmarks.parity_inputs import ParityError, features_to_compare, residual_scale
from medgemma_benchmarks.parity_report import LayerParity
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil import Mode
from medgemma_runtime.backends.observed import open_observed
from medgemma_runtime.command import Progress
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.layers import EMBEDDINGS, MAX_TOKENS, kept_tokens, layer_names

__all__ = ["MAX_ITEMS", "check_layers", "prompt_of_layers"]

MAX_ITEMS = 2
"""Images, or captions, whose layers a reference holds: the first ones."""

_INPUT = {"image": "pixel_values", "vision": "pixel_values", "text": "input_ids"}
_RESULT = {"image": "pooler_output", "vision": "image_features", "text": "pooler_output", "decoder": "logits"}

_States = dict[str, NDArray[np.float32]]


def prompt_of_layers(prompts: Sequence[ReferencePrompt]) -> tuple[int, int] | None:
    """Which tokens a decoder's layers are compared by: those of the first prompt that is text alone.

    `MAX_TOKENS` at most, so that any engine reads them in one step.

    Returns:
        The first and the end, counted over the ids of all prompts; None where all prompts have images.
    """
    start = 0
    for prompt in prompts:
        if not prompt.images:
            return start, start + min(prompt.tokens - 1, MAX_TOKENS)
        start += prompt.tokens
    return None


def check_layers(
    artifact: Artifact,
    bundle: ReferenceBundle,
    judge: Judge,
    *,
    threads: int | None = None,
    arithmetic: Mode | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[LayerParity, ...]]:
    """Compare the layers of every component that both have, and judge the first that departs.

    Args:
        artifact: An opened artifact.
        bundle: A reference that was recorded with its layers.
        judge: Where the verdicts go.
        threads: Threads for one operator; None leaves the choice to the engine.
        arithmetic: How much of a Core ML program's fp16 is honoured; None for nothing, and for other targets.
        progress: Called before every component.

    Raises:
        ParityError: If the reference holds no layers.
        ArtifactError: If the artifact was written before its values had names.
    """
    recorded = [name for name in bundle.record.layers if name in artifact.manifest.components]
    if not recorded:
        raise ParityError(
            "the layers were asked for and the reference holds none of this artifact's; record one with "
            "medgemma-reference record --per-layer"
        )
    found: dict[str, tuple[LayerParity, ...]] = {}
    for number, component in enumerate(recorded):
        if progress is not None:
            progress(f"running {component} layer by layer", number, len(recorded))
        states = bundle.arrays[f"{component}.layers"]
        names, result = layer_names(states.shape[1] - 1), _RESULT[component]
        scale = residual_scale(artifact) if component == "decoder" else 1.0
        if component == "decoder":
            items = list(_decoder_states(artifact, bundle, names, threads, arithmetic))
        else:
            items = list(_encoder_states(artifact, component, bundle, names, threads, arithmetic))
        rows = _compare(names, items, states * np.float32(scale), scale)
        expected = _recorded_result(bundle, component)
        if expected is not None:
            actual = np.concatenate([item[result] for item in items])
            if component == "vision":
                actual = features_to_compare(artifact, actual)
            rows.append(_row(result, actual=actual, reference=expected[: len(actual)], is_result=True))
        found[component] = tuple(rows)
        judge.layers(component, found[component])
    return found


def _recorded_result(bundle: ReferenceBundle, component: str) -> NDArray[np.float32] | None:
    """What a component gives for the inputs whose layers are compared, and more of them.

    None where the reference predicts nothing after the tokens that a decoder's layers are compared by.
    """
    if component != "decoder":
        array: NDArray[np.float32] = bundle.arrays[f"{component}.{_RESULT[component]}"]
        return array
    prompts, place = bundle.record.prompts, prompt_of_layers(bundle.record.prompts)
    assert place is not None  # a reference without them holds no decoder's layers
    before = list(itertools.takewhile(lambda prompt: prompt.images, prompts))
    row = place[1] - place[0] - prompts[len(before)].given_tokens
    if row < 0:
        return None
    hidden = bundle.arrays["decoder.hidden_states"][sum(prompt.predictions for prompt in before) + row]
    logits: NDArray[np.float32] = (bundle.arrays["decoder.head"] @ hidden)[None]
    return logits


def _compare(
    names: Sequence[str], items: Sequence[Mapping[str, Any]], states: NDArray[np.float32], scale: float
) -> list[LayerParity]:
    """By layer; `states` are [items, layers + 1, kept tokens, H]."""
    rows = []
    for layer, name in enumerate(names):
        if any(name not in item for item in items):
            rows.append(LayerParity(name=name, is_seen=False))
            continue
        actual = [item[name][kept_tokens(len(item[name]))] for item in items]
        reference = states[:, layer].reshape(-1, states.shape[-1])
        rows.append(_row(name, actual=np.concatenate(actual), reference=reference, scale=scale))
    return rows


def _row(
    name: str,
    *,
    actual: NDArray[np.float32],
    reference: NDArray[np.float32],
    scale: float = 1.0,
    is_result: bool = False,
) -> LayerParity:
    parity = compare_component(actual=actual, reference=reference)
    return LayerParity(
        name=name,
        is_seen=True,
        is_result=is_result,
        sqnr_db=parity.sqnr_db,
        cosine_min=parity.cosine_min,
        max_abs_error=None if parity.max_abs_error is None else parity.max_abs_error / scale,
        relative_error=parity.relative_error,
        undefined=parity.undefined,
    )


def _encoder_states(
    artifact: Artifact,
    component: str,
    bundle: ReferenceBundle,
    names: Sequence[str],
    threads: int | None,
    arithmetic: Mode | None,
) -> Iterator[_States]:
    shown: _States = {}
    session = open_observed(
        artifact,
        component,
        names,
        shown.__setitem__,
        threads=threads,
        arithmetic=arithmetic,
        exact_program=bundle.program(component) if bundle.record.kind == "packing" else None,
    )
    key = _INPUT[component]
    with closing(session):
        for row in bundle.arrays[f"{component}.{key}"][: len(bundle.arrays[f"{component}.layers"])]:
            yield {**session.run({key: row[None]}), **shown}
            shown.clear()


def _decoder_states(
    artifact: Artifact,
    bundle: ReferenceBundle,
    names: Sequence[str],
    threads: int | None,
    arithmetic: Mode | None,
) -> Iterator[_States]:
    place, spec = prompt_of_layers(bundle.record.prompts), artifact.manifest.prompt
    assert place is not None and spec is not None  # a reference without them holds no decoder's layers
    ids = bundle.arrays["decoder.input_ids"][slice(*place)]
    width = bundle.arrays["decoder.layers"].shape[-1]
    parts: dict[str, list[NDArray[np.float32]]] = {}
    with (
        closing(open_session(artifact, "embed", threads=threads, arithmetic=arithmetic)) as embed,
        closing(
            open_observed(
                artifact,
                "decoder",
                [name for name in names if name != EMBEDDINGS],
                lambda name, rows: parts.setdefault(name, []).append(rows),
                threads=threads,
                arithmetic=arithmetic,
            )
        ) as session,
    ):
        decoder = Decoder(embed, session, spec)
        logits = decoder.read(decoder.new_cache(len(ids)), ids)
        embedded: NDArray[Any] = embed.run({"input_ids": ids[None]})["inputs_embeds"]
    # An ExecuTorch program's embeddings have one column more; the last step of fixed size is padded.
    shown = {name: np.concatenate(rows)[: len(ids)] for name, rows in parts.items()}
    yield {EMBEDDINGS: embedded[0, :, :width].astype(np.float32), **shown, _RESULT["decoder"]: logits[None]}
