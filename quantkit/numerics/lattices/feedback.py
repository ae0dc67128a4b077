"""Block feedback on the lattice grids: QuIP#'s BlockLDLQ with the codebooks and scales of the IQ types.

With H = R·Rᵀ, R upper triangular, and blocks B of the columns of a code in processing order

    q_B = argmin |R_BBᵀ (q − t_B)|²,   t_B = w_B + R_BB⁻ᵀ Σ_{j<B} R_jBᵀ (w_j − q_j)

and the losses add up to tr(Δ·H·Δᵀ). Scales of a super-block are searched on its compensated weights when
it comes up. Shape suffixes: i inputs in processing order, n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.cholesky import Factor
from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.kinds import COLUMNS, LatticeKind
from quantkit.numerics.lattices.scales import search
from quantkit.numerics.lattices.state import Places, State


def round_with_feedback(book: Codebook, w_in: Tensor, factor: Factor, places: Places, v: Tensor) -> State:
    """Weights (in, n) fp32 in processing order rounded with feedback; v (in,) weights in file order."""
    kind, state = places.kind, State.empty(places, w_in)
    error_in = torch.empty_like(w_in)
    for start in range(0, w_in.shape[0], COLUMNS):
        block, end = start // COLUMNS, start + COLUMNS
        columns = factor.columns(start, end)
        upper, pull = columns[start:], columns[:start].T @ error_in[:start]
        own = w_in[start:end]
        moved: Tensor = torch.linalg.solve_triangular(upper.T, pull, upper=False)
        _scale(kind, book, state, block, own + moved, v)
        steps = state.wide(block, state.steps(block))
        for first in range(0, COLUMNS, kind.unit):
            unit = slice(first, first + kind.unit)
            inner = upper[unit, unit]
            fed: Tensor = torch.linalg.solve_triangular(inner.T, pull[unit], upper=False)
            found = state.proposed(book, start + first, own[unit] + fed, inner, steps[first])
            state.put(start + first, found)
            error = own[unit] - found.value_nu.T * steps[first]
            error_in[start + first : start + unit.stop] = error
            rest = slice(unit.stop, COLUMNS)
            pull[rest].addmm_(upper[unit, rest].T, error)
    return state


def _scale(kind: LatticeKind, book: Codebook, state: State, block: int, w: Tensor, v: Tensor) -> None:
    """Scales, and shifts that sub-blocks share, of a super-block of compensated weights (256, n)."""
    local = state.places.local(block)
    in_file = torch.empty_like(w)
    in_file[local] = w
    first = int(state.places.order[block * COLUMNS]) // COLUMNS * COLUMNS
    found = search(kind, book.table, in_file.T.contiguous(), v[None, first : first + COLUMNS])
    state.d_bn[block] = found.d
    state.sub_bsn[block] = found.sub.T.float()
    if found.shift is not None and state.shift_cn is not None:
        per = COLUMNS // kind.length
        subs = local[:: kind.length] // kind.group
        state.shift_cn[block * per : (block + 1) * per] = found.shift.T[subs]
