from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import hqq

WORKED = torch.tensor(
    [[-0.30, -0.10, 0.05, 0.10, 0.20, 0.25, 0.40, 1.20], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2]]
)


def test_worked_example_in_4_bits() -> None:
    scale, zero = hqq.solve(WORKED, 4, 1)
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.1, 0.046666667]))
    torch.testing.assert_close(zero.flatten(), torch.tensor([3.125, 4.03571415]), atol=1e-5, rtol=0)
    codes = hqq.codes(WORKED, scale, zero, 4, 1)
    assert codes.tolist() == [[0, 2, 4, 4, 5, 6, 7, 15], [15, 13, 10, 8, 6, 4, 2, 0]]
    value = scale * (codes - zero)
    expected = [-0.3125, -0.1125, 0.0875, 0.0875, 0.1875, 0.2875, 0.3875, 1.1875]
    torch.testing.assert_close(value[0], torch.tensor(expected))


def test_worked_example_in_8_bits() -> None:
    scale, zero = hqq.solve(WORKED, 8, 1)
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.00588235306, 0.00274509797]))
    torch.testing.assert_close(zero.flatten(), torch.tensor([51.125, 72.8571472]))
    assert hqq.codes(WORKED, scale, zero, 8, 1).tolist() == [
        [0, 34, 60, 68, 85, 94, 119, 255],
        [255, 219, 182, 146, 109, 73, 36, 0],
    ]


def as_published(
    w: Tensor, bits: int, axis: int, p: float = 0.7, beta: float = 10.0
) -> tuple[Tensor, Tensor]:
    """The solver line by line, on whole matrices."""
    last = 2**bits - 1
    low, high = w.amin(axis, keepdim=True), w.amax(axis, keepdim=True)
    s = torch.where(high - low <= 1e-4, torch.ones_like(low), last / (high - low)).clamp(max=2e4)
    z = -low * s
    if bits == 4:
        z = z.round()
    best = float("inf")
    for _ in range(20):
        q = torch.round(w * s + z).clamp(0, last)
        e = w - (q - z) / s
        shrunk = e.sign() * (e.abs() - (1 / beta) * e.abs() ** (p - 1)).clamp(min=0)
        z = (q - (w - shrunk) * s).mean(axis, keepdim=True)
        error = float(e.abs().mean())
        if error >= best:
            break
        best = error
    return 1 / s, z


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [0.02, 1.0, 5.0])
def test_every_bit_is_that_of_the_published_steps(
    bits: int, axis: int, size: float, rng: torch.Generator
) -> None:
    """Small errors count as squares and take a shorter path; around 1, both paths are needed."""
    w = torch.randn(128, 64, generator=rng) * size + size * torch.rand(1, 64, generator=rng)
    found, expected = hqq.solve(w, bits, axis), as_published(w, bits, axis)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("p, beta", [(1.0, 10.0), (0.5, 1.0), (0.7, 1000.0)])
def test_parameters_of_the_shrinkage(p: float, beta: float, rng: torch.Generator) -> None:
    w = torch.randn(64, 32, generator=rng)
    found = hqq.solve(w, 2, 1, p=p, beta=beta)
    assert torch.equal(found[1], as_published(w, 2, 1, p, beta)[1])
    assert not torch.equal(found[1], hqq.solve(w, 2, 1)[1])


def test_small_errors_make_least_squares(rng: torch.Generator) -> None:
    """Far below the threshold z is the mean of q − w/s, whatever p and beta are."""
    w = torch.randn(64, 32, generator=rng) * 0.02
    assert torch.equal(hqq.solve(w, 3, 1)[1], hqq.solve(w, 3, 1, p=0.9, beta=5.0)[1])


def test_one_iteration_moves_the_zero_point_once() -> None:
    scale, zero = hqq.solve(WORKED, 3, 1, iterations=1)
    low, high = WORKED.amin(1, keepdim=True), WORKED.amax(1, keepdim=True)
    torch.testing.assert_close(scale, (high - low) / 7)
    start = -low / scale
    q = torch.round(WORKED / scale + start).clamp(0, 7)
    torch.testing.assert_close(zero, (q - WORKED / scale).mean(1, keepdim=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_large_matrices_are_solved_in_pieces(
    axis: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(320, 320, generator=rng)
    whole = hqq.solve(w, 2, axis)
    codes = hqq.codes(w, *whole, 2, axis)
    monkeypatch.setattr(hqq, "_CHUNK", 1)
    pieces = hqq.solve(w, 2, axis)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])
    assert torch.equal(hqq.codes(w, *pieces, 2, axis), codes)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_equal_weights_and_narrow_groups(bits: int) -> None:
    w = torch.tensor([[0.0] * 8, [0.03] * 8, [-2.5] * 8, [0.3] * 4 + [0.30004] * 4])
    scale, zero = hqq.solve(w, bits, 1)
    assert scale.flatten().tolist() == [1, 1, 1, 1]
    value = scale * (hqq.codes(w, scale, zero, bits, 1) - zero)
    torch.testing.assert_close(value, w, atol=3e-5, rtol=0)
    assert float(value[0].abs().max()) == 0


def test_scales_stop_at_one_over_20000(rng: torch.Generator) -> None:
    w = torch.rand(4, 16, generator=rng) * 2e-4
    assert hqq.solve(w, 8, 1)[0].tolist() == [[pytest.approx(1 / 2e4)]] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    w = WORKED.clone()
    w[1, 3] = bad
    with pytest.raises(NumericsError, match="non-finite"):
        hqq.solve(w, 4, 1)


def test_the_input_stays(rng: torch.Generator) -> None:
    w = torch.randn(8, 16, generator=rng)
    kept = w.clone()
    hqq.codes(w, *hqq.solve(w, 4, 0), 4, 0)
    assert torch.equal(w, kept)
