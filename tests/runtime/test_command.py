import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from medgemma_runtime.command import (
    BAD_REQUEST,
    CHECK_FAILED,
    DEFECT,
    DONE,
    INTERRUPTED,
    READER_GONE,
    printable,
    progress_bar,
    run_app,
)
from medgemma_runtime.errors import ArtifactError


def app_of(action: object) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def work(number: int = 0) -> None:
        if isinstance(action, BaseException):
            raise action
        if callable(action):
            action()

    return app


def test_done() -> None:
    assert run_app(app_of(None), []) == DONE


def test_a_command_chooses_its_own_code() -> None:
    assert run_app(app_of(typer.Exit(CHECK_FAILED)), []) == CHECK_FAILED


@pytest.mark.parametrize("words", [["--unknown"], ["--number", "x"], ["surplus"]])
def test_a_usage_error_is_a_bad_request(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app_of(None), words) == BAD_REQUEST
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error" in captured.err


def test_a_refusal_is_one_sentence_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app_of(ArtifactError("x is missing; copy it again")), []) == BAD_REQUEST
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: x is missing; copy it again\n")


def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(28, "No space left on device", "out.npy")
    assert run_app(app_of(error), []) == BAD_REQUEST
    assert capsys.readouterr().err == (
        "error: the disk is full while writing out.npy; free some space and run the command again\n"
    )


def test_no_permission_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app_of(PermissionError(13, "Permission denied", "out.npy")), []) == BAD_REQUEST
    assert capsys.readouterr().err == ("error: out.npy cannot be read or written: Permission denied\n")


def test_a_real_error_of_the_system_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    assert run_app(app_of(absent.read_bytes), []) == BAD_REQUEST
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_as_shells_expect_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app_of(KeyboardInterrupt()), []) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "act",
    [
        "typer.echo('x')",
        "typer.echo('x' * 200_000)",
        "Console().print('x')",
    ],
)
def test_a_reader_that_leaves_ends_it_without_a_word(act: str) -> None:
    """What fails a check exits with 1; a pipe to `head` must not read like that."""
    program = f"""
import sys, typer
from rich.console import Console
from medgemma_runtime.command import run_app
app = typer.Typer()
app.command()(lambda: {act})
sys.exit(run_app(app, []))
"""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stderr) == (READER_GONE, b"")


def test_a_defect_prints_its_traceback_and_is_no_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app_of(ZeroDivisionError()), []) == DEFECT
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_words_come_from_the_process_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--unknown"])
    assert run_app(app_of(None)) == BAD_REQUEST


def test_progress_shows_what_is_done_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    with progress_bar("opening") as progress:
        progress("embedding [red]a\x1b]0;title\x07", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "embedding [red]a\ufffd]0;title\ufffd" in captured.err


def test_progress_has_a_bar_and_a_time_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    with progress_bar("opening") as progress:
        progress("embedding a file with a very long name indeed.dcm", 1, 2)
    shown = capsys.readouterr().err
    assert "embedding a file wit" in shown and "embedding a file with" not in shown
    assert "━━━" in shown and "0:00:0" in shown


def test_progress_of_an_unknown_total_is_no_finished_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("opening") as progress:
        progress("timing", 0, 0)
    assert "timing" in capsys.readouterr().err


def test_progress_writes_nothing_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with progress_bar("opening") as progress:
        progress("embedding", 1, 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_control_sequences_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[31mé\n\x07\u202e日") == "a\ufffd[31mé\n\ufffd\ufffd日"
    run_app(app_of(ArtifactError("\x1b]0;title\x07")), [])
    assert "\x1b" not in capsys.readouterr().err
