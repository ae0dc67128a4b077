"""Blocks of 32 weights, as llama.cpp lays them out: d is a float16 scale, q are codes.

    Q4_0  18 bytes  d, 16 bytes of codes      w = d · (q − 8)
    Q4_1  20 bytes  d, m, 16 bytes of codes   w = d · q + m
    Q8_0  34 bytes  d, 32 signed bytes        w = d · q
Byte j of 16 holds code j in its low half and code j + 16 in its high half. Blocks of a row follow each
other, rows follow each other; everything is little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import SourceError, UnsupportedError
from quantkit.numerics.bits import signed, unsigned
from quantkit.tensors import Affine

WIDTH = 32
_HALF = WIDTH // 2


@dataclass(frozen=True, slots=True)
class BlockType:
    """One kind of block.

    name       as llama.cpp writes it
    bits       per code
    minimum    whether a float16 minimum is stored beside the scale
    file_type  the number that a file made mostly of it carries in `general.file_type`
    """

    name: str
    bits: int
    minimum: bool
    file_type: int

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return 2 + 2 * self.minimum + WIDTH * self.bits // 8

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return width // WIDTH * self.nbytes


Q4_0 = BlockType("Q4_0", 4, False, 2)
Q4_1 = BlockType("Q4_1", 4, True, 3)
Q8_0 = BlockType("Q8_0", 8, False, 7)
TYPES = MappingProxyType({t.name: t for t in (Q4_0, Q4_1, Q8_0)})


def pack(q: Affine, kind: BlockType) -> Tensor:
    """(out, row bytes) uint8 of a weight that already lies on the grid of `kind`.

    That is: float16 scales per 32 inputs and signed codes, or, with a minimum, unsigned codes and a
    float16 offset. UnsupportedError for anything else: nothing is rounded here.
    """
    _check(q, kind)
    out, width = q.codes.shape
    blocks = out * width // WIDTH
    pieces = [_half_bytes(q.scale, blocks)]
    if kind.minimum:
        pieces.append(_half_bytes(q.offset, blocks))
    codes = q.codes.reshape(blocks, WIDTH)
    if kind.bits == 8:
        pieces.append(codes.contiguous().view(torch.uint8))
    else:
        nibbles = unsigned(codes, kind.bits)
        pieces.append(nibbles[:, :_HALF] | nibbles[:, _HALF:] << 4)
    return torch.cat(pieces, dim=1).view(out, kind.row_bytes(width))


def unpack(rows: Tensor, kind: BlockType) -> Affine:
    """Inverse of `pack`: the weight that (out, row bytes) uint8 stand for."""
    out, row_bytes = rows.shape
    if row_bytes % kind.nbytes:
        raise SourceError(f"rows of {row_bytes:,} bytes are no whole {kind.name} blocks of {kind.nbytes}")
    groups = row_bytes // kind.nbytes
    blocks = rows.reshape(out * groups, kind.nbytes)
    head = 2 + 2 * kind.minimum
    data = blocks[:, head:]
    if kind.bits == 8:
        codes = data.contiguous().view(torch.int8)
    else:
        codes = torch.cat((data & 15, data >> 4), dim=1)
        codes = codes if kind.minimum else signed(codes, kind.bits)
    halves = blocks[:, :head].contiguous().view(torch.float16)
    return Affine(
        codes=codes.reshape(out, groups * WIDTH),
        bits=kind.bits,
        scale=halves[:, 0].reshape(out, groups),
        group=(1, WIDTH),
        offset=halves[:, 1].reshape(out, groups) if kind.minimum else None,
    )


def _check(q: Affine, kind: BlockType) -> None:
    plain = q.zero_point is None and q.column_group is None and q.row_group is None
    unsigned_codes = q.codes.dtype == torch.uint8
    right = q.bits == kind.bits and unsigned_codes == kind.minimum and (q.offset is not None) == kind.minimum
    if not plain or not right or q.group != (1, WIDTH):
        raise UnsupportedError(f"these codes do not lie on the grid of {kind.name}")


def _half_bytes(values: object, blocks: int) -> Tensor:
    """(blocks, 2) bytes of float16 values, one per block."""
    if not isinstance(values, Tensor) or values.dtype != torch.float16 or values.numel() != blocks:
        raise UnsupportedError("blocks of 32 store one float16 scale each")
    # not `contiguous`: a single scale would keep a stride that cannot be viewed as bytes
    return values.reshape(blocks, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
