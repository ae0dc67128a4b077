"""From what the user typed to files on disk: a local model, or one fetched from the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint import folder
from quantkit.errors import SourceError
from quantkit.progress import SILENT, Progress

if TYPE_CHECKING:
    from quantkit.hub.client import Repo

_REPO_ID = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@:]+))?(:(?P<which>[^:]*[^:\s]))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model: a folder or a GGUF file.

    id, revision  repository and commit, 40 hex digits, when it came from the Hub
    """

    path: Path
    id: str | None
    revision: str | None
    requested: str

    @property
    def name(self) -> str:
        """What to call it: a repository by its id, a folder by its name, not by where it lies."""
        return self.id or Path(self.requested).expanduser().resolve().name

    @property
    def pinned(self) -> str:
        """What to ask for to get this very model again: of the Hub, its commit."""
        if self.id is None:
            return self.requested
        named = _REPO_ID.fullmatch(self.requested)
        which = f":{named['which']}" if named is not None and named["which"] else ""
        return f"{self.id}@{self.revision}{which}"

    @property
    def label(self) -> str:
        """What to call it beside others: of the Hub as it was asked for, with its commit."""
        if self.id is None or self.revision is None:
            return self.name
        return self.pinned.replace(self.revision, self.revision[:7])


def resolve(
    source: str,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Source:
    """The model that `source` names: an existing folder or GGUF file, or one of the Hub, fetched.

    ``org/name[@revision][:which]``: `which` is a GGUF file or its tag (``Q4_K_M``), as in llama.cpp, or a
    sub-folder with a checkpoint. offline uses only what the cache holds. token is for the Hub; without one
    it is that of the environment, then of the last login.

    SourceError when `source` is none of these or holds no model, HubError when the Hub refuses or cannot
    be reached, BudgetError when the disk is too small.
    """
    if (local := _local(source)) is not None:
        return local
    repo, which = _on_hub(source, cache_dir, endpoint, token)
    from quantkit.hub import snapshot

    found = snapshot.cached(repo, which) if offline else snapshot.downloaded(repo, which, progress)
    path, commit = found
    return Source(path, repo.id, commit, source)


def headers(
    source: str,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Source:
    """Like `resolve`, without the weights: of those only headers are fetched, see `checkpoint.header_file`.

    What opens folders and GGUF files opens these; reading a tensor raises `header_file.NotDownloaded`. What
    is complete in the cache is taken from there.
    """
    if (local := _local(source)) is not None:
        return local
    repo, which = _on_hub(source, cache_dir, endpoint, token)
    from quantkit.hub import remote

    found = remote.cached(repo, which) if offline else remote.headers(repo, which, progress)
    path, commit = found
    return Source(path, repo.id, commit, source)


def _local(source: str) -> Source | None:
    """The folder or GGUF file at `source`; None when nothing is there."""
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or `~nobody`
        raise _neither(source) from error
    if not source or not exists:
        return None
    if not (path.is_file() and path.suffix.lower() == ".gguf"):
        folder.check_folder(path)
    return Source(path, None, None, source)


def _on_hub(
    source: str, cache_dir: Path | None, endpoint: str | None, token: str | None
) -> tuple[Repo, str | None]:
    """(the repository that `source` names, which model of it)."""
    named = _REPO_ID.fullmatch(source)
    if named is None:
        raise _neither(source, folder.did_you_mean(Path(source)))
    from quantkit.hub import client  # imports the client, which a local folder does not need

    try:
        repo = client.repository(named["id"], named["revision"], client.connect(endpoint, token), cache_dir)
    except ValueError as error:
        raise _neither(source) from error
    return repo, named["which"]


def _neither(source: str, hint: str = "") -> SourceError:
    return SourceError(
        f"'{source}' is neither a folder nor a repo id{hint}",
        remedy="give a folder with config.json and safetensors, a .gguf file, or a Hub id such as org/name",
    )
