"""Large files over plain HTTP, so that a download that was cut goes on where it stopped.

The client gives each attempt a file of its own and throws it away. Here a body is asked for by ranges and
kept in ``blobs/<sha256>.quantkit.incomplete`` until it is whole: after a lost connection, after Ctrl-C and
after a kill. Named by its hash, it cannot be mixed with another version. Whole, it becomes the client's
blob, under the client's lock, and the client only links to it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import are_symlinks_supported
from huggingface_hub.utils._fixes import WeakFileLock
from huggingface_hub.utils._runtime import is_xet_available

from quantkit.hub import problems
from quantkit.hub.client import Repo
from quantkit.hub.listing import Listed, cache_folder, known_listing
from quantkit.hub.ranges import part
from quantkit.hub.transfer import Meter

PARTIAL = ".quantkit.incomplete"
_LEAST = 2**24  # bytes; what is smaller is soon fetched anew
_WORKERS = 8  # the client's number
_LOCK_WAIT = 1.0  # seconds between two looks whether the download was stopped
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Another file failed, or the user stopped it: what came so far is kept."""


def bodies(repo: Repo, commit: str, files: Sequence[Listed], meter: Meter, *, anew: bool = False) -> int:
    """Put the bodies of large files into the client's cache; how many. The others are left to the client.

    anew  also those that the cache has, because they are damaged

    HubError, or BudgetError when the disk is full; what came before is kept.
    """
    # Without links the client copies what it finds and moves what it fetches itself.
    if not are_symlinks_supported(repo.cache):
        return 0
    stop = threading.Event()
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        large = (_Body(repo, commit, file, meter, stop) for file in files if _is_large(file))
        started = [pool.submit(body.fetch, anew=anew) for body in large]
        return sum(future.result() for future in as_completed(started))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def held(repo: Repo, file: Listed) -> int:
    """Bytes of a large file that need not be fetched."""
    blob, unfinished = _places(repo, file.sum)
    return min(_size(blob) or _size(unfinished), file.size) if _is_large(file) else 0


def tidy(repo: Repo, commit: str) -> None:
    """Remove unfinished files that are whole meanwhile, or of a version that this commit does not have."""
    files = known_listing(repo, commit)
    if files is None:
        return
    sums = {file.sum for file in files.values()}
    for unfinished in (cache_folder(repo) / "blobs").glob(f"*{PARTIAL}"):
        sum = unfinished.name.removesuffix(PARTIAL)
        if sum in sums and not _places(repo, sum)[0].exists():
            continue
        # One that is locked is being fetched by somebody, a cache that is read-only stays as it is.
        with suppress(OSError), WeakFileLock(_lock_path(repo, sum), timeout=0.01):
            unfinished.unlink(missing_ok=True)
            _log.info("removed `%s`, which is not needed any more", unfinished.name)


@dataclass(frozen=True, slots=True)
class _Body:
    """One file on its way; `stop` ends it at the next piece."""

    repo: Repo
    commit: str
    file: Listed
    meter: Meter
    stop: threading.Event

    def fetch(self, *, anew: bool) -> bool:
        """Make the blob; False when it is left to the client: it comes by Xet, or is named otherwise."""
        return problems.attempt(partial(self._fetch, anew), self.repo, waits=())

    def _fetch(self, anew: bool) -> bool:
        blob, unfinished = _places(self.repo, self.file.sum)
        if (anew or not blob.exists()) and not problems.attempt(self._is_plain, self.repo):
            return False
        with self._locked():
            if anew or not blob.exists():
                self._begin(unfinished)
                complete = partial(self._complete, unfinished)
                problems.attempt(complete, self.repo, done=lambda: _size(unfinished))
                unfinished.replace(blob)
            else:
                self.meter.add(self.file.size)
        return True

    def _is_plain(self) -> bool:
        """By the answer of the Hub, which the client goes by, too."""
        found = self.repo.api.get_hf_file_metadata(
            url=self._url, token=self.repo.api.token, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        by_xet = found.xet_file_data is not None and is_xet_available()
        return found.etag == self.file.sum and not by_xet

    def _begin(self, unfinished: Path) -> None:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        if here := _size(unfinished):
            self.meter.add(here)
            _log.info("'%s': going on at %s of %s bytes", self.file.path, f"{here:,}", f"{self.file.size:,}")

    def _complete(self, unfinished: Path) -> None:
        """Ask for what is missing until nothing is, by pieces that a storage gives out at once."""
        while (begin := _size(unfinished)) < self.file.size:
            self._go_on()
            end = min(self.file.size, begin + constants.MAX_HTTP_DOWNLOAD_SIZE)
            # Not appended: where a file system does not honour locks, two write the same at the same places.
            with unfinished.open("r+b") as f:
                f.seek(begin)
                for data in self._pieces(begin, end):
                    self._go_on()
                    f.write(data)
                    self.meter.add(len(data))
            if _size(unfinished) == begin:
                raise OSError(f"Consistency check failed: nothing from byte {begin:,} on")

    def _pieces(self, begin: int, end: int) -> Iterator[bytes]:
        """Bytes ``[begin, end)`` of the file as they come, fewer where the answer is short."""
        with part(self.repo, self.file, self._url, begin, end) as (response, at):
            for chunk in response.iter_bytes():
                data = chunk[max(0, begin - at) : end - at]
                at += len(chunk)
                if data:
                    yield data
                if at >= end:
                    return

    @property
    def _url(self) -> str:
        api = self.repo.api
        return hf_hub_url(self.repo.id, self.file.path, revision=self.commit, endpoint=api.endpoint)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The client's lock of this blob; the lock of another process is waited for until `stop`."""
        path = _lock_path(self.repo, self.file.sum)
        with ExitStack() as stack:
            while True:
                self._go_on()
                with suppress(TimeoutError):
                    stack.enter_context(WeakFileLock(path, timeout=_LOCK_WAIT))
                    break
                _log.info("'%s' is being fetched elsewhere: waiting for it", self.file.path)
            yield

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise _Stopped


def _is_large(file: Listed) -> bool:
    return file.large and file.size >= _LEAST and _SHA256.fullmatch(file.sum) is not None


def _places(repo: Repo, sum: str) -> tuple[Path, Path]:
    """(the client's blob, what it is made of)."""
    folder = cache_folder(repo) / "blobs"
    return folder / sum, folder / f"{sum}{PARTIAL}"


def _lock_path(repo: Repo, sum: str) -> Path:
    folder = repo.cache / ".locks" / cache_folder(repo).name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{sum}.lock"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
