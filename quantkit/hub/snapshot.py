"""One commit of a repository in the client's cache: pinned first, the model's files only, verified.

What is fetched is decided from the listing of the repository, not from patterns: safetensors, by
index where there is one, and the small files. Pickles and code are never fetched.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, RevisionResolutionError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import hf_request_event_hook
from huggingface_hub.utils._validators import validate_repo_id

from quantkit.checkpoint import folder
from quantkit.errors import BudgetError, HubError, SourceError
from quantkit.hub import problems
from quantkit.hub.problems import Repo

_CARD = "README.md"
_HASH_CHUNK = 2**20
_TIMEOUTS = {"connect": 10.0, "read": 120.0, "write": 120.0}
_log = logging.getLogger(__name__)


def repository(id: str, revision: str | None, cache_dir: Path | None, endpoint: str | None) -> Repo:
    """A repository and a client for it that never waits for ever; ValueError when `id` cannot be one."""
    validate_repo_id(id)
    set_client_factory(_client)
    api = HfApi(endpoint=endpoint, library_name="quantkit")
    cache = (cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().resolve()
    return Repo(id, revision, api, cache)


def downloaded(repo: Repo) -> tuple[Path, str]:
    """Folder and commit of `repo`, fetched as far as the cache lacks it; HubError when that fails."""
    if constants.is_offline_mode():
        return cached(repo)
    commit = problems.attempt(partial(_pin, repo), repo)
    try:
        listed = [f for f in repo.api.list_repo_tree(repo.id, revision=commit) if isinstance(f, RepoFile)]
    except problems.CLIENT_ERRORS as error:
        if problems.may_pass(error) and _path(repo, commit).is_dir():
            _log.warning("cannot list %s at %s: using the cached copy", repo.id, repo.api.endpoint)
            return cached(repo)
        raise problems.explain(error, repo) from error
    files = {file.path: file for file in listed}
    small = [name for name in files if _is_small(name)]
    if folder.CONFIG not in small:
        raise SourceError(
            f"{_at(repo, commit)} has no {folder.CONFIG}", remedy="name a repository with a model"
        )
    _fetch(repo, commit, [files[name] for name in small])
    weights = _weights(repo, commit, files)
    _fetch(repo, commit, [files[name] for name in weights])
    skipped = sum(file.size for file in listed) - sum(files[name].size for name in (*small, *weights))
    _log.info("%s: %d weight files, skipped %s bytes", _at(repo, commit), len(weights), f"{skipped:,}")
    return _path(repo, commit), commit


def cached(repo: Repo) -> tuple[Path, str]:
    """Folder and commit of `repo` from the cache alone; HubError unless config and weights are there."""
    try:
        commit = _pin(repo, local_files_only=True)
    except RevisionResolutionError as error:
        raise problems.explain(error, repo) from error
    path = _path(repo, commit)
    present = {file.name for file in path.iterdir() if file.is_file()} if path.is_dir() else set()
    if not present:
        raise problems.not_cached(repo)
    try:
        names = {f.path for f in get_cached_repo_tree(repo.id, revision=commit, cache_dir=repo.cache)}
    except CachedRepoTreeNotFoundError:  # filled by a tool that never listed the repository
        names = present
    _require(repo, commit, present, {folder.CONFIG, folder.index_file(names) or folder.CONFIG})
    _require(repo, commit, present, _weights(repo, commit, names))
    return path, commit


def _client() -> httpx2.Client:
    # The first hook is the client's own: it implements offline mode and request ids.
    return httpx2.Client(event_hooks={"request": [hf_request_event_hook, _limit_time]}, follow_redirects=True)


def _limit_time(request: httpx2.Request) -> None:
    """Time-outs also for the requests that are sent with none, which would wait for ever."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = _TIMEOUTS | {k: v for k, v in given.items() if v is not None}


def _pin(repo: Repo, *, local_files_only: bool = False) -> str:
    """The commit that the revision stands for now."""
    pinned = repo.api.resolve_revision(
        repo.id, revision=repo.revision, cache_dir=repo.cache, local_files_only=local_files_only
    )
    return pinned.resolved


def _at(repo: Repo, commit: str) -> str:
    return f"{repo.id}@{commit[:7]}"


def _path(repo: Repo, commit: str) -> Path:
    """The client's layout of its cache."""
    return repo.cache / f"models--{repo.id.replace('/', '--')}" / "snapshots" / commit


def _is_small(name: str) -> bool:
    named = name in (folder.CONFIG, _CARD, *folder.QUANTIZATION_FILES)
    return (named or name.endswith(folder.INDEX_SUFFIX) or folder.is_extra(name)) and "/" not in name


def _weights(repo: Repo, commit: str, names: Collection[str]) -> tuple[str, ...]:
    """The weight files among `names`; an index that is needed must be in the cache already."""
    top = {name for name in names if "/" not in name}
    path = _path(repo, commit)
    return folder.weight_files(_at(repo, commit), top, lambda name: folder.read_index(path / name))


def _require(repo: Repo, commit: str, present: Collection[str], wanted: Collection[str]) -> None:
    missing = sorted(set(wanted).difference(present))
    if missing:
        raise HubError(
            f"The cached copy of {_at(repo, commit)} lacks {len(missing):,} files (first: {missing[0]}).",
            remedy="run once online",
        )


def _fetch(repo: Repo, commit: str, files: Sequence[RepoFile]) -> None:
    """Download `files` of one commit into the cache and verify each; a damaged one is fetched once more."""
    path = _path(repo, commit)
    _check_space(repo, [file for file in files if not (path / file.path).exists()])
    get_all = partial(
        snapshot_download,
        repo.id,
        revision=commit,
        cache_dir=repo.cache,
        endpoint=repo.api.endpoint,
        allow_patterns=[glob.escape(file.path) for file in files],
    )
    problems.attempt(get_all, repo)
    for file in files:
        if _damage(path / file.path, file) is None:
            continue
        get_again = partial(
            hf_hub_download,
            repo.id,
            file.path,
            revision=commit,
            cache_dir=repo.cache,
            endpoint=repo.api.endpoint,
            force_download=True,
        )
        problems.attempt(get_again, repo)
        if (damage := _damage(path / file.path, file)) is not None:
            raise HubError(
                f"'{file.path}' of {_at(repo, commit)} arrived damaged twice: {damage}.",
                remedy="try again later; if it happens again, check the proxy and the disk",
            )


def _check_space(repo: Repo, files: Sequence[RepoFile]) -> None:
    needed = sum(file.size for file in files)
    existing = next(p for p in (repo.cache, *repo.cache.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BudgetError(
            f"{repo.id} needs {needed:,} bytes in `{repo.cache}`, {free:,} bytes are free",
            needed=needed,
            available=free,
            remedy="free space, or point HF_HOME to a larger disk",
        )


def _damage(path: Path, listed: RepoFile) -> str | None:
    """None when size and hash are what the Hub lists, else expected against found."""
    if not path.is_file():
        return "it is not there"
    size = path.stat().st_size
    if size != listed.size:
        return f"{size:,} bytes instead of {listed.size:,}"
    # Large files are listed with their sha256, small ones with the hash that git gives a blob.
    digest = hashlib.sha256() if listed.lfs else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(_HASH_CHUNK):
            digest.update(chunk)
    expected = listed.lfs.sha256 if listed.lfs else listed.blob_id
    found = digest.hexdigest()
    return None if found == expected else f"hash {found[:12]}… instead of {expected[:12]}…"
