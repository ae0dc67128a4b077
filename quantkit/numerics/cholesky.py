"""Damped factorisation of a curvature, with stated failure.

H = R·Rᵀ with R upper triangular is what error feedback needs: no inverse is ever formed. R comes from
one ordinary Cholesky of H with both axes reversed, a quarter of the work of the textbook route
cholesky → inverse → cholesky, and the condition number is not squared. The factor is kept reversed,
in the memory that H was built in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.curvature import Curvature

# multiples of the requested damping that are tried in turn in fp32; the last is tried in fp64 as well
_LADDER = ((1.0, torch.float32), (3.0, torch.float32), (10.0, torch.float32), (10.0, torch.float64))
# rows of the curvature that are gathered at once
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Factor:
    """R with H = R·Rᵀ; `note` says when more damping or fp64 was needed.

    reversed_lower (in, in) fp32: entry (in−1−j, in−1−k) is R_jk, lower triangular.
    """

    reversed_lower: Tensor
    note: str | None

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start … stop − 1 of R down to row stop − 1, (stop, stop − start)."""
        width = self.reversed_lower.shape[0]
        return self.reversed_lower[width - stop :, width - stop : width - start].flip((0, 1))


def factor(curvature: Curvature, damp: float) -> Factor:
    """Factor of curvature + damp·mean(diag)·I in its processing order.

    More damping is tried when the matrix is not positive definite, then fp64. Raises NumericsError
    when every rung fails.
    """
    mean = float(curvature.diagonal.mean())
    for multiple, dtype in _LADDER:
        lower = _cholesky(_reversed(curvature, dtype, damp * multiple * mean))
        if lower is None:
            continue
        plain = (multiple, dtype) == _LADDER[0]
        kind = str(dtype).removeprefix("torch.")
        note = None if plain else f"damping raised to {damp * multiple:g} in {kind}"
        return Factor(lower.float(), note)
    raise NumericsError(
        f"the gram is not positive definite, not even with damping {damp * _LADDER[-1][0]:g} in float64",
        remedy="calibrate with more rows",
    )


def _reversed(curvature: Curvature, dtype: torch.dtype, added: float) -> Tensor:
    """The damped matrix with both axes reversed."""
    width = curvature.width
    out = torch.empty(width, width, dtype=dtype, device=curvature.gram.device)
    for start in range(0, width, _ROWS):
        stop = min(start + _ROWS, width)
        out[width - stop : width - start] = curvature.rows(start, stop).flip((0, 1))
    out.diagonal().add_(added)
    return out


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Lower factor of a symmetric matrix, computed in its own memory; None when there is none.

    LAPACK works on columns: the transposed view of a symmetric matrix needs no copy.
    """
    columns = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return columns if int(info) == 0 and bool(torch.isfinite(columns.diagonal()).all()) else None
