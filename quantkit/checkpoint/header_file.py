"""Headers without their weights: all that a plan needs to know of a file that was not downloaded.

Where ``model.safetensors`` would lie is ``model.safetensors.header`` instead, and so for ``model.gguf``:
    "quantkit header\\n"   u64 size of the whole file   u64 n   its first n bytes, which are its header
    then pieces of its data, each  u64 position  u64 length  bytes
Name and first bytes keep every tool from taking it for weights. Everything is little endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.atomic import write_bytes
from quantkit.errors import SourceError

SUFFIX = ".header"
_MAGIC = b"quantkit header\n"
_PAIR = struct.Struct("<QQ")


class NotDownloaded(SourceError):
    """Values were asked for of a file of which only the header is here."""


@dataclass(frozen=True, slots=True)
class HeaderFile:
    """The first bytes of a file of `size` bytes, and some `pieces` of its data: (position, bytes)."""

    size: int
    first: bytes
    pieces: tuple[tuple[int, bytes], ...] = ()


def path_of(file: Path) -> Path:
    """Where the header of the weights `file` is kept."""
    return file.with_name(file.name + SUFFIX)


def stands_in(file: Path) -> bool:
    """Whether only the header of the weights `file` is here."""
    return not file.is_file() and path_of(file).is_file()


def names_in(folder: Path) -> set[str]:
    """Names of the files of `folder`; a file of which only the header is here counts."""
    return {file.name.removesuffix(SUFFIX) for file in folder.iterdir() if file.is_file()}


def write(file: Path, kept: HeaderFile) -> None:
    """Keep the header of the weights `file`, whole or not at all; RunError when the disk refuses."""
    parts = [_MAGIC, _PAIR.pack(kept.size, len(kept.first)), kept.first]
    for position, data in kept.pieces:
        parts += [_PAIR.pack(position, len(data)), data]
    write_bytes(path_of(file), b"".join(parts))


def read(file: Path) -> HeaderFile:
    """What is kept of the weights `file`; SourceError when it is damaged."""
    path = path_of(file)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}", remedy="remove it") from error
    try:
        if not raw.startswith(_MAGIC):
            raise ValueError("it begins otherwise")
        size, at = _PAIR.unpack_from(raw, len(_MAGIC))[0], len(_MAGIC) + 8
        first, at = _counted(raw, at)
        pieces = []
        while at < len(raw):
            position = int.from_bytes(raw[at : at + 8], "little")
            data, at = _counted(raw, at + 8)
            pieces.append((position, data))
    except (struct.error, ValueError) as error:
        raise SourceError(
            f"`{path}` is not what quantkit writes: {error}", remedy="remove it; it is fetched again"
        ) from error
    return HeaderFile(size, first, tuple(pieces))


def data(file: Path, tensor: str, begin: int, end: int) -> bytes:
    """Bytes ``[begin, end)`` of the weights `file`, in `tensor`; NotDownloaded unless they are kept."""
    for position, piece in read(file).pieces:
        if position <= begin and end <= position + len(piece):
            return piece[begin - position : end - position]
    raise NotDownloaded(
        f"`{file.name}` with `{tensor}` was not downloaded, only its header",
        remedy="give the Hub id to a command that needs the weights: it downloads them",
    )


def _counted(raw: bytes, at: int) -> tuple[bytes, int]:
    """(bytes, position after them) of a u64 count at `at` and so many bytes."""
    count = struct.unpack_from("<Q", raw, at)[0]
    end = at + 8 + count
    if end > len(raw):
        raise ValueError(f"it ends {end - len(raw):,} bytes too early")
    return raw[at + 8 : end], end
