"""Rounding a whole weight to nearest, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics import affine, grids
from quantkit.numerics.grids import Scales
from quantkit.schemes import Scheme
from quantkit.tensors import Affine


def nearest(weight: Tensor, scheme: Scheme, scales: Scales, importance: Tensor | None = None) -> Affine:
    """weight (out, in) fp32 rounded to the nearest point of grids chosen by `scales`.

    importance (in,) is the mean square of each input, for `weighted`.
    """
    scale, zero = fit_groups(weight, scheme, scales, importance)
    rows, columns = scheme.group((weight.shape[0], weight.shape[1]))
    grouped = _grouped(weight, rows, columns)
    codes = affine.steps(grouped, scale[..., None], None if zero is None else zero[..., None], scheme.bits)
    return Affine(
        codes=codes.to(affine.code_dtype(scheme.sym)).view(weight.shape),
        bits=scheme.bits,
        scale=scale.to(getattr(torch, scheme.scale_dtype)),
        group=(rows, columns),
        zero_point=None if zero is None else zero.to(torch.uint8),
    )


def fit_groups(
    weight: Tensor, scheme: Scheme, scales: Scales, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(out/rows, in/columns) fp32 scales, and zero points or None, of every group of `weight`."""
    rows, columns = scheme.group((weight.shape[0], weight.shape[1]))
    grouped = _grouped(weight, rows, columns)
    v = None if importance is None else importance.repeat(rows).view(grouped.shape[1], -1)
    dtype = getattr(torch, scheme.scale_dtype)
    scale, zero = grids.choose(grouped, scheme.bits, scheme.sym, scales, dtype, v)
    return scale.squeeze(-1), None if zero is None else zero.squeeze(-1)


def _grouped(weight: Tensor, rows: int, columns: int) -> Tensor:
    # only (1, columns) and whole-tensor groups exist, so a plain reshape keeps each group together
    return weight.reshape(weight.shape[0] // rows, weight.shape[1] // columns, rows * columns)
