from pathlib import Path

import pytest

from medgemma_runtime.errors import EdgeError
from medgemma_runtime.files import check_destination, replacing


def test_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with replacing(path) as stream:
        stream.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), replacing(path) as stream:
        stream.write(b"half")
        raise error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_others_put_at_the_temporary_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "foreseen")
    target = tmp_path / "target"
    target.write_bytes(b"of somebody else")
    link = tmp_path / ".x.foreseen"
    link.symlink_to(target)
    with pytest.raises(FileExistsError) as caught, replacing(tmp_path / "x") as stream:
        stream.write(b"mine")
    assert caught.value.filename == str(tmp_path / "x")
    assert target.read_bytes() == b"of somebody else"
    assert link.is_symlink()


def test_others_may_read_what_the_user_lets_them_read(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with replacing(tmp_path / "x"):
        pass
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_of_the_disk_names_the_file_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(OSError, match="No space left") as caught, replacing(path):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_directories_and_devices_are_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(EdgeError, match="is there already and is no file"), replacing(path):
            pass
    assert Path("/dev/null").is_char_device()


def test_a_place_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_destination(tmp_path / "new")
    with pytest.raises(EdgeError, match="no is no directory; make it first"):
        check_destination(tmp_path / "no" / "x")
    with pytest.raises(EdgeError, match="is there already and is no file"):
        check_destination(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(EdgeError, match="is read-only"):
        check_destination(tmp_path / "new")
