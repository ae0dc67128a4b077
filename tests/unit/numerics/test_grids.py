from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import grids
from quantkit.numerics.levels import Integers
from quantkit.numerics.stored import Plain, round_scale
from tests.quantized import restore, steps

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def choose(
    w: Tensor,
    bits: int,
    sym: bool,
    scales: grids.Scales,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of integers, kept in `dtype`."""
    return grids.choose(w, Integers(bits, sym), Plain(dtype), scales, importance)


def error(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int, v: Tensor | None = None) -> Tensor:
    """(…,) squared error of w (…, g) rounded on its grids, weighted by v."""
    square = (restore(steps(w, scale, zero, bits), scale, zero) - w).double().square()
    return (square if v is None else square * v.double()).sum(-1)


def test_absmax_by_hand() -> None:
    # 3.5 / 7 = ½; the sign of the largest does not matter
    w = torch.tensor([[3.5, -1.0, 0.2], [-3.5, 1.0, 0.2]])
    assert choose(w, 4, True, "absmax", F16)[0].flatten().tolist() == [0.5, 0.5]
    assert choose(w, 2, True, "absmax", F16)[0].flatten().tolist() == [3.5, 3.5]


def test_minmax_by_hand() -> None:
    # (2 − (−1)) / 15 = .2; zero point 1 / .2 = 5.  A range without 0 is widened to hold it
    scale, zero = grids.minmax(torch.tensor([[-1.0, 2.0], [3.0, 1.5], [-3.0, -1.5]]), 4, Plain(F32))
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.2, 0.2, 0.2]))
    assert zero.flatten().tolist() == [5, 0, 15]


def test_minmax_rounds_the_scale_before_the_zero_point() -> None:
    scale, zero = grids.minmax(torch.tensor([[-1.0, 2.0]]), 4, Plain(BF16))
    assert float(scale) == float(torch.tensor(0.2).to(BF16))
    assert float(zero) == 5


def test_search_by_hand() -> None:
    # 2 bits: codes −2 … 1. (2, −1) is exact only with a negative scale: −1 · (−2, 1)
    scale, zero = choose(torch.tensor([[2.0, -1.0]]), 2, True, "mse", F32)
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[-1.0]]))
    # (2, 1): nothing fits both signs; codes (1, 1) at s = 1.5 leave .5, (−2, −1) at −1 leave 0
    scale, _ = choose(torch.tensor([[2.0, 1.0]]), 2, True, "mse", F32)
    torch.testing.assert_close(scale, torch.tensor([[-1.0]]))


def test_weighted_search_by_hand() -> None:
    # 2 bits, three equal weights and a large one that meets no input: s = 1 or −1 serves the three
    w = torch.tensor([[1.0, -1.0, 1.0, 4.0]])
    v = torch.tensor([1.0, 1.0, 1.0, 0.0])
    scale, _ = choose(w, 2, True, "weighted", F32, v)
    value = restore(steps(w, scale, None, 2), scale, None)
    # the floor of 1e-3 of the mean importance pulls by less than one part in a hundred
    assert float((value[0, :3] - w[0, :3]).abs().max()) < 0.02
    plain, _ = choose(w, 2, True, "mse", F32)
    assert float(error(w, plain, None, 2, v)) > 0.9


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("scales", ["mse", "weighted"])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_search_is_never_worse_than_absmax_on_its_own_objective(
    bits: int, sym: bool, scales: grids.Scales, dtype: torch.dtype, rng: torch.Generator
) -> None:
    normal = torch.randn(150, 16, generator=rng)
    low, high = Integers(bits, sym).limits
    on_grid = torch.randint(low + 1, high + 1, (150, 16), generator=rng).float() * 0.013
    heavy = normal / torch.rand(150, 16, generator=rng).clamp(min=0.01)
    one_sided = torch.rand(150, 16, generator=rng)
    w = torch.cat([normal, on_grid, heavy, one_sided, torch.zeros(1, 16), torch.ones(1, 16)])
    v = torch.rand(16, generator=rng) ** 4
    floored = None if scales == "mse" else v.clamp(min=1e-3 * float(v.mean()))
    searched = error(w, *choose(w, bits, sym, scales, dtype, v), bits, floored)
    plain = error(w, *choose(w, bits, sym, "absmax", dtype), bits, floored)
    # fp32 sums of 16 squares compare two candidates that may be equal
    assert bool((searched <= plain * (1 + 1e-5)).all())
    assert float(searched.sum()) < float(plain.sum())


def exact(w: Tensor, v: Tensor, bits: int) -> float:
    """Least weighted error of any scale: between breakpoints of 1/s the codes, so the best s, are fixed."""
    best, (low, high) = 0.0, Integers(bits, True).limits
    for signed in (w, -w):
        points = sorted({(k + 0.5) / abs(float(x)) for x in w for k in range(-low)})
        middles = [(a + b) / 2 for a, b in zip(points, [*points[1:], points[-1] * 2], strict=True)]
        codes = torch.stack([torch.round(signed * m).clamp(low, high) for m in middles])
        gain = (codes * signed * v).sum(1).square() / (codes * codes * v).sum(1).clamp(min=1e-300)
        best = max(best, float(gain.max()))
    return float((v * w * w).sum()) - best


@pytest.mark.parametrize("bits, share", [(2, 1.005), (3, 1.005), (4, 1.05)])
def test_search_comes_close_to_the_exact_sweep(bits: int, share: float, rng: torch.Generator) -> None:
    w = torch.randn(40, 8, generator=rng)
    v = torch.rand(40, 8, generator=rng) + 0.05
    found = error(w, choose(w, bits, True, "weighted", F32, v)[0], None, bits, v)
    best = torch.tensor([exact(a.double(), b.double(), bits) for a, b in zip(w, v, strict=True)])
    assert bool((found >= best.double() - 1e-6).all())
    assert float(found.sum()) <= share * float(best.sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_asymmetric_search_comes_close_to_brute_force(bits: int, rng: torch.Generator) -> None:
    w = torch.randn(40, 8, generator=rng) + 0.5 * torch.randn(40, 1, generator=rng)
    found = error(w, *choose(w, bits, False, "mse", F32), bits).sum()
    full = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)).clamp(min=1e-9) / ((1 << bits) - 1)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for zero in range(1 << bits):
        for factor in torch.linspace(0.3, 1.6, 300):
            best = torch.minimum(best, error(w, full * factor, torch.tensor([[float(zero)]]), bits))
    assert float(found) <= 1.06 * float(best.sum())


def gaussian_error(scales: grids.Scales, sym: bool, rng: torch.Generator) -> float:
    w = torch.randn(2000, 128, generator=rng)
    return float(error(w, *choose(w, 4, sym, scales, F16), 4).mean() / 128)


def test_error_on_gaussian_weights_pins_every_convention(rng: torch.Generator) -> None:
    """Mean squared error of 4 bits in groups of 128 on a unit Gaussian, known values within 2 %."""
    # absmax / 7; the half step convention (/ 7.5) would give .0123, the signed one (/ −8) .0107
    assert gaussian_error("absmax", True, rng) == pytest.approx(0.0138, rel=0.02)
    # a search over positive scales gives .0102; both signs take another 8 % off
    assert gaussian_error("mse", True, rng) == pytest.approx(0.0102 * 0.92, rel=0.02)
    assert gaussian_error("mse", False, rng) == pytest.approx(0.0090, rel=0.02)


def test_about_half_of_all_groups_fit_the_mirrored_grid_better(rng: torch.Generator) -> None:
    scale, _ = choose(torch.randn(1000, 32, generator=rng), 4, True, "mse", F16)
    assert 0.4 < float((scale < 0).float().mean()) < 0.6


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("sym", [True, False])
def test_zero_groups_get_scale_one_and_stay_zero(scales: grids.Scales, sym: bool) -> None:
    w = torch.zeros(2, 8)
    scale, zero = choose(w, 4, sym, scales, F16, torch.ones(8))
    assert scale.tolist() == [[1.0], [1.0]]
    assert float(error(w, scale, zero, 4).sum()) == 0


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-3, 200.0])
def test_constant_and_single_element_groups_are_nearly_exact(
    scales: grids.Scales, sym: bool, value: float
) -> None:
    for width in (1, 8):
        w = torch.full((1, width), value)
        scale, zero = choose(w, 4, sym, scales, F16, torch.ones(width))
        found = restore(steps(w, scale, zero, 4), scale, zero)
        # the scale is rounded to 11 bits
        torch.testing.assert_close(found, w, rtol=2**-11, atol=0)


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
def test_dead_inputs_do_not_ruin_their_weights(scales: grids.Scales, rng: torch.Generator) -> None:
    w = torch.randn(20, 16, generator=rng)
    for v in (torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), 1e30)):
        scale, _ = choose(w, 4, True, scales, F16, v)
        assert float(error(w, scale, None, 4).sum() / w.square().sum()) < 0.02


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_scales_are_values_of_their_stored_dtype(
    sym: bool, scales: grids.Scales, dtype: torch.dtype, rng: torch.Generator
) -> None:
    w = torch.randn(9, 16, generator=rng)
    scale, zero = choose(w, 3, sym, scales, dtype, torch.rand(16, generator=rng))
    assert scale.dtype == F32
    assert torch.equal(scale.to(dtype).float(), scale)
    assert scale.shape == (9, 1)
    assert (zero is None) == sym
    if zero is not None:
        assert torch.equal(zero, zero.round())
        assert float(zero.min()) >= 0 and float(zero.max()) <= 7


def test_rounding_a_scale_by_hand() -> None:
    rounded = round_scale(torch.tensor([0.0, 1e-9, -1e-9, 0.1, -2.0]), F16)
    tiny = 2.0**-24  # the smallest fp16 number
    assert rounded.tolist() == [1.0, tiny, -tiny, float(torch.tensor(0.1).half()), -2.0]


def test_a_scale_beyond_its_dtype_is_refused_and_others_hold_it() -> None:
    w = torch.tensor([[1e6, -1.0]])
    with pytest.raises(NumericsError, match=r"1.43e\+05 does not fit float16") as caught:
        choose(w, 4, True, "absmax", F16)
    assert caught.value.remedy is not None and "bfloat16" in caught.value.remedy
    scale, _ = choose(w, 4, True, "mse", BF16)
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(scales: grids.Scales, bad: float) -> None:
    w = torch.ones(2, 4)
    w[1, 2] = bad
    with pytest.raises(NumericsError, match="weights hold non-finite"):
        choose(w, 4, True, scales, F16, torch.ones(4))


def test_weighted_search_refuses_a_missing_or_broken_importance() -> None:
    with pytest.raises(NumericsError, match="there is none"):
        choose(torch.ones(1, 4), 4, True, "weighted", F16)
    with pytest.raises(NumericsError, match="importance of the inputs holds non-finite"):
        choose(torch.ones(1, 4), 4, True, "weighted", F16, torch.tensor([1.0, torch.nan, 1, 1]))


def test_large_inputs_are_searched_in_pieces(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = torch.randn(7, 3, 8, generator=rng), torch.rand(3, 8, generator=rng)
    for sym in (True, False):
        whole = choose(w, 3, sym, "weighted", F16, v)
        with monkeypatch.context() as patch:
            patch.setattr(grids, "_CHUNK", 16)
            pieces = choose(w, 3, sym, "weighted", F16, v)
        assert torch.equal(whole[0], pieces[0])
        assert whole[0].shape == (7, 3, 1)
        if whole[1] is not None and pieces[1] is not None:
            assert torch.equal(whole[1], pieces[1])
