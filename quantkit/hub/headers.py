"""What is fetched of one weight file instead of it: its header, and what a plan has to know of its data.

Headers cannot be verified by a hash, but must describe the file without a hole, to exactly the size that the
Hub lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quantkit.checkpoint.header import PREFIX_BYTES, TensorInfo, header_length, parse_header
from quantkit.checkpoint.header_file import HeaderFile
from quantkit.checkpoint.stored_shapes import shape_in, states_shape
from quantkit.errors import SourceError
from quantkit.gguf import container
from quantkit.gguf.architectures.rope import GENERATED
from quantkit.gguf.files import SUFFIX
from quantkit.hub.ranges import FAR, Ranges

# Bytes asked for at once: most headers of safetensors are shorter, those of GGUF hold a vocabulary
_FIRST, _FIRST_GGUF = 2**16, 2**20
_LONGEST = 2**27  # bytes of a GGUF header; the longest vocabularies take 20 MB
# What is fetched of the data has at most so many bytes; what lies closer together is asked for at once
_SMALL, _GAP = 2**12, 2**14
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes ``[begin, end)`` of the data that are needed; `info` of a tensor that holds a shape."""

    begin: int
    end: int
    info: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The beginning of a weight file: its `first` bytes, `length` of which are the header; what is `wanted`
    of the data, in order."""

    first: bytes
    length: int
    wanted: Sequence[Wanted]


def begin(file: Ranges, where: str) -> Begun:
    """The header of a file of `where`; one that is not sound is fetched once more.

    SourceError when it is not sound again, HubError when the Hub refuses.
    """
    fetch = _gguf if file.file.path.lower().endswith(SUFFIX) else _safetensors
    shown = Path(f"{where}/{file.file.path}")
    try:
        return fetch(file, shown)
    except SourceError as error:
        _log.warning("%s; fetching it again", error.message)
        return fetch(file, shown)


def finish(file: Ranges, begun: Begun, pool: Executor) -> HeaderFile:
    """What is kept of a file, with the data that `begun` lacks.

    SourceError when shapes in it are not sound twice, HubError when the Hub refuses.
    """
    groups = _groups(begun.wanted, whole=file.whole)
    contents = pool.map(partial(_content, file, begun.first), groups)
    pieces = tuple((group[0].begin, data) for group, data in zip(groups, contents, strict=True))
    return HeaderFile(file.file.size, begun.first[: begun.length], pieces)


def _content(file: Ranges, first: bytes, group: Sequence[Wanted]) -> bytes:
    """The bytes from the beginning to the end of a group; where shapes are not sound, fetched once more."""
    start, end = group[0].begin, group[-1].end
    data = first[start:end] if end <= len(first) else file.get(start, end)
    try:
        _check_shapes(group, data)
    except SourceError as error:
        _log.warning("%s; fetching it again", error.message)
        data = file.get(start, end)
        _check_shapes(group, data)
    return data


def _check_shapes(group: Sequence[Wanted], data: bytes) -> None:
    """SourceError unless what holds a shape does; `data` begin where the group does."""
    start = group[0].begin
    for info, begin, end in ((one.info, one.begin - start, one.end - start) for one in group):
        if info is None:
            continue
        stored = torch.frombuffer(bytearray(data[begin:end]), dtype=info.torch_dtype)
        try:
            if min(shape_in(info.name, stored)) < 1:
                raise ValueError("sizes must be positive")
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"`{info.name}` in `{info.file}` does not hold a shape: {error!r:.80}",
                remedy="the file is damaged or was tampered with: take another",
            ) from error


def _safetensors(file: Ranges, shown: Path) -> Begun:
    size = file.file.size
    first = file.get(0, min(_FIRST, size))
    length = PREFIX_BYTES + header_length(first[:PREFIX_BYTES], shown, size)
    first += file.get(len(first), length)
    described = parse_header(first[PREFIX_BYTES:length], shown, size)
    states = (info for info in described.tensors.values() if _states_shape(info))
    return Begun(first, length, [Wanted(info.begin, info.end, info) for info in states])


def _states_shape(info: TensorInfo) -> bool:
    """Two integers, or the text that bitsandbytes has of it."""
    pair = info.shape == (2,) and not info.torch_dtype.is_floating_point
    text = info.dtype == "U8" and 2 < info.nbytes <= _SMALL
    return states_shape(info.name) and (pair or text)


def _gguf(file: Ranges, shown: Path) -> Begun:
    size = file.file.size
    first = file.get(0, min(_FIRST_GGUF, size))
    while True:
        try:
            found = container.parse_header(shown, first, size)
            break
        except container.EndsEarly as error:
            if max(error.needed, len(first) + 1) > _LONGEST:
                raise SourceError(
                    f"`{shown}` has a header of more than {_LONGEST:,} bytes",
                    remedy="the file is damaged or was tampered with: take another",
                ) from error
            first += file.get(len(first), min(max(2 * len(first), error.needed), _LONGEST, size))
    container.check_filled(found, size)
    small = (placed for placed in found.tensors if placed[0].name in GENERATED and placed[0].nbytes <= _SMALL)
    wanted = [Wanted(start, start + tensor.nbytes) for tensor, start in small]
    return Begun(first, found.end, sorted(wanted, key=lambda wanted: wanted.begin))


def _groups(wanted: Iterable[Wanted], *, whole: bool) -> list[list[Wanted]]:
    """What to ask for at once; of a server that sends whole files, all that lies at the beginning."""
    groups: list[list[Wanted]] = []
    for one in wanted:
        if groups and (one.begin - groups[-1][-1].end <= _GAP or (whole and one.end <= FAR)):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups
