"""`Statistics`: what was seen at one site. A monoid: sums and counts, divided only when used.

Merging shards, ranks, datasets and resumed parts is one ``+``. The reservoir keeps the rows of
smallest content hash, so even the sample depends on neither order nor sharding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SAMPLE_ROWS = 256
_GRAM_ROWS = 256
# elements hashed at once: bounds the 64-bit copies
_HASHED = 1 << 20
_ODD, _ODDER = 0x9E3779B97F4A7C1, 0x2545F4914F6CDD1D


class Need(Flag):
    """What a method or transform wants to know of a site; the sweep collects the union once."""

    NOTHING = 0
    SQUARES = auto()
    ABSMAX = auto()
    ABSSUM = auto()
    GRAM = auto()
    SAMPLE = auto()
    HELDOUT = auto()
    CROSS = auto()


# What is kept of the tokens that are held out; a choice is judged by sums alone.
_JUDGED = Need.SQUARES | Need.ABSSUM | Need.GRAM | Need.CROSS


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the activations x (tokens, in) that entered a site, all fp32.

    tokens   rows of x seen
    squares  (in,)     Σ x², the importance matrix before division
    absmax   (in,)     max |x|
    abssum   (in,)     Σ |x|
    gram     (in, in)  Σ x xᵀ
    sample   (n, in)   distinct rows of x with the smallest content hash, n ≤ SAMPLE_ROWS
    cross    (in, in)  Σ x̃ xᵀ, x̃ what the untouched model has where x is what a quantized one has
    prior    how many of the tokens stand for what the other experts of a layer saw
    held     the same sums over the tokens held out, which all others include; decisions are judged on
             them and final solves use everything
    """

    tokens: int
    squares: Tensor | None = None
    absmax: Tensor | None = None
    abssum: Tensor | None = None
    gram: Tensor | None = None
    sample: Tensor | None = None
    held: Statistics | None = None
    cross: Tensor | None = None
    prior: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.tokens + other.tokens,
            _both(self.squares, other.squares, torch.add),
            _both(self.absmax, other.absmax, torch.maximum),
            _both(self.abssum, other.abssum, torch.add),
            _both(self.gram, other.gram, torch.add),
            _both(self.sample, other.sample, _merge_samples),
            _both(self.held, other.held, operator.add),
            _both(self.cross, other.cross, torch.add),
            self.prior + other.prior,
        )

    def split(self) -> tuple[Statistics, Statistics]:
        """(what to decide from, what to judge by): without the tokens held out, and those alone.

        Both are everything when none or all tokens were held out. Largest magnitudes and the sample cannot
        be taken apart and cover all tokens. The gram of the first is a copy.
        """
        held = self.held
        if held is None or held.tokens in (0, self.tokens):
            return self, self
        rest = replace(
            self,
            tokens=self.tokens - held.tokens,
            squares=_less(self.squares, held.squares),
            abssum=_less(self.abssum, held.abssum),
            gram=_less(self.gram, held.gram),
            cross=_less(self.cross, held.cross),
            held=None,
        )
        return rest, held

    def with_prior(self, pool: Statistics, tokens: int) -> Statistics:
        """These statistics, those of a pool counting as `tokens` more: a conjugate prior.

        An expert that few tokens reached keeps to what all of its kind saw. A pool without a gram gives its
        squares to the diagonal. Largest magnitudes are the pool's only where no token was seen.
        """
        if pool.tokens == 0:
            return self
        share = tokens / pool.tokens
        squares = pool.squares if pool.squares is not None else pool.importance() * pool.tokens
        gram = None if self.gram is None else self.gram.clone()
        if gram is not None and pool.gram is not None:
            gram.add_(pool.gram, alpha=share)
        elif gram is not None:
            gram.diagonal().add_(squares, alpha=share)
        return replace(
            self,
            tokens=self.tokens + tokens,
            prior=tokens,
            squares=None if self.squares is None else self.squares + share * squares,
            abssum=_more(self.abssum, pool.abssum, share),
            absmax=self.absmax if self.tokens else pool.absmax,
            sample=self.sample if self.tokens else pool.sample,
            gram=gram,
        )

    def evened(self, share: float) -> Statistics:
        """The same with `share` of the mean diagonal added in every direction, as if all had been seen.

        Gram, squares and what is held out of them; everything else is as it is.
        """
        gram, squares = self.gram, self.squares
        if gram is not None:
            gram = gram + share * gram.diagonal().mean() * torch.eye(gram.shape[0], device=gram.device)
        if squares is not None:
            squares = squares + share * squares.mean()
        held = None if self.held is None else self.held.evened(share)
        return replace(self, gram=gram, squares=squares, held=held)

    def importance(self) -> Tensor:
        """(in,) mean square of each input, the weight of its column in a scale search."""
        squares = self.squares if self.squares is not None else _diagonal(self.gram)
        return squares / max(1, self.tokens)

    def through(self, factors: Tensor) -> Statistics:
        """What would have been seen had every input been divided by `factors` (in,), positive fp32.

        squares / f², absmax / f, abssum / f, gram and cross / (f fᵀ), sample / f: exact but for rounding. The
        sample keeps its choice of rows and their order. All results are new tensors: other targets go on
        reading these. The gram is copied once (3 GiB at 28,672 inputs) and so are the vectors and the sample.
        """
        return replace(
            self,
            squares=None if self.squares is None else self.squares / factors / factors,
            absmax=None if self.absmax is None else self.absmax / factors,
            abssum=None if self.abssum is None else self.abssum / factors,
            gram=None if self.gram is None else _scaled_gram(self.gram, factors),
            sample=None if self.sample is None else self.sample / factors,
            held=None if self.held is None else self.held.through(factors),
            cross=None if self.cross is None else _scaled_gram(self.cross, factors),
        )


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
        zero(width, need & _JUDGED, device) if Need.HELDOUT in need else None,
        empty(width, width) if Need.CROSS in need else None,
    )


