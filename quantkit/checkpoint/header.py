"""The header of a safetensors file: 8 bytes of length, JSON, then the data without holes.

The file is treated as hostile: nothing is allocated by a claimed length before the length has been
compared with the size of the file, and everything the header says is checked before it is believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from quantkit.checkpoint import header_file
from quantkit.checkpoint.strict_json import parse_object
from quantkit.errors import SourceError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # what torch can hold
MAX_TENSOR_BYTES = 2**63 - 1
PREFIX_BYTES = 8
METADATA = "__metadata__"
TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "U16": torch.uint16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``[begin, end)`` are absolute byte positions in `file`.

    dtype is the safetensors name: "BF16", "F16", "F32", "I32", …
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds, in the order of the data; `size` is the file's size in bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int


def read_header(file: Path) -> Header:
    """Parse and validate the header of `file`; SourceError on anything malformed.

    Also of a file that was not downloaded, where `header_file` keeps its header.
    """
    if header_file.stands_in(file):
        kept = header_file.read(file)
        length = header_length(kept.first[:PREFIX_BYTES], file, kept.size)
        return parse_header(kept.first[PREFIX_BYTES : PREFIX_BYTES + length], file, kept.size)
    try:
        if not file.is_file():  # also keeps a named pipe from being opened, which would wait for ever
            raise _malformed(file, "is missing or not a regular file")
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = header_length(f.read(PREFIX_BYTES), file, size)
            return parse_header(f.read(length), file, size)
    except OSError as error:
        raise SourceError(
            f"cannot read `{file}`: {error.strerror}", remedy="check that the file exists and is readable"
        ) from error


def parse_header(raw: bytes, file: Path, size: int) -> Header:
    """Validate the JSON bytes of a header; `file` and its `size` in bytes are what they claim to describe."""
    try:
        content = parse_object(raw)
    except ValueError as error:
        raise _malformed(file, f"the header is not a JSON object: {str(error)[:200]}") from error
    metadata = _metadata(content.pop(METADATA, {}), file)
    data_begin = PREFIX_BYTES + len(raw)
    parsed = (_tensor(name, entry, file, data_begin) for name, entry in content.items())
    tensors = sorted(parsed, key=lambda info: (info.begin, info.end))
    _check_layout(tensors, file, data_begin, size)
    return Header({info.name: info for info in tensors}, metadata, size)


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], int, int]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file: length, JSON and spaces up to a multiple of 8.

    Each tensor is (name, dtype, shape, begin, end) with positions relative to the first data byte;
    keys are written in this order, after the metadata.
    """
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, dtype, shape, begin, end in tensors:
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % PREFIX_BYTES)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _malformed(file: Path, what: str) -> SourceError:
    return SourceError(
        f"`{file}`: {what}", remedy="the file is damaged or was tampered with: download it again"
    )


def header_length(prefix: bytes, file: Path, size: int) -> int:
    """Bytes of JSON that the first 8 of a `file` of `size` bytes promise; SourceError when it has fewer."""
    if len(prefix) < PREFIX_BYTES:
        raise _malformed(file, f"is only {size:,} bytes; a safetensors file starts with {PREFIX_BYTES}")
    if _LFS_POINTER.startswith(prefix):
        raise SourceError(
            f"`{file}` is a Git LFS pointer of {size:,} bytes, not the weights",
            remedy="run `git lfs pull` in the folder, or download the file again",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _malformed(file, f"claims a header of {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
    if length > size - PREFIX_BYTES:
        missing = PREFIX_BYTES + length - size
        raise _malformed(file, f"is truncated inside the header: at least {missing:,} bytes are missing")
    return length


def _metadata(value: Any, file: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _malformed(file, f"`{METADATA}` must map strings to strings")
    return value


def _tensor(name: str, entry: Any, file: Path, data_begin: int) -> TensorInfo:
    """One checked entry: printable name, known dtype, and a byte range as long as the shape says."""
    shown = f"tensor {name[:200]!r}"
    # Unprintable covers NUL, terminal escapes and lone surrogates, none of which a real name has.
    if not name or not name.isprintable():
        raise _malformed(file, f"{shown}: the name is empty or has unprintable characters")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _malformed(file, f"{shown}: needs the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        known = ", ".join(TORCH_DTYPES)
        raise SourceError(f"`{file}`: {shown}: unknown dtype {str(dtype)[:50]!r}", remedy=f"known: {known}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _malformed(file, f"{shown}: the shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(file, f"{shown}: data_offsets is not [begin, end] with 0 ≤ begin ≤ end")
    begin, end = offsets
    expected = _tensor_bytes(shape, TORCH_DTYPES[dtype].itemsize)
    if expected != end - begin:
        shape_bytes = "more bytes than any file" if expected is None else f"{expected:,} bytes"
        raise _malformed(
            file, f"{shown}: {dtype} {shape} needs {shape_bytes}, data_offsets hold {end - begin:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + begin, data_begin + end)


def _are_sizes(value: Any) -> bool:
    """A list of non-negative integers; `type` rather than `isinstance` because True is an int."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_TENSOR_BYTES for v in value)


def _tensor_bytes(shape: Sequence[int], itemsize: int) -> int | None:
    """Bytes of a tensor; None if its strides overflow 64 bits, even when another dimension is 0."""
    strides = itemsize
    for length in shape:
        strides *= max(length, 1)
        if strides > MAX_TENSOR_BYTES:
            return None
    return 0 if 0 in shape else strides


def _check_layout(tensors: Sequence[TensorInfo], file: Path, data_begin: int, size: int) -> None:
    """The data is contiguous from the header to exactly the end of the file."""
    position = data_begin
    for info in tensors:
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise _malformed(
                file, f"tensor {info.name!r}: the data {kind} by {abs(info.begin - position):,} bytes"
            )
        position = info.end
    if position > size:
        raise SourceError(
            f"`{file}` is truncated: {position - size:,} of {position:,} bytes are missing",
            remedy="the download or copy did not finish: download the file again",
        )
    if position < size:
        raise _malformed(file, f"has {size - position:,} bytes after the last tensor")
