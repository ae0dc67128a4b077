"""One commit of a repository in the client's cache: pinned first, the model's files only, verified.

What is fetched is decided from the listing of the repository, not from patterns: safetensors, by
index where there is one, or the files of one GGUF model, and the small files. Pickles and code are
never fetched.
"""

from __future__ import annotations

import glob
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, RevisionResolutionError

from quantkit.checkpoint import folder
from quantkit.errors import BudgetError, HubError
from quantkit.hub import problems, resume, selection, xet
from quantkit.hub.client import Repo
from quantkit.hub.listing import Listed, Verified, cache_folder, known_listing, listing
from quantkit.hub.selection import Choice
from quantkit.hub.transfer import Meter, bar_class
from quantkit.progress import SILENT, Progress
from quantkit.recipe.sizes import format_size

_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


def downloaded(repo: Repo, which: str | None = None, progress: Progress = SILENT) -> tuple[Path, str]:
    """(folder or GGUF file, commit) of a model, fetched as far as the cache lacks it.

    which  picks one of several, see `selection.choose`

    HubError when the Hub refuses, BudgetError when the disk is too small, SourceError when there is no
    such model.
    """
    if constants.is_offline_mode():
        return cached(repo, which)
    commit = pin(repo)
    try:
        files = listing(repo, commit)
    except HubError as error:
        if not problems.may_pass(error) or not place(repo, commit).is_dir():
            raise
        _log.warning("cannot list %s at %s: using the cached copy", repo.id, repo.api.endpoint)
        return cached(repo, which)
    choice = selection.choose(repo.id, files, which)
    small = choice.small(files)
    fetch(repo, commit, [files[name] for name in small], progress)
    chosen = weights(repo, commit, choice, files)
    fetch(repo, commit, [files[name] for name in chosen], progress)
    skipped = [file for name, file in files.items() if name not in {*small, *chosen}]
    _log.info(
        "%s: %d weight files, skipped %d others of %s bytes",
        at(repo, commit),
        len(chosen),
        len(skipped),
        f"{sum(file.size for file in skipped):,}",
    )
    return found(repo, commit, choice), commit


def cached(repo: Repo, which: str | None = None) -> tuple[Path, str]:
    """(folder or GGUF file, commit) from the cache alone; HubError unless config and weights are there."""
    commit = pinned_before(repo)
    present = _present(repo, commit)
    if not present:
        raise problems.not_cached(repo)
    names = known_names(repo, commit) or present
    choice = selection.choose(repo.id, names, which)
    if not choice.gguf:
        index = folder.index_file(choice.beside(names))
        require(repo, commit, present, {choice.folder + (name or folder.CONFIG) for name in ("", index)})
    require(repo, commit, present, weights(repo, commit, choice, names))
    return found(repo, commit, choice), commit


def pin(repo: Repo) -> str:
    """The commit that the revision stands for now; HubError when the Hub does not say."""
    ask = partial(repo.api.resolve_revision, repo.id, revision=repo.revision, cache_dir=repo.cache)
    commit = problems.attempt(lambda: problems.understood(ask, repo), repo).resolved
    if _COMMIT.fullmatch(commit) is None:
        raise problems.no_hub(repo)
    return commit


def pinned_before(repo: Repo) -> str:
    """The commit that the revision stood for when it was last looked up; HubError when it never was."""
    try:
        pinned = repo.api.resolve_revision(
            repo.id, revision=repo.revision, cache_dir=repo.cache, local_files_only=True
        )
    except RevisionResolutionError as error:
        raise problems.explain(error, repo) from error
    return pinned.resolved


def known_names(repo: Repo, commit: str) -> set[str] | None:
    """The files of a commit, from a listing that was made earlier, by us or another tool; None: never."""
    if (known := known_listing(repo, commit)) is not None:
        return set(known)
    try:
        return {f.path for f in get_cached_repo_tree(repo.id, revision=commit, cache_dir=repo.cache)}
    except CachedRepoTreeNotFoundError:
        return None


