"""Block feedback on the lattice grids: QuIP#'s BlockLDLQ with the codebooks and scales of the IQ types.

With H = R·Rᵀ, R upper triangular, and blocks B of the columns of a code in processing order

    q_B = argmin |R_BBᵀ (q − t_B)|²,   t_B = w_B + R_BB⁻ᵀ Σ_{j<B} R_jBᵀ (w_j − q_j)

and the losses add up to tr(Δ·H·Δᵀ). Scales of a super-block are searched on its compensated weights when
it comes up. Shape suffixes: i inputs in processing order, n rows, u columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.cholesky import Factor
from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.kinds import COLUMNS
from quantkit.numerics.lattices.scales import search
from quantkit.numerics.lattices.state import Factors, Places, State
from quantkit.numerics.lattices.units import Chosen, choose


def round_with_feedback(book: Codebook, w_in: Tensor, factor: Factor, places: Places, v: Tensor) -> State:
    """Weights (in, n) fp32 in processing order rounded with feedback; v (in,) weights in file order."""
    state, error_in = State.empty(places, w_in), torch.empty_like(w_in)
    every = torch.arange(COLUMNS, device=w_in.device)
    for start in range(0, w_in.shape[0], COLUMNS):
        block, own = start // COLUMNS, slice(start, start + COLUMNS)
        columns = factor.columns(start, start + COLUMNS)
        upper, pull = columns[start:], columns[:start].T @ error_in[:start]
        moved: Tensor = torch.linalg.solve_triangular(upper.T, pull, upper=False)
        factors = searched(book, places, block, w_in[own] + moved, v)
        chosen = fed(book, places, Aim(block, every, w_in[own] + moved, upper), factors)
        state.put(block, every, factors, chosen)
        error_in[own] = w_in[own] - state.values(block)
    return state


@dataclass(frozen=True, slots=True)
class Aim:
    """What whole units shall become: columns `at` (u,) of the block-th super-block processed near aim_un
    for the metric upper·upperᵀ."""

    block: int
    at: Tensor
    aim_un: Tensor
    upper: Tensor


def fed(book: Codebook, places: Places, wanted: Aim, factors: Factors) -> Chosen:
    """Points chosen unit by unit, the error of each fed into those that follow."""
    kind, upper = places.kind, wanted.upper
    step_un = factors.steps()[places.subs(wanted.block)[wanted.at]]
    inverse_un = torch.where(step_un > 0, 1 / step_un, 0.0)
    shift_cn = None
    if factors.shift_cn is not None:
        shift_cn = factors.shift_cn[wanted.at[:: kind.length] // kind.length]
    pull, found = torch.zeros_like(wanted.aim_un), []
    for first in range(0, len(wanted.at), kind.unit):
        unit, rest = slice(first, first + kind.unit), slice(first + kind.unit, None)
        inner = upper[unit, unit]
        moved: Tensor = torch.linalg.solve_triangular(inner.T, pull[unit], upper=False)
        y = (wanted.aim_un[unit] + moved) * inverse_un[unit]
        shift = None if shift_cn is None else shift_cn[first // kind.length]
        found.append(choose(kind, book, y.T.contiguous(), inner, shift))
        error = wanted.aim_un[unit] - found[-1].value_nu.T * step_un[unit]
        pull[rest].addmm_(upper[unit, rest].T, error)
    return Chosen.beside(found)


def searched(book: Codebook, places: Places, block: int, w: Tensor, v: Tensor) -> Factors:
    """Of the block-th super-block processed, for weights (256, n) it should have; v as above."""
    kind, local = places.kind, places.local(block)
    in_file = torch.empty_like(w)
    in_file[local] = w
    first = int(places.order[block * COLUMNS]) // COLUMNS * COLUMNS
    found = search(kind, book.table, in_file.T.contiguous(), v[None, first : first + COLUMNS])
    shift = None if found.shift is None else found.shift.T[local[:: kind.length] // kind.group]
    return Factors(found.d, found.sub.T.float(), shift)
