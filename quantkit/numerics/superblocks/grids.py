"""Super-blocks of ggml: what each type stores of 32 or 256 consecutive weights, and what that stands for.

    w = d · q                      q8_0 q4_0 q5_0 tq1_0 tq2_0, iq4_nl with points of a table for q
    w = d · q + m                  q4_1 q5_1
    w = (d · s) · q                q3_k q6_k, iq4_xs with points of a table for q
    w = (d · s) · q − (dmin · m)   q2_k q4_k q5_k
d, dmin and the m of q4_1 and q5_1 are float16, one of a super-block; s and the other m are small integers,
one of a sub-block of 16 or 32 weights. Products are rounded to fp32 in the order written, as engines do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.tensors import Affine, Codebook, QuantizedTensor

# the points of iq4_nl and iq4_xs
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a super-block of one type is made of.

    columns  weights of it
    group    consecutive weights sharing an effective scale
    bits     per code
    low, high  the points: all integers from low to high, or the table's first and last
    table    the points where they are not consecutive integers
    scales   lowest and highest sub-scale s, or None where the scale is d itself
    minimum  a minimum is stored beside every scale: below zero, or (no sub-scales) anywhere
    """

    name: str
    columns: int
    group: int
    bits: int
    low: int
    high: int
    table: tuple[int, ...] | None = None
    scales: tuple[int, int] | None = None
    minimum: bool = False

    @property
    def parts(self) -> int:
        """Sub-blocks of a super-block."""
        return self.columns // self.group

    @property
    def scale_bits(self) -> int:
        """Bits of a sub-scale, and of a sub-minimum."""
        low, high = self.scales or (0, 0)
        return (high - low).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """int8 for signed integers, uint8 for the rest."""
        return torch.int8 if self.low < 0 and self.table is None else torch.uint8


