"""Scales refitted to their codes, all groups of a row at once, through the gram.

With codes fixed, ŵ = Σ_g s_g·u_g, u_g the units of group g and zero elsewhere, and the loss of a row is
quadratic in its scales: (Q A Qᵀ)·s = Q A wᵀ with Q the (groups, in) matrix of the u_g. The groups of a row
are coupled by the gram, which a search group by group cannot see. Rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature
from quantkit.numerics.stored import Stored

# pull towards the scales as they are: groups without units, or nearly dependent ones, stay where they were
_RIDGE = 1e-4
# elements of the (rows, groups, groups) systems held at once
_SYSTEMS = 1 << 22


def refit(
    units_io: Tensor, w_io: Tensor, scale_og: Tensor, group_of: Tensor, curvature: Curvature, stored: Stored
) -> Tensor:
    """(out, groups) fp32 scales as stored; a row whose loss would not fall keeps its own.

    units_io, w_io (in, out) fp32 in the processing order of `curvature`; scale_og (out, groups) fp32;
    group_of (in,) int64 group of each processing position. Scales keep their sign.
    """
    out, groups = scale_og.shape
    step = max(1, _SYSTEMS // (groups * groups))
    parts = [
        _rows(
            units_io[:, at : at + step],
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
    u: Tensor, w: Tensor, scale: Tensor, group_of: Tensor, curvature: Curvature, stored: Stored
) -> Tensor:
    groups, rows = scale.shape[1], scale.shape[0]
    system = u.new_zeros(rows, groups, groups)
    right = u.new_zeros(rows, groups)
    for group in range(groups):
        members = (group_of == group).nonzero().flatten()
        coupled = _product(curvature, members, u[members])
        # (in, rows) summed over the inputs of each group
        system[:, :, group] = u.new_zeros(groups, rows).index_add_(0, group_of, coupled.mul(u)).T
        right[:, group] = (coupled * w).sum(0)
    diagonal = system.diagonal(dim1=1, dim2=2)
    pull = _RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    damped = system + torch.diag_embed(pull.expand(rows, groups))
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
