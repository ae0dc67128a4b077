"""A model of the Hub without its weights: of each file only the header, by range requests.

What it makes is a folder ``quantkit/headers/<commit>`` beside the client's snapshots: copies of the small
files, verified, and for every weight file what `checkpoint.header_file` keeps.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from quantkit.checkpoint import folder, header_file
from quantkit.checkpoint.atomic import write_error
from quantkit.errors import SourceError
from quantkit.hub import headers as weights_headers
from quantkit.hub import selection, snapshot
from quantkit.hub.client import Repo
from quantkit.hub.listing import Listed, cache_folder, listing
from quantkit.hub.ranges import Ranges
from quantkit.hub.selection import Choice
from quantkit.progress import SILENT, Progress

_WORKERS = 8
_log = logging.getLogger(__name__)


def headers(repo: Repo, which: str | None = None, progress: Progress = SILENT) -> tuple[Path, str]:
    """(folder or GGUF file, commit) of a model with its headers alone, or whole where the cache has it.

    Of a GGUF file the path is where it would lie: `header_file` keeps its header there.

    HubError when the Hub refuses, SourceError when there is no such model or a header is not sound.
    """
    if constants.is_offline_mode():
        return cached(repo, which)
    commit = snapshot.pin(repo)
    files = listing(repo, commit)
    choice = selection.choose(repo.id, files, which)
    small = choice.small(files)
    snapshot.fetch(repo, commit, [files[name] for name in small], progress)
    weights = [files[name] for name in snapshot.weights(repo, commit, choice, files)]
    if _are_there(snapshot.place(repo, commit), weights):
        return snapshot.found(repo, commit, choice), commit
    path = _folder(repo, commit, choice)
    _copy(snapshot.place(repo, commit), small, path, choice)
    if missing := [file for file in weights if not _is_kept(_beside(path, choice, file.path), file)]:
        count = "1 file" if len(missing) == 1 else f"{len(missing):,} files"
        progress.step("download", f"{snapshot.at(repo, commit)}: headers of {count}")
        _fetch(repo, commit, choice, missing)
    return _found(path, choice), commit


def cached(repo: Repo, which: str | None = None) -> tuple[Path, str]:
    """(folder or GGUF file, commit) from the cache: the weights where they are, else what `headers` left."""
    commit = snapshot.pinned_before(repo)
    names = snapshot.known_names(repo, commit)
    if names is None:
        return snapshot.cached(repo, which)
    choice = selection.choose(repo.id, names, which)
    path = _folder(repo, commit, choice)
    wanted = _wanted(repo, commit, choice, path, names) if path.is_dir() else ()
    if wanted and not _are_present(snapshot.place(repo, commit), wanted):
        kept = {choice.folder + name for name in header_file.names_in(path)}
        snapshot.require(repo, commit, kept, wanted)
        return _found(path, choice), commit
    return snapshot.cached(repo, which)


def _wanted(repo: Repo, commit: str, choice: Choice, path: Path, names: Collection[str]) -> Sequence[str]:
    """The weight files, of safetensors by the index among the copies."""
    where = snapshot.at(repo, commit)
    if choice.gguf:
        selection.check_shards(where, choice)
        return choice.gguf
    found = folder.weight_files(where, choice.beside(names), lambda name: folder.read_index(path / name))
    return [choice.folder + name for name in found]


def _folder(repo: Repo, commit: str, choice: Choice) -> Path:
    return cache_folder(repo) / "quantkit" / "headers" / commit / choice.folder


def _beside(path: Path, choice: Choice, name: str) -> Path:
    """Where a file of the repository is in the folder of the headers."""
    return path / name.removeprefix(choice.folder)


def _found(path: Path, choice: Choice) -> Path:
    return _beside(path, choice, choice.gguf[0]) if choice.gguf else path


def _fetch(repo: Repo, commit: str, choice: Choice, files: Sequence[Listed]) -> None:
    """Keep the header of each file; those that came before a failure stay."""
    path, where = _folder(repo, commit, choice), snapshot.at(repo, commit)
    ranges = [Ranges(repo, commit, file) for file in files]
    with ThreadPoolExecutor(_WORKERS) as pool:
        begun = pool.map(partial(weights_headers.begin, where=where), ranges)
        for file, beginning in zip(ranges, begun, strict=True):
            kept = weights_headers.finish(file, beginning, pool)
            header_file.write(_beside(path, choice, file.file.path), kept)
    size = sum(file.size for file in files)
    _log.info(
        "%s: %d headers of %s bytes of weights, which are not needed yet", where, len(files), f"{size:,}"
    )


def _are_present(path: Path, names: Sequence[str]) -> bool:
    return all((path / name).is_file() for name in names)


def _are_there(path: Path, files: Sequence[Listed]) -> bool:
    """By their sizes; who reads them verifies them first."""
    return _are_present(path, [f.path for f in files]) and all(
        (path / f.path).stat().st_size == f.size for f in files
    )


def _copy(source: Path, names: Sequence[str], target: Path, choice: Choice) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            copy = _beside(target, choice, name)
            partial_copy = copy.with_name(f"{copy.name}.partial")
            shutil.copyfile(source / name, partial_copy)
            partial_copy.replace(copy)
    except OSError as error:
        raise write_error(error, target, needed=0) from error


def _is_kept(path: Path, file: Listed) -> bool:
    """Whether an earlier call left a sound header of `file`."""
    if not header_file.stands_in(path):
        return False
    try:
        return header_file.read(path).size == file.size
    except SourceError:
        return False
