"""Reading files that may be anything: nothing is believed before it was compared with the file's size.

This is not left to `gguf.GGUFReader` (0.19), which makes several arrays of every element of a list: 11 s and
560 MiB for a vocabulary of 150,000 tokens with scores, types and merges, 0.3 s here. It also believes what it
reads: a file of 113 bytes whose list claims 2⁴⁰ elements took 15 s to fill 2 GiB, and lists within lists end
in a RecursionError. To refuse such files beforehand one must walk through every key, and that is the parser.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.checkpoint import header_file
from quantkit.errors import SourceError
from quantkit.gguf.container.metadata import ARRAY, STRING, WIDTHS, Scalar
from quantkit.gguf.container.stored import MAX_DIMENSIONS, Stored
from quantkit.gguf.container.writing import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARCHITECTURE,
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    shard_names,
)
from quantkit.gguf.files import SHARD
from quantkit.gguf.types import OTHER_TYPES, TYPES

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# the least bytes of a key (name length, type, value) and of a tensor (name length, one size, type, offset)
_LEAST_KEY, _LEAST_TENSOR = 13, 32
_NAMES = MappingProxyType({number: (name, code) for name, (number, code) in WIDTHS.items()})
_BY_ID = MappingProxyType({t.id: t for t in (*TYPES.values(), *OTHER_TYPES.values())})
_AGAIN = "fetch the file again"

Meta = Scalar | tuple[Scalar, ...]


class EndsEarly(SourceError):
    """What is here of a file ends within its header; at least the first `needed` bytes are needed."""

    def __init__(self, path: Path, needed: int) -> None:
        super().__init__(f"`{path}` is here only in part, and its header does not end there", remedy=_AGAIN)
        self.needed = needed


@dataclass(frozen=True, slots=True)
class Opened:
    """A GGUF model, in one file or several.

    paths         its files, first shard first
    architecture  `general.architecture`, empty where there is none
    metadata      keys of the first file; lists are tuples
    widths        how each value, or each element of a list, is stored: ``uint32``, see `metadata.Typed`
    tensors       by name, in file order
    places        file and position of the bytes of each
    """

    paths: tuple[Path, ...]
    architecture: str
    metadata: Mapping[str, Meta]
    widths: Mapping[str, str]
    tensors: Mapping[str, Stored]
    places: Mapping[str, tuple[Path, int]]

    def read_bytes(self, name: str) -> Tensor:
        """(…, row bytes) uint8, mapped: the file is read where the tensor is. Changes stay private.

        SourceError when the file has changed or cannot be read, NotDownloaded where there is only a header.
        """
        stored, (path, start) = self.tensors[name], self.places[name]
        if header_file.stands_in(path):
            kept = bytearray(header_file.data(path, name, start, start + stored.nbytes))
            return torch.frombuffer(kept, dtype=torch.uint8).view(stored.byte_shape)
        page = start % mmap.ALLOCATIONGRANULARITY
        try:
            with path.open("rb") as file:
                # a private map of one tensor: a read-only one cannot become a tensor without a warning
                length = page + stored.nbytes
                data = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start - page)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read `{name}` of `{path}`: {error}", remedy=_AGAIN) from error
        flat = torch.frombuffer(data, dtype=torch.uint8, count=stored.nbytes, offset=page)
        return flat.view(stored.byte_shape)


def open_file(path: Path) -> Opened:
    """The model that `path` belongs to, which may be any of its shards; SourceError when it is not sound.

    Also of files that were not downloaded, where `header_file` keeps their headers.
    """
    first = _parse(path)
    count = first.metadata.get(SPLIT_COUNT, 1)
    if not isinstance(count, int) or count < 2:
        return _join([first])
    found = SHARD.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        raise SourceError(
            f"`{path}` is one of {count} shards and its name does not say which",
            remedy=f"name the shards {shard_names('<name>', count)[0]} and so on",
        )
    paths = [path.with_name(name) for name in shard_names(found["stem"], count)]
    if missing := [p.name for p in paths if not p.is_file() and not header_file.stands_in(p)]:
        listed = ", ".join(missing[:3])
        raise SourceError(
            f"{len(missing)} of {count} shards of `{path}` are missing: {listed}",
            remedy="put all shards into one folder",
        )
    return _join([_parse(p) for p in paths])


def read(path: Path) -> Iterator[tuple[Stored, Tensor]]:
    """Every tensor of a model with its bytes, (…, row bytes) uint8, in file order."""
    opened = open_file(path)
    for name, stored in opened.tensors.items():
        yield stored, opened.read_bytes(name)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file says.

    tensors  with the positions of their bytes in the file
    end      bytes of the header, without the zeros that follow it
    """

    path: Path
    metadata: dict[str, Meta]
    widths: dict[str, str]
    tensors: list[tuple[Stored, int]]
    end: int


