"""What a commit of a repository holds, with the hash of every file, and which files were found to have it.

Both are kept in ``quantkit/`` within the repository's folder of the cache: a commit never changes, and
files of many gigabytes are hashed once, not at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.hf_api import RepoFile

from quantkit.checkpoint.atomic import write_text
from quantkit.errors import RunError
from quantkit.hub import problems
from quantkit.hub.client import Repo

_LISTING, _VERIFIED = "quantkit/listing/1", "quantkit/verified/1"
_HASH_CHUNK = 2**20
_QUICK = 2**20  # bytes that are hashed in no time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of a repository. `sum` is its sha256 when it is `large`, else the hash that git gives a blob."""

    path: str
    size: int
    sum: str
    large: bool


def cache_folder(repo: Repo) -> Path:
    """Where the client keeps this repository: its own layout, in which ``quantkit/`` is ours."""
    return repo.cache / f"models--{repo.id.replace('/', '--')}"


def listing(repo: Repo, commit: str) -> dict[str, Listed]:
    """All files of a commit by path; HubError when the Hub refuses or does not answer."""
    if (known := known_listing(repo, commit)) is not None:
        return known
    found = problems.attempt(partial(_ask, repo, commit), repo, waits=())  # the client retries this one
    _keep(_listing_path(repo, commit), {"schema": _LISTING, "files": [asdict(file) for file in found]})
    return {file.path: file for file in found}


def known_listing(repo: Repo, commit: str) -> dict[str, Listed] | None:
    """The listing without asking the Hub; None where it was never asked."""
    found = _kept(_listing_path(repo, commit), _LISTING)
    try:
        return None if found is None else {file["path"]: Listed(**file) for file in found["files"]}
    except (KeyError, TypeError):
        return None


class Verified:
    """Which files of a repository's cache were hashed; a file that changed since is not among them."""

    def __init__(self, repo: Repo) -> None:
        self._root = cache_folder(repo)
        self._path = self._root / "quantkit" / "verified.json"
        found = (_kept(self._path, _VERIFIED) or {}).get("files")
        self._files: dict[str, list[Any]] = found if isinstance(found, dict) else {}

    def damage(self, path: Path, listed: Listed) -> str | None:
        """None when size and hash of `path` are what the Hub lists, else expected against found."""
        if not path.is_file():
            return "it is not there"
        size = path.stat().st_size
        if size != listed.size:
            return f"{size:,} bytes instead of {listed.size:,}"
        name, state = self._state(path, listed)
        if self._files.get(name) == state:
            return None
        found = _hash(path, listed)
        if found != listed.sum:
            self._files.pop(name, None)
            return f"hash {found[:12]}… instead of {listed.sum[:12]}…"
        if size > _QUICK:
            self._files[name] = state
            _keep(self._path, {"schema": _VERIFIED, "files": self._files})
        return None

    def _state(self, path: Path, listed: Listed) -> tuple[str, list[Any]]:
        """(name of the file itself, to which snapshots link; what is remembered of it)."""
        file = path.resolve()
        inside = file.is_relative_to(self._root)
        state = file.stat()
        name = str(file.relative_to(self._root) if inside else file)
        return name, [state.st_size, state.st_mtime_ns, listed.sum]


def _hash(path: Path, listed: Listed) -> str:
    blob = b"blob %d\0" % listed.size
    digest = hashlib.sha256() if listed.large else hashlib.sha1(blob, usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _ask(repo: Repo, commit: str) -> list[Listed]:
    tree = problems.understood(
        lambda: list(repo.api.list_repo_tree(repo.id, revision=commit, recursive=True)), repo
    )
    files = (item for item in tree if isinstance(item, RepoFile))
    return [
        Listed(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id, file.lfs is not None)
        for file in files
        if _is_inside(file.path)
    ]


def _is_inside(path: str) -> bool:
    """No path that would lead out of the folder; git has none."""
    return not PurePosixPath(path).is_absolute() and ".." not in path.split("/") and "\\" not in path


def _listing_path(repo: Repo, commit: str) -> Path:
    return cache_folder(repo) / "quantkit" / "listings" / f"{commit}.json"


def _kept(path: Path, schema: str) -> dict[str, Any] | None:
    """What `_keep` wrote; None when there is nothing that reads."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == schema else None


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Remember `content`; a cache that cannot be written to only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content))
    except (OSError, RunError) as error:
        _log.info("cannot remember `%s`: %s", path, error)
