"""What the Hub client raises, said in words a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from quantkit.checkpoint.atomic import write_error
from quantkit.errors import HubError, QuantkitError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
# Everything the client is known to raise for a Hub that refuses or is out of reach.
CLIENT_ERRORS = (OSError, httpx2.HTTPError, RevisionResolutionError, json.JSONDecodeError)
WAITS = (1.0, 2.0, 4.0)
_MAX_WAIT = 300.0  # the Hub counts per window of 5 minutes
_TOO_MANY = 429
_CUT_SHORT = "Consistency check failed"
_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository at a revision, as the user named it, and the client to ask about it."""

    id: str
    revision: str | None
    api: HfApi
    cache: Path

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.id}"


def attempt(call: Callable[[], T], repo: Repo) -> T:
    """The result of `call`, tried up to 4 times while the failure may pass; HubError when it does not.

    For the calls that the client itself does not retry.
    """
    for seconds in WAITS:
        try:
            return call()
        except CLIENT_ERRORS as error:
            if not may_pass(error):
                raise explain(error, repo) from error
            wait = max(seconds, _requested_wait(error))
            what = "Rate limited" if _status(error) == _TOO_MANY else f"{repo.id}: {type(error).__name__}"
            _log.warning("%s; waiting %.0f s.", what, wait)
            time.sleep(wait)
    try:
        return call()
    except CLIENT_ERRORS as error:
        raise explain(error, repo) from error


def may_pass(error: Exception) -> bool:
    """Whether trying again may help: 5xx, rate limits, lost connections, a body that was cut short."""
    status = _status(error)
    if status is not None:
        return status == _TOO_MANY or status >= 500
    cause = _unwrap(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return False
    return isinstance(cause, (httpx2.TransportError, ConnectionError)) or _CUT_SHORT in str(cause)


def explain(error: Exception, repo: Repo) -> QuantkitError:
    """The quantkit error for one of `CLIENT_ERRORS`."""
    cause = _unwrap(error)
    match cause:
        case GatedRepoError():
            return _gated(cause, repo)
        case RepositoryNotFoundError():
            return _no_repo(cause, repo)
        case RevisionNotFoundError():
            return HubError(f"'{repo.id}' has no revision '{repo.revision}'.", remedy=_revisions(repo))
        case RemoteEntryNotFoundError():
            name = str(cause.response.url).rpartition("/")[2]
            at = f"{repo.id}@{(repo.revision or 'main')[:7]}"
            return HubError(f"{at} has no '{name}'.", remedy=f"see which files exist: {repo.url}/tree/main")
        case HfHubHTTPError():
            return _answered(cause.response.status_code, repo)
        case FileMetadataError() | json.JSONDecodeError():
            return HubError(
                f"{repo.api.endpoint} does not speak the Hub protocol.",
                remedy="check HF_ENDPOINT and the proxy settings",
            )
        case _:
            return _unanswered(cause, repo)


def _did_you_mean(name: str, others: Iterable[str]) -> str:
    """A sentence that offers the closest of `others`, or an empty string."""
    close = difflib.get_close_matches(name, list(others), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _gated(error: GatedRepoError, repo: Repo) -> HubError:
    if error.response.status_code == 401:
        return HubError(
            f"{repo.id} is gated and you are not logged in.",
            remedy=f"Accept the terms at {repo.url}, then run: hf auth login",
        )
    return HubError(
        f"Your account{_account(repo)} has not been granted access to {repo.id}.",
        remedy=f"Request access at {repo.url}; approval can take a while.",
    )


def _no_repo(error: RepositoryNotFoundError, repo: Repo) -> HubError:
    near = Path(repo.id).parent
    known = [str(p) for p in near.iterdir() if p.is_dir()] if near.is_dir() else []
    known += [p.name[len("models--") :].replace("--", "/") for p in repo.cache.glob("models--*")]
    remedy = "Check the spelling, or log in if it is private: hf auth login."
    remedy += _did_you_mean(repo.id, [name for name in known if name != repo.id])
    if error.response.status_code == 401 or get_token() is None:
        return HubError(f"No public model '{repo.id}'.", remedy=remedy)
    return HubError(f"'{repo.id}' does not exist or this token{_account(repo)} cannot see it.", remedy=remedy)


def _answered(status: int, repo: Repo) -> HubError:
    if status == _TOO_MANY:
        return HubError(
            "Rate limited.",
            remedy="wait a few minutes; the limits are lowest when not logged in: hf auth login",
        )
    if status >= 500:
        return HubError(
            f"The Hub answered {status}", remedy="try again later; see https://status.huggingface.co"
        )
    return HubError(
        f"The Hub answered {status} for {repo.id}.",
        remedy="log in with a token that may read it: hf auth login",
    )


def not_cached(repo: Repo) -> HubError:
    """Offline, and the cache has nothing of this repository at this revision."""
    return HubError(
        f"Offline and '{repo.id}' is not in the cache",
        remedy="drop --offline (and HF_HUB_OFFLINE) and run once with a network",
    )


def _unanswered(cause: BaseException, repo: Repo) -> QuantkitError:
    """No answer that the client understood: offline, no connection, a cut body, the local disk."""
    if isinstance(cause, (OfflineModeIsEnabled, RevisionResolutionError, FileNotFoundError)):
        return not_cached(repo)
    if (status := _status(cause)) is not None:
        return _answered(status, repo)
    if isinstance(cause, (httpx2.TransportError, ConnectionError)):
        return HubError(
            f"Cannot reach {repo.api.endpoint}", remedy="check the network and the proxy, or use --offline"
        )
    if _CUT_SHORT in str(cause):
        return HubError(f"Download of {repo.id} was cut short.", remedy="run the same command again")
    if isinstance(cause, OSError) and cause.errno is not None:
        return write_error(cause, Path(cause.filename or repo.cache), needed=0)
    return HubError(f"Download of {repo.id} failed: {str(cause)[:300]}", remedy="run the same command again")


def _unwrap(error: BaseException) -> BaseException:
    """The client wraps the real reason in errors about its cache; the reason is the cause."""
    wrappers = (RevisionResolutionError, FileNotFoundError)
    while isinstance(error, wrappers) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """HTTP status; the Xet client only tells it in the text of a builtin ConnectionError."""
    cause = _unwrap(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code
    if isinstance(cause, ConnectionError) and (found := _STATUS.search(str(cause))):
        return int(found[1])
    return None


def _requested_wait(error: Exception) -> float:
    """Seconds the server asks to wait, from Retry-After or the RateLimit header; 0 if it does not."""
    cause = _unwrap(error)
    if not isinstance(cause, HfHubHTTPError):
        return 0.0
    headers = cause.response.headers
    after = headers.get("Retry-After", "")
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    seconds = int(after) if after.isdigit() else int(limit[1]) + 1 if limit else 0
    return min(float(seconds), _MAX_WAIT)


def _account(repo: Repo) -> str:
    """`` (alice)`` when the Hub tells whose token it is."""
    name = None
    with contextlib.suppress(*CLIENT_ERRORS):
        name = repo.api.whoami(cache=True).get("name")
    return f" ({name})" if name else ""


def _revisions(repo: Repo) -> str:
    names: list[str] = []
    with contextlib.suppress(*CLIENT_ERRORS):
        refs = repo.api.list_repo_refs(repo.id)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    if not names:
        return f"see {repo.url}/tree/main for its branches and tags"
    return f"it has {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
