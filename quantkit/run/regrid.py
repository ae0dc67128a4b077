"""The same weights on another grid, moved as integers: nothing is rounded, or nothing is done.

A finer group repeats its scale. A zero point in the middle is none. More bits hold fewer. Everything
else that would change a single value is refused with the numbers that say why.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, plain_grid, shape, spread

ACT_ORDER = "columns in groups of their own (act-order)"


def plain(linear: QuantizedLinear) -> tuple[Affine, Tensor]:
    """The integers and plain scales of a weight; UnsupportedError when it has something else."""
    name, q = linear.name, linear.weight
    found = plain_grid(q)
    if found is None:
        what = type(q).__name__.lower()
        if isinstance(q, Affine):
            fractional = q.zero_point is not None and q.zero_point.is_floating_point()
            what = "fractional zero points" if fractional else "nested scales, offsets or groups of rows"
        raise UnsupportedError(
            f"`{name}` is no plain grid of integers ({what}): its codes mean nothing elsewhere",
            remedy="`quantkit convert` takes such a checkpoint as a source, and rounds anew",
        )
    if linear.input_scale is not None:
        raise UnsupportedError(f"`{name}` has a scale of its inputs, which the model rounds while it runs")
    return found


def regrid(linear: QuantizedLinear, scheme: Scheme) -> QuantizedLinear:
    """`linear` on the grid of a plain `scheme`, equal in every value, or UnsupportedError."""
    q, scale = plain(linear)
    name, group = linear.name, scheme.group(shape(q))
    if q.bits > scheme.bits:
        raise UnsupportedError(f"`{name}` has codes of {q.bits} bits and {scheme.name} holds {scheme.bits}")
    if q.column_group is not None and group != q.group:
        raise UnsupportedError(f"`{name}` has {ACT_ORDER}: they cannot be cut anew")
    codes, zero = (_centred(name, q, scheme), None) if scheme.sym else _shifted(q, scheme)
    return QuantizedLinear(
        name,
        replace(
            q,
            codes=codes,
            bits=scheme.bits,
            scale=stored_as(name, _regroup(name, scale, q, group), getattr(torch, scheme.scale_dtype)),
            group=group,
            zero_point=None if zero is None else _regroup(name, zero, q, group),
        ),
    )


def fits_symmetric(q: Affine, bits: int) -> bool:
    """Codes minus their zero points are signed integers of `bits` bits."""
    if q.zero_point is None:
        return q.bits <= bits
    least, most = (int(end) for end in _steps(q).aminmax())
    return least >= -(1 << (bits - 1)) and most < 1 << (bits - 1)


def stored_as(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`; UnsupportedError unless every one is exact there."""
    if (wrong := inexact(scale, dtype)) == 0:
        return scale.to(dtype)
    raise UnsupportedError(
        f"{wrong:,} of {scale.numel():,} {_said(scale.dtype)} scales of `{name}` are not exact in "
        f"{_said(dtype)}"
    )


def inexact(scale: Tensor, dtype: torch.dtype) -> int:
    """How many scales `dtype` would round."""
    return int((scale.to(dtype).to(torch.float64) != scale.to(torch.float64)).sum())


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(q: Affine) -> Tensor:
    """(out, in) int16 codes minus zero points."""
    codes = q.codes.to(torch.int16)
    if q.zero_point is None:
        return codes
    zeros = q.zero_point.to(torch.int16)
    if q.column_group is not None:
        return codes - zeros[:, q.column_group.long()]
    return codes - spread(zeros, q.group, shape(q))


def _centred(name: str, q: Affine, scheme: Scheme) -> Tensor:
    """Signed codes without zero points."""
    if q.zero_point is None:
        return q.codes
    if not fits_symmetric(q, scheme.bits):
        middle = 1 << (q.bits - 1)
        off = int((q.zero_point != middle).sum())
        raise UnsupportedError(
            f"{off:,} of {q.zero_point.numel():,} zero points of `{name}` are not {middle}: without them "
            f"its codes do not fit {scheme.bits} bits"
        )
    return _steps(q).to(torch.int8)


def _shifted(q: Affine, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Unsigned codes and zero points."""
    if q.zero_point is not None:
        return q.codes, q.zero_point
    middle = 1 << (scheme.bits - 1)
    groups = plain_shape(q)
    return (q.codes.to(torch.int16) + middle).to(torch.uint8), torch.full(groups, middle, dtype=torch.uint8)


def plain_shape(q: Affine) -> tuple[int, int]:
    """(groups of rows, groups of columns) of the plain scales of `q`."""
    rows, columns = q.group
    out, width = shape(q)
    return -(-out // rows), -(-width // columns)


def _regroup(name: str, per_group: Tensor, q: Affine, group: tuple[int, int]) -> Tensor:
    """One value per `group` instead of per `q.group`: finer groups repeat it, coarser ones must agree."""
    if group == q.group:
        return per_group
    to = shape(q)
    each = spread(per_group, q.group, to)
    rows, columns = group
    tiles = each.reshape(to[0] // rows, rows, to[1] // columns, columns)
    found = tiles[:, 0, :, 0]
    if not bool((tiles == found[:, None, :, None]).all()):
        raise UnsupportedError(
            f"`{name}` has groups of {_words(q.group, to)} and neighbours differ: "
            f"groups of {_words(group, to)} cannot hold them"
        )
    return found.contiguous()


def _words(group: tuple[int, int], to: tuple[int, int]) -> str:
    if group == to:
        return "a whole tensor"
    return "a whole row" if group[1] == to[1] else f"{group[1]:,}"