def parse_header(path: Path, data: mmap.mmap | bytes, size: int) -> FileHeader:
    """The header of the file `path` of `size` bytes, of which `data` are the first.

    EndsEarly when the header is longer than `data`, SourceError when it is not sound.
    """
    if size < 24:
        raise SourceError(f"`{path}` is no GGUF file: it has {size} bytes", remedy=_AGAIN)
    return _Header(path, data, size).parse()


def check_filled(header: FileHeader, size: int) -> None:
    """SourceError unless the tensors, each padded to the alignment, fill a file of `size` bytes.

    What llama.cpp asks of a file; a header without its file has nothing else to be held against. The last
    tensor may go without its zeros.
    """
    alignment = _alignment(header.metadata)
    end = header.end
    for stored, start in sorted(header.tensors, key=lambda placed: placed[1]):
        if start != _padded(end, alignment):
            raise _unsound(header.path, f"`{stored.name:.80}` begins at byte {start:,}, not {end:,}")
        end = start + stored.nbytes
    if size not in (end, _padded(end, alignment)):
        raise _unsound(header.path, f"its tensors end at byte {end:,} of {size:,}")


def _join(files: list[FileHeader]) -> Opened:
    tensors: dict[str, Stored] = {}
    places: dict[str, tuple[Path, int]] = {}
    for number, file in enumerate(files):
        said = (file.metadata.get(SPLIT_NO), file.metadata.get(SPLIT_COUNT))
        if len(files) > 1 and said != (number, len(files)):
            raise SourceError(
                f"`{file.path}` says that it is shard {said[0]} (from 0) of {said[1]}, and its name {number} "
                f"of {len(files)}"
            )
        for stored, start in file.tensors:
            if stored.name in tensors:
                raise SourceError(f"`{stored.name}` is twice in `{file.path}` or its other shards")
            tensors[stored.name] = stored
            places[stored.name] = (file.path, start)
    first = files[0]
    total = first.metadata.get(SPLIT_TENSORS, len(tensors))
    if len(files) > 1 and total != len(tensors):
        raise SourceError(f"`{first.path}` promises {total} tensors, and its shards hold {len(tensors)}")
    architecture = first.metadata.get(ARCHITECTURE, "")
    return Opened(
        tuple(file.path for file in files),
        architecture if isinstance(architecture, str) else "",
        MappingProxyType(first.metadata),
        MappingProxyType(first.widths),
        MappingProxyType(tensors),
        MappingProxyType(places),
    )


def _parse(path: Path) -> FileHeader:
    if header_file.stands_in(path):
        kept = header_file.read(path)
        return parse_header(path, kept.first, kept.size)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not size:  # nothing can be mapped
                return parse_header(path, b"", size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse_header(path, data, size)
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror or error}") from error


def _unsound(path: Path, why: str) -> SourceError:
    return SourceError(f"`{path}` is no sound GGUF file: {why}", remedy=_AGAIN)


