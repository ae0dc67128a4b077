"""The one client that talks to the Hub: it names itself, and never waits for ever."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils._http import hf_request_event_hook
from huggingface_hub.utils._validators import validate_repo_id

from quantkit import __version__

_TIMEOUTS = {"connect": 10.0, "read": 120.0, "write": 120.0}


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


def connect(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """A client for `endpoint` (default: the environment's) that sends `token` (default: the environment's,
    then that of the last login)."""
    set_client_factory(_client)
    return HfApi(endpoint=endpoint, token=token, library_name="quantkit", library_version=__version__)


def repository(id: str, revision: str | None, api: HfApi, cache_dir: Path | None = None) -> Repo:
    """A repository of the Hub; ValueError when `id` cannot be one."""
    validate_repo_id(id)
    cache = (cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().resolve()
    return Repo(id, revision, api, cache)


def _client() -> httpx2.Client:
    # The first hook is the client's own: it implements offline mode and request ids.
    return httpx2.Client(
        event_hooks={"request": [hf_request_event_hook, _limit_time]},
        follow_redirects=True,
        timeout=httpx2.Timeout(**_TIMEOUTS, pool=None),
    )


def _limit_time(request: httpx2.Request) -> None:
    """Time-outs also for the requests that are sent with none, which would wait for ever."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = _TIMEOUTS | {k: v for k, v in given.items() if v is not None}