def update(
    stats: Statistics, x: Tensor, *, held_out: bool = False, reference: Tensor | None = None
) -> Statistics:
    """`stats` plus the rows of x (tokens, in); sums are accumulated in place, in fp32.

    The gram of the new rows is added by one matrix product with fp32 accumulation. `held_out` rows count
    among those that decisions are judged on, too. `reference` (tokens, in): what the untouched model has in
    their place, wanted where `cross` is.
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
    if stats.cross is not None:
        if reference is None:
            raise ValueError("a cross gram needs what the untouched model has")
        stats.cross.addmm_(reference.reshape(x.shape).to(torch.float32).T, x)
    sample = None if stats.sample is None else _merge_samples(stats.sample, x)
    held = stats.held
    if held_out and held is not None:
        held = update(held, x, reference=reference)
    return replace(stats, tokens=stats.tokens + x.shape[0], sample=sample, held=held)


def nbytes(width: int, need: Need) -> int:
    """Bytes that the statistics of one site of `width` inputs occupy."""
    vectors = sum(n in need for n in (Need.SQUARES, Need.ABSMAX, Need.ABSSUM))
    gram = width * sum(n in need for n in (Need.GRAM, Need.CROSS))
    sample = SAMPLE_ROWS if Need.SAMPLE in need else 0
    held = nbytes(width, need & _JUDGED) if Need.HELDOUT in need else 0
    return 4 * width * (vectors + gram + sample) + held


def _scaled_gram(gram: Tensor, factors: Tensor) -> Tensor:
    """gram / (f fᵀ), a few rows at a time: the divisor is symmetric to the last bit, and never held whole."""
    scaled = torch.empty_like(gram)
    for at in range(0, gram.shape[0], _GRAM_ROWS):
        rows = slice(at, at + _GRAM_ROWS)
        torch.div(gram[rows], factors[rows, None] * factors, out=scaled[rows])
    return scaled


def _more(own: Tensor | None, other: Tensor | None, share: float) -> Tensor | None:
    return own if own is None or other is None else own + share * other


def _less(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if whole is None or part is None else whole - part


def _both(a: T | None, b: T | None, merge: Callable[[T, T], T]) -> T | None:
    if (a is None) != (b is None):
        raise ValueError("statistics of different needs cannot be merged")
    return None if a is None or b is None else merge(a, b)


def _diagonal(gram: Tensor | None) -> Tensor:
    if gram is None:
        raise ValueError("neither squares nor a gram were collected")
    return gram.diagonal()


def _hashes(x: Tensor) -> Tensor:
    """(rows,) int64 hash of the bits of each row. Every element is mixed with its place before it is added,
    or differences of a few elements would cancel: activations have few bits and much in common.
    """
    place = torch.arange(1, x.shape[1] + 1, dtype=torch.int64, device=x.device) * _ODD
    place = (place ^ (place >> 29)) * _ODDER
    found = x.new_empty(x.shape[0], dtype=torch.int64)
    rows = max(1, _HASHED // x.shape[1])
    for at in range(0, x.shape[0], rows):
        bits = x[at : at + rows].contiguous().view(torch.int32).to(torch.int64)
        mixed = bits.add_(place).mul_(_ODD)
        found[at : at + rows] = mixed.bitwise_xor_(mixed >> 32).mul_(place | 1).sum(1)
    found = (found ^ (found >> 31)) * _ODDER
    return found ^ (found >> 29)


def _merge_samples(a: Tensor, b: Tensor) -> Tensor:
    """The distinct rows of smallest hash: a token met a thousand times at the first site is one row."""
    hashes, order = torch.cat((_hashes(a), _hashes(b))).sort(stable=True)
    first = torch.ones_like(hashes, dtype=torch.bool)
    first[1:] = hashes[1:] != hashes[:-1]
    chosen = order[first][:SAMPLE_ROWS]
    return torch.cat((a, b))[chosen]
