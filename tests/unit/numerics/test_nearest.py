from __future__ import annotations

import pytest
import torch

from quantkit.numerics.nearest import fit_groups, nearest
from quantkit.schemes import Scheme
from quantkit.tensors import dequantize


def test_groups_of_two_by_hand() -> None:
    # 3 bits, scale max|w| / 3: (3, .9) has 1, codes 3, 1; (−6, 3.2) has 2, codes −3, 2
    # second row: zeros have 1; (.3, −.1) has .1, codes 3, −1
    w = torch.tensor([[3.0, 0.9, -6.0, 3.2], [0.0, 0.0, 0.3, -0.1]])
    q = nearest(w, Scheme(3, 2, scale_dtype="float32"), "absmax")
    assert q.codes.tolist() == [[3, 1, -3, 2], [0, 0, 3, -1]]
    assert q.codes.dtype == torch.int8
    assert isinstance(q.scale, torch.Tensor)
    torch.testing.assert_close(q.scale, torch.tensor([[1.0, 2.0], [1.0, 0.1]]))
    assert q.group == (1, 2)
    torch.testing.assert_close(dequantize(q), torch.tensor([[3.0, 1.0, -6.0, 4.0], [0.0, 0.0, 0.3, -0.1]]))


def test_asymmetric_rows_by_hand() -> None:
    # 2 bits: (2 − (−1)) / 3 = 1, zero point 1
    q = nearest(torch.tensor([[-1.0, 0.2, 2.0, 0.9]]), Scheme(2, sym=False), "absmax")
    assert q.codes.tolist() == [[0, 1, 3, 2]]
    assert q.zero_point is not None and q.zero_point.tolist() == [[1]]
    assert q.codes.dtype == q.zero_point.dtype == torch.uint8
    assert dequantize(q).tolist() == [[-1.0, 0.0, 2.0, 1.0]]


def test_one_scale_per_tensor_by_hand() -> None:
    q = nearest(torch.tensor([[1.0, -0.5], [7.0, 0.0]]), Scheme(4, per_tensor=True), "absmax")
    assert q.codes.tolist() == [[1, 0], [7, 0]]  # −.5 is a tie and goes to the even code
    assert isinstance(q.scale, torch.Tensor) and q.scale.tolist() == [[1.0]]
    assert q.group == (2, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("sym", [True, False])
def test_codes_are_nearest_for_the_scale_that_is_stored(dtype: str, sym: bool, rng: torch.Generator) -> None:
    w = torch.randn(6, 32, generator=rng)
    q = nearest(w, Scheme(4, 8, sym, scale_dtype=dtype), "absmax")
    assert isinstance(q.scale, torch.Tensor) and q.scale.dtype == getattr(torch, dtype)
    step = q.scale.float().repeat_interleave(8, 1)
    # a clipped end may miss by a little more than half a step, as the zero point is an integer
    assert bool(((dequantize(q) - w).abs() <= step * (0.5 + 1e-4 + (0.5 if not sym else 0.04))).all())


def test_importance_reaches_the_right_columns(rng: torch.Generator) -> None:
    """Importance is per input: groups of one row see their own part of it, a tensor all of it."""
    w = torch.randn(5, 8, generator=rng)
    importance = torch.tensor([1.0, 1, 1, 1, 50, 1, 1, 1])
    for scheme in (Scheme(2, 4), Scheme(2), Scheme(2, per_tensor=True)):
        plain = dequantize(nearest(w, scheme, "mse")) - w
        weighted = dequantize(nearest(w, scheme, "weighted", importance)) - w
        assert float((weighted.square() * importance).sum()) < float((plain.square() * importance).sum())


def test_fit_groups_has_a_scale_per_group(rng: torch.Generator) -> None:
    w = torch.randn(6, 32, generator=rng)
    for scheme, size in ((Scheme(4, 8), (6, 4)), (Scheme(4), (6, 1)), (Scheme(4, per_tensor=True), (1, 1))):
        scale, zero = fit_groups(w, scheme, "mse", None)
        assert scale.shape == size
        assert zero is None
