"""Sub-scales and sub-minima revisited: coordinate descent through the gram, one sub-block at a time.

With E = Ŵ − W and M = A·E kept current as in `numerics.polish`, a sub-block of codes q whose scale and offset
move by Δs and Δo changes the loss by 2·gᵀΔ + ΔᵀHΔ, where Δ = (Δs, Δo), g = (qᵀM, 1ᵀM) and H has the entries
qᵀAq, qᵀA1, 1ᵀA1 of the sub-block. The file knows whole multiples of d and dmin only, so the neighbours of
the best scale are tried, each with the offset that is best beside it. Nothing is taken that does not gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, Superblock, inverse
from quantkit.numerics.superblocks.points import Points


def rescale(kind: str, codes_io: Tensor, w_io: Tensor, scales: Scales, curvature: Curvature) -> Scales:
    """`scales` with sub-scales and sub-minima that fit codes_io (in, out) better, d and dmin as they are.

    w_io (in, out) fp32 original weights; both in the processing order of `curvature`, in which super-blocks
    are whole. Returned as they came where a type has no sub-scales.
    """
    block = SUPERBLOCKS[kind]
    if scales.sub is None:
        return scales
    columns, (width, out) = block.columns, w_io.shape
    levels, order = Points(block), curvature.order
    scale, offset = _spread(kind, scales, out), _spread_offset(kind, scales, out)
    part_of = order // block.group
    value_io = levels.values(codes_io, scale[part_of], None if offset is None else offset[part_of])
    m_io = torch.empty_like(w_io)
    for start in range(0, width, columns):
        torch.matmul(
            curvature.rows(start, start + columns), value_io - w_io, out=m_io[start : start + columns]
        )
    sub, submin = scales.sub.clone().view(out, -1), None
    if scales.submin is not None:
        submin = scales.submin.clone().view(out, -1)
    d = scales.d.view(out, -1).to(torch.float32)
    dmin = None if scales.dmin is None else scales.dmin.view(out, -1).to(torch.float32)
    for start in range(0, width, columns):
        own = slice(start, start + columns)
        number = int(order[start]) // columns
        coupling = curvature.rows(start, start + columns)
        inside = m_io[own].clone()
        change = torch.zeros_like(inside)
        for part in torch.unique(part_of[own]).tolist():
            at = (part_of[own] == part).nonzero().flatten()
            step = _Step(block, d[:, number], None if dmin is None else dmin[:, number])
            q = levels.units(codes_io[start + at], None)
            near = coupling[at[:, None], (start + at)[None, :]]
            moved = step.best(q, inside[at], near, sub[:, part], None if submin is None else submin[:, part])
            sub[:, part] = moved.sub.to(sub.dtype)
            if submin is not None and moved.submin is not None:
                submin[:, part] = moved.submin.to(submin.dtype)
            change[at] = moved.change
            inside.addmm_(coupling[at][:, own].T, moved.change)
        m_io.addmm_(coupling.T, change)
    return replace(scales, sub=sub.flatten().view(scales.sub.shape), submin=_like(submin, scales.submin))


@dataclass(frozen=True, slots=True)
class _Moved:
    """(out,) new integers of one sub-block, and by how much its weights (columns, out) changed."""

    sub: Tensor
    submin: Tensor | None
    change: Tensor


@dataclass(frozen=True, slots=True)
class _Step:
    """One sub-block of all rows: d and dmin (out,) fp32."""

    block: Superblock
    d: Tensor
    dmin: Tensor | None

    def best(self, q: Tensor, m: Tensor, near: Tensor, sub: Tensor, submin: Tensor | None) -> _Moved:
        """q, m (columns, out): points and gradients; near (columns, columns): the curvature among them."""
        low, high = self.block.scales or (0, 0)
        coupled = near @ q
        g_s, h_ss = (q * m).sum(0), (q * coupled).sum(0)
        g_o, h_so, h_oo = m.sum(0), coupled.sum(0), float(near.sum())
        fixed = submin is None or self.dmin is None
        # the scale alone, or together with the offset that is best beside it
        pull, bend = (g_s, h_ss) if fixed else (g_s - h_so * g_o / h_oo, h_ss - h_so.square() / h_oo)
        wanted = sub - pull / bend.clamp(min=torch.finfo(torch.float32).tiny) * inverse(self.d)
        now = sub.to(torch.float32)
        found, found_min = now, None if submin is None else submin.to(torch.float32)
        gain = torch.zeros_like(now)
        for candidate in (wanted.floor(), wanted.ceil(), now):
            trial = candidate.nan_to_num_(0.0).clamp_(low, high)
            by = self.d * (trial - now)
            loss = (2 * g_s + h_ss * by) * by
            if found_min is not None and self.dmin is not None and submin is not None:
                wish = submin + (g_o + h_so * by) / h_oo * inverse(self.dmin)
                trial_min = wish.round_().clamp_(low, high)
                down = self.dmin * (submin - trial_min)
                loss = loss + (2 * g_o + 2 * h_so * by + h_oo * down) * down
                found_min = torch.where(loss < gain, trial_min, found_min)
            found, gain = torch.where(loss < gain, trial, found), torch.minimum(loss, gain)
        change = (self.d * (found - now)) * q
        if found_min is not None and self.dmin is not None and submin is not None:
            change = change + self.dmin * (submin - found_min)
        return _Moved(found, found_min, change)


def _spread(kind: str, scales: Scales, out: int) -> Tensor:
    """(sub-blocks of a row, out) effective scales."""
    return scales.scale(kind).view(out, -1).T


def _spread_offset(kind: str, scales: Scales, out: int) -> Tensor | None:
    offset = scales.offset(kind)
    return None if offset is None else offset.view(out, -1).T


def _like(found: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if found is None or before is None else found.reshape(before.shape)
