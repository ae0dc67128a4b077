"""Numbers of 1, 2 or 4 bits in bytes, and what else the layouts of ggml have in common.

ggml interleaves: of the numbers of a *run* of 8/bits · `stride`, byte m holds those at m, m + stride,
m + 2·stride and so on, the first in its lowest bits. Every layout is this with some stride. All
functions work along the last dimension and keep the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from quantkit.tensors import QuantizedTensor

Q = TypeVar("Q", bound=QuantizedTensor)


@dataclass(frozen=True, slots=True)
class Codec(Generic[Q]):
    """The two directions of one type.

    encode  a weight that lies on the grid to (out, super-blocks, bytes) uint8
    decode  the inverse
    """

    encode: Callable[[Q], Tensor]
    decode: Callable[[Tensor], Q]


def fold(data: Tensor, *shape: int) -> Tensor:
    """`data` with its last dimension laid out as `shape`, of which one may be −1."""
    return data.reshape(*data.shape[:-1], *shape)


def sections(data: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """`data` cut along its last dimension."""
    return torch.split_with_sizes(data, widths, dim=-1)


def interleave(numbers: Tensor, bits: int, stride: int) -> Tensor:
    """(…, n) uint8 below 2^bits to (…, n·bits/8) bytes."""
    runs = fold(numbers, -1, 8 // bits, stride)
    found = runs[..., 0, :]
    for n in range(1, 8 // bits):
        found = found | runs[..., n, :] << (n * bits)
    return found.flatten(-2)


def separate(data: Tensor, bits: int, stride: int) -> Tensor:
    """Inverse of `interleave`: (…, b) bytes to (…, b·8/bits) uint8."""
    runs = fold(data, -1, stride)
    planes = [runs >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(planes, dim=-2).flatten(-3)


def as_bytes(numbers: Tensor) -> Tensor:
    """(…, n) of any dtype to their (…, n · itemsize) bytes."""
    return _own(numbers).view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `as_bytes`."""
    return _own(data).view(dtype)


def per_block(numbers: Tensor) -> Tensor:
    """(out, n) numbers of which each super-block has one to their (out, n, itemsize) bytes."""
    return as_bytes(numbers[..., None])


def join(fields: Sequence[Tensor], widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Integers below 2^width side by side in words of `dtype`, the first in the lowest bits."""
    word, shift = torch.zeros_like(fields[0], dtype=torch.int32), 0
    for field, width in zip(fields, widths, strict=True):
        # int32 shifts wrap in two's complement, which keeps the highest bit of 32
        word |= field.to(torch.int32) << shift
        shift += width
    return word.to(dtype)


def cut(words: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Inverse of `join`: the int32 fields of words."""
    wide, fields, shift = words.to(torch.int32), [], 0
    for width in widths:
        fields.append(wide >> shift & (1 << width) - 1)
        shift += width
    return fields


def _own(data: Tensor) -> Tensor:
    # not `contiguous`: a single number would keep strides and an offset that cannot be viewed otherwise
    return data.clone(memory_format=torch.contiguous_format)