def weights(repo: Repo, commit: str, choice: Choice, names: Collection[str]) -> tuple[str, ...]:
    """The weight files of a model; an index that is needed must be in the cache already."""
    if choice.gguf:
        selection.check_shards(at(repo, commit), choice)
        return choice.gguf
    path = place(repo, commit) / choice.folder
    found = folder.weight_files(
        at(repo, commit), choice.beside(names), lambda name: folder.read_index(path / name)
    )
    return tuple(choice.folder + name for name in found)


def found(repo: Repo, commit: str, choice: Choice) -> Path:
    """Where a model is once it is fetched."""
    return place(repo, commit) / (choice.gguf[0] if choice.gguf else choice.folder)


def at(repo: Repo, commit: str) -> str:
    """What to call a commit."""
    return f"{repo.id}@{commit[:7]}"


def place(repo: Repo, commit: str) -> Path:
    """The folder of a commit, by the client's layout of its cache."""
    return cache_folder(repo) / "snapshots" / commit


def _present(repo: Repo, commit: str) -> set[str]:
    path = place(repo, commit)
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def require(repo: Repo, commit: str, present: Collection[str], wanted: Collection[str]) -> None:
    """HubError unless all `wanted` files are `present`."""
    missing = sorted(set(wanted).difference(present))
    if missing:
        raise problems.incomplete(at(repo, commit), missing)


def fetch(repo: Repo, commit: str, files: Sequence[Listed], progress: Progress = SILENT) -> None:
    """Download `files` of one commit into the cache and verify each; a damaged one is fetched once more.

    What an earlier call left of a large file is gone on with.
    """
    path = place(repo, commit)
    missing = [file for file in files if not (path / file.path).exists()]
    if missing:
        total, here = sum(file.size for file in missing), sum(resume.held(repo, file) for file in missing)
        _check_space(repo, total - here)
        count = "1 file" if len(missing) == 1 else f"{len(missing):,} files"
        known = f", {format_size(here)} of it here" if here else ""
        progress.step("download", f"{at(repo, commit)}: {count}, {format_size(total)}{known}")
        _get(repo, commit, missing, Meter(progress, total))
    verified = Verified(repo)
    for file in files:
        if verified.damage(path / file.path, file) is None:
            continue
        _get_again(repo, commit, file, Meter(progress, file.size))
        if (damage := verified.damage(path / file.path, file)) is not None:
            raise HubError(
                f"'{file.path}' of {at(repo, commit)} arrived damaged twice: {damage}.",
                remedy="try again later; if it happens again, check the proxy and the disk",
            )
    if missing:
        resume.tidy(repo, commit)


def _get(repo: Repo, commit: str, files: Sequence[Listed], meter: Meter) -> None:
    """Large files by parts that stay, whatever happens; the rest, and all links, by the client."""
    path = place(repo, commit)

    def in_place() -> set[Listed]:
        return {file for file in files if (path / file.path).exists()}

    def get_all() -> None:
        there = in_place()
        meter.restart(sum(file.size for file in there))
        resume.bodies(repo, commit, [file for file in files if file not in there], meter)
        repo.api.snapshot_download(
            repo.id,
            revision=commit,
            cache_dir=repo.cache,
            allow_patterns=[glob.escape(file.path) for file in files],
            tqdm_class=bar_class(meter),
        )

    xet.attempt(get_all, repo, done=in_place)


def _get_again(repo: Repo, commit: str, file: Listed, meter: Meter) -> None:
    """A file whose bytes are wrong, from its beginning."""

    def get() -> None:
        ours = resume.bodies(repo, commit, [file], meter, anew=True)
        if ours:
            (place(repo, commit) / file.path).unlink(missing_ok=True)  # a copy, where there are no links
        repo.api.hf_hub_download(
            repo.id,
            file.path,
            revision=commit,
            cache_dir=repo.cache,
            force_download=not ours,
            tqdm_class=bar_class(meter),
        )

    xet.attempt(get, repo)


def _check_space(repo: Repo, needed: int) -> None:
    existing = next(p for p in (repo.cache, *repo.cache.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BudgetError(
            f"{repo.id} needs {needed:,} bytes in `{repo.cache}`, {free:,} bytes are free",
            needed=needed,
            available=free,
            remedy="free space, or point HF_HOME to a larger disk",
        )
