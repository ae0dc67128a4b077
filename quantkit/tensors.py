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
    zero_point  shaped like scale: integers, or floats where a zero point may be fractional (HQQ); or None
    offset      additive minimum shaped like scale, or None
    group       (rows, columns) sharing one scale
    column_group  (in,) int32 group of each column when columns were regrouped, else None
    row_group   (out,) int32 group of each row when groups are not consecutive rows, else None
    """

    codes: Tensor
    bits: int
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]
    zero_point: Tensor | None = None
    offset: Tensor | QuantizedTensor | None = None
    column_group: Tensor | None = None
    row_group: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Float:
    """Low-precision floats: ``w = scale · values``; `values` is (out, in) in a torch float dtype."""

    values: Tensor
    bits: int
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Codebook:
    """Indices into a table: ``w = scale · table[codes] + offset``.

    table   (entries,) fp32
    offset  (1,) one constant for all, or None; bitsandbytes centres nested scales by their mean
    """

    codes: Tensor
    bits: int
    table: Tensor
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]
    offset: Tensor | None = None


QuantizedTensor = Affine | Float | Codebook


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """What is stored and exported for one weight.

    name         its checkpoint name (`Weight.key`)
    weight       its quantized values
    input_scale  (1,) the one scale of its inputs where that is static, else None
    """

    name: str
    weight: QuantizedTensor
    input_scale: Tensor | None = None


def values(v: Tensor | QuantizedTensor) -> Tensor:
    """fp32 values of a scale or offset, which may itself be quantized.

    A quantized scale may be laid out flat, (1, groups), where its own groups cross the rows of the weight.
    """
    return v.to(torch.float32) if isinstance(v, Tensor) else dequantize(v)


def shape(q: QuantizedTensor) -> tuple[int, int]:
    """(out, in) of the weight that `q` stands for."""
    codes = q.values if isinstance(q, Float) else q.codes
    return codes.shape[0], codes.shape[1]


def plain_grid(q: QuantizedTensor) -> tuple[Affine, Tensor] | None:
    """`q` and its scale when it is integers on a grid with plain scales, an integer zero point or none,
    no offset and consecutive rows, else None."""
    if not isinstance(q, Affine) or q.offset is not None or q.row_group is not None:
        return None
    fractional = q.zero_point is not None and q.zero_point.is_floating_point()
    return (q, q.scale) if isinstance(q.scale, Tensor) and not fractional else None


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
    out, width = shape(q)
    grid = values(v)
    if isinstance(q, Affine) and q.column_group is not None:
        return grid[:, q.column_group.long()].expand(out, width)
    if isinstance(q, Affine) and q.row_group is not None:
        return grid[q.row_group.long()].expand(out, width)
    rows, columns = q.group
    return spread(grid.reshape(-(-out // rows), -(-width // columns)), q.group, (out, width))


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
            found = _per_element(q.scale, q) * q.table.to(torch.float32)[q.codes.long()]
            return found if q.offset is None else found + q.offset.to(torch.float32)
        case _:
            assert_never(q)
