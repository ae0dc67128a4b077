"""Learned rounding: codes and scales of a block, moved by the gradient of what comes out of it.

SignRound (Cheng et al. 2023) with three changes: it starts from solved codes (GPTQ) rather than from the
nearest, steps have the size that Adam gives them rather than one for all, and an iterate replaces the
start only if it is better on rows that had no say. Measured in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import RecipeError
from quantkit.numerics.learned import Learned
from quantkit.numerics.solve import Order
from quantkit.protocols import Outcome, Pairs, Quantizer, Tuned, TunedBlock
from quantkit.schemes import Scheme
from quantkit.tensors import QuantizedLinear, QuantizedTensor, dequantize

SUMMARY = "codes and scales learned from each block's output, from a GPTQ start; slow, for 2 and 3 bits"

# Iterates are judged at these shares of the steps: the rate falls to zero, and late ones are the best.
_JUDGED = (0.6, 0.7, 0.8, 0.9, 1.0)
# A block that gains less than this share is tried once more at a fraction of the rate: the first blocks of a
# model, and 4 bits, are lost in the noise of steps that later blocks need.
_ENOUGH, _GENTLER = 0.97, 0.25
# A quantile is taken over about so many elements.
_SAMPLED = 1 << 16


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of learned rounding.

    start       the method that makes the codes to start from
    act_order   as of `gptq`
    corrected   as of `gptq`
    iterations  steps, for every block
    rows        calibration rows in a step
    rate        how far a code may move in the first step, in steps of its grid; falls to zero; a block
                that gains nothing is tried again at a quarter of it
    scales      scales are learned too, where the file stores them as plain floats
    held_out    share of the rows that only judge
    drop        share of the residuals, the largest, that the loss leaves out
    seed        of the order of the rows
    """

    start: Literal["gptq", "rtn"] = "gptq"
    act_order: Order = "group_aware"
    corrected: float = 0.0
    iterations: int = 400
    rows: int = 2
    rate: float = 0.02
    scales: bool = True
    held_out: float = 0.1
    drop: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in ("gptq", "rtn"):
            raise RecipeError(f"signround: start must be gptq or rtn, not {self.start!r}")
        for name in ("iterations", "rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"signround: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.rate < 1:
            raise RecipeError(f"signround: rate must lie between 0 and 1, not {self.rate}")
        for name in ("held_out", "drop"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise RecipeError(f"signround: {name} must lie between 0 and 0.5, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class SignRound:
    """Quantizer and Tuner: `quantize` makes the start, `tune` goes on from it."""

    params: Params
    start: Quantizer[Any]

    @property
    def tuner(self) -> SignRound:
        return self

    @property
    def needs(self) -> Need:
        return self.start.needs

    @property
    def ties_rows(self) -> bool:
        return self.start.ties_rows

    @property
    def regroups_columns(self) -> bool:
        return self.start.regroups_columns

    def accepts(self, scheme: Scheme) -> str | None:
        if scheme.ggml:
            return f"scales of {scheme.numbers} are quantized themselves, and cannot be learned yet; use gptq"
        if scheme.numbers == "fp8":
            return "floats of 8 bits leave nothing to learn; use gptq or rtn"
        if scheme.activations is not None:
            return "learned rounding does not see that inputs are rounded; use gptq or rtn"
        return self.start.accepts(scheme)

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Any:
        return self.start.prepare(stats, scheme)

    def quantize(self, weight: Tensor, prepared: Any, scheme: Scheme) -> Outcome:
        return self.start.quantize(weight, prepared, scheme)

    def tune(
        self,
        block: TunedBlock,
        sources: Mapping[str, Tensor],
        start: Mapping[str, QuantizedLinear],
        schemes: Mapping[str, Scheme],
        pairs: Pairs,
    ) -> Tuned:
        held, rest = split(pairs.rows, self.params.held_out)
        judge = _Judge(block, pairs, held, self.params.drop)
        best = {key: linear.weight for key, linear in start.items()}
        before = lowest = judge(best)
        for rate in (self.params.rate, self.params.rate * _GENTLER):
            learned = {
                key: Learned(linear.weight, sources[key], schemes[key], scales=self.params.scales)
                for key, linear in start.items()
            }
            for now in self._iterates(learned, block, pairs, rest, rate):
                found = judge(now)
                if found < lowest:
                    best, lowest = now, found
            if lowest < _ENOUGH * before:
                break
        return _tuned(start, best, before, lowest)

    def _iterates(
        self,
        learned: Mapping[str, Learned],
        block: TunedBlock,
        pairs: Pairs,
        rows: Sequence[int],
        rate: float,
    ) -> Iterator[dict[str, QuantizedTensor]]:
        """The weights at the steps that are judged."""
        steps = self.params.iterations
        judged = {max(1, round(share * steps)) for share in _JUDGED}
        for number, chosen in enumerate(batches(rows, self.params)):
            falling = rate * (1 - number / steps) ** 2
            _descend(learned, block, [pairs.read(row) for row in chosen], falling, self.params.drop)
            if number + 1 in judged:
                yield {key: weight.quantized() for key, weight in learned.items()}


def quantizer(params: Params) -> SignRound:
    """The method with these parameters."""
    plugin = registry.load("methods", params.start)
    match params.start:
        case "gptq":
            given = plugin.Params(act_order=params.act_order, corrected=params.corrected)
        case "rtn":
            given = plugin.Params(scales="weighted")
    return SignRound(params, plugin.quantizer(given))


def split(rows: int, share: float) -> tuple[list[int], list[int]]:
    """(rows that only judge, evenly spaced; the others). With too few rows, or no share, all do both."""
    count = round(rows * share)
    if count == 0:
        return list(range(rows)), list(range(rows))
    held = [(2 * n + 1) * rows // (2 * count) for n in range(count)]
    return held, sorted(set(range(rows)).difference(held))


def batches(rows: Sequence[int], params: Params) -> Iterator[list[int]]:
    """`params.iterations` lists of rows: every row once in some order, then again in another."""
    random = torch.Generator().manual_seed(params.seed)
    queue: list[int] = []
    for _ in range(params.iterations):
        while len(queue) < params.rows:
            queue += [rows[n] for n in torch.randperm(len(rows), generator=random).tolist()]
        yield queue[: params.rows]
        del queue[: params.rows]


def block_loss(out: Tensor, goal: Tensor, drop: float) -> Tensor:
    """Σ (out − goal)² / Σ goal², without the share `drop` of largest residuals, by a sampled quantile."""
    wanted = goal.to(torch.float32)
    squares = (out.to(torch.float32) - wanted).square()
    if drop:
        step = max(1, squares.numel() // _SAMPLED)
        while math.gcd(step, squares.shape[-1]) > 1:
            # else some channels would never be looked at
            step += 1
        sample = squares.detach().flatten()[::step]
        limit = sample.kthvalue(max(1, round(sample.numel() * (1 - drop)))).values
        squares = squares * (squares.detach() <= limit)
    return squares.sum() / wanted.square().sum()


@dataclass(frozen=True, slots=True)
class _Judge:
    """Mean loss of weights on held-out rows."""

    block: TunedBlock
    pairs: Pairs
    rows: Sequence[int]
    drop: float

    def __call__(self, weights: Mapping[str, QuantizedTensor]) -> float:
        values = {key: dequantize(weight) for key, weight in weights.items()}
        total = 0.0
        with torch.no_grad():
            for row in self.rows:
                hidden, goal = self.pairs.read(row)
                total += float(block_loss(self.block.differentiable(hidden, values), goal, self.drop))
        return total / len(self.rows)


def _descend(
    learned: Mapping[str, Learned],
    block: TunedBlock,
    pairs: Sequence[tuple[Tensor, Tensor]],
    rate: float,
    drop: float,
) -> None:
    """One step of all weights. Rows go through one by one: memory holds the activations of one."""
    values = {key: dequantize(weight.quantized()).requires_grad_() for key, weight in learned.items()}
    for hidden, goal in pairs:
        torch.autograd.backward(block_loss(block.differentiable(hidden, values), goal, drop))
    for key, weight in learned.items():
        gradient = values[key].grad
        # none reaches an expert that no token of these rows chose
        if gradient is not None:
            weight.step(gradient, rate)


def _tuned(
    start: Mapping[str, QuantizedLinear], best: Mapping[str, QuantizedTensor], before: float, after: float
) -> Tuned:
    kept = all(best[key] is linear.weight for key, linear in start.items())
    facts = {"block_loss_start": before, "block_loss": after}
    note = "learned rounding did not lower the loss on held-out rows: the start is kept" if kept else None
    return Tuned({key: replace(linear, weight=best[key]) for key, linear in start.items()}, facts, note)
