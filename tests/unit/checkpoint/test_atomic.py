"""Files and folders that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quantkit.checkpoint.atomic import (
    AtomicFile,
    fsync_dir,
    replace_dir,
    write_bytes,
    write_error,
    write_text,
)
from quantkit.errors import BudgetError, RunError


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "grün\r\n")
    assert path.read_bytes() == "grün\r\n".encode()
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    write_bytes(path, memoryview(bytearray(b"xyz")))
    assert path.read_bytes() == b"xyz"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_content_stays_until_the_new_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BudgetError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_data_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def recording_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    write_text(tmp_path / "a", "x")
    assert events == ["fsync", "rename", "fsync"]


def test_a_leftover_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"long leftover of a run that was killed")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_write_at_positions(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "a", size=6)
    file.write(b"AB")
    file.write(b"EF", at=4)
    file.write(b"CD", at=2)
    file.commit()
    file.discard()
    assert (tmp_path / "a").read_bytes() == b"ABCDEF"


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "a", size=6)
    file.write(b"AB")
    file.discard()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file") as caught:
        write_text(tmp_path / "absent" / "a", "x")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "file size limit")]
)
def test_out_of_space(tmp_path: Path, code: int, says: str) -> None:
    error = write_error(OSError(code, os.strerror(code)), tmp_path / "absent" / "a", needed=12_345)
    assert isinstance(error, BudgetError)
    assert error.needed == 12_345
    assert error.available > 0
    assert says in error.message
    assert "12,345 bytes still needed" in error.message
    assert "run the same command again" in str(error.remedy)


def test_other_errors_are_not_about_space(tmp_path: Path) -> None:
    error = write_error(OSError(errno.EACCES, "Permission denied"), tmp_path / "a", needed=1)
    assert not isinstance(error, BudgetError)
    assert "Permission denied" in error.message


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_replace_dir(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for content in ("first", "second"):
        replace_dir(folder(tmp_path / "out.partial", content), final)
        assert (final / "file").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_replace_dir_restores_the_old_folder_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = folder(tmp_path / "out", "old")
    partial = folder(tmp_path / "out.partial", "new")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError, match="Input/output error"):
        replace_dir(partial, final)
    assert (final / "file").read_text() == "old"


def test_replace_dir_after_a_kill_between_its_renames(tmp_path: Path) -> None:
    folder(tmp_path / "out.old", "old")
    replace_dir(folder(tmp_path / "out.partial", "new"), tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_fsync_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raises: bool) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if raises:
        with pytest.raises(OSError, match="Input/output"):
            fsync_dir(tmp_path)
    else:
        fsync_dir(tmp_path)
        assert tmp_path.is_dir()
