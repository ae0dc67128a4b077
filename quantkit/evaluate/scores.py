"""Scores per token, and what they add up to: perplexity, KL divergence, top-1 agreement.

    NLL = −log q(next)         PPL = exp(mean NLL)
    KL(P ‖ Q) = Σ_v p(v)·(log p(v) − log q(v)), full vocabulary, p the source, q the quantized model

Log-softmax in fp32, sums in fp64. Standard errors are over windows, because tokens inside a window
are correlated; the ratio of perplexities is paired, window by window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.evaluate.quality import Perplexity, Quality


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of a target beside the source, each (windows, scored positions) fp32."""

    nll: Tensor
    kl: Tensor
    agrees: Tensor


def source_nll(logits: Tensor, following: Tensor) -> Tensor:
    """(n,) −log p(following) from logits (n, vocab)."""
    return torch.nn.functional.cross_entropy(logits.float(), following.long(), reduction="none")


def beside_source(source: Tensor, logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, kl, agrees) of n positions, each (n,) fp32; both logits (n, vocab).

    The most likely token of both is the first of equals, so a model always agrees with itself.
    """
    log_p = torch.log_softmax(source.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    nll = -log_q.gather(-1, following.long()[:, None]).squeeze(-1)
    agrees = log_p.argmax(-1) == log_q.argmax(-1)
    p = log_p.exp()
    # what the source rules out contributes nothing, however little the target thinks of it
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return nll, kl, agrees.float()


def perplexity(nll: Tensor) -> Perplexity:
    """From NLL (windows, positions)."""
    mean, error = _mean(nll)
    return Perplexity(_exp(mean), _exp(mean) * error)


def _exp(x: float) -> float:
    """e^x, at most e^700: a broken model shall be reported, not overflow the report."""
    return math.exp(min(x, 700.0))


def quality(convention: str, source: Tensor, scores: TokenScores) -> Quality:
    """Sum up the scores of one text; source (windows, positions) holds the NLL of the source."""
    difference, paired = _mean(scores.nll.double() - source.double())
    kl_mean, kl_error = _mean(scores.kl)
    ordered = scores.kl.flatten().double().sort().values
    return Quality(
        convention=convention,
        windows=source.shape[0],
        tokens=source.numel(),
        source=perplexity(source),
        target=perplexity(scores.nll),
        ratio=Perplexity(_exp(difference), _exp(difference) * paired),
        kl_mean=kl_mean,
        kl_error=kl_error,
        kl_median=float(ordered[(ordered.numel() - 1) // 2]),
        kl_p99=float(ordered[int(0.99 * (ordered.numel() - 1))]),
        kl_p999=float(ordered[int(0.999 * (ordered.numel() - 1))]),
        kl_max=float(ordered[-1]),
        top1_agreement=float(scores.agrees.double().mean()),
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean over everything and its standard error over windows (0 for a single window)."""
    windows = values.double().mean(1)
    count = windows.numel()
    error = float(windows.std(correction=1)) / math.sqrt(count) if count > 1 else 0.0
    return float(values.double().mean()), error
