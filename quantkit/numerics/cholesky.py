"""Damped factorisation of a gram, with stated failure.

With H = R·Rᵀ, R upper triangular, the factor GPTQ needs is U = R⁻¹, because H⁻¹ = Uᵀ·U. R comes
from one ordinary Cholesky of H with both axes reversed: half the work of the textbook
cholesky → inverse → cholesky, and the condition number is not squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError

# multiples of the requested damping that are tried in turn in fp32; the last is tried in fp64 as well
_LADDER = ((1.0, torch.float32), (3.0, torch.float32), (10.0, torch.float32), (10.0, torch.float64))


@dataclass(frozen=True, slots=True)
class Factor:
    """upper (in, in) fp32 with H⁻¹ = upperᵀ·upper; `note` says when more damping or fp64 was needed."""

    upper: Tensor
    note: str | None


def shrink_(gram: Tensor, tokens: int) -> None:
    """gram ← (1 − ρ)·gram + ρ·diag(gram) in place, ρ = min(½, in / (4·tokens)).

    The fewer tokens per input, the less the entries off the diagonal are believed.
    """
    rho = min(0.5, gram.shape[0] / (4 * max(1, tokens)))
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - rho)
    gram.diagonal().copy_(diagonal)


def revive_(gram: Tensor) -> int:
    """Put the mean diagonal in place where an input was never excited; returns how many there were.

    Zero activation in calibration is not proof of uselessness: such weights are then rounded by
    themselves, where the reference implementation deletes them.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if count:
        mean = float(diagonal.sum()) / max(1, diagonal.numel() - count)
        diagonal[dead] = mean or 1.0
    return count


def factor(gram: Tensor, order: Tensor, damp: float) -> Factor:
    """Upper factor of (gram + damp·mean(diag)·I)⁻¹ with rows and columns taken in `order`.

    gram (in, in) fp32, symmetric, not modified. More damping is tried when the matrix is not positive
    definite, then fp64. Raises NumericsError on non-finite values or when every rung fails.
    """
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise NumericsError("the gram holds non-finite values")
    mean = float(gram.diagonal().mean())
    backwards = order.flip(0)
    for multiple, dtype in _LADDER:
        damped = gram.index_select(0, backwards).index_select(1, backwards).to(dtype)
        damped.diagonal().add_(damp * multiple * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
            continue
        inverse = torch.eye(lower.shape[0], dtype=dtype, device=lower.device)
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        plain = (multiple, dtype) == _LADDER[0]
        note = (
            None if plain else f"damping raised to {damp * multiple:g} in {str(dtype).removeprefix('torch.')}"
        )
        return Factor(inverse.flip((0, 1)).float(), note)
    raise NumericsError(
        f"the gram is not positive definite, not even with damping {damp * _LADDER[-1][0]:g} in float64",
        remedy="calibrate with more rows",
    )