SUPERBLOCKS: Mapping[str, Superblock] = MappingProxyType(
    {
        block.name: block
        for block in (
            Superblock("q8_0", 32, 32, 8, -128, 127),
            Superblock("q4_0", 32, 32, 4, -8, 7),
            Superblock("q5_0", 32, 32, 5, -16, 15),
            Superblock("q4_1", 32, 32, 4, 0, 15, minimum=True),
            Superblock("q5_1", 32, 32, 5, 0, 31, minimum=True),
            Superblock("q2_k", 256, 16, 2, 0, 3, scales=(0, 15), minimum=True),
            Superblock("q3_k", 256, 16, 3, -4, 3, scales=(-32, 31)),
            Superblock("q4_k", 256, 32, 4, 0, 15, scales=(0, 63), minimum=True),
            Superblock("q5_k", 256, 32, 5, 0, 31, scales=(0, 63), minimum=True),
            Superblock("q6_k", 256, 16, 6, -32, 31, scales=(-128, 127)),
            Superblock("iq4_nl", 32, 32, 4, IQ4[0], IQ4[-1], table=IQ4),
            Superblock("iq4_xs", 256, 32, 4, IQ4[0], IQ4[-1], table=IQ4, scales=(-32, 31)),
            Superblock("tq1_0", 256, 256, 2, -1, 1),
            Superblock("tq2_0", 256, 256, 2, -1, 1),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Scales:
    """Everything but the codes of n super-blocks of S sub-blocks, as the file stores it.

    d       (n,) float16, of either sign where the file allows it
    sub     (n, S) uint8 or int8 sub-scales s, or None where d is the scale
    dmin    (n,) float16, or None. With sub-scales it multiplies minima that are subtracted; in q4_1 and q5_1
            it is the minimum m itself, which is added
    submin  (n, S) uint8, or None
    """

    d: Tensor
    sub: Tensor | None = None
    dmin: Tensor | None = None
    submin: Tensor | None = None

    def scale(self, kind: str) -> Tensor:
        """(n, S) fp32 effective scales exactly as decoded."""
        d = self.d.to(torch.float32)[:, None]
        return d if self.sub is None else d * self.sub

    def offset(self, kind: str) -> Tensor | None:
        """(n, S) fp32 effective additive offsets exactly as decoded, or None."""
        if self.dmin is None:
            return None
        dmin = self.dmin.to(torch.float32)[:, None]
        return dmin if self.submin is None else -(dmin * self.submin)


def joined(parts: Sequence[Scales]) -> Scales:
    """The scales of the super-blocks of all parts, one after the other."""

    def cat(pieces: list[Tensor | None]) -> Tensor | None:
        present = [piece for piece in pieces if piece is not None]
        return torch.cat(present) if present else None

    return Scales(
        torch.cat([part.d for part in parts]),
        cat([part.sub for part in parts]),
        cat([part.dmin for part in parts]),
        cat([part.submin for part in parts]),
    )


def half(values: Tensor) -> Tensor:
    """`values` as finite float16."""
    return values.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)


def codes(kind: str, w: Tensor, scales: Scales) -> Tensor:
    """(n, columns) codes of the points nearest to w (n, columns) fp32: int8 where points are signed integers,
    uint8 otherwise. Where a scale is zero every code is that of the point nearest to zero."""
    block = SUPERBLOCKS[kind]
    n = w.shape[0]
    scale = scales.scale(kind)
    offset = scales.offset(kind)
    x = w.reshape(n, -1, block.group)
    if offset is not None:
        x = x - offset[:, :, None]
    units = x * inverse(scale)[:, :, None]
    if block.table is not None:
        return nearest_places(units).reshape(n, block.columns)
    return units.round_().clamp_(block.low, block.high).to(block.code_dtype).reshape(n, block.columns)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, scale, scale.reciprocal())


def values(kind: str, codes: Tensor, scales: Scales) -> Tensor:
    """(n, columns) fp32 weights that codes (n, columns) stand for, to the bit what engines decode."""
    block = SUPERBLOCKS[kind]
    n = codes.shape[0]
    units = codes.to(torch.float32) if block.table is None else table(codes.device)[codes.to(torch.int32)]
    out = scales.scale(kind)[:, :, None] * units.reshape(n, -1, block.group)
    offset = scales.offset(kind)
    return (out if offset is None else out + offset[:, :, None]).reshape(n, block.columns)


def assemble(kind: str, codes: Tensor, scales: Scales) -> QuantizedTensor:
    """The weight with codes (out, in) and the scales of its out · in / columns super-blocks, row by row."""
    block = SUPERBLOCKS[kind]
    out = codes.shape[0]
    per_row = codes.shape[1] // block.columns
    d = scales.d.view(out, per_row)
    offset: Tensor | QuantizedTensor | None = None
    scale: Tensor | QuantizedTensor = d
    if scales.sub is not None:
        scale = _nested(block, scales.sub, d)
    if scales.dmin is not None:
        dmin = scales.dmin.view(out, per_row)
        offset = dmin if scales.submin is None else _nested(block, scales.submin, -dmin)
    group = (1, block.group)
    if block.table is not None:
        return Codebook(codes, block.bits, table(codes.device), scale, group)
    return Affine(codes, block.bits, scale, group, offset=offset)


def _nested(block: Superblock, sub: Tensor, d: Tensor) -> Affine:
    return Affine(sub.reshape(d.shape[0], -1), block.scale_bits, d, (1, block.parts))


# Middles of two points of the table are multiples of ½, so all x with the same floor(2·x) are nearest to one
# point, which a look-up finds exactly.
_EDGE = 128
_BINS = torch.arange(-2 * _EDGE, 2 * _EDGE, dtype=torch.float32) / 2 + 0.25


@cache
def table(device: torch.device) -> Tensor:
    """(16,) fp32 points of iq4_nl and iq4_xs."""
    return torch.tensor(IQ4, dtype=torch.float32, device=device)


@cache
def _place_of_bin(device: torch.device) -> Tensor:
    points = torch.tensor(IQ4, dtype=torch.float32)
    return (_BINS[:, None] - points).abs().argmin(1).to(torch.uint8).to(device)


@cache
def _point_of_bin(device: torch.device) -> Tensor:
    return table(device)[_place_of_bin(device).to(torch.int32)]


def _bin(units: Tensor) -> Tensor:
    # above zero the conversion cuts off as floor does
    return units.mul_(2).add_(2 * _EDGE).clamp_(0, 4 * _EDGE - 1).to(torch.int32).view(-1)


def nearest_places(units: Tensor) -> Tensor:
    """uint8 places in the table of the points nearest to `units`, which is overwritten."""
    return torch.index_select(_place_of_bin(units.device), 0, _bin(units)).view(units.shape)


def nearest_points(units: Tensor) -> Tensor:
    """`units` overwritten by the points of the table nearest to them."""
    torch.index_select(_point_of_bin(units.device), 0, _bin(units), out=units.view(-1))
    return units
