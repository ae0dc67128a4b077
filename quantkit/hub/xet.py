"""Downloads by Xet, and without it where that fails.

Nothing in the client falls back: where `hf_xet` is installed and a repository says that its files are in
Xet storage, a server that has none, or a proxy that lets nothing through to it, ends the download.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._runtime import is_xet_available

from quantkit.errors import HubError
from quantkit.hub import problems
from quantkit.hub.client import Repo

_TOKEN_ROUTES = ("/xet-read-token/", "/xet-write-token/")
_log = logging.getLogger(__name__)


def attempt(call: Callable[[], object], repo: Repo, *, done: Callable[[], object] = lambda: None) -> None:
    """`problems.attempt`, once more over plain HTTP when it was Xet that failed."""
    try:
        problems.attempt(call, repo, done=done)
    except HubError as error:
        if not is_to_blame(error.__cause__):
            raise
        _log.warning("%s: Xet storage cannot be used (%s); using plain HTTP", repo.id, error.message)
        with switched_off():
            problems.attempt(call, repo, done=done)


def is_to_blame(error: BaseException | None) -> bool:
    """Whether a failure of the client is one of Xet, so that plain HTTP may do better."""
    if error is None or not is_xet_available():
        return False
    cause = problems.unwrap(error)
    if isinstance(cause, HfHubHTTPError):
        return any(route in str(cause.response.url) for route in _TOKEN_ROUTES)
    # `hf_xet` raises builtin errors of many kinds, with nothing but their text to tell them by.
    if isinstance(cause, ConnectionError):
        return str(cause).startswith("Network error")
    if problems.is_cut_short(cause) or (isinstance(cause, OSError) and cause.errno is not None):
        return False
    return type(cause) in (RuntimeError, ValueError, OSError, TimeoutError) or _is_its_own(cause)


@contextmanager
def switched_off() -> Iterator[None]:
    """Plain HTTP (and LFS) for every call of the client in this block; it looks at the constant each time."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _is_its_own(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "hf_xet"
