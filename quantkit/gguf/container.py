"""The GGUF container, written tensor by tensor through the `gguf` package and read back by it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import write_error
from quantkit.errors import RunError, UnsupportedError
from quantkit.gguf.blocks import TYPES

# what llama.cpp reads a value as; int is u32 and float is f32 there, lists are arrays of the same
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MAX_NAME = 63


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: `shape` is the logical one, (out, in), `kind` a type name of llama.cpp's."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        """A tensor of floats; UnsupportedError for a dtype that models do not hold."""
        if dtype not in _PLAIN:
            raise UnsupportedError(f"GGUF stores `{name}` as float32, float16 or bfloat16, not {dtype}")
        return cls(name, shape, _PLAIN[dtype])

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape in bytes."""
        if self.kind in TYPES:
            return (*self.shape[:-1], TYPES[self.kind].row_bytes(self.shape[-1]))
        return (*self.shape[:-1], self.shape[-1] * (4 if self.kind == "F32" else 2))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)


def library() -> Any:
    """The `gguf` package, imported when it is first needed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "writing GGUF needs the package gguf", remedy="pip install 'quantkit[gguf]'"
        ) from error
    return gguf


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[Stored],
    contents: Iterable[Tensor],
) -> None:
    """Write `path`: `contents` are the bytes of `tensors`, (…, row bytes) uint8, in the same order.

    The caller writes into a folder of its own and renames it; RunError when the disk refuses.
    """
    gguf = library()
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        if len(tensor.name.encode()) > _MAX_NAME:
            raise UnsupportedError(f"`{tensor.name}` is longer than the {_MAX_NAME} bytes that GGUF allows")
        kind = gguf.GGMLQuantizationType[tensor.kind]
        # bytes, whatever they mean: then the library derives the logical shape
        writer.add_tensor_info(tensor.name, tensor.byte_shape, _uint8(), tensor.nbytes, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, data in zip(tensors, contents, strict=True):
            if data.dtype != torch.uint8 or tuple(data.shape) != tensor.byte_shape:
                raise RunError(f"`{tensor.name}`: planned as {tensor.byte_shape} bytes, got {data.shape}")
            writer.write_tensor_data(data.contiguous().numpy())
        writer.flush()
        with path.open("rb") as written:
            os.fsync(written.fileno())
    except OSError as error:
        raise write_error(error, path, needed=sum(t.nbytes for t in tensors)) from error
    finally:
        writer.close()


def read(path: Path) -> Iterator[tuple[Stored, Tensor]]:
    """Every tensor of a file with its bytes, (…, row bytes) uint8, in file order."""
    reader = library().GGUFReader(path)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        stored = Stored(tensor.name, shape, tensor.tensor_type.name)
        flat = torch.from_numpy(tensor.data.copy()).view(torch.uint8)
        yield stored, flat.reshape(stored.byte_shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor of floats as `write` takes them."""
    return tensor.contiguous().view(torch.uint8)


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _add(writer: Any, key: str, value: Value) -> None:
    # bool before int: it is one
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value:  # the library writes nothing for an empty list, and neither do we
        writer.add_array(key, list(value))
