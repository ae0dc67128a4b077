from __future__ import annotations

import pytest
import torch

from quantkit.numerics import affine


def test_limits_are_signed_when_symmetric() -> None:
    assert affine.limits(4, True) == (-8, 7)
    assert affine.limits(4, False) == (0, 15)
    assert affine.limits(2, True) == (-2, 1)
    assert affine.limits(8, False) == (0, 255)


def test_symmetric_steps_round_and_clip() -> None:
    # 0.13 / 0.125 = 1.04 → 1; −1.2 / 0.125 = −9.6 → −8; 1 / 0.125 = 8 → 7
    w = torch.tensor([0.13, -1.2, 1.0, 0.0])
    code = affine.steps(w, torch.tensor([0.125]), None, 4)
    assert code.tolist() == [1, -8, 7, 0]
    assert affine.restore(code, torch.tensor([0.125]), None).tolist() == [0.125, -1.0, 0.875, 0.0]


def test_asymmetric_steps_add_the_zero_point_after_rounding() -> None:
    # scale ½, zero point 3: −1 → −2 + 3 = 1; 0 → 3; 1.2 → 2 + 3 = 5; −5 → −10 + 3 < 0; 100 → 15
    w = torch.tensor([-1.0, 0.0, 1.2, -5.0, 100.0])
    scale, zero = torch.tensor([0.5]), torch.tensor([3.0])
    code = affine.steps(w, scale, zero, 4)
    assert code.tolist() == [1, 3, 5, 0, 15]
    assert affine.restore(code, scale, zero).tolist() == [-1.0, 0.0, 1.0, -1.5, 6.0]


def test_ties_go_to_even() -> None:
    w = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert affine.steps(w, torch.tensor([1.0]), None, 4).tolist() == [0, 2, 2, 0, -2]


def test_a_negative_scale_mirrors_the_grid() -> None:
    # with scale −1 the reachable values are −7 … 8
    w = torch.tensor([8.0, -8.0, 3.0])
    code = affine.steps(w, torch.tensor([-1.0]), None, 4)
    assert code.tolist() == [-8, 7, -3]
    assert affine.restore(code, torch.tensor([-1.0]), None).tolist() == [8.0, -7.0, 3.0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_codes_fit_their_dtype_and_stay_on_the_grid(bits: int, sym: bool) -> None:
    low, high = affine.limits(bits, sym)
    codes = torch.arange(low, high + 1, dtype=torch.float32)
    zero = None if sym else torch.tensor([float(1 << (bits - 1))])
    scale = torch.tensor([0.0371])
    again = affine.steps(affine.restore(codes, scale, zero), scale, zero, bits)
    assert torch.equal(again, codes)
    assert torch.equal(codes.to(affine.code_dtype(sym)).float(), codes)
