"""Rounding a whole weight to nearest, group by group, and putting codes and scales together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics import grids
from quantkit.numerics.grids import Scales
from quantkit.numerics.levels import Integers, Levels, Table, levels_of
from quantkit.numerics.stored import Stored, keep, stored_of
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedTensor

# elements rounded at once
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of a weight, (out groups, in groups).

    scale  fp32 values as the file gives them back
    zero   zero points, or None
    kept   the stored form of the scales
    """

    scale: Tensor
    zero: Tensor | None
    kept: Tensor | QuantizedTensor


def nearest(
    weight: Tensor, scheme: Scheme, scales: Scales, importance: Tensor | None = None
) -> QuantizedTensor:
    """weight (out, in) fp32 rounded to the nearest point of grids chosen by `scales`.

    importance (in,) is the mean square of each input, for `weighted`.
    """
    grid = fit_groups(weight, scheme, scales, stored_of(scheme, weight), importance)
    codes = _codes(_grouped(weight, scheme), grid, levels_of(scheme))
    return assemble(_ungrouped(codes, weight, scheme), grid.kept, grid.zero, scheme)


def fit_groups(
    weight: Tensor, scheme: Scheme, scales: Scales, stored: Stored, importance: Tensor | None
) -> Grid:
    """The grids of all groups of `weight`."""
    grouped = _grouped(weight, scheme)
    v = None if importance is None else _importance(importance, grouped, scheme)
    scale, zero = grids.choose(grouped, levels_of(scheme), stored, scales, v)
    chosen = scale.squeeze(-1)
    values, kept = keep(chosen, scheme, stored)
    if scales not in ("mse", "weighted"):
        # bitsandbytes nests scales after it has chosen codes by them; a convention is followed to the bit
        values = chosen
    return Grid(values, None if zero is None else zero.squeeze(-1), kept)


def _codes(grouped: Tensor, grid: Grid, levels: Levels) -> Tensor:
    """Stored codes of grouped weights, some rows at a time: what is made on the way stays in the cache."""
    rows, columns, size = grouped.shape
    step = max(1, _CHUNK // (columns * size))
    parts = []
    for at in range(0, rows, step):
        zero = None if grid.zero is None else grid.zero[at : at + step, :, None]
        codes = levels.codes(grouped[at : at + step], grid.scale[at : at + step, :, None], zero)
        parts.append(levels.stored(codes))
    return torch.cat(parts)


def assemble(
    codes: Tensor, kept: Tensor | QuantizedTensor, zero: Tensor | None, scheme: Scheme
) -> QuantizedTensor:
    """Stored codes (out, in) of `levels_of(scheme)`, the stored form of their scales, and zero points."""
    shape = (codes.shape[0], codes.shape[1])
    group = scheme.group(shape)
    levels = levels_of(scheme)
    if isinstance(levels, Table):
        return Codebook(codes, scheme.bits, levels.table.to(codes.device), kept, group)
    if not isinstance(levels, Integers):
        return Float(codes, scheme.bits, kept, group)
    if zero is not None:
        zero = zero.to(getattr(torch, scheme.scale_dtype) if scheme.fractional else torch.uint8).contiguous()
    return Affine(
        codes=codes,
        bits=scheme.bits,
        scale=kept,
        group=group,
        zero_point=zero,
        row_group=_row_group(shape[0], scheme, codes.device) if scheme.axis == 0 else None,
    )


def _row_group(out: int, scheme: Scheme, device: torch.device) -> Tensor:
    groups = out // (scheme.group_size or out)
    return (torch.arange(out, device=device) % groups).to(torch.int32)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """(out groups, in groups, elements of a group); a last tile that is cut short is filled with zeros."""
    out, width = weight.shape
    if scheme.tile is not None:
        t = scheme.tile
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -out % t))
        tiles = padded.view(-1, t, width // t, t).transpose(1, 2)
        return tiles.reshape(-1, width // t, t * t)
    if scheme.axis == 0:
        size = scheme.group_size or out
        return weight.reshape(size, out // size, width).permute(1, 2, 0).contiguous()
    rows, columns = scheme.group((out, width))
    return weight.reshape(out // rows, width // columns, rows * columns)


def _ungrouped(grouped: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Inverse of `_grouped`: (out, in)."""
    out, width = weight.shape
    if scheme.tile is not None:
        t = scheme.tile
        tiles = grouped.view(-1, width // t, t, t).transpose(1, 2)
        return tiles.reshape(-1, width)[:out]
    if scheme.axis == 0:
        return grouped.permute(2, 0, 1).reshape(out, width)
    return grouped.view(out, width)


def _importance(importance: Tensor, grouped: Tensor, scheme: Scheme) -> Tensor:
    """Importance (in,) spread over grouped elements, broadcastable to them."""
    if scheme.axis == 0:
        return importance[None, :, None]
    columns = importance.view(grouped.shape[1], -1)
    return columns.repeat(1, grouped.shape[2] // columns.shape[1])
