"""`publish.json`: kept where it can be, never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.hub.push.record import Entry, Record
from tests.pushing import Said

WHO = ("https://hub", "alice/T", "main")
ENTRY = Entry(*WHO, pull_request=7)


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    path, said = tmp_path / "publish.json", Said()
    Record(path, said).keep(ENTRY)
    assert Record(path, said).pull_request(*WHO) == 7 and said.lines == []
    assert Record(None, said).pull_request(*WHO) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[" * 200_000,
        b"[]",
        b"\xff",
        b'{"schema": "mine"}',
        b'{"schema": "quantkit/publish/1", "publications": [1]}',
        b'{"schema": "quantkit/publish/1", "publications": [{"endpoint": [], "repo": "", "branch": ""}]}',
    ],
)
def test_what_is_not_ours_is_left_as_it_is(tmp_path: Path, text: bytes) -> None:
    path, said = tmp_path / "publish.json", Said()
    path.write_bytes(text)
    kept = Record(path, said)
    assert kept.pull_request(*WHO) is None
    kept.keep(ENTRY)
    assert path.read_bytes() == text and list(tmp_path.iterdir()) == [path]
    (line,) = said.lines
    assert line.startswith(f"warning: `{path}` is not what quantkit push writes; it is left as it is")


def test_what_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    said = Said()
    kept = Record(tmp_path / "gone" / "publish.json", said)
    kept.keep(ENTRY)
    kept.keep(ENTRY)
    (line,) = said.lines
    assert line.startswith(f"warning: cannot write `{tmp_path}/gone/publish.json`: No such file")
    said.lines.clear()
    (tmp_path / "publish.json").mkdir()
    Record(tmp_path / "publish.json", said).keep(ENTRY)
    assert "publish.json` cannot be read: Is a directory" in said.lines[0] and len(said.lines) == 1
