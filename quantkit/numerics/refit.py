"""Scales refitted to their codes, all groups of a row at once, through the gram.

With codes fixed, ŵ = Σ_g s_g·u_g, u_g the units of group g and zero elsewhere, and the loss of a row is
quadratic in its scales: (Q A Qᵀ)·s = Q A wᵀ with Q the (groups, in) matrix of the u_g. The groups of a row
are coupled by the gram, which a search group by group cannot see. Rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature

# pull towards the scales as they are: groups without units, or nearly dependent ones, stay where they were
_RIDGE = 1e-4
# elements of the (rows, scales, scales) systems held at once
_SYSTEMS = 1 << 22


class Rounding(Protocol):
    """How a file keeps scales."""

    def round(self, scale: Tensor) -> Tensor: ...


def refit(
    bases: Sequence[Tensor],
    w_io: Tensor,
    scale_og: Tensor,
    group_of: Tensor,
    curvature: Curvature,
    stored: Rounding,
) -> Tensor:
    """(out, bases · groups) fp32 scales as stored; a row whose loss would not fall keeps its own.

    bases: (in, out) units that scales multiply; several where a group has more than one scale (a minimum), ŵ
    being the sum of all. w_io (in, out) fp32; all in the processing order of `curvature`. scale_og (out,
    bases · groups) fp32, basis by basis; group_of (in,) int64 group of each position. Scales keep their sign.
    """
    out, scales = scale_og.shape
    step = max(1, _SYSTEMS // (scales * scales))
    parts = [
        _rows(
            [u[:, at : at + step] for u in bases],
            w_io[:, at : at + step],
            scale_og[at : at + step],
            group_of,
            curvature,
            stored,
        )
        for at in range(0, out, step)
    ]
    return torch.cat(parts)


def _rows(
    bases: Sequence[Tensor],
    w: Tensor,
    scale: Tensor,
    group_of: Tensor,
    curvature: Curvature,
    stored: Rounding,
) -> Tensor:
    rows, scales = scale.shape
    groups = scales // len(bases)
    system = w.new_zeros(rows, scales, scales)
    right = w.new_zeros(rows, scales)
    for group in range(groups):
        members = (group_of == group).nonzero().flatten()
        for a, u in enumerate(bases):
            coupled = _product(curvature, members, u[members])
            right[:, a * groups + group] = (coupled * w).sum(0)
            for b, v in enumerate(bases):
                # (in, rows) summed over the inputs of each group
                summed = w.new_zeros(groups, rows).index_add_(0, group_of, coupled * v)
                system[:, b * groups : (b + 1) * groups, a * groups + group] = summed.T
    diagonal = system.diagonal(dim1=1, dim2=2)
    # scales of one basis are alike, those of two may be far apart
    mean = diagonal.view(rows, -1, groups).mean(2, keepdim=True).expand(-1, -1, groups).reshape(rows, scales)
    pull = _RIDGE * mean + torch.finfo(torch.float32).tiny
    damped = system + torch.diag_embed(pull)
    wanted = torch.linalg.solve(damped, right + pull * scale)
    found = torch.where(torch.isfinite(wanted) & (wanted * scale > 0), wanted, scale)
    found = stored.round(found)
    better = _loss(system, right, found) < _loss(system, right, scale)
    return torch.where(better[:, None], found, scale)


def _product(curvature: Curvature, members: Tensor, u: Tensor) -> Tensor:
    """A[:, members] · u, (in, rows)."""
    result = u.new_zeros(curvature.width, u.shape[1])
    for at in range(0, len(members), 128):
        part = members[at : at + 128]
        result += curvature.chosen(part).T @ u[at : at + 128]
    return result


def _loss(system: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """(rows,) loss but for a constant."""
    quadratic = (system @ scale[:, :, None]).squeeze(2) * scale
    return (quadratic - 2 * right * scale).sum(1, dtype=torch.float64)
