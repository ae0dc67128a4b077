"""Writing one file, or several that llama.cpp loads through the first.

The package gguf writes every byte. Around it: which keys a shard has, what the container or llama.cpp would
refuse later, exact sizes, and files that are whole or absent. `gguf.GGUFWriter` has shards too, but cuts
them by its own rule and names a file by the path that it writes to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.atomic import AtomicFile, write_error
from quantkit.errors import RunError, UnsupportedError
from quantkit.gguf.container.metadata import Typed, Value, typed
from quantkit.gguf.container.stored import MAX_DIMENSIONS, MAX_NAME, Stored
from quantkit.gguf.tables import library

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
    _write([path], architecture, metadata, [tensors], contents)


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
    _write(paths, architecture, metadata, shards, contents)
    return paths


def plan_shards(tensors: Sequence[Stored], max_bytes: int) -> list[list[Stored]]:
    """`tensors` in order, cut so that those of a shard take at most `max_bytes` of its data.

    A tensor that is larger has a shard of its own. Metadata come on top, see `shard_bytes`.
    """
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _padded(tensor, ALIGNMENT)
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
    """Bytes of each file that `write_shards` makes: what precedes the data is written to a temporary file,
    which for a large vocabulary takes most of a second."""
    _check(shards)
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for keys, tensors in zip(_keys(architecture, metadata, shards), shards, strict=True):
            with _begun(Path(folder) / "head.gguf", keys, tensors, needed=0) as (writer, _):
                data = sum(_padded(tensor, writer.data_alignment) for tensor in tensors)
                sizes.append(writer.fout[0].tell() + data)
    return sizes


def _write(
    paths: Sequence[Path],
    architecture: str,
    metadata: Mapping[str, Value],
    shards: Sequence[Sequence[Stored]],
    contents: Iterable[Tensor],
) -> None:
    _check(shards)
    rest = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    data = iter(contents)
    for path, keys, tensors in zip(paths, _keys(architecture, metadata, shards), shards, strict=True):
        with _begun(path, keys, tensors, needed=rest) as (writer, file):
            for tensor in tensors:
                array = _checked(tensor, next(data, None))
                with _disk(file, rest):
                    writer.write_tensor_data(array)
                rest -= tensor.nbytes
            with _disk(file, rest):
                writer.flush()
            file.commit()
    if next(data, None) is not None:
        raise RunError("more contents than planned tensors")


@contextmanager
def _begun(
    path: Path, keys: Mapping[str, Value], tensors: Sequence[Stored], needed: int
) -> Iterator[tuple[Any, AtomicFile]]:
    """The library's writer, past all that precedes the data, and its file, removed unless committed."""
    writer = _writer(keys, tensors)
    file = AtomicFile(path, size=needed)
    try:
        with _disk(file, needed):
            # through a handle of its own: `commit` flushes and renames whatever has written
            writer.write_header_to_file(file.partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # it would do so before the first tensor, which may never come
            writer.write_padding(writer.fout[0], writer.fout[0].tell())
        yield writer, file
    finally:
        with suppress(OSError):  # what could not be flushed was said before
            writer.close()
        file.discard()


def _writer(keys: Mapping[str, Value], tensors: Sequence[Stored]) -> Any:
    """Knows all keys and tensors, and has no file yet; UnsupportedError for a value that does not fit."""
    gguf = library()
    # it stores the architecture first and leaves out an empty one
    writer = gguf.GGUFWriter(None, keys.get(ARCHITECTURE, ""))
    for key, value in keys.items():
        found = typed(key, value)
        kind = gguf.GGUFValueType[found.width.upper()]
        if key == ALIGNMENT_KEY:
            try:
                writer.add_custom_alignment(found.value)
            except (TypeError, ValueError) as error:
                raise UnsupportedError(f"`{key}` must be a power of two, not {found.value!r}") from error
        elif found.listed:
            writer.add_key_value(key, found.value, gguf.GGUFValueType.ARRAY, kind)
        elif key != ARCHITECTURE:
            writer.add_key_value(key, found.value, kind)
    for tensor in tensors:
        # a shape in weights: the library takes it for one in bytes only when the dtype is uint8
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type.id
        )
    return writer


@contextmanager
def _disk(file: AtomicFile, needed: int) -> Iterator[None]:
    """What the disk refuses to the library, as `AtomicFile` says it."""
    try:
        yield
    except OSError as error:
        raise write_error(_reason(error, file.partial), file.path, needed=needed) from error


def _reason(error: OSError, path: Path) -> OSError:
    """numpy, which writes for the library, says how much was refused and not why: one more byte tells."""
    if error.errno is None:
        try:
            with path.open("ab", buffering=0) as file:
                file.write(b"\0")
        except OSError as why:
            return why
    return error


def _checked(tensor: Stored, data: Tensor | None) -> Any:
    if data is None or data.dtype != torch.uint8 or tuple(data.shape) != tensor.byte_shape:
        found = "nothing" if data is None else f"{tuple(data.shape)} {data.dtype}"
        raise RunError(f"`{tensor.name}`: planned as {tensor.byte_shape} bytes, got {found}")
    return data.cpu().contiguous().numpy()


def _keys(
    architecture: str, metadata: Mapping[str, Value], shards: Sequence[Sequence[Stored]]
) -> Iterator[dict[str, Value]]:
    """The keys of each shard: all are in the first, the others say only which they are."""
    if metadata.get(ARCHITECTURE, architecture) != architecture:
        raise UnsupportedError(
            f"`{ARCHITECTURE}` is {metadata[ARCHITECTURE]!r} in the metadata and {architecture!r} beside it"
        )
    # how another file was cut does not matter here
    kept = {
        key: value for key, value in metadata.items() if key not in (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)
    }
    for number in range(len(shards)):
        keys = {ARCHITECTURE: architecture, **kept} if number == 0 else {}
        if len(shards) > 1:
            # in the types that the loader insists on; `split.no` counts from 0, file names from 1
            keys[SPLIT_NO] = Typed(number, "uint16")
            keys[SPLIT_COUNT] = Typed(len(shards), "uint16")
            keys[SPLIT_TENSORS] = Typed(sum(map(len, shards)), "int32")
        yield keys


def _check(shards: Sequence[Sequence[Stored]]) -> None:
    """What the library would write and llama.cpp refuse."""
    seen = set()
    for tensor in (tensor for tensors in shards for tensor in tensors):
        if len(tensor.name.encode()) > MAX_NAME:
            raise UnsupportedError(f"`{tensor.name}` is longer than the {MAX_NAME} bytes that GGUF allows")
        if tensor.name in seen:
            raise UnsupportedError(f"`{tensor.name}` is there twice, and GGUF has one tensor of a name")
        if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
            raise UnsupportedError(
                f"`{tensor.name}` has the shape {tensor.shape}; GGUF holds 1 to {MAX_DIMENSIONS} dimensions"
            )
        tensor.type.row_bytes(tensor.shape[-1])
        seen.add(tensor.name)


def _padded(tensor: Stored, alignment: int) -> int:
    return -(-tensor.nbytes // alignment) * alignment
