from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgemma_benchmarks import latency
from medgemma_benchmarks.latency import TimedImage, measure_latency
from medgemma_benchmarks.peers import PeerModel, compare_with_peer, open_peer, parse_peer
from medgemma_benchmarks.results import read_result, to_json
from medgemma_benchmarks.timing import Repetition
from medgemma_runtime.backends import open_session
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry
from tests.benchmarks.tiny_bundle import LABELS, broken_image, pixels_of, rewritten, tiny_opened
from tests.runtime import tiny_artifact as tiny

pytest.importorskip("psutil")

QUICK = Repetition(seconds=0, min_runs=3, warm_up_runs=1)
CAPTIONS = [label.caption for label in LABELS]
ENTRY = ComponentEntry(
    program="image.onnx",
    inputs=(tiny.tensor("pixel_values", "float32", "batch", 3, 2, 2),),
    outputs=(tiny.tensor("pooler_output", "float32", "batch", 2),),
)


def images() -> list[TimedImage]:
    rng = np.random.default_rng(5)
    decoded = [rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8) for index in range(2)]
    return [TimedImage(name=f"noise-{i}", decode=lambda rgb=rgb: rgb) for i, rgb in enumerate(decoded)]


def test_every_stage_is_measured(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    said: list[str] = []
    report = measure_latency(
        artifact,
        images(),
        CAPTIONS,
        threads=1,
        batches=(1, 3),
        repetition=QUICK,
        profile=True,
        progress=said.append,
    )
    assert list(report.stages) == ["decode", "resize", "normalize", "image", "end-to-end", "tokenize", "text"]
    for times in report.stages.values():
        assert times.runs == 3
        assert 0 < times.min_ms <= times.p50_ms <= times.p90_ms <= times.p99_ms
    assert [cost.components for cost in report.processes] == [("image",), ("text",), ("image", "text")]
    assert [item.batch for item in report.throughput] == [1, 3]
    for item in report.throughput:
        assert item.images_per_second == pytest.approx(item.batch / item.times.p50_ms * 1e3)
    assert report.images == ("noise-0", "noise-1")
    assert (report.repetition, report.device.threads) == (QUICK, 1)
    assert report.artifact.manifest_sha256 == artifact.manifest_sha256
    assert report.profile is not None
    assert {share.operator for share in report.profile["image"]} == {"AveragePool", "Flatten"}
    assert sum(share.share for share in report.profile["text"]) == pytest.approx(1.0)
    assert "timing decode" in said
    (tmp_path / "latency.json").write_text(to_json(report))
    assert read_result(tmp_path / "latency.json") == [report]


@pytest.mark.parametrize("kept", ["image", "text"])
def test_one_tower_alone_is_measured(tmp_path: Path, kept: str) -> None:
    components = {kept: tiny_opened(tmp_path / "artifact").manifest.components[kept]}
    artifact = rewritten(tmp_path / "artifact", components=components)
    report = measure_latency(artifact, images(), CAPTIONS, repetition=QUICK)
    assert [cost.components for cost in report.processes] == [(kept,)]
    assert ("text" in report.stages, "end-to-end" in report.stages) == (kept == "text", kept == "image")
    assert report.profile is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batches": (0,)}, "batch sizes must be at least 1 and are 0"),
        ({"captions": []}, "no caption was given"),
        ({"images": []}, "no image was given"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, arguments, words: str) -> None:
    given = {"images": images(), "captions": CAPTIONS, "repetition": QUICK} | arguments
    with pytest.raises(EdgeError, match=words):
        measure_latency(
            tiny_opened(tmp_path / "artifact"), given.pop("images"), given.pop("captions"), **given
        )


def test_a_model_that_answers_is_timed_by_another_command(tmp_path: Path) -> None:
    whole = tiny_opened(tmp_path / "artifact")
    entry = whole.manifest.components["image"]
    answering = replace(whole, manifest=replace(whole.manifest, components={"decoder": entry}))
    with pytest.raises(EdgeError, match=r"nor a text component to measure; time it with medgemma-bench gen"):
        measure_latency(answering, [], [], repetition=QUICK)


def test_an_artifact_without_a_direction_is_refused(tmp_path: Path) -> None:
    artifact = broken_image(tmp_path / "artifact", "Log")
    with pytest.raises(EdgeError, match="component 'image' gave NaN"):
        measure_latency(artifact, images(), CAPTIONS, repetition=QUICK)


def test_a_batch_is_refused_where_its_images_could_change_each_other(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact", precision="int8")
    rounding = replace(artifact.manifest.quantization, activations="uint8 dynamic")
    artifact = rewritten(tmp_path / "artifact", precision="int8", quantization=rounding)
    with pytest.raises(EdgeError, match=r"batches of 1, 4 .* rounds activations \(uint8 dynamic\)"):
        measure_latency(artifact, images(), CAPTIONS, batches=(1, 4), repetition=QUICK)
    report = measure_latency(artifact, images(), CAPTIONS, repetition=QUICK)
    assert [item.batch for item in report.throughput] == [1]


def test_a_file_that_is_no_image_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> np.ndarray:
        raise EdgeError("notes.txt is no image")

    monkeypatch.setattr(latency, "measure_process_cost", lambda *_, **__: pytest.fail("it was started"))
    given = [*images(), TimedImage(name="image 3", decode=bad)]
    with pytest.raises(EdgeError, match=r"notes\.txt is no image"):
        measure_latency(tiny_opened(tmp_path / "artifact"), given, CAPTIONS, repetition=QUICK)


def test_a_fixed_batch_size_is_respected(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    image = artifact.manifest.components["image"]
    fixed = replace(image, inputs=(tiny.tensor("pixel_values", "float32", 2, 3, 16, 16),))
    artifact = replace(artifact, manifest=replace(artifact.manifest, components={"image": fixed}))
    with pytest.raises(EdgeError, match="takes batches of 2 only and 1, 4 was asked for"):
        measure_latency(artifact, images(), CAPTIONS, batches=(1, 4), repetition=QUICK)


def test_a_peer_takes_turns_and_is_compared(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    broken_image(tmp_path / "peer", "Add")
    peer = PeerModel(name="doubled", path=tmp_path / "peer/image.onnx")
    report = measure_latency(artifact, images(), CAPTIONS, threads=1, repetition=QUICK, peers=[peer])
    (comparison,) = report.peers
    assert comparison.name == "doubled"
    assert comparison.cosine_min == pytest.approx(1.0)
    assert comparison.ours.runs == comparison.theirs.runs == 4  # three, made even
    assert 0 < comparison.ratio_min <= comparison.ratio_median <= comparison.ratio_max
    assert comparison.size_bytes == peer.path.stat().st_size
    assert comparison.sha256 == tiny.file_entry(tmp_path / "peer", "image.onnx").sha256


def test_a_peer_that_computes_something_else_has_another_cosine(tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    broken_image(tmp_path / "peer", "Neg")
    peer = PeerModel(name="negated", path=tmp_path / "peer/image.onnx")
    ours, theirs = open_session(artifact, "image"), open_peer(peer, threads=None)
    pixels = [pixels_of(image.decode())[None] for image in images()]
    comparison = compare_with_peer(ours, theirs, peer, pixels, repetition=QUICK)
    assert comparison.cosine_min == pytest.approx(-1.0)


def test_peers_run_in_turns_and_on_the_same_images() -> None:
    log: list[tuple[str, float]] = []

    class Fake:
        load_seconds = 0.0

        def __init__(self, name: str) -> None:
            self.name = name
            self.entry = ENTRY

        def run(self, inputs):
            log.append((self.name, float(inputs["pixel_values"][0, 0, 0, 0])))
            return {"pooler_output": np.ones((1, 2), np.float32)}

        def close(self) -> None: ...

    pixels = [np.full((1, 3, 2, 2), value, np.float32) for value in (1, 2)]
    compare_with_peer(
        Fake("a"),
        Fake("b"),
        PeerModel(name="b", path=Path(__file__)),
        pixels,
        repetition=Repetition(seconds=0, min_runs=3, warm_up_runs=0),
    )

    # Three pairs were asked for, and an even number lets each go first as often.
    assert log[-8:] == [
        *(("a", 1), ("b", 1), ("b", 2), ("a", 2)),
        *(("a", 1), ("b", 1), ("b", 2), ("a", 2)),
    ]


def test_a_pause_precedes_every_timed_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = tiny_opened(tmp_path / "artifact")
    peer = PeerModel(name="itself", path=tmp_path / "artifact/image.onnx")
    pauses: list[float] = []
    monkeypatch.setattr("medgemma_benchmarks.peers.time.sleep", pauses.append)
    ours, theirs = open_session(artifact, "image", threads=1), open_peer(peer, threads=1)
    pixels = [pixels_of(image.decode())[None] for image in images()]
    comparison = compare_with_peer(ours, theirs, peer, pixels, repetition=QUICK)
    assert len(pauses) == comparison.ours.runs + comparison.theirs.runs
    assert min(pauses) >= 0.05
    assert "100 ms" in comparison.method


def test_a_peer_has_the_default_options_of_its_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    tiny_opened(tmp_path / "artifact")
    given = []
    intact = onnxruntime.InferenceSession

    def recording(path: str, options: onnxruntime.SessionOptions, **rest: object) -> object:
        given.append(options)
        return intact(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    peer = open_peer(PeerModel(name="peer", path=tmp_path / "artifact/image.onnx"), threads=1)
    peer.close()
    (options,) = given
    default = onnxruntime.SessionOptions()
    changed = {
        name
        for name in dir(default)
        if not (name.startswith("_") or callable(getattr(default, name)))
        and getattr(options, name) != getattr(default, name)
    }
    assert changed == {"intra_op_num_threads", "log_severity_level"}
    with pytest.raises(RuntimeError, match="force_spinning_stop"):
        options.get_session_config_entry("session.force_spinning_stop")


def test_name_and_path_of_a_peer_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a=b.onnx"
    path.write_bytes(b"")
    assert parse_peer(f"optimum={path}") == PeerModel(name="optimum", path=path)
    for text in ("optimum", "=model.onnx", "optimum="):
        with pytest.raises(EdgeError, match="is not NAME=PATH"):
            parse_peer(text)
    for text in (f"optimum={tmp_path}", f"optimum={tmp_path / 'none.onnx'}"):
        with pytest.raises(EdgeError, match=r"is no \.onnx file"):
            parse_peer(text)


def test_a_peer_that_is_no_image_tower_is_refused(tmp_path: Path) -> None:
    tiny_opened(tmp_path / "artifact")
    text = PeerModel(name="text", path=tmp_path / "artifact/text.onnx")
    with pytest.raises(EdgeError, match=r"peer text takes input_ids tensor\(int64\)"):
        open_peer(text, threads=None)
    (tmp_path / "junk.onnx").write_bytes(b"\x07junk")
    with pytest.raises(EdgeError, match="cannot load the peer junk"):
        open_peer(PeerModel(name="junk", path=tmp_path / "junk.onnx"), threads=None)


def test_a_peer_with_several_outputs_must_name_one(tmp_path: Path) -> None:
    tiny_opened(tmp_path / "artifact")

    def program(*outputs: str) -> PeerModel:
        nodes = [tiny._node("AveragePool", ["x"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8])]
        nodes += [tiny._node("Flatten", ["pooled"], [name]) for name in outputs]
        path = tmp_path / f"{'-'.join(outputs)}.onnx"
        path.write_bytes(
            tiny.model(
                nodes,
                inputs=[tiny._value("x", tiny._FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
                outputs=[tiny._value(name, tiny._FLOAT, ["batch", tiny.WIDTH]) for name in outputs],
            )
        )
        return PeerModel(name="peer", path=path)

    with pytest.raises(EdgeError, match="outputs first, second and none is called pooler_output"):
        open_peer(program("first", "second"), threads=None)
    chosen = open_peer(program("hidden", "image_embeds"), threads=None)
    assert chosen.entry.outputs[0].name == "image_embeds"
    assert open_peer(program("anything"), threads=None).entry.outputs[0].name == "anything"
