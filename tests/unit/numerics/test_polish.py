from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantkit.numerics.cholesky import factor
from quantkit.numerics.curvature import Curvature, curvature
from quantkit.numerics.feedback import StaticGroups, round_with_feedback
from quantkit.numerics.levels import Integers
from quantkit.numerics.polish import polish
from tests.quantized import absmax, activations, restore, steps

W4 = Integers(4, True)
W3 = Integers(3, True)


def loss(w: Tensor, value: Tensor, gram: Tensor) -> Tensor:
    """(out,) of Δ·A·Δᵀ in fp64."""
    delta = (value - w).double()
    return torch.einsum("oi,ij,oj->o", delta, gram.double(), delta)


def grid_of(scale: Tensor, width: int, zero: Tensor | None = None) -> StaticGroups:
    return StaticGroups(scale, zero, torch.zeros(width, dtype=torch.long))


def seen(gram: Tensor) -> Curvature:
    """The matrix itself as a curvature."""
    return curvature(gram, 1, shrink=False)


def gram_of(width: int, rng: torch.Generator) -> Tensor:
    x = activations(width, 3 * width, rng)
    return x.T @ x / x.shape[0]


def of(gram: Tensor) -> Curvature:
    """The gram itself, as the curvature of one token."""
    return curvature(gram, 1, shrink=False)


def test_one_column_moves_by_hand() -> None:
    # w = (.4, .4), A = [[2, 1.5], [1.5, 2]], scale 1, codes (0, 0): E = (−.4, −.4), M = E·A = (−1.4, −1.4)
    # column 0: 0 + 1.4/2 = .7 → 1; M = (−1.4 + 2, −1.4 + 1.5) = (.6, .1)
    # column 1: 0 − .1/2 = −.05 → 0.  Loss before .32 + .48 + .32 = 1.12, after (E = (.6, −.4))
    # 2·.36 − 2·1.5·.24 + 2·.16 = .32
    codes = torch.zeros(2, 1)
    w = torch.tensor([[0.4], [0.4]])
    gram = torch.tensor([[2.0, 1.5], [1.5, 2.0]])
    before = loss(w.T, codes.T, gram)
    polish(codes, w, of(gram), grid_of(torch.ones(1, 1), 2), W4, 1)
    assert codes.flatten().tolist() == [1, 0]
    torch.testing.assert_close(before, torch.tensor([1.12], dtype=torch.float64))
    torch.testing.assert_close(loss(w.T, codes.T, gram), torch.tensor([0.32], dtype=torch.float64))


@pytest.mark.parametrize("start", ["zeros", "nearest", "random"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_loss_never_grows_whatever_made_the_codes(start: str, sym: bool, rng: torch.Generator) -> None:
    width, out, bits = 40, 6, 3
    w, gram = torch.randn(out, width, generator=rng), gram_of(width, rng)
    scale, zero = absmax(w, bits, zero=not sym)
    low, high = Integers(bits, sym).limits
    codes = {
        "zeros": torch.zeros(out, width),
        "nearest": steps(w, scale, zero, bits),
        "random": torch.randint(low, high + 1, (out, width), generator=rng).float(),
    }[start]
    grid, codes = grid_of(scale, width, zero), codes.T.contiguous()
    losses = [loss(w, restore(codes.T, scale, zero), gram)]
    for _ in range(3):
        polish(codes, w.T.contiguous(), of(gram), grid, Integers(bits, sym), 1, 16)
        assert low <= float(codes.min()) and float(codes.max()) <= high
        losses.append(loss(w, restore(codes.T, scale, zero), gram))
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert float(losses[-1].sum()) < float(losses[0].sum())


def test_batches_change_nothing(rng: torch.Generator) -> None:
    w, gram = torch.randn(4, 30, generator=rng).double(), gram_of(30, rng).double()
    results = []
    for batch in (1, 7, 30, 128):
        codes = steps(w, torch.tensor(0.4), None, 3).T.contiguous()
        polish(
            codes,
            w.T.contiguous(),
            of(gram),
            grid_of(torch.full((4, 1), 0.4), 30),
            W3,
            3,
            batch,
        )
        results.append(codes)
    assert all(torch.equal(r, results[0]) for r in results[1:])


def test_no_sweeps_and_an_exact_start_change_nothing(rng: torch.Generator) -> None:
    codes = torch.randint(-4, 4, (10, 3), generator=rng).float()
    w, gram = codes * 0.5, gram_of(10, rng)
    polished = codes.clone()
    polish(polished, w, of(gram), grid_of(torch.full((3, 1), 0.5), 10), W3, 4)
    assert torch.equal(polished, codes)
    w = torch.randn(10, 3, generator=rng)
    polish(polished, w, of(gram), grid_of(torch.full((3, 1), 0.5), 10), W3, 0)
    assert torch.equal(polished, codes)


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_polish_and_feedback_are_ordered(seed: int) -> None:
    """On 5 inputs and 2 bits all 1,024 code words are tried: best ≤ polished feedback ≤ feedback."""
    rng = torch.Generator().manual_seed(seed)
    width, bits, out = 5, 2, 8
    w, gram = torch.randn(out, width, generator=rng), gram_of(width, rng)
    scale = absmax(w, bits)[0]
    found = factor(of(gram), 0.01)
    grid = grid_of(scale, width)
    codes = round_with_feedback(w.T.contiguous(), found, grid, Integers(bits, True)).codes_io
    fed = loss(w, codes.T * scale, gram)
    polish(codes, w.T.contiguous(), of(gram), grid, Integers(bits, True), 4)
    polished = loss(w, codes.T * scale, gram)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=width)), dtype=torch.float32)
    best = torch.stack([loss(w[o], every * scale[o], gram).min() for o in range(out)])
    assert bool((best <= polished * (1 + 1e-5)).all())
    assert bool((polished <= fed * (1 + 1e-5)).all())
