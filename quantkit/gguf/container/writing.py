"""Writing one file, or several that llama.cpp loads through the first."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import AtomicFile
from quantkit.errors import RunError, UnsupportedError
from quantkit.gguf.container.metadata import Typed, Value, entry, string
from quantkit.gguf.container.stored import MAX_DIMENSIONS, MAX_NAME, Stored

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
ARCHITECTURE, ALIGNMENT_KEY = "general.architecture", "general.alignment"
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[Stored],
    contents: Iterable[Tensor],
) -> None:
    """Write `path`, whole or not at all: `contents` are the bytes of `tensors`, in the same order.

    architecture  empty for a file that is no model
    contents      (…, row bytes) uint8 each

    RunError when the disk refuses or contents are others than planned; UnsupportedError for what the
    container cannot say.
    """
    _write([path], _plan(architecture, metadata, [tensors]), contents)


def write_shards(
    folder: Path,
    stem: str,
    architecture: str,
    metadata: Mapping[str, Value],
    shards: Sequence[Sequence[Stored]],
    contents: Iterable[Tensor],
) -> list[Path]:
    """Like `write`, into the files of `shard_names`; `contents` run through all shards."""
    paths = [folder / name for name in shard_names(stem, len(shards))]
    _write(paths, _plan(architecture, metadata, shards), contents)
    return paths


def plan_shards(tensors: Sequence[Stored], max_bytes: int) -> list[list[Stored]]:
    """`tensors` in order, cut so that those of a shard take at most `max_bytes` of its data.

    A tensor that is larger has a shard of its own. Metadata come on top, see `shard_bytes`.
    """
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _padded(tensor.nbytes, ALIGNMENT)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """Names of `count` files, as llama.cpp derives them from the first."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def file_bytes(architecture: str, metadata: Mapping[str, Value], tensors: Sequence[Stored]) -> int:
    """Bytes of the one file that `write` makes."""
    return sum(shard_bytes(architecture, metadata, [tensors]))


def shard_bytes(
    architecture: str, metadata: Mapping[str, Value], shards: Sequence[Sequence[Stored]]
) -> list[int]:
    """Bytes of each file that `write_shards` makes."""
    return [shard.size for shard in _plan(architecture, metadata, shards)]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: what comes before its data, and what its tensors are padded to."""

    head: bytes
    alignment: int
    tensors: Sequence[Stored]

    @property
    def size(self) -> int:
        return len(self.head) + sum(_padded(tensor.nbytes, self.alignment) for tensor in self.tensors)


def _write(paths: Sequence[Path], shards: Sequence[_Shard], contents: Iterable[Tensor]) -> None:
    rest = sum(shard.size for shard in shards)
    data = iter(contents)
    for path, shard in zip(paths, shards, strict=True):
        rest -= shard.size
        file = AtomicFile(path, size=shard.size, beyond=rest)
        try:
            file.write(shard.head)
            for tensor in shard.tensors:
                file.write(_checked(tensor, next(data, None)))
                file.write(bytes(-tensor.nbytes % shard.alignment))
            file.commit()
        finally:
            file.discard()
    if next(data, None) is not None:
        raise RunError("more contents than planned tensors")


def _checked(tensor: Stored, data: Tensor | None) -> memoryview:
    if data is None or data.dtype != torch.uint8 or tuple(data.shape) != tensor.byte_shape:
        found = "nothing" if data is None else f"{tuple(data.shape)} {data.dtype}"
        raise RunError(f"`{tensor.name}`: planned as {tensor.byte_shape} bytes, got {found}")
    return data.cpu().contiguous().numpy().data


def _plan(
    architecture: str, metadata: Mapping[str, Value], shards: Sequence[Sequence[Stored]]
) -> list[_Shard]:
    _check([tensor for shard in shards for tensor in shard])
    found = []
    for number, tensors in enumerate(shards):
        keys = dict(_keys(architecture, metadata)) if number == 0 else {}
        if len(shards) > 1:
            keys |= _split_keys(number, shards)
        alignment = _alignment(keys)
        head = b"".join(
            (
                MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)),
                *(entry(key, value) for key, value in keys.items()),
                *_infos(tensors, alignment),
            )
        )
        found.append(_Shard(head + bytes(-len(head) % alignment), alignment, tensors))
    return found


def _keys(architecture: str, metadata: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    if architecture:
        yield ARCHITECTURE, architecture
    for key, value in metadata.items():
        if key == ARCHITECTURE and value != architecture:
            raise UnsupportedError(f"`{key}` is {value!r} in the metadata and {architecture!r} beside it")
        if key not in (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS):  # how another file was cut
            yield key, value


def _split_keys(number: int, shards: Sequence[Sequence[Stored]]) -> dict[str, Value]:
    # in the types that the loader insists on; `split.no` counts from 0, file names from 1
    return {
        SPLIT_NO: Typed(number, "uint16"),
        SPLIT_COUNT: Typed(len(shards), "uint16"),
        SPLIT_TENSORS: Typed(sum(len(shard) for shard in shards), "int32"),
    }


def _alignment(keys: Mapping[str, Value]) -> int:
    value = keys.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(value, int) or value < 1 or value & (value - 1):
        raise UnsupportedError(f"`{ALIGNMENT_KEY}` must be a power of two, not {value!r}")
    return value


def _infos(tensors: Sequence[Stored], alignment: int) -> Iterator[bytes]:
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        yield string(tensor.name)
        yield struct.pack(f"<I{dimensions}Q", dimensions, *reversed(tensor.shape))
        yield struct.pack("<IQ", tensor.type.id, offset)
        offset += _padded(tensor.nbytes, alignment)


def _check(tensors: Sequence[Stored]) -> None:
    seen = set()
    for tensor in tensors:
        if len(tensor.name.encode()) > MAX_NAME:
            raise UnsupportedError(f"`{tensor.name}` is longer than the {MAX_NAME} bytes that GGUF allows")
        if tensor.name in seen:
            raise UnsupportedError(f"`{tensor.name}` is there twice, and GGUF has one tensor of a name")
        if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
            raise UnsupportedError(
                f"`{tensor.name}` has the shape {tensor.shape}; GGUF holds 1 to {MAX_DIMENSIONS} dimensions"
            )
        seen.add(tensor.name)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
