"""How long each stage of an artifact takes on this device, and what it costs to open."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from medgemma_benchmarks.device import DeviceDescription, describe_device
from medgemma_benchmarks.identity import ArtifactDescription, describe_artifact
from medgemma_benchmarks.metrics import probabilities
from medgemma_benchmarks.operator_profile import OperatorShare, profile_encoder
from medgemma_benchmarks.peers import PeerComparison, PeerModel, compare_with_peer, open_peer
from medgemma_benchmarks.process_cost import ProcessCost, measure_process_cost
from medgemma_benchmarks.timing import Distribution, Repetition, measure
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.embed import BATCHED_ACTIVATIONS, unit_length
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.images import normalize, preprocess, resize
from medgemma_runtime.session import Session
from medgemma_runtime.text import load_tokenizer

__all__ = ["LatencyReport", "TimedImage", "Throughput", "measure_latency"]

METHOD = (
    "Each stage is warmed up and then repeated for a minimum time and a minimum count, one image after the "
    "other, on a monotonic clock; garbage collection is off while a stage is timed. Percentiles are measured "
    "times (nearest rank). Load and memory come from fresh processes."
)


@dataclass(frozen=True, kw_only=True)
class TimedImage:
    """An image to time: its name and how to decode it from its file to [H, W, 3] uint8."""

    name: str
    decode: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images a second through the image component alone, at one batch size."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    batch: int
    images_per_second: float
    times: Distribution


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Everything that was measured of one artifact on one device.

    Attributes:
        report: Tells this JSON from the parity report's.
        artifact: Which artifact.
        device: Which machine, and the threads asked for.
        method: How it was measured, for the reader.
        repetition: The minima.
        images: Names of the images, in turn.
        stages: Times by stage: `decode`, `resize`, `normalize`, `image` (the model), `tokenize`, `text` (the
            model, one caption) and `end-to-end` (image file to label probabilities, or to the embedding
            where the artifact has no text component; label embeddings are computed before).
        throughput: By batch size.
        processes: Cost of opening each component alone and all together.
        peers: Side by side with other programs.
        profile: By component, most expensive operator first; None when not asked for.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    report: Literal["latency"] = "latency"
    artifact: ArtifactDescription
    device: DeviceDescription
    method: str
    repetition: Repetition
    images: tuple[str, ...]
    stages: dict[str, Distribution]
    throughput: tuple[Throughput, ...]
    processes: tuple[ProcessCost, ...]
    peers: tuple[PeerComparison, ...]
    profile: dict[str, tuple[OperatorShare, ...]] | None


def measure_latency(
    artifact: Artifact,
    images: Sequence[TimedImage],
    captions: Sequence[str],
    *,
    threads: int | None = None,
    batches: Sequence[int] = (1,),
    repetition: Repetition | None = None,
    peers: Sequence[PeerModel] = (),
    profile: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LatencyReport:
    """Measure every stage that this artifact has.

    Args:
        artifact: An opened artifact.
        images: At least one, where the artifact has an image component.
        captions: At least one, where it has a text component.
        threads: Threads for one operator; None leaves the choice to the engine.
        batches: Batch sizes for throughput. An artifact that rounds activations takes 1, as in `Embedder`.
        repetition: How often each stage runs; None for the defaults.
        peers: ONNX programs of the same image tower to run in turns with it.
        profile: Also share out the engine's time by operator.
        progress: Called with what is measured next.

    Raises:
        EdgeError: If inputs are missing or cannot be decoded, a batch size is not one the program takes or
            the artifact allows, an output has no direction, or a peer cannot run.
    """
    repetition = repetition if repetition is not None else Repetition()
    say = progress if progress is not None else lambda _: None
    names = [name for name in ("image", "text") if name in artifact.manifest.components]
    if not names:
        more = "; time it with medgemma-bench generate" if "decoder" in artifact.manifest.components else ""
        raise EdgeError(
            f"{artifact.directory.name} has neither an image nor a text component to measure{more}"
        )
    if "image" in names and not images:
        raise EdgeError("the artifact has an image component and no image was given to time it with")
    if "text" in names and not captions:
        raise EdgeError("the artifact has a text component and no caption was given to time it with")
    if peers and "image" not in names:
        raise EdgeError(f"{artifact.directory.name} has no image component to compare with a peer")
    _check_batches(artifact, names, batches)
    if "image" in names:
        say("decoding images")
        for image in images:
            image.decode()  # a file that is no image ends the run here, not minutes later

    # Fresh processes first, while this one is small and holds none of the artifact's files.
    processes = []
    for components in [[name] for name in names] + ([names] if len(names) > 1 else []):
        say(f"opening {' and '.join(components)} in a fresh process")
        processes.append(measure_process_cost(artifact, components, threads=threads))

    stages: dict[str, Distribution] = {}
    throughput: list[Throughput] = []
    comparisons: list[PeerComparison] = []
    label_embeddings = None
    if "text" in names:
        session = open_session(artifact, "text", threads=threads)
        text_stages, label_embeddings = _measure_text(artifact, session, captions, repetition, say)
        session.close()
    if "image" in names:
        session = open_session(artifact, "image", threads=threads)
        stages |= _measure_image(artifact, session, images, label_embeddings, repetition, say)
        pixels = _pixels(artifact, images)
        for batch in batches:
            say(f"throughput at batch {batch}")
            throughput.append(_measure_throughput(session, pixels, batch, repetition))
        for peer in peers:
            say(f"in turns with {peer.name}")
            theirs = open_peer(peer, threads=threads)
            comparisons.append(compare_with_peer(session, theirs, peer, pixels, repetition=repetition))
            theirs.close()
        session.close()
    if "text" in names:
        stages |= text_stages
    shares = None
    if profile:
        shares = dict[str, tuple[OperatorShare, ...]]()
        for name in names:
            say(f"profiling {name}")
            shares[name] = profile_encoder(artifact, name, threads)
    return LatencyReport(
        artifact=describe_artifact(artifact),
        device=describe_device(threads=threads),
        method=METHOD,
        repetition=repetition,
        images=tuple(image.name for image in images),
        stages=stages,
        throughput=tuple(throughput),
        processes=tuple(processes),
        peers=tuple(comparisons),
        profile=shares,
    )


def _check_batches(artifact: Artifact, names: Sequence[str], batches: Sequence[int]) -> None:
    if any(batch < 1 for batch in batches):
        raise EdgeError(f"batch sizes must be at least 1 and are {', '.join(map(str, batches))}")
    activations = artifact.manifest.quantization.activations
    if max(batches) > 1 and activations not in BATCHED_ACTIVATIONS:
        raise EdgeError(
            f"batches of {', '.join(map(str, batches))} were asked for and {artifact.directory.name} rounds "
            f"activations ({activations}), so that images in one batch could change each other's embeddings "
            "and the runtime takes one at a time; measure with --batch 1"
        )
    if "image" in names:
        fixed = artifact.component("image").inputs[0].shape[0]
        if isinstance(fixed, int) and set(batches) != {fixed}:
            raise EdgeError(
                f"the image component takes batches of {fixed} only and {', '.join(map(str, batches))} was "
                f"asked for; measure with --batch {fixed}"
            )


def _measure_text(
    artifact: Artifact,
    session: Session,
    captions: Sequence[str],
    repetition: Repetition,
    say: Callable[[str], None],
) -> tuple[dict[str, Distribution], NDArray[np.float32]]:
    """Times of `tokenize` and `text`, and the captions' embeddings [M, D] at unit length."""
    spec = artifact.manifest.text
    if spec is None:
        raise EdgeError(f"{artifact.directory.name} has a text component and no text spec; export it again")
    tokenizer = load_tokenizer(artifact.directory, spec)
    ids = [tokenizer.encode([caption]) for caption in captions]
    say("timing tokenize")
    tokenize = measure(lambda run: tokenizer.encode([captions[run % len(captions)]]), repetition)
    say("timing text")
    text = measure(lambda run: session.run({"input_ids": ids[run % len(ids)]}), repetition)
    embeddings = np.concatenate([session.run({"input_ids": row})["pooler_output"] for row in ids])
    return {"tokenize": tokenize, "text": text}, unit_length(embeddings, "text")


