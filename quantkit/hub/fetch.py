"""From what the user typed to a folder on disk: a local checkpoint, or one fetched from the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint import folder
from quantkit.errors import SourceError

_REPO_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder; `id` and `revision` (the commit, 40 hex digits) when it came from the Hub."""

    path: Path
    id: str | None
    revision: str | None
    requested: str

    @property
    def name(self) -> str:
        """What to call it: a repository by its id, a folder by its name, not by where it lies."""
        return self.id or Path(self.requested).expanduser().resolve().name


def resolve(
    source: str, *, offline: bool = False, cache_dir: Path | None = None, endpoint: str | None = None
) -> Source:
    """The folder that `source` names: an existing one, or ``org/name[@revision]`` fetched into the cache.

    offline uses only what the cache holds. SourceError when `source` is neither a folder nor a
    repository id, or holds no safetensors; HubError when the Hub refuses or cannot be reached.
    """
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or `~nobody`
        raise _neither(source) from error
    if source and path.is_dir():
        return Source(path, None, None, source)
    if exists:
        folder.check_folder(path)
    named = _REPO_ID.fullmatch(source)
    if named is None:
        raise _neither(source, folder.did_you_mean(path))
    from quantkit.hub import snapshot  # imports the Hub client, which a local folder does not need

    try:
        repo = snapshot.repository(named["id"], named["revision"], cache_dir, endpoint)
    except ValueError as error:
        raise _neither(source) from error
    found, commit = snapshot.cached(repo) if offline else snapshot.downloaded(repo)
    return Source(found, repo.id, commit, source)


def _neither(source: str, hint: str = "") -> SourceError:
    return SourceError(
        f"'{source}' is neither a folder nor a repo id{hint}",
        remedy="give a folder with config.json and safetensors, a .gguf file, or a Hub id such as org/name",
    )
