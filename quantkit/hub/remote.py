"""A model of the Hub without its weights: of each file only the header, by range requests.

What it makes is a folder ``quantkit/headers/<commit>`` beside the client's snapshots: copies of the small
files, verified, and for every weight file what `checkpoint.header_file` keeps. Headers cannot be verified
by a hash, but must describe the file without a hole, to exactly the size that the Hub lists.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from quantkit import __version__
from quantkit.checkpoint import folder, header_file
from quantkit.checkpoint.atomic import write_error
from quantkit.checkpoint.header import PREFIX_BYTES, TensorInfo, header_length, parse_header
from quantkit.checkpoint.header_file import HeaderFile
from quantkit.errors import SourceError
from quantkit.hub import problems, selection, snapshot
from quantkit.hub.client import Repo
from quantkit.hub.listing import Listed, cache_folder, listing
from quantkit.hub.selection import Choice
from quantkit.run.progress import SILENT, Progress

_FIRST = 2**16  # bytes asked for at once; most headers are shorter
_FAR = 2**24  # bytes to skip at most where a server does not know ranges
_WORKERS = 8
# What is fetched of the data: shapes and states that some formats keep beside their codes
_SMALL, _GAP, _MOST_PIECES = 512, 2**14, 8
_STATES = frozenset({"I64", "I32", "U8"})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_log = logging.getLogger(__name__)


def headers(repo: Repo, which: str | None = None, progress: Progress = SILENT) -> tuple[Path, str]:
    """(folder, commit) of a model with its headers alone; complete ones of the cache, and GGUF files, whole.

    HubError when the Hub refuses, SourceError when there is no such model or a header is not sound.
    """
    if constants.is_offline_mode():
        return cached(repo, which)
    commit = snapshot.pin(repo)
    files = listing(repo, commit)
    choice = selection.choose(repo.id, files, which)
    if choice.gguf:
        return snapshot.downloaded(repo, which, progress)
    small = choice.small(files)
    snapshot.fetch(repo, commit, [files[name] for name in small], progress)
    weights = [files[name] for name in snapshot.weights(repo, commit, choice, files)]
    if _are_there(snapshot.place(repo, commit), weights):
        return snapshot.found(repo, commit, choice), commit
    path = _folder(repo, commit, choice)
    _copy(snapshot.place(repo, commit), small, path, choice)
    missing = [file for file in weights if not _is_kept(path / file.path.removeprefix(choice.folder), file)]
    with ThreadPoolExecutor(_WORKERS) as pool:
        kept = pool.map(partial(_header, repo, commit), missing)
        for file, header in zip(missing, kept, strict=True):
            header_file.write(path / file.path.removeprefix(choice.folder), header)
    _log.info(
        "%s: %d headers of %s bytes of weights, which are not needed yet",
        snapshot.at(repo, commit),
        len(weights),
        f"{sum(file.size for file in weights):,}",
    )
    return path, commit


def cached(repo: Repo, which: str | None = None) -> tuple[Path, str]:
    """(folder, commit) from the cache alone: the weights where they are, else what `headers` left there."""
    commit = snapshot.pinned_before(repo)
    names = snapshot.known_names(repo, commit)
    if names is None:
        return snapshot.cached(repo, which)
    choice = selection.choose(repo.id, names, which)
    path = _folder(repo, commit, choice)
    wanted = () if choice.gguf or not path.is_dir() else _wanted(repo, commit, choice, path, names)
    if wanted and not _are_present(snapshot.place(repo, commit), wanted):
        kept = {choice.folder + name for name in header_file.names_in(path)}
        snapshot.require(repo, commit, kept, wanted)
        return path, commit
    return snapshot.cached(repo, which)


def _wanted(repo: Repo, commit: str, choice: Choice, path: Path, names: set[str]) -> list[str]:
    """The weight files, by the index among the copies."""
    where = snapshot.at(repo, commit)
    found = folder.weight_files(where, choice.beside(names), lambda name: folder.read_index(path / name))
    return [choice.folder + name for name in found]


def _folder(repo: Repo, commit: str, choice: Choice) -> Path:
    return cache_folder(repo) / "quantkit" / "headers" / commit / choice.folder


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
            copy = target / name.removeprefix(choice.folder)
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


def _header(repo: Repo, commit: str, file: Listed) -> HeaderFile:
    """The header of a weight file; one that is not sound is fetched once more."""
    try:
        return _fetched(repo, commit, file)
    except SourceError as error:
        _log.warning("%s; fetching it again", error.message)
        return _fetched(repo, commit, file)


def _fetched(repo: Repo, commit: str, file: Listed) -> HeaderFile:
    get = partial(_get, repo, commit, file)
    shown = Path(f"{snapshot.at(repo, commit)}/{file.path}")
    first = get(0, min(_FIRST, file.size))
    end = PREFIX_BYTES + header_length(first[:PREFIX_BYTES], shown, file.size)
    if end > len(first):
        first += get(len(first), end)
    described = parse_header(first[PREFIX_BYTES:end], shown, file.size)
    pieces = []
    for begin, stop in _pieces(described.tensors.values()):
        data = first[begin:stop] if stop <= len(first) else get(begin, stop)
        pieces += [(begin, data)] if data else []
    return HeaderFile(file.size, first[:end], tuple(pieces))


def _pieces(tensors: Iterable[TensorInfo]) -> list[tuple[int, int]]:
    """Ranges of the data that hold shapes and states; none where they are strewn over the file."""
    ranges: list[tuple[int, int]] = []
    for info in tensors:
        if info.dtype in _STATES and 0 < info.nbytes <= _SMALL:
            if ranges and info.begin - ranges[-1][1] <= _GAP:
                ranges[-1] = (ranges[-1][0], info.end)
            else:
                ranges.append((info.begin, info.end))
    return ranges if len(ranges) <= _MOST_PIECES else []


def _get(repo: Repo, commit: str, file: Listed, begin: int, end: int) -> bytes:
    """Bytes ``[begin, end)`` of a file of the repository; none where too much else would come along."""
    return problems.attempt(partial(_ask, repo, commit, file, begin, end), repo)


def _ask(repo: Repo, commit: str, file: Listed, begin: int, end: int) -> bytes:
    url = hf_hub_url(repo.id, file.path, revision=commit, endpoint=repo.api.endpoint)
    sent = build_hf_headers(
        token=repo.api.token, library_name=repo.api.library_name, library_version=__version__
    )
    # Compressed, a range would not be the range of the file.
    sent |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # A redirect to another origin, where the storage is, is followed without the token.
    with get_session().stream("GET", url, headers=sent, timeout=seconds) as response:
        hf_raise_for_status(response)
        start = 0
        if response.status_code == 206:
            start, size = _stated(response.headers.get("Content-Range", ""))
            if (start, size) != (begin, file.size):
                raise problems.no_hub(repo)
        elif begin > _FAR:
            return b""
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= end - start:  # a server that does not know ranges would send the whole file
                break
    found = bytes(data[begin - start : end - start])
    if len(found) != end - begin:
        raise OSError(f"Consistency check failed: {len(found):,} bytes instead of {end - begin:,}")
    return found


def _stated(content_range: str) -> tuple[int, int]:
    """(position, size of the file) that an answer with a part says."""
    found = _RANGE.fullmatch(content_range)
    return (int(found[1]), int(found[3])) if found else (-1, -1)
