"""Parts of a file of a repository, by range requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx2
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from quantkit import __version__
from quantkit.errors import HubError
from quantkit.hub import problems
from quantkit.hub.client import Repo
from quantkit.hub.listing import Listed

FAR = 2**24  # bytes to skip at most where a server does not know ranges
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Whole(ConnectionError):
    """The whole file was sent instead of a part far inside it; another try may be answered better."""


class Ranges:
    """A file of a commit, read in parts; several threads may read.

    whole  whether the last answer was the whole file, as from a server that does not know ranges
    """

    def __init__(self, repo: Repo, commit: str, file: Listed) -> None:
        self.file = file
        self.whole = False
        self._repo = repo
        self._url = hf_hub_url(repo.id, file.path, revision=commit, endpoint=repo.api.endpoint)
        self._stored: str | None = None

    def get(self, begin: int, end: int) -> bytes:
        """Bytes ``[begin, end)``.

        HubError when the Hub refuses, or sends only whole files and these bytes are far inside.
        """
        if begin >= end:
            return b""
        try:
            return problems.attempt(partial(self._ask, begin, end), self._repo)
        except HubError as error:
            if not isinstance(error.__cause__, _Whole):
                raise
            raise HubError(
                f"{self._repo.api.endpoint} sends '{self.file.path}' of {self._repo.id} only whole, "
                f"and {begin:,} bytes of it would come before what is needed.",
                remedy="try without the proxy or mirror; commands that need the weights download them",
            ) from error

    def _ask(self, begin: int, end: int) -> bytes:
        """One try, at the place in the storage where the Hub sent us last, if it still knows it."""
        if (stored := self._stored) is not None:
            try:
                return self._read(stored, begin, end)
            except HfHubHTTPError as error:
                if problems.may_pass(error):
                    raise
                if self._stored == stored:  # such addresses expire
                    self._stored = None
        return self._read(self._url, begin, end)

    def _read(self, url: str, begin: int, end: int) -> bytes:
        with part(self._repo, self.file, url, begin, end) as (response, start):
            self.whole = response.status_code != 206
            if begin - start > FAR:
                raise _Whole(f"the whole of {self.file.path}")
            if response.history and response.url.netloc != response.history[0].url.netloc:
                self._stored = str(response.url)
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= end - start:  # a server that does not know ranges would send the whole file
                    break
        found = bytes(data[begin - start : end - start])
        if len(found) != end - begin:
            raise OSError(f"Consistency check failed: {len(found):,} bytes instead of {end - begin:,}")
        return found


@contextmanager
def part(repo: Repo, file: Listed, url: str, begin: int, end: int) -> Iterator[tuple[httpx2.Response, int]]:
    """The answer to a request for bytes ``[begin, end)`` of `file`, and the byte of it at which this starts.

    That is `begin`, or 0 from a server that does not know ranges. `url` is the Hub's or that of the storage,
    which is asked without the token, also after a redirect.

    HubError for a part of something else, OSError for another whole, what the client raises for a refusal.
    """
    api = repo.api
    token = api.token if url.startswith(f"{api.endpoint}/") else False
    sent = build_hf_headers(token=token, library_name=api.library_name, library_version=__version__)
    # Compressed, a range would not be the range of the file.
    sent |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=sent, timeout=seconds) as response:
        hf_raise_for_status(response)
        yield response, _start(response, repo, file, begin)


def _start(response: httpx2.Response, repo: Repo, file: Listed, begin: int) -> int:
    if response.status_code == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[3])) != (begin, file.size):
            raise problems.no_hub(repo)
        return begin
    length = response.headers.get("Content-Length", str(file.size))
    if length != str(file.size):  # the page of some network, not the file
        raise OSError(f"Consistency check failed: {length} bytes instead of {file.size}")
    return 0
