"""What the Hub client raises, said in words a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils._auth import _get_token_from_environment, _get_token_from_file

from quantkit.checkpoint.atomic import write_error
from quantkit.errors import BudgetError, HubError, QuantkitError
from quantkit.hub.client import Repo

T = TypeVar("T")
# Everything the client is known to raise for a Hub that refuses or is out of reach. Xet raises builtin
# errors, uploads wrap the reason in RuntimeError or ValueError, forced downloads in ValueError.
CLIENT_ERRORS = (
    OSError,
    httpx2.HTTPError,
    RevisionResolutionError,
    OIDCError,
    json.JSONDecodeError,
    RuntimeError,
    ValueError,
)
IN_ENVIRONMENT = " in HF_TOKEN"
WAITS = (1.0, 2.0, 4.0)
_MAX_WAIT = 300.0  # the Hub counts per window of 5 minutes
_TOO_LONG, _TOO_MANY = 408, 429
_CUT_SHORT = "Consistency check failed"
_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# What hides a cause that is worth knowing, beside plain ValueError and RuntimeError.
_WRAPPERS = (RevisionResolutionError, LocalEntryNotFoundError, QuantkitError)
_log = logging.getLogger(__name__)


def attempt(
    call: Callable[[], T],
    repo: Repo,
    *,
    waits: Sequence[float] = WAITS,
    done: Callable[[], object] = lambda: None,
) -> T:
    """The result of `call`, tried again after each of `waits` while the failure may pass.

    For the calls that the client itself does not retry. HubError, or another QuantkitError where it is
    not the Hub's fault, with the client's error as its cause.

    done  what earlier attempts achieved: while it changes, the waits begin anew
    """
    before, left = done(), list(waits)
    while True:
        try:
            return call()
        except CLIENT_ERRORS as error:
            if (now := done()) != before:
                before, left = now, list(waits)
            if not left or not may_pass(error):
                raise explain(error, repo) from error
            wait = max(left.pop(0), requested_wait(error))
            what = "Rate limited" if status_of(error) == _TOO_MANY else f"{repo.id}: {_briefly(error)}"
            _log.warning("%s; waiting %.0f s.", what, wait)
            time.sleep(wait)


def understood(call: Callable[[], T], repo: Repo) -> T:
    """The result of `call`, whose answer the client takes apart; HubError when it is not a Hub's."""
    try:
        return call()
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise no_hub(repo) from error


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: 5xx, rate limits, lost connections, time-outs, cut bodies."""
    status = status_of(error)
    if status is not None:
        return status in (_TOO_LONG, _TOO_MANY) or status >= 500
    cause = unwrap(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return False
    lost = (httpx2.TransportError, ConnectionError, TimeoutError)
    return isinstance(cause, lost) or is_cut_short(cause)


def is_cut_short(error: BaseException) -> bool:
    """Whether fewer bytes came over plain HTTP than the file has."""
    return _CUT_SHORT in str(error)


def status_of(error: BaseException) -> int | None:
    """HTTP status; the Xet client only tells it in the text of a builtin ConnectionError. None: no answer."""
    cause = unwrap(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code
    if isinstance(cause, ConnectionError) and (found := _STATUS.search(str(cause))):
        return int(found[1])
    return None


def unwrap(error: BaseException) -> BaseException:
    """The reason: the client wraps it in errors about its cache, and we in ours."""
    while error.__cause__ is not None and (
        isinstance(error, _WRAPPERS) or type(error) in (ValueError, RuntimeError)
    ):
        error = error.__cause__
    return error


def explain(error: BaseException, repo: Repo) -> QuantkitError:
    """The quantkit error for one of `CLIENT_ERRORS`."""
    cause = unwrap(error)
    match cause:
        case GatedRepoError():
            return _gated(cause, repo)
        case RepositoryNotFoundError():
            return _no_repo(cause, repo)
        case RevisionNotFoundError():
            return HubError(f"'{repo.id}' has no revision '{repo.revision}'.", remedy=_revisions(repo))
        case RemoteEntryNotFoundError():
            return _no_file(cause, repo)
        case DisabledRepoError():
            return HubError(
                f"{repo.id} is disabled: its owner or the Hub closed it.",
                remedy=f"see {repo.url} for the reason, or take another copy",
            )
        case HfHubHTTPError():
            return _answered(cause.response.status_code, repo)
        case FileMetadataError() | json.JSONDecodeError():
            return no_hub(repo)
        case OIDCError():
            return HubError(
                "The token exchange that HF_OIDC_RESOURCE asks for failed.",
                remedy="check the identity provider of this job, or unset HF_OIDC_RESOURCE",
            )
        case _:
            return _unanswered(cause, repo)


def no_hub(repo: Repo) -> HubError:
    """Something answers, and it is not a Hub."""
    return HubError(
        f"{repo.api.endpoint} does not speak the Hub protocol.",
        remedy="check HF_ENDPOINT and the proxy settings",
    )


def token_place(api: HfApi) -> str:
    """Where the token that is sent was found, to follow "The token"; empty when that is not known."""
    if isinstance(api.token, str):
        return " that was given"
    with contextlib.suppress(OIDCError):
        token = get_token()
        if token is not None and token == _get_token_from_environment():
            return IN_ENVIRONMENT
        if token is not None and token == _get_token_from_file():
            return f" in `{constants.HF_TOKEN_PATH}`"
    return ""


def not_cached(repo: Repo) -> HubError:
    """Offline, and the cache has nothing of this repository at this revision."""
    return HubError(
        f"Offline and '{repo.id}' is not in the cache",
        remedy="drop --offline (and HF_HUB_OFFLINE) and run once with a network",
    )


def incomplete(where: str, missing: Sequence[str]) -> HubError:
    """Offline, and the cache has only some of the files."""
    return HubError(
        f"The cached copy of {where} lacks {len(missing):,} files (first: {missing[0]}).",
        remedy="run once online",
    )


def _did_you_mean(name: str, others: Iterable[str]) -> str:
    """A sentence that offers the closest of `others`, or an empty string."""
    close = difflib.get_close_matches(name, list(others), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _gated(error: GatedRepoError, repo: Repo) -> HubError:
    if error.response.status_code == 401:
        if _token(repo) is not None and _is_refused(repo):
            return _bad_token(repo)
        return HubError(
            f"{repo.id} is gated and you are not logged in.",
            remedy=f"Accept the terms at {repo.url}, then run: hf auth login",
        )
    return HubError(
        f"Your account{_account(repo)} has not been granted access to {repo.id}.",
        remedy=f"Request access at {repo.url}; approval can take a while.",
    )


def _no_repo(error: RepositoryNotFoundError, repo: Repo) -> HubError:
    token = _token(repo)
    if error.response.status_code == 401 and token is not None and _is_refused(repo):
        return _bad_token(repo)
    near = Path(repo.id).parent
    known = [str(p) for p in near.iterdir() if p.is_dir()] if near.is_dir() else []
    known += [p.name[len("models--") :].replace("--", "/") for p in repo.cache.glob("models--*")]
    remedy = "Check the spelling, or log in if it is private: hf auth login."
    remedy += _did_you_mean(repo.id, [name for name in known if name != repo.id])
    if token is None:
        return HubError(f"No public model '{repo.id}'.", remedy=remedy)
    return HubError(f"'{repo.id}' does not exist or this token{_account(repo)} cannot see it.", remedy=remedy)


def _no_file(error: RemoteEntryNotFoundError, repo: Repo) -> HubError:
    name = unquote(urlsplit(str(error.response.url)).path).partition("/resolve/")[2].partition("/")[2]
    suffix = PurePosixPath(name).suffix
    files: list[str] = []
    with contextlib.suppress(*CLIENT_ERRORS):
        files = [f for f in repo.api.list_repo_files(repo.id, revision=repo.revision) if f.endswith(suffix)]
    where = f"see which files exist: {repo.url}/tree/{repo.revision or 'main'}"
    return HubError(
        f"{repo.id}@{(repo.revision or 'main')[:7]} has no '{name}'.",
        remedy=f"it has {_few(files)}" if files else where,
    )


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
    if status == 401 and _token(repo) is not None:
        return _bad_token(repo)
    return HubError(
        f"The Hub answered {status} for {repo.id}.",
        remedy="log in with a token that may read it: hf auth login",
    )


def _unanswered(cause: BaseException, repo: Repo) -> QuantkitError:
    """No answer that the client understood: offline, no connection, a cut body, the local disk."""
    if isinstance(cause, IncompleteSnapshotError):
        return HubError(f"The cached copy of {repo.id} lacks files.", remedy="run once online")
    if isinstance(cause, (OfflineModeIsEnabled, RevisionResolutionError, LocalEntryNotFoundError)):
        return not_cached(repo)
    if (status := status_of(cause)) is not None:
        return _answered(status, repo)
    if isinstance(cause, (httpx2.TimeoutException, TimeoutError)):
        return HubError(
            f"{repo.api.endpoint} did not answer in time",
            remedy="run the same command again, it continues; check the network and the proxy",
        )
    if isinstance(cause, (httpx2.TransportError, ConnectionError)):
        return HubError(
            f"Cannot reach {repo.api.endpoint}", remedy="check the network and the proxy, or use --offline"
        )
    if is_cut_short(cause):
        return HubError(f"Download of {repo.id} was cut short.", remedy="run the same command again")
    if (refused := _refused_by_disk(cause)) is not None:
        return _disk(refused, repo)
    return HubError(f"Download of {repo.id} failed: {str(cause)[:300]}", remedy="run the same command again")


def _refused_by_disk(cause: BaseException) -> OSError | None:
    """The error of the system behind `cause`; Xet tells of it in text only."""
    if isinstance(cause, OSError) and cause.errno is not None:
        return cause
    found = _OS_ERROR.search(str(cause))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _disk(error: OSError, repo: Repo) -> QuantkitError:
    path = Path(error.filename or repo.cache)
    if error.errno != errno.ENOSPC:
        return write_error(error, path, needed=0)
    existing = next(p for p in (repo.cache, *repo.cache.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    return BudgetError(
        f"disk full while downloading {repo.id} into `{repo.cache}`, {free:,} bytes free",
        needed=0,
        available=free,
        remedy="free space and run the same command again, it continues; or point HF_HOME to a larger disk",
    )


def _briefly(error: BaseException) -> str:
    status = status_of(error)
    return type(unwrap(error)).__name__ if status is None else f"the Hub answered {status}"


def requested_wait(error: BaseException) -> float:
    """Seconds the server asks to wait, from Retry-After or the RateLimit header; 0 if it does not."""
    cause = unwrap(error)
    if not isinstance(cause, HfHubHTTPError):
        return 0.0
    headers = cause.response.headers
    after = headers.get("Retry-After", "")
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    seconds = int(after) if after.isdigit() else int(limit[1]) + 1 if limit else 0
    return min(float(seconds), _MAX_WAIT)


def _token(repo: Repo) -> str | None:
    """What is sent; None when nobody is logged in."""
    given = repo.api.token
    if given is False:
        return None
    with contextlib.suppress(OIDCError):
        return given if isinstance(given, str) else get_token()
    return None


def _is_refused(repo: Repo) -> bool:
    """Whether the Hub does not know the token at all."""
    try:
        repo.api.whoami(cache=True)
    except CLIENT_ERRORS as error:
        return status_of(error) == 401
    return False


def _bad_token(repo: Repo) -> HubError:
    """The token itself is never shown; where it was found helps to replace it."""
    return HubError(
        f"The token{token_place(repo.api)} is not valid at {repo.api.endpoint}: "
        "it expired, was revoked, or is of another Hub.",
        remedy="replace it: hf auth login, or set HF_TOKEN; without any, public models can be read",
    )


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
    close = _did_you_mean(repo.revision or "", names)
    return f"it has {_few(names)}{'.' + close if close else ''}"


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
