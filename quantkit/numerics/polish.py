"""Coordinate-descent polish: revisit codes with the scales fixed (QuantEase, CDQuant).

E = Ŵ − W, M = A·E (transposed layout). For each column t = ŵ − m/A_jj, ŵ ← Q(t), and M follows.
Every step solves its one-dimensional problem exactly on the grid, so tr(E·A·Eᵀ) never grows,
whatever made the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature
from quantkit.numerics.feedback import StaticGroups, runs
from quantkit.numerics.levels import Levels


def polish(
    codes_io: Tensor,
    w_io: Tensor,
    curvature: Curvature,
    grids: StaticGroups,
    levels: Levels,
    sweeps: int,
    batch_columns: int = 128,
) -> None:
    """Improve `codes_io` (in, out) fp32 in place by `sweeps` passes over the columns.

    w_io (in, out) fp32 original weights, in the processing order of `curvature`. `batch_columns`
    share one update of M: inside a batch only the rows of M still to be read in it are kept current.
    """
    width = codes_io.shape[0]
    value_io = torch.stack([levels.values(codes_io[j], *grids.at(j)) for j in range(width)])
    m_io = torch.empty_like(w_io)
    for start in range(0, width, batch_columns):
        end = min(start + batch_columns, width)
        torch.matmul(curvature.rows(start, end), value_io - w_io, out=m_io[start:end])
    diagonal = curvature.diagonal.tolist()
    # always so many: stopping early would make a row depend on those it is stacked with
    for _ in range(sweeps):
        for start in range(0, width, batch_columns):
            end = min(start + batch_columns, width)
            coupling = curvature.rows(start, end)
            inside = m_io[start:end].clone()
            change = torch.empty_like(inside)
            for first, last in runs(start, end, None):
                for j in range(first, last):
                    k = j - start
                    scale, zero = grids.at(j)
                    code = levels.codes(value_io[j] - inside[k] / diagonal[j], scale, zero)
                    value = levels.values(code, scale, zero)
                    torch.sub(value, value_io[j], out=change[k])
                    inside[k + 1 : last - start].addr_(coupling[k, j + 1 : last], change[k])
                    value_io[j] = value
                    codes_io[j] = code
                done = slice(first - start, last - start)
                inside[last - start :].addmm_(coupling[done, last:end].T, change[done])
            m_io.addmm_(coupling.T, change)
