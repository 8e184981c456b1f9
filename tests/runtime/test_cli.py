import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgemma_runtime import cli, image_index
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.command import INTERRUPTED, run_app
from medgemma_runtime.embed import Embedder
from medgemma_runtime.images import load_image
from medgemma_runtime.manifest import AdapterInfo, write_manifest
from tests.runtime.tiny_artifact import WIDTH, tiny_manifest, write_images, write_tiny_artifact


class Commands:
    """Runs `medgemma-run` in a directory with `artifact`, and `images` of three colours."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self._capsys = capsys
        write_tiny_artifact(directory / "artifact")
        write_images(directory / "images")

    def run(self, *words: str) -> tuple[int, str, str]:
        code = run_app(cli.app, words)
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def done(self, *words: str) -> str:
        code, out, err = self.run(*words)
        assert (code, err) == (0, "")
        return out

    def json(self, *words: str) -> Any:
        return json.loads(self.done(*words, "--json"))

    def refused(self, *words: str) -> str:
        code, out, err = self.run(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert "Traceback" not in err
        return err


@pytest.fixture
def commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Commands(tmp_path, capsys)


@pytest.fixture
def embedder(commands: Commands) -> Embedder:
    return Embedder(open_artifact(commands.directory / "artifact"))


def test_info_shows_the_manifest(commands: Commands) -> None:
    out = commands.done("info", "artifact")
    for words in ("test:tiny", "Apache-2.0", "For tests only.", "batch x 3 x 16 x 16"):
        assert words in out
    content = commands.json("info", "artifact")
    assert content["manifest"]["model"]["id"] == "test:tiny"
    artifact = open_artifact(commands.directory / "artifact")
    assert content["manifest_sha256"] == artifact.manifest_sha256
    assert content["size_bytes"] == artifact.size_bytes


def test_info_cuts_nothing_off_on_a_narrow_terminal(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = commands.done("info", "artifact")
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    identity = open_artifact(commands.directory / "artifact").manifest_sha256
    assert identity in "".join(out.split())


def test_info_names_an_adapter(commands: Commands) -> None:
    assert re.search(r"adapter\s+none", commands.done("info", "artifact"))
    directory = commands.directory / "artifact"
    manifest = tiny_manifest(directory)
    model = dataclasses.replace(manifest.model, adapter=AdapterInfo(name="my-lora", sha256="a" * 64))
    write_manifest(dataclasses.replace(manifest, model=model), directory)
    assert re.search(r"adapter\s+my-lora", commands.done("info", "artifact"))


def test_info_prints_a_hostile_manifest_as_plain_text(commands: Commands) -> None:
    directory = commands.directory / "artifact"
    manifest = tiny_manifest(directory)
    model = dataclasses.replace(manifest.model, intended_use="[bold]x[/nope]\x1b[2Jy")
    write_manifest(dataclasses.replace(manifest, model=model), directory)
    out = commands.done("info", "artifact")
    assert "[bold]x[/nope]\ufffd[2Jy" in out


def test_verify_passes_a_whole_artifact(commands: Commands) -> None:
    assert commands.done("verify", "artifact") == "artifact is whole\n"
    assert commands.json("verify", "artifact")["is_whole"] is True


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("text.onnx.data", b"\1", "has 1 bytes"),
        ("extra", b"", "not in its manifest"),
        ("manifest.json", b"{}", "schema version None"),
    ],
)
def test_verify_ends_with_1_when_something_differs(
    commands: Commands, file: str, content: bytes, words: str
) -> None:
    (commands.directory / "artifact" / file).write_bytes(content)
    code, out, err = commands.run("verify", "artifact")
    assert (code, out) == (1, "")
    assert words in err
    code, out, err = commands.run("verify", "artifact", "--json")
    assert (code, err) == (1, "")
    assert words in json.loads(out)["problem"]


def test_verify_of_nothing_is_a_bad_request(commands: Commands) -> None:
    assert "is not a directory" in commands.refused("verify", "absent")


def test_classify_finds_the_colour(commands: Commands) -> None:
    labels = ["--label", "a red image", "--label", "green", "--label", "BLUE!"]
    content = commands.json("classify", "artifact", "images/blue.png", "images/red.png", *labels)
    assert [image["path"] for image in content["images"]] == ["images/blue.png", "images/red.png"]
    first, second = (image["labels"] for image in content["images"])
    assert [row["label"] for row in first] == ["BLUE!", "a red image", "green"]
    assert second[0]["label"] == "a red image"
    # scale 10, bias -5, cosines 1, -1/3, -1/3
    for row, logit in zip(first, (5, -25 / 3, -25 / 3), strict=True):
        assert row["logit"] == pytest.approx(logit, abs=1e-4)
        assert row["sigmoid_per_label"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3)
    assert sum(row["softmax_over_labels"] for row in first) == pytest.approx(1)


def test_classify_prints_a_table_with_the_best_labels(commands: Commands) -> None:
    (commands.directory / "labels.txt").write_text("\ufeffred\n\n  green \r\n[b] blue\n", encoding="utf-8")
    out = commands.done("classify", "artifact", "images/green.png", "--labels", "labels.txt")
    assert out.startswith("images/green.png\n")
    assert out.index("green") < out.index("[b] blue")
    assert "red" in out
    long = "images/../" * 5 + "images/green.png"
    assert commands.done("classify", "artifact", long, "--label", "red").startswith(f"{long}\n")
    out = commands.done(*("classify", "artifact", "images/green.png", "--labels", "labels.txt", "--top", "1"))
    assert "red" not in out
    assert "0.993" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either --label"),
        (["--label", "red", "--labels", "labels.txt"], "give either --label"),
        (["--labels", "labels.txt"], "at least one label"),
        (["--labels", "absent.txt"], r"absent.txt cannot be read or written: No such file"),
        (["--labels", "images/red.png"], "is not UTF-8 text"),
        (["--label", "red", "--label", "Red"], "are the same to the model"),
        (["--label", "nothing"], "which has no direction"),
    ],
)
def test_classify_refuses_what_is_no_question(commands: Commands, options: list[str], words: str) -> None:
    (commands.directory / "labels.txt").write_text("\n \n")
    assert words in commands.refused("classify", "artifact", "images/red.png", *options)


def test_classify_names_a_file_that_is_no_image(commands: Commands) -> None:
    (commands.directory / "notes.txt").write_text("no image")
    assert "notes.txt" in commands.refused("classify", "artifact", "notes.txt", "--label", "red")


def test_a_damaged_artifact_is_not_run(commands: Commands) -> None:
    path = commands.directory / "artifact" / "text.onnx.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    err = commands.refused("embed", "artifact", "--text", "red", "--json")
    assert "does not have the SHA-256" in err


def test_embed_writes_numpy(commands: Commands, embedder: Embedder) -> None:
    paths = ["images/red.png", "images/green.png"]
    out = commands.done(*("embed", "artifact", "--image", paths[0], "--image", paths[1], "--out", "out.npy"))
    assert out == f"wrote float32 [2, {WIDTH}] to out.npy\n"
    expected = embedder.embed_images([load_image(commands.directory / path) for path in paths])
    np.testing.assert_array_equal(np.load("out.npy"), expected)


def test_embed_prints_json(commands: Commands, embedder: Embedder) -> None:
    content = commands.json("embed", "artifact", "--text", "red", "--text", "blue")
    assert [row["source"] for row in content["embeddings"]] == ["red", "blue"]
    rows = np.array([row["embedding"] for row in content["embeddings"]], np.float32)
    np.testing.assert_array_equal(rows, embedder.embed_texts(["red", "blue"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json"], "give either --image or --text"),
        (["--text", "red", "--image", "images/red.png", "--json"], "give either --image or --text"),
        (["--text", "red"], "give either --out or --json"),
        (["--text", "red", "--out", "x.npy", "--json"], "give either --out or --json"),
        (["--text", "red", "--out", "images"], "is there already and is no file"),
        (["--text", "red", "--out", "no/x.npy"], "no/x.npy cannot be written: no is no directory"),
        (["--text", "red " * 64, "--json"], "has 64 tokens"),
    ],
)
def test_embed_refuses_what_it_cannot_do(commands: Commands, options: list[str], words: str) -> None:
    assert words in commands.refused("embed", "artifact", *options)


def test_a_full_disk_is_one_sentence(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.np, "save", full)
    err = commands.refused("embed", "artifact", "--text", "red", "--out", "x.npy")
    assert err == ("error: the disk is full while writing x.npy; free some space and run the command again\n")
    assert not list(commands.directory.glob("*x.npy*"))


def test_index_and_search(commands: Commands) -> None:
    out = commands.done("index", "artifact", "images", "--out", "index.npz")
    assert out == "wrote 3 images to index.npz: 3 embedded, 0 known already\n"
    content = commands.json("index", "artifact", "images", "--out", "index.npz")
    assert (content["embedded"], content["reused"], content["skipped"]) == (0, 3, [])

    by_text = commands.json("search", "artifact", "index.npz", "--text", "a green image", "-k", "2")
    assert [image["name"] for image in by_text["images"]] == ["green.png", "blue.png"]
    assert by_text["images"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    by_image = commands.json("search", "artifact", "index.npz", "--image", "images/red.png")
    assert by_image["images"][0]["name"] == "red.png"
    assert len(by_image["images"]) == 3
    table = commands.done("search", "artifact", "index.npz", "--text", "blue", "-k", "1")
    assert "blue.png" in table
    assert "red.png" not in table


def test_index_names_bad_files_and_skips_them_only_when_asked(commands: Commands) -> None:
    (commands.directory / "images" / "notes.txt").write_text("no image")
    err = commands.refused("index", "artifact", "images", "--out", "index.npz")
    assert "1 of the files" in err
    assert "notes.txt" in err
    assert not (commands.directory / "index.npz").exists()
    out = commands.done("index", "artifact", "images", "--out", "index.npz", "--skip-bad")
    assert "skipped 1 files" in out
    assert "notes.txt" in out
    content = commands.json("index", "artifact", "images", "--out", "index.npz", "--skip-bad")
    assert [row["name"] for row in content["skipped"]] == ["notes.txt"]


def test_a_stopped_index_is_gone_on_with(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = commands.directory / "images", ("--out", "index.npz")
    (images / "green.png").rename(images / "m.png")
    (images / "c.png").write_text("no image")
    assert "c.png" in commands.refused("index", "artifact", "images", *out)
    (images / "c.png").unlink()
    Image.new("RGB", (8, 8), (9, 200, 90)).save(images / "a.png")
    Image.new("RGB", (8, 8), (9, 200, 91)).save(images / "z.png")

    real = image_index.load_image

    def interrupted(path: Path) -> Any:
        if path.name == "z.png":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(image_index, "load_image", interrupted)
    assert commands.run("index", "artifact", "images", *out)[0] == INTERRUPTED
    assert "there is no index" in commands.refused("search", "artifact", "index.npz", "--text", "red")
    monkeypatch.setattr(image_index, "load_image", real)
    content = commands.json("index", "artifact", "images", *out)
    assert (content["images"], content["embedded"], content["reused"]) == (5, 1, 4)
    assert sorted(path.name for path in commands.directory.glob("index*")) == ["index.npz"]


def test_an_index_of_another_artifact_is_refused(commands: Commands) -> None:
    commands.done("index", "artifact", "images", "--out", "index.npz")
    directory = commands.directory / "artifact"
    manifest = tiny_manifest(directory)
    build = dataclasses.replace(manifest.build, seconds=2.0)
    write_manifest(dataclasses.replace(manifest, build=build), directory)
    for words in (
        ("search", "artifact", "index.npz", "--text", "red"),
        ("index", "artifact", "images", "--out", "index.npz"),
    ):
        assert "was made by the artifact" in commands.refused(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("index", "artifact", "images", "--out", "images/i.npz"), "lies in the folder"),
        (("index", "artifact", "absent", "--out", "i.npz"), "is not a folder"),
        (("index", "artifact", "images", "--out", "images/red.png"), "lies in the folder"),
        (("index", "artifact", "artifact", "--out", "labels.txt"), "is no index"),
        (("search", "artifact", "absent.npz", "--text", "red"), "there is no index"),
        (("search", "artifact", "labels.txt", "--text", "red"), "is no index"),
        (("search", "artifact", "absent.npz"), "give either --image or --text"),
    ],
)
def test_index_and_search_refuse(commands: Commands, words: tuple[str, ...], message: str) -> None:
    (commands.directory / "labels.txt").write_text("red\n")
    assert message in commands.refused(*words)


@pytest.mark.parametrize("command", ["info", "classify", "embed", "index", "search"])
def test_an_absent_artifact_is_a_bad_request(commands: Commands, command: str) -> None:
    words = {
        "classify": ["images/red.png", "--label", "red"],
        "embed": ["--text", "red", "--json"],
        "index": ["images", "--out", "i.npz"],
        "search": ["i.npz", "--text", "red"],
    }.get(command, [])
    assert "absent is not a directory" in commands.refused(command, "absent", *words)


@pytest.mark.parametrize(
    "words", [["fly"], ["classify"], ["info", "artifact", "--verbose"], ["embed", "--threads", "0"]]
)
def test_a_usage_error_is_a_bad_request(commands: Commands, words: list[str]) -> None:
    code, out, err = commands.run(*words)
    assert (code, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize("command", ["info", "verify", "classify", "embed", "index", "search"])
def test_help_shows_an_example(commands: Commands, command: str) -> None:
    out = commands.done(command, "--help")
    assert f"medgemma-run {command} out/medsiglip-int8" in out
    assert "--json" in out


def test_threads_reach_the_engine(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgemma_runtime import embed

    seen: list[int | None] = []
    real = embed.open_session
    monkeypatch.setattr(
        embed,
        "open_session",
        lambda artifact, name, *, threads, arithmetic: seen.append(threads) or real(artifact, name),
    )
    commands.json("embed", "artifact", "--text", "red", "--threads", "1")
    commands.json("embed", "artifact", "--text", "red")
    assert seen == [1, None]
