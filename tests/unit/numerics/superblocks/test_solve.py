"""Error feedback inside super-blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import cholesky
from quantkit.numerics.curvature import curvature
from quantkit.numerics.solve import Seen, Steps
from quantkit.numerics.superblocks import solve
from quantkit.numerics.superblocks.grids import SUPERBLOCKS
from quantkit.numerics.superblocks.search import nearest
from quantkit.tensors import dequantize, rows, stacked

KINDS = [name for name in SUPERBLOCKS if name not in ("q8_0", "tq1_0", "tq2_0")]
STEPS = Steps(2, 2)


def gram_of(width: int, rng: torch.Generator) -> Tensor:
    """Correlated inputs of very different sizes, as those of a model are."""
    x = torch.randn(4 * width, 24, generator=rng) @ torch.randn(24, width, generator=rng)
    x = (x + torch.randn(4 * width, width, generator=rng)) * torch.randn(width, generator=rng).exp()
    return x.T @ x


def seen_of(gram: Tensor, kind: str) -> Seen:
    tokens = 4 * gram.shape[0]
    found = curvature(gram, tokens, shrink=False)
    found = found.ordered(solve.order(kind, found.diagonal))
    return Seen(found, cholesky.factor(found, 0.01), gram.diagonal() / tokens, None)


def loss(values: Tensor, w: Tensor, gram: Tensor) -> float:
    error = (values - w).double()
    return float(((error @ gram.double()) * error).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_is_better_than_the_one_before_and_than_rounding(kind: str, rng: torch.Generator) -> None:
    gram = gram_of(512, rng)
    w = torch.randn(24, 512, generator=rng)
    seen = seen_of(gram, kind)
    rounded = loss(dequantize(nearest(kind, w, seen.importance)), w, gram)
    found = [loss(dequantize(q), w, gram) for q in solve.stages(kind, w, seen, STEPS)]
    assert len(found) == STEPS.stages
    assert found[0] < 0.9 * rounded
    assert found[1] < found[0] and found[2] < found[1]


@pytest.mark.parametrize("kind", ["q4_k", "q3_k", "q4_0"])
def test_rows_do_not_know_of_one_another(kind: str, rng: torch.Generator) -> None:
    gram = gram_of(256, rng)
    w = torch.randn(6, 256, generator=rng)
    seen = seen_of(gram, kind)
    *_, whole = solve.stages(kind, w, seen, STEPS)
    parts = []
    for chosen in (slice(0, 2), slice(2, 6)):
        *_, part = solve.stages(kind, w[chosen], seen, STEPS)
        torch.testing.assert_close(dequantize(part), dequantize(rows(whole, chosen)))
        parts.append(part)
    torch.testing.assert_close(dequantize(stacked(parts)), dequantize(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_inputs_that_were_never_seen(kind: str, rng: torch.Generator) -> None:
    gram = gram_of(256, rng)
    gram[7], gram[:, 7] = 0, 0
    w = torch.randn(3, 256, generator=rng)
    w[1] = 0
    for q in solve.stages(kind, w, seen_of(gram, kind), STEPS):
        values = dequantize(q)
        assert bool(torch.isfinite(values).all())
        assert bool((values[1] == 0).all())
        assert abs(float(values[0, 7] - w[0, 7])) < 1.5


def test_super_blocks_are_met_whole_and_important_ones_first() -> None:
    diagonal = torch.ones(512)
    diagonal[300] = 5.0
    diagonal[2] = 3.0
    order = solve.order("q4_k", diagonal)
    assert order[0] == 300 and order[256] == 2
    assert set(order[:256].tolist()) == set(range(256, 512))
