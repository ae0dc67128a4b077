"""`QuantizedTensor`: codes and what they mean, independent of any file.

A closed union with recursive scales: a scale may itself be a quantized tensor, which is all that
"super-blocks", "double quantization" and "two-level scales" are. `dequantize` defines the meaning,
in fp32; formats only lay these values out in bytes.

Shape suffixes used here: o = out_features, i = in_features, g = groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, assert_never

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


@dataclass(frozen=True, slots=True)
class Lattice:
    """Vectors of a table: ``w = scale · sign · (table[codes] + shift)``, each `length` weights of a row.

    codes   (out, in / length) int16 rows of the table
    bits    per code
    table   (entries, length) fp32
    signs   (out, in) int8, 1 or −1, or None
    shift   (out, in / run) fp32 added to the points of each run of equal length, or None
    """

    codes: Tensor
    bits: int
    table: Tensor
    scale: Tensor | QuantizedTensor
    group: tuple[int, int]
    signs: Tensor | None = None
    shift: Tensor | None = None


QuantizedTensor = Affine | Float | Codebook | Lattice


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
    if isinstance(q, Lattice):
        return q.codes.shape[0], q.codes.shape[1] * q.table.shape[1]
    codes = q.values if isinstance(q, Float) else q.codes
    return codes.shape[0], codes.shape[1]


def plain_grid(q: QuantizedTensor) -> tuple[Affine, Tensor] | None:
    """`q` and its scale when it is integers on a grid with plain scales, an integer zero point or none,
    no offset and consecutive rows, else None."""
    if not isinstance(q, Affine) or q.offset is not None or q.row_group is not None:
        return None
    fractional = q.zero_point is not None and q.zero_point.is_floating_point()
    return (q, q.scale) if isinstance(q.scale, Tensor) and not fractional else None


def rows(q: QuantizedTensor, chosen: slice) -> QuantizedTensor:
    """Some rows of a quantized tensor whose groups span one row or all of them."""
    whole = q.group[0] != 1
    count = len(range(*chosen.indices(shape(q)[0])))

    def cut(v: Any) -> Any:
        match v:
            case None:
                return None
            case Tensor():
                return v if whole else v[chosen]
            case _:
                return v if whole else rows(v, chosen)

    # what there is one of per weight, or per group of weights
    own: dict[str, Any] = {
        name: getattr(q, name)[chosen] for name in ("codes", "values") if name in _names(q)
    }
    own |= {name: cut(getattr(q, name)) for name in ("scale", "zero_point") if name in _names(q)}
    if not isinstance(q, Codebook):
        own |= {name: cut(getattr(q, name)) for name in ("offset", "signs", "shift") if name in _names(q)}
    return replace(q, **own, group=(count if whole else 1, q.group[1]))


def stacked(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Quantized tensors of one kind below one another; groups within rows, or one group that all share."""
    first = parts[0]
    if len(parts) == 1:
        return first
    whole = first.group[0] != 1

    def join(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        if found[0] is None:
            return None
        return torch.cat(found) if isinstance(found[0], Tensor) else stacked(found)

    own: dict[str, Any] = {
        name: join(name) for name in ("codes", "values", "signs", "shift") if name in _names(first)
    }
    if not whole:
        own |= {name: join(name) for name in ("scale", "zero_point") if name in _names(first)}
        if isinstance(first, Affine):
            own["offset"] = join("offset")
    total = sum(shape(part)[0] for part in parts)
    return replace(first, **own, group=(total if whole else 1, first.group[1]))


def _names(q: QuantizedTensor) -> set[str]:
    return {f.name for f in fields(q)}


def spread(per_group: Tensor, group: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Repeat a (groups, groups) tensor over the elements of each group and cut it to `to`."""
    rows, columns = group
    wide = per_group
    if rows != 1:
        wide = wide.repeat_interleave(rows, dim=0)[: to[0]]
    if columns != 1:
        wide = wide.repeat_interleave(columns, dim=1)[:, : to[1]]
    return wide.expand(to)


def _per_element(v: Tensor | QuantizedTensor, q: QuantizedTensor) -> Tensor:
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
        case Lattice():
            points = q.table[q.codes.long()].flatten(1)
            if q.shift is not None:
                points = points + q.shift.repeat_interleave(points.shape[1] // q.shift.shape[1], 1)
            signed = points if q.signs is None else points * q.signs
            return _per_element(q.scale, q) * signed
        case _:
            assert_never(q)
