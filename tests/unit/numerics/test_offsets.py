from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import hqq, offsets

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (F16, BF16, F32)


def value(w: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """What w becomes on its grids."""
    scale, zero = grid
    return scale * (torch.round(w / scale + zero).clamp(0, 2**bits - 1) - zero)


def error(w: Tensor, grid: tuple[Tensor, Tensor], bits: int, v: Tensor | None = None) -> Tensor:
    """(…,) squared error of w (…, g), weighted by v."""
    square = (value(w, grid, bits) - w).double().square()
    return (square if v is None else square * v.double()).sum(-1)


def test_minmax_by_hand() -> None:
    # 2 bits, three steps: (1.25 + .25) / 3 = .5 and .25 / .5 = .5; a range without 0 stays as it is
    w = torch.tensor([[-0.25, 0.4, 1.25], [3.0, 4.0, 4.5], [-4.5, -4.0, -3.0]])
    scale, zero = offsets.minmax(w, 2, F16)
    assert scale.tolist() == [[0.5]] * 3
    assert zero.tolist() == [[0.5], [-6.0], [9.0]]


def test_minmax_rounds_the_scale_before_the_zero_point() -> None:
    scale, zero = offsets.minmax(torch.tensor([[-1.0, 2.0]]), 4, BF16)
    assert float(scale) == float(torch.tensor(0.2).to(BF16))
    assert float(zero) == float((1 / scale).to(BF16))


def test_fit_by_hand() -> None:
    # 1 bit is two levels, best at the means of the two halves
    scale, zero = offsets.fit(torch.tensor([[0.0, 1.0, 5.0, 6.0]]), 1, F32, None)
    torch.testing.assert_close(scale, torch.tensor([[5.0]]))
    torch.testing.assert_close(zero, torch.tensor([[-0.1]]))
    # counted three times, the 0 pulls its level to (3·0 + 1·1) / 4
    v = torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    scale, zero = offsets.fit(torch.tensor([[0.0, 1.0, 5.0, 6.0]]), 1, F32, v)
    torch.testing.assert_close(-scale * zero, torch.tensor([[0.25]]))
    torch.testing.assert_close(scale * (1 - zero), torch.tensor([[5.5]]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_on_a_grid_are_found_exactly(bits: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 2**bits, (100, 32), generator=rng).float()
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    w = 0.125 * (codes - torch.rand(100, 1, generator=rng).mul(64).round() / 16)
    assert float(error(w, offsets.fit(w, bits, F16, None), bits).max()) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_never_worse_than_minmax_as_stored(
    bits: int, dtype: torch.dtype, weighted: bool, rng: torch.Generator
) -> None:
    normal = torch.randn(100, 16, generator=rng)
    heavy = normal / torch.rand(100, 16, generator=rng).clamp(min=0.01)
    on_grid = torch.randint(0, 2**bits, (100, 16), generator=rng) * 0.013 - 0.1
    far = 20 + 0.1 * normal
    few = torch.randint(0, 2, (100, 16), generator=rng).float()
    w = torch.cat([normal, heavy, on_grid, far, few, torch.zeros(1, 16), torch.ones(1, 16)])
    v = torch.rand(16, generator=rng) ** 4 + 1e-3 if weighted else None
    scale, zero = offsets.fit(w, bits, dtype, v)
    for stored in (scale, zero):
        assert stored.shape == (502, 1) and stored.dtype == F32
        assert torch.equal(stored.to(dtype).float(), stored)
    found, plain = error(w, (scale, zero), bits, v), error(w, offsets.minmax(w, bits, dtype), bits, v)
    assert bool((found <= plain * (1 + 1e-6)).all())
    assert float(found.sum()) < float(plain.sum())


@pytest.mark.parametrize("bits, share", [(1, 1.001), (2, 1.01), (3, 1.04)])
def test_fit_comes_close_to_brute_force(bits: int, share: float, rng: torch.Generator) -> None:
    w = torch.randn(40, 12, generator=rng)
    v = torch.rand(40, 12, generator=rng) + 0.05
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for first in torch.linspace(-0.1, 0.6, 60):
        for last in torch.linspace(-0.1, 0.6, 60):
            start = low + first * (high - low)
            scale = (high - last * (high - low) - start).clamp(min=1e-3) / (2**bits - 1)
            best = torch.minimum(best, error(w, (scale, -start / scale), bits, v))
    found = error(w, offsets.fit(w, bits, F32, v), bits, v)
    assert float(found.sum()) <= share * float(best.sum())


# mean squared error on a unit Gaussian in groups of 64: least squares, HQQ's solver, the range of min and max
GAUSSIAN = {
    1: (0.3426, 2.18, 2.74),
    2: (0.1014, 0.1877, 0.2029),
    3: (0.0269, 0.0333, 0.0369),
    4: (0.00654, 0.00758, 0.00803),
    8: (2.32e-5, 2.58e-5, 2.79e-5),
}


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_error_on_gaussian_weights(bits: int, rng: torch.Generator) -> None:
    w = torch.randn(2000, 64, generator=rng)
    solved = hqq.solve(w, bits, 1)
    grids = (
        offsets.fit(w, bits, F16, None),
        (solved[0].half().float(), solved[1].half().float()),
        offsets.minmax(w, bits, F16),
    )
    found = [float(error(w, grid, bits).mean() / 64) for grid in grids]
    assert found == [pytest.approx(expected, rel=0.02) for expected in GAUSSIAN[bits]]


@pytest.mark.parametrize("bits, share", [(2, 0.55), (3, 0.8), (4, 0.86)])
def test_importance_takes_more_off_than_hqq_can(bits: int, share: float, rng: torch.Generator) -> None:
    w, v = torch.randn(500, 64, generator=rng), torch.rand(64, generator=rng) ** 3 + 1e-3
    weighted = float(error(w, offsets.fit(w, bits, F16, v), bits, v).sum())
    plain = float(error(w, offsets.fit(w, bits, F16, None), bits, v).sum())
    assert weighted < plain
    assert weighted < share * float(error(w, hqq.solve(w, bits, 1), bits, v).sum())


def test_a_large_weight_that_meets_nothing_is_given_up(rng: torch.Generator) -> None:
    w, v = torch.randn(50, 32, generator=rng), torch.ones(32)
    w[:, 3], v[3] = 40.0, 1e-3
    rest = torch.arange(32) != 3
    off = (value(w, offsets.fit(w, 4, F16, v), 4) - w)[:, rest]
    assert float(off.square().mean()) < 0.02
    assert float((value(w, offsets.fit(w, 4, F16, None), 4) - w)[:, rest].square().mean()) > 0.3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8])
def test_equal_weights_are_exact(bits: int, dtype: torch.dtype, width: int) -> None:
    # of 8 significant bits, as every bfloat16 has
    levels = torch.tensor([0.0, 0.25, -0.25, 3.14e-2, -7.7e-4, 1e-6, 1000.0, -30000.0]).to(BF16).float()
    w = levels[:, None].repeat(1, width)
    for grid in (offsets.minmax(w, bits, dtype), offsets.fit(w, bits, dtype, None)):
        assert bool(torch.isfinite(grid[0]).all()) and bool((grid[0] > 0).all())
        assert torch.equal(value(w, grid, bits), w)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_far_from_zero_keep_their_level(bits: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Their zero points would overflow float16: spans from a billionth to a hundredth of the level."""
    span = torch.logspace(-9, -2, 40)[:, None]
    w = torch.tensor([[5.0], [-300.0], [1e-3]])[:, None] * (1 + span * torch.rand(40, 16, generator=rng))
    for grid in (offsets.minmax(w, bits, dtype), offsets.fit(w, bits, dtype, None)):
        assert all(bool(torch.isfinite(part).all()) for part in grid)
        off = (value(w, grid, bits) - w).abs() / w.abs()
        # a step of the stored dtype, and what the bits leave of the span
        assert bool((off <= 1.1 * torch.finfo(dtype).eps + 1.01 * span).all())


def test_a_scale_beyond_its_dtype_is_refused_and_others_hold_it() -> None:
    w = torch.tensor([[4e5, -4e5, 1.0]])
    for choose in (offsets.minmax, lambda w, b, d: offsets.fit(w, b, d, None)):
        with pytest.raises(NumericsError, match="does not fit float16"):
            choose(w, 2, F16)
        assert bool(torch.isfinite(choose(w, 2, BF16)[0]).all())


def test_pieces_and_shapes(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = torch.randn(7, 3, 8, generator=rng), torch.rand(3, 8, generator=rng) + 0.01
    whole = offsets.fit(w, 3, F16, v)
    assert whole[0].shape == whole[1].shape == (7, 3, 1)
    for importance in (v.expand(7, 3, 8), v[None]):
        assert all(map(torch.equal, offsets.fit(w, 3, F16, importance), whole))
    flat = offsets.fit(w.view(21, 8), 3, F16, v.repeat(7, 1))
    assert all(torch.equal(a.view(7, 3, 1), b) for a, b in zip(flat, whole, strict=True))
    single = offsets.fit(w[2, 1], 3, F16, v[1])
    assert all(torch.equal(a, b[2, 1]) for a, b in zip(single, whole, strict=True))
    monkeypatch.setattr(offsets, "_CHUNK", 1)
    assert all(map(torch.equal, offsets.fit(w, 3, F16, v), whole))


def test_fit_follows_the_weights(rng: torch.Generator) -> None:
    """Twice the weights: twice the scale. Importance counts in proportion only. The inputs stay."""
    w, v = torch.randn(60, 32, generator=rng), torch.rand(60, 32, generator=rng) + 0.01
    kept, known = w.clone(), v.clone()
    scale, zero = offsets.fit(w, 4, F32, v)
    double, same = offsets.fit(2 * w, 4, F32, v)
    assert torch.equal(double, 2 * scale) and torch.equal(same, zero)
    assert all(map(torch.equal, offsets.fit(w, 4, F32, 4 * v), (scale, zero)))
    assert torch.equal(w, kept) and torch.equal(v, known)
