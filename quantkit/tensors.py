"""`QuantizedTensor`: codes and what they mean, independent of any file.

A closed union with recursive scales: a scale may itself be a quantized tensor, which is all that
"super-blocks", "double quantization" and "two-level scales" are. `dequantize` defines the meaning,
in fp32; formats only lay these values out in bytes.

Shape suffixes used here: o = out_features, i = in_features, g = groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Affine:
    """Integers on a grid: ``w = scale · (codes − zero_point) + offset``.

    codes       (out, in) integer tensor in logical order, unpacked, each in [0, 2^bits) or, when
                `zero_point` is None, in [−2^(bits−1), 2^(bits−1))
    scale       (⌈out/group[0]⌉, ⌈in/group[1]⌉), a tensor in its stored dtype or a quantized tensor
    zero_point  integer tensor shaped like scale, or None
    offset      additive minimum shaped like scale, or None
    group       (rows, columns) sharing one scale
    column_group  (in,) int32 group of each column when columns were regrouped, else None
    """

    codes: Tensor
    bits: int
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]
    zero_point: Tensor | None = None
    offset: Tensor | QuantizedTensor | None = None
    column_group: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Float:
    """Low-precision floats: ``w = scale · values``; `values` is (out, in) in a torch float dtype."""

    values: Tensor
    bits: int
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Codebook:
    """Indices into a table: ``w = scale · table[codes]``; `table` is (entries,) fp32."""

    codes: Tensor
    bits: int
    table: Tensor
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]


QuantizedTensor = Affine | Float | Codebook


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """What is stored and exported for one weight: its checkpoint name and its quantized values."""

    name: str
    weight: QuantizedTensor


def values(v: Tensor | QuantizedTensor) -> Tensor:
    """fp32 values of a scale or offset, which may itself be quantized."""
    return v.to(torch.float32) if isinstance(v, Tensor) else dequantize(v)


def shape(q: QuantizedTensor) -> tuple[int, int]:
    """(out, in) of the weight that `q` stands for."""
    codes = q.values if isinstance(q, Float) else q.codes
    return codes.shape[0], codes.shape[1]


def plain_grid(q: QuantizedTensor) -> tuple[Affine, Tensor] | None:
    """`q` and its scale when it is integers on a grid with plain scales and no offset, else None."""
    if isinstance(q, Affine) and isinstance(q.scale, Tensor) and q.offset is None:
        return q, q.scale
    return None


def spread(per_group: Tensor, group: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Repeat a (groups, groups) tensor over the elements of each group and cut it to `to`."""
    rows, columns = group
    wide = per_group
    if rows != 1:
        wide = wide.repeat_interleave(rows, dim=0)[: to[0]]
    if columns != 1:
        wide = wide.repeat_interleave(columns, dim=1)[:, : to[1]]
    return wide.expand(to)


def _per_element(v: Tensor | QuantizedTensor, q: Affine | Float | Codebook) -> Tensor:
    grid = values(v)
    if isinstance(q, Affine) and q.column_group is not None:
        return grid[:, q.column_group.long()].expand(shape(q))
    return spread(grid, q.group, shape(q))


def dequantize(q: QuantizedTensor) -> Tensor:
    """(out, in) fp32 weights that `q` stands for. This function is the definition of meaning."""
    match q:
        case Affine():
            steps = q.codes.to(torch.float32)
            if q.zero_point is not None:
                steps = steps - _per_element(q.zero_point, q)
            out = _per_element(q.scale, q) * steps
            return out if q.offset is None else out + _per_element(q.offset, q)
        case Float():
            return _per_element(q.scale, q) * q.values.to(torch.float32)
        case Codebook():
            return _per_element(q.scale, q) * q.table.to(torch.float32)[q.codes.long()]
        case _:
            assert_never(q)
