"""Corrected targets: weights that repair what the quantized blocks before have done to their inputs.

x̃ is the input of a site in the untouched model, x what the quantized model has there. With A = E[x xᵀ] and
C = E[x̃ xᵀ],
    W* = W·(C + λI)·(A + λI)⁻¹,   λ = .01·mean diag A,
and E‖W x̃ − Ŵ x‖² = tr((W* − Ŵ) A (W* − Ŵ)ᵀ) + const, exact at λ = 0: whatever rounds W by its gram rounds
W* by it as well (exact pre-correction; GPTAQ, Li et al. 2025, goes column by column towards the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import NumericsError


def correction(gram: Tensor, cross: Tensor, damp: float = 0.01) -> Tensor:
    """(in, in) D with W* = W + W·D; gram Σ x xᵀ, cross Σ x̃ xᵀ (in, in); λ is `damp` times the mean diagonal.

    NumericsError when the damped gram cannot be solved with.
    """
    damped = gram.clone()
    damped.diagonal().add_(damp * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise NumericsError("the gram of the quantized stream is not positive definite")
    # (C − A)·(A + λI)⁻¹, from the right: the damped gram is symmetric
    found = torch.cholesky_solve((cross - gram).T.contiguous(), lower).T.contiguous()
    if not bool(torch.isfinite(found).all()):
        raise NumericsError("the cross gram holds non-finite values")
    return found


def loss(weight: Tensor, values: Tensor, gram: Tensor, cross: Tensor | None) -> float:
    """Σ ‖W x̃ − Ŵ x‖² but for what no Ŵ changes; without `cross`, Σ ‖(W − Ŵ) x‖².

    weight W and values Ŵ (rows, in) fp32; gram Σ x xᵀ, cross Σ x̃ xᵀ (in, in).
    """
    if cross is None:
        error = values - weight
        return float(((error @ gram) * error).sum(dtype=torch.float64))
    pulled = (values @ gram - 2 * (weight @ cross)) * values
    return float(pulled.sum(dtype=torch.float64))