def _measure_image(
    artifact: Artifact,
    session: Session,
    images: Sequence[TimedImage],
    labels: NDArray[np.float32] | None,
    repetition: Repetition,
    say: Callable[[str], None],
) -> dict[str, Distribution]:
    """Times of every stage from an image's file to label probabilities."""
    spec, similarity = artifact.manifest.image, artifact.manifest.similarity
    if spec is None:
        raise EdgeError(
            f"{artifact.directory.name} has an image component and no image spec; export it again"
        )
    decoded = [image.decode() for image in images]
    resized = [resize(rgb, spec) for rgb in decoded]
    pixels = [normalize(rgb, spec)[None] for rgb in resized]
    n = len(images)

    def end_to_end(run: int) -> NDArray[np.float64]:
        model_input = preprocess(images[run % n].decode(), spec)[None]
        embedding = unit_length(session.run({"pixel_values": model_input})["pooler_output"], "image")
        if labels is None or similarity is None:
            return embedding.astype(np.float64)
        return probabilities(similarity.scale * (embedding @ labels.T) + similarity.bias)

    work: dict[str, Callable[[int], object]] = {
        "decode": lambda run: images[run % n].decode(),
        "resize": lambda run: resize(decoded[run % n], spec),
        "normalize": lambda run: normalize(resized[run % n], spec),
        "image": lambda run: session.run({"pixel_values": pixels[run % n]}),
        "end-to-end": end_to_end,
    }
    stages = {}
    for stage, run_once in work.items():
        say(f"timing {stage}")
        stages[stage] = measure(run_once, repetition)
    return stages


def _pixels(artifact: Artifact, images: Sequence[TimedImage]) -> list[NDArray[np.float32]]:
    spec = artifact.manifest.image
    assert spec is not None  # _measure_image has refused it
    return [preprocess(image.decode(), spec)[None] for image in images]


def _measure_throughput(
    session: Session, pixels: Sequence[NDArray[np.float32]], batch: int, repetition: Repetition
) -> Throughput:
    inputs = np.concatenate([pixels[index % len(pixels)] for index in range(batch)])
    times = measure(lambda _: session.run({"pixel_values": inputs}), repetition)
    return Throughput(batch=batch, images_per_second=batch / times.p50_ms * 1e3, times=times)
