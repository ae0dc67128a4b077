"""Local files beside what a repository lists: new, changed, the same, or none of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.errors import VerifyError
from quantkit.hub.listing import Listed
from quantkit.hub.manifest import FileSum
from quantkit.hub.push.publication import Item
from quantkit.progress import SILENT, Progress
from quantkit.recipe.sizes import format_size

Change = Literal["new", "replace", "same", "untouched", "delete"]
MAKE_ANEW = "run quantkit convert again with --on-exists replace"
SENT: tuple[Change, ...] = ("new", "replace")
OF_THE_HUB = ".gitattributes"
_CHUNK = 1 << 20
_SMALL = 1 << 25  # what git might hold itself, so both of its hashes are taken in one reading
_LARGE = 1 << 28  # takes seconds to read, which are told of


@dataclass(frozen=True, slots=True)
class Row:
    """A file by its path in the repository; `bytes` are those that are or will be there."""

    path: str
    change: Change
    bytes: int
    was: int | None = None


class Sums:
    """Hashes of local files; each file is read once, and again when it was written to since."""

    def __init__(self, progress: Progress = SILENT) -> None:
        self._progress = progress
        self._known: dict[tuple[str, int, int], FileSum] = {}
        self._git: dict[tuple[str, int, int], str] = {}

    def of(self, source: Path | bytes) -> FileSum:
        """Size and sha256; VerifyError when the file cannot be read."""
        if isinstance(source, bytes):
            return FileSum(len(source), hashlib.sha256(source).hexdigest())
        state = _state(source)
        if state not in self._known:
            self._read(source, state)
        return self._known[state]

    def git(self, source: Path | bytes) -> str:
        """What git calls a file with this content."""
        if isinstance(source, bytes):
            return _git(len(source), [source])
        state = _state(source)
        if state not in self._git:
            self._git[state] = _git(state[1], _chunks(source))
        return self._git[state]

    def unchanged(self, source: Path | bytes) -> bool:
        """Whether a file is still the one that was hashed."""
        return isinstance(source, bytes) or _state(source) in self._known

    def match(self, source: Path | bytes, listed: Listed | None) -> bool:
        """Whether the repository holds this very content."""
        if listed is None:
            return False
        mine = self.of(source)
        if mine.bytes != listed.size:
            return False
        return listed.sum == (mine.sha256 if listed.large else self.git(source))

    def _read(self, path: Path, state: tuple[str, int, int]) -> None:
        size = state[1]
        sha256 = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= _SMALL else None
        count = 0
        if size >= _LARGE:
            self._progress.step("checksum", f"{path.name} ({format_size(size)})")
        for chunk in _chunks(path):
            sha256.update(chunk)
            count += len(chunk)
            if size >= _LARGE:
                self._progress.amount(count, size)
            if git is not None:
                git.update(chunk)
        if count != size:
            raise _unreadable(path, f"it has {count:,} bytes and is listed with {size:,}")
        self._known[state] = FileSum(size, sha256.hexdigest())
        if git is not None:
            self._git[state] = git.hexdigest()


def difference(items: Iterable[Item], listed: Mapping[str, Listed], sums: Sums) -> tuple[Row, ...]:
    """A row for each of `items`, and one for each other file there but the Hub's own."""
    rows = []
    mine = set()
    for item in items:
        there = listed.get(item.path_in_repo)
        mine.add(item.path_in_repo)
        change: Change = "same" if sums.match(item.source, there) else "new" if there is None else "replace"
        was = None if there is None else there.size
        rows.append(Row(item.path_in_repo, change, sums.of(item.source).bytes, was))
    others = (file for path, file in sorted(listed.items()) if path not in {*mine, OF_THE_HUB})
    return (*rows, *(Row(file.path, "untouched", file.size, file.size) for file in others))


def nothing_to_do(rows: tuple[Row, ...]) -> bool:
    """Whether everything is there."""
    return all(row.change in ("same", "untouched") for row in rows)


def counted(number: int) -> str:
    """``1 file``, ``1,200 files``."""
    return f"{number:,} {'file' if number == 1 else 'files'}"


def _state(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return str(path), found.st_size, found.st_mtime_ns


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _git(size: int, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _unreadable(path: Path, why: str) -> VerifyError:
    return VerifyError(f"`{path}` cannot be published: {why}", remedy=MAKE_ANEW)
