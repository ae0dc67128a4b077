"""How far an upload is, told to a `Progress` as the client reads files, and not drawn by it.

By LFS the client opens a file through its `CommitOperationAdd`, of which ours hands out one that tells how
far it was read. Xet opens files by their paths itself and tells how far it is, if it is asked to when an
upload begins; the client asks for its own bars alone, so its session is wrapped meanwhile. Where a client has
neither of the two, files are sent all the same, and nothing is told but that each is there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd

from quantkit.progress import Progress

Tell = Callable[[int], None]


class Sending:
    """Files that are sent for one commit, of `total` bytes together."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._arrived = 0
        self._on_their_way: dict[str, int] = {}

    def operation(self, path: str, source: Path | bytes) -> CommitOperationAdd:
        """A file to be sent; `path` in the repository."""
        return _Told(path, source, partial(self._reached, path))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """One try to send some of them. What an earlier one sent of these does not count any more."""
        self._on_their_way = {}
        with _told_by_xet(partial(self._reached, "")):
            yield

    def arrived(self, size: int) -> None:
        """Files of `size` bytes are there: sent, or known to the Hub already."""
        self._on_their_way = {}
        self._arrived += size
        self._tell()

    def _reached(self, path: str, done: int) -> None:
        """So many bytes of a file, or (path empty) of all that are sent together."""
        self._on_their_way[path] = done
        self._tell()

    def _tell(self) -> None:
        done = self._arrived + sum(self._on_their_way.values())
        self._progress.amount(min(done, self._total), self._total)


class _Told(CommitOperationAdd):
    """A file that tells how far it was read to be sent."""

    def __init__(self, path: str, source: Path | bytes, tell: Tell) -> None:
        super().__init__(path, source)
        self._tell_reader = tell

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """The client asks `with_tqdm` for what it sends, and without for what it only looks at."""
        if with_tqdm and isinstance(self.path_or_fileobj, str):
            with _Read(self.path_or_fileobj, self._tell_reader) as file:
                yield file
        else:
            with super().as_file() as file:
                yield file


class _Read(io.BufferedReader):
    """A file that tells, whenever more of it is wanted, how many bytes went before."""

    def __init__(self, path: str, tell: Tell) -> None:
        super().__init__(io.FileIO(path))
        self._tell_position = tell

    def read(self, size: int | None = -1) -> bytes:
        # a position, not a sum: what is sent once more begins again at its first byte
        self._tell_position(self.tell())
        return super().read(size)


class _XetSession:
    """The client's session, whose uploads tell how many bytes of their files were sent or found there."""

    def __init__(self, session: Any, tell: Tell) -> None:
        self._session, self._tell = session, tell

    def new_upload_commit(self, *given: Any, **named: Any) -> Any:
        if "progress_callback" in named and named["progress_callback"] is None:
            named["progress_callback"] = self._report
        return self._session.new_upload_commit(*given, **named)

    def _report(self, together: Any, _each: Any) -> None:
        with suppress(AttributeError):  # nothing may be raised here: it would be printed
            self._tell(together.total_bytes_completed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@contextmanager
def _told_by_xet(tell: Tell) -> Iterator[None]:
    """Uploads by Xet in this block tell how far they are, if the client has the session where 2.4 has it."""
    try:
        from huggingface_hub.utils import _xet
    except ImportError:
        yield
        return
    session = vars(_xet).get("get_xet_session")
    if session is None:
        yield
        return
    _xet.get_xet_session = lambda: _XetSession(session(), tell)
    try:
        yield
    finally:
        _xet.get_xet_session = session
