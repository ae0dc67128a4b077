"""What goes wrong while publishing, said in words a user can act on; and which of it is worth a new try."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from quantkit.checkpoint.atomic import write_error
from quantkit.errors import HubError, QuantkitError, UsageError
from quantkit.hub import problems

# Failed uploads arrive as RuntimeError with the reason as cause, refused ones as ValueError; an answer that
# is JSON of another kind, as a proxy gives, as KeyError.
FAILURES = (*problems.CLIENT_ERRORS, RuntimeError, ValueError, KeyError)
STALE = 412
# of no use to try again; 400 is: the Hub may have lost an object that a commit points to
_FINAL = frozenset({401, 402, 403, 404, 405, 410, 411, 413, 414, STALE, 501})
# what the client wraps around a failure of the storage behind the Hub, and of its check of what came in
_STORING = "Error while uploading"
_METADATA = "Invalid metadata in README.md."
_QUERY = re.compile(r"\?[^\s'\"<>]+")
_TOKEN = re.compile(r"\bhf_\w+")
_ADDRESS = re.compile(r"/api/[^\s)'\"]*xet-[a-z]+-token")
_MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is published, and the command that goes on after a failure."""

    api: HfApi
    repo: str
    resume: str
    account: str | None = None
    namespaces: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    @property
    def who(self) -> str:
        return f"The token of {self.account}" if self.account else "The token"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind a failure, None where there was no answer."""
    return problems.status_of(error)


def hopeless(error: BaseException) -> bool:
    """Whether the same call would fail again."""
    if _METADATA in str(error):
        return True
    cause = problems.unwrap(error)
    status = problems.status_of(cause)
    if status is not None:
        # addresses of the storage expire, so that a 403 from there is no last word
        return status in _FINAL and not _is_storage(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return True
    no_network = not isinstance(cause, (httpx2.HTTPError, ConnectionError, TimeoutError))
    return no_network and isinstance(cause, OSError) and cause.errno is not None


def lacks_xet(error: BaseException) -> bool:
    """Whether this is what the client raises at a server without Xet; it never falls back to LFS itself."""
    cause = problems.unwrap(error)
    if constants.HF_HUB_DISABLE_XET or not isinstance(cause, ConnectionError):
        return False
    return problems.status_of(cause) == 404 and _ADDRESS.search(str(cause)) is not None


def explain(error: BaseException, place: Place, doing: str) -> QuantkitError:
    """The quantkit error for one of `FAILURES` that happened while `doing` something at `place`."""
    if _METADATA in str(error):
        return UsageError(
            f"The Hub refuses the card of {place.repo}: {_told(error)}",
            remedy="correct the front matter of README.md",
        )
    cause = problems.unwrap(error)
    status = problems.status_of(cause)
    if status is not None and _is_storage(error):
        return HubError(
            f"{place.repo}: the storage answered {status} while {doing}: {_told(cause)}", remedy=_later(place)
        )
    if isinstance(cause, GatedRepoError) and status == 403:
        return HubError(
            f"{place.repo} is gated, and {place.account or 'this account'} has not been granted access "
            f"(while {doing}).",
            remedy=f"request access at {place.url}, that can take a while; then: {place.resume}",
        )
    if status is not None:
        if status == 403 and _only_read(cause):
            return HubError(
                f"{place.who} has no right to see {place.repo} (while {doing}).",
                remedy=f"make one that may read and write it: {place.api.endpoint}/settings/tokens",
            )
        return _answered(status, _told(cause), place, doing)
    match cause:
        case OfflineModeIsEnabled():
            return HubError(
                f"Offline: {place.repo} cannot be published to.", remedy="drop --offline (and HF_HUB_OFFLINE)"
            )
        case httpx2.TimeoutException() | TimeoutError():
            what = f"{place.api.endpoint} did not answer in time while {doing}."
            return HubError(what, remedy=_later(place))
        case httpx2.TransportError() | ConnectionError():
            return HubError(f"Cannot reach {place.api.endpoint} while {doing}.", remedy=_later(place))
        case json.JSONDecodeError() | KeyError():
            return HubError(
                f"{place.api.endpoint} did not answer as a Hub does while {doing}.",
                remedy=f"{_later(place)}; if it stays so, check HF_ENDPOINT and the proxy settings",
            )
        case OSError() if cause.errno is not None:
            return write_error(cause, Path(cause.filename or constants.HF_HOME), needed=0)
        case _:
            return HubError(f"{place.repo}: {doing} failed: {_told(cause)}", remedy=_later(place))


def in_one_line(problem: QuantkitError) -> str:
    """What happened and what to do, for a list."""
    if problem.remedy is None:
        return problem.message
    return f"{problem.message.removesuffix('.')}; {problem.remedy}"


def distinct(found: Iterable[QuantkitError]) -> tuple[QuantkitError, ...]:
    """Each once: what is wrong with the token is so for every repository."""
    return tuple({(type(each), each.message, each.remedy): each for each in found}.values())


def no_token(endpoint: str) -> HubError:
    """Nothing can be published without a login."""
    return HubError(
        f"There is no token for {endpoint}.",
        remedy="run: hf auth login, or set HF_TOKEN to a token that may write",
    )


def may_not_write(place: Place) -> HubError:
    """The token is known, and has no right to this repository."""
    known = f"it may write to {', '.join(place.namespaces)}" if place.namespaces else "it may only read"
    return HubError(
        f"{place.who} may not write to {place.repo}: {known}.",
        remedy=f"name a repository of yours, or make a token that may write: "
        f"{place.api.endpoint}/settings/tokens",
    )


def _answered(status: int, told: str, place: Place, doing: str) -> HubError:
    match status:
        case 401:
            return HubError(
                f"The token{problems.token_place(place.api)} is not valid at {place.api.endpoint}, while "
                f"{doing}: it expired, was revoked, or is of another Hub.",
                remedy=f"{_new_token(place.api)}, then: {place.resume}",
            )
        case 402:
            return HubError(
                f"The Hub wants payment before {doing} at {place.repo}: {told}",
                remedy=f"free or buy storage: {place.api.endpoint}/settings/billing, then: {place.resume}",
            )
        case 403:
            return may_not_write(place)
        case 404:
            return HubError(
                f"{place.repo} or its branch is gone, or cannot be seen any more, while {doing}.",
                remedy=f"look at {place.url}, then: {place.resume}",
            )
        case 413:
            return HubError(
                f"The Hub finds this too large, while {doing}: {told}",
                remedy=f"free storage, then: {place.resume}; or convert again with a smaller --shard-size "
                "(output.shard_size) and --on-exists replace",
            )
        case 429:
            return HubError("Rate limited.", remedy=f"wait a few minutes, then: {place.resume}")
        case 412:
            return HubError(
                f"{place.repo} was changed while it was published to.", remedy=f"look, then: {place.resume}"
            )
        case _ if status >= 500:
            return HubError(f"The Hub answered {status} while {doing}.", remedy=_later(place))
        case _:
            return HubError(
                f"The Hub answered {status} while {doing}: {told}", remedy=f"then: {place.resume}"
            )


def _new_token(api: HfApi) -> str:
    """A login does not help where something else goes before it."""
    if isinstance(api.token, str):
        return "put another in its place"
    if problems.token_place(api) == problems.IN_ENVIRONMENT:
        return "set HF_TOKEN to another one, or unset it and log in with hf auth login"
    return "log in again with hf auth login"


def _later(place: Place) -> str:
    return f"all files are where they were; try again later: {place.resume}"


def _is_storage(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith(_STORING)


def _only_read(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.request.method in ("GET", "HEAD")


def _told(error: BaseException) -> str:
    """What the server or the client says, without signatures in addresses and whatever looks like a token."""
    text = error.server_message or str(error) if isinstance(error, HfHubHTTPError) else str(error)
    text = _TOKEN.sub("hf_…", _QUERY.sub("", " ".join(text.split())))
    return text.removeprefix(f"{_METADATA} ")[:_MAX_TEXT]
