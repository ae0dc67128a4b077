"""`Statistics`: what was seen at one site. A monoid: sums and counts, divided only when used.

Merging shards, ranks, datasets and resumed parts is one ``+``. The reservoir keeps the rows of
smallest content hash, so even the sample depends on neither order nor sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto

import torch
from torch import Tensor

SAMPLE_ROWS = 256


class Need(Flag):
    """What a method or transform wants to know of a site; the sweep collects the union once."""

    NOTHING = 0
    SQUARES = auto()
    ABSMAX = auto()
    ABSSUM = auto()
    GRAM = auto()
    SAMPLE = auto()


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the activations x (tokens, in) that entered a site, all fp32.

    tokens   rows of x seen
    squares  (in,)     Σ x², the importance matrix before division
    absmax   (in,)     max |x|
    abssum   (in,)     Σ |x|
    gram     (in, in)  Σ x xᵀ
    sample   (n, in)   rows of x with the smallest content hash, n ≤ SAMPLE_ROWS
    """

    tokens: int
    squares: Tensor | None = None
    absmax: Tensor | None = None
    abssum: Tensor | None = None
    gram: Tensor | None = None
    sample: Tensor | None = None

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.tokens + other.tokens,
            _both(self.squares, other.squares, torch.add),
            _both(self.absmax, other.absmax, torch.maximum),
            _both(self.abssum, other.abssum, torch.add),
            _both(self.gram, other.gram, torch.add),
            _both(self.sample, other.sample, _merge_samples),
        )

    def importance(self) -> Tensor:
        """(in,) mean square of each input, the weight of its column in a scale search."""
        squares = self.squares if self.squares is not None else _diagonal(self.gram)
        return squares / max(1, self.tokens)


def zero(width: int, need: Need, device: torch.device) -> Statistics:
    """The neutral element for `need` at a site of `width` inputs."""

    def empty(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=device)

    return Statistics(
        0,
        empty(width) if Need.SQUARES in need else None,
        empty(width) if Need.ABSMAX in need else None,
        empty(width) if Need.ABSSUM in need else None,
        empty(width, width) if Need.GRAM in need else None,
        empty(0, width) if Need.SAMPLE in need else None,
    )


def update(stats: Statistics, x: Tensor) -> Statistics:
    """`stats` plus the rows of x (tokens, in); sums are accumulated in place, in fp32.

    The gram of the new rows is added by one matrix product with fp32 accumulation.
    """
    x = x.reshape(-1, x.shape[-1]).to(torch.float32)
    if stats.squares is not None:
        stats.squares.add_(x.square().sum(0))
    if stats.absmax is not None and x.shape[0]:
        torch.maximum(stats.absmax, x.abs().amax(0), out=stats.absmax)
    if stats.abssum is not None:
        stats.abssum.add_(x.abs().sum(0))
    if stats.gram is not None:
        stats.gram.addmm_(x.T, x)
    sample = None if stats.sample is None else _merge_samples(stats.sample, x)
    return Statistics(
        stats.tokens + x.shape[0], stats.squares, stats.absmax, stats.abssum, stats.gram, sample
    )


def nbytes(width: int, need: Need) -> int:
    """Bytes that the statistics of one site of `width` inputs occupy."""
    vectors = sum(n in need for n in (Need.SQUARES, Need.ABSMAX, Need.ABSSUM))
    gram = width if Need.GRAM in need else 0
    sample = SAMPLE_ROWS if Need.SAMPLE in need else 0
    return 4 * width * (vectors + gram + sample)


def _both(a: Tensor | None, b: Tensor | None, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if (a is None) != (b is None):
        raise ValueError("statistics of different needs cannot be merged")
    return None if a is None or b is None else merge(a, b)


def _diagonal(gram: Tensor | None) -> Tensor:
    if gram is None:
        raise ValueError("neither squares nor a gram were collected")
    return gram.diagonal()


def _hashes(x: Tensor) -> Tensor:
    """(rows,) int64 hash of the bits of each row, mixed so that its order is pseudo-random."""
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    odd = torch.arange(1, 2 * x.shape[1], 2, dtype=torch.int64, device=x.device) * 0x9E3779B97F4A7C1
    mixed = (bits * odd).sum(1)
    mixed = (mixed ^ (mixed >> 31)) * 0x2545F4914F6CDD1D
    return mixed ^ (mixed >> 29)


def _merge_samples(a: Tensor, b: Tensor) -> Tensor:
    rows = torch.cat((a, b))
    if rows.shape[0] == 0:
        return rows
    return rows[torch.argsort(_hashes(rows), stable=True)[:SAMPLE_ROWS]]