def _alignment(metadata: Mapping[str, Meta]) -> int:
    """ValueError unless it is a power of two."""
    found = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(found, int) or found < 1 or found & (found - 1):
        raise ValueError(f"an alignment of {found!r}")
    return found


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Header:
    """Walks through the part of a file before its data; of a file of `size` bytes, `data` are the first."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 0

    def parse(self) -> FileHeader:
        tensor_count, key_count = self._counts()
        metadata: dict[str, Meta] = {}
        widths: dict[str, str] = {}
        for _ in range(key_count):
            key = self._string("the name of a key")
            if key in metadata:
                raise self._unsound(f"`{key}` is there twice")
            metadata[key], widths[key] = self._value(key)
        infos = [self._info() for _ in range(tensor_count)]
        try:
            alignment = _alignment(metadata)
        except ValueError as error:
            raise self._unsound(str(error)) from error
        begin = _padded(self._at, alignment)
        for stored, offset in infos:
            self._check_place(stored, begin, offset, alignment)
        tensors = [(stored, begin + offset) for stored, offset in infos]
        return FileHeader(self._path, metadata, widths, tensors, self._at)

    def _counts(self) -> tuple[int, int]:
        magic, version = self._take(4, "its first bytes"), self._number("I", "the version")
        if magic != _MAGIC:
            raise SourceError(f"`{self._path}` is no GGUF file: it begins with {magic!r}", remedy=_AGAIN)
        if version not in _VERSIONS:
            big = "; its bytes are in big-endian order" if version >> 16 and not version & 0xFFFF else ""
            raise self._unsound(f"version {version} where {' or '.join(map(str, _VERSIONS))} are known{big}")
        tensors, keys = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        least = tensors * _LEAST_TENSOR + keys * _LEAST_KEY
        if least > self._size - self._at:
            raise self._unsound(f"{tensors:,} tensors and {keys:,} keys do not fit its {self._size:,} bytes")
        self._need(least)
        return tensors, keys

    def _value(self, key: str) -> tuple[Meta, str]:
        kind, count = self._number("I", f"the type of `{key}`"), 1
        listed = kind == ARRAY
        if listed:
            kind, count = self._number("I", f"the type of `{key}`"), self._number("Q", f"`{key}`")
        if kind not in _NAMES:
            raise self._unsound(f"`{key}` is of the unknown type {kind}")
        width, code = _NAMES[kind]
        least = 8 if kind == STRING else struct.calcsize(code)
        if count * least > self._size - self._at:
            raise self._unsound(f"`{key}` holds {count:,} values, more than the file")
        self._need(count * least)
        if kind == STRING:
            values: tuple[Scalar, ...] = tuple(self._string(f"`{key}`") for _ in range(count))
        else:
            values = struct.unpack(f"<{count}{code}", self._take(count * least, f"`{key}`"))
        return (values if listed else values[0]), width

    def _info(self) -> tuple[Stored, int]:
        name = self._string("the name of a tensor")
        dimensions = self._number("I", f"`{name}`")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._unsound(f"`{name:.80}` has {dimensions} dimensions")
        shape = tuple(self._number("Q", f"`{name}`") for _ in range(dimensions))[::-1]
        kind, offset = self._number("I", f"`{name}`"), self._number("Q", f"`{name}`")
        if kind not in _BY_ID:
            raise self._unsound(f"`{name:.80}` is of the unknown type {kind}")
        if not math.prod(shape) or shape[-1] % _BY_ID[kind].elements:
            raise self._unsound(f"`{name:.80}` has the shape {shape} in {_BY_ID[kind].ggml}")
        return Stored(name, shape, _BY_ID[kind].name), offset

    def _check_place(self, stored: Stored, begin: int, offset: int, alignment: int) -> None:
        end = begin + offset + stored.nbytes
        if offset % alignment or end > self._size:
            raise self._unsound(f"`{stored.name:.80}` ends at byte {end:,} of {self._size:,}")

    def _number(self, code: str, what: str) -> int:
        found: int = struct.unpack(f"<{code}", self._take(struct.calcsize(code), what))[0]
        return found

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._unsound(f"{what} is not UTF-8: {error.reason}") from error

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._unsound(f"{what:.80} goes beyond its end at byte {self._size:,}")
        self._need(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _need(self, count: int) -> None:
        """EndsEarly unless the next `count` bytes, which the file has, are here."""
        if self._at + count > len(self._data):
            raise EndsEarly(self._path, self._at + count)

    def _unsound(self, why: str) -> SourceError:
        return _unsound(self._path, why)
