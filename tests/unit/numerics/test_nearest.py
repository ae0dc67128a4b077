from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.numerics.grids import Scales, span
from quantkit.numerics.levels import levels_of
from quantkit.numerics.nearest import fit_groups, nearest
from quantkit.numerics.stored import stored_of
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, dequantize


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
        grid = fit_groups(w, scheme, "mse", stored_of(scheme, w), None)
        assert grid.scale.shape == size
        assert grid.zero is None


def test_a_weight_of_the_documentation() -> None:
    """0.1 in [−3.0, 3.2] at 8 bits: absmax 4 and back 0.1008; with a zero point −3 … 3.2 is 255 steps."""
    w = torch.tensor([[-3.0, 0.1, 3.2]])
    q = nearest(w, Scheme(8, scale_dtype="float32"), "absmax")
    assert isinstance(q, Affine) and q.codes.tolist() == [[-119, 4, 127]]
    assert float(dequantize(q)[0, 1]) == pytest.approx(0.1008, abs=5e-5)
    q = nearest(w, Scheme(8, sym=False, scale_dtype="float32"), "absmax")
    assert isinstance(q, Affine) and isinstance(q.scale, torch.Tensor) and q.zero_point is not None
    assert float(q.scale) == pytest.approx(6.2 / 255) and q.zero_point.tolist() == [[123]]
    assert q.codes.tolist() == [[0, 127, 255]]
    assert float(dequantize(q)[0, 1]) == pytest.approx(0.0973, abs=5e-5)


def brute_force(w: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Nearest points, group by group in a loop, scales that span the group."""
    out, width = w.shape
    found, levels = torch.empty_like(w), levels_of(scheme)
    if scheme.axis == 0:
        apart = out // (scheme.group_size or out)
        groups = [(slice(o, None, apart), slice(i, i + 1)) for o in range(apart) for i in range(width)]
    else:
        rows, columns = scheme.group((out, width))
        groups = [
            (slice(o, o + rows), slice(i, i + columns))
            for o in range(0, out, rows)
            for i in range(0, width, columns)
        ]
    for place in groups:
        group = w[place].reshape(1, -1)
        scale, zero = span(group, levels, stored_of(scheme, w), "absmax")
        found[place] = (levels.units(levels.codes(group, scale, zero), zero) * scale).view(w[place].shape)
    return found


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "fp8_block", "nf4g32", "fp4g32", "mxfp4", "nvfp4"])
def test_every_grouping_against_a_loop(name: str, rng: torch.Generator) -> None:
    scheme = replace(parse_scheme(name), scale_dtype="float32")
    for shape in ((130, 256), (5, 128)):
        w = torch.randn(shape, generator=rng) * 0.05
        q = nearest(w, scheme, "absmax")
        assert q.group == scheme.group(shape)
        torch.testing.assert_close(dequantize(q), brute_force(w, scheme), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scales", ["absmax", "mse"])
def test_groups_along_the_outputs(scales: Scales, rng: torch.Generator) -> None:
    scheme = replace(parse_scheme("w4g8_asymf_axis0"), scale_dtype="float32")
    w = torch.randn(24, 5, generator=rng)
    q = nearest(w, scheme, scales)
    assert isinstance(q, Affine) and isinstance(q.scale, torch.Tensor) and q.row_group is not None
    assert q.scale.shape == (3, 5) and q.row_group.tolist() == [0, 1, 2] * 8
    # the same weights, each group a row of its own
    rows = w.view(8, 3, 5).permute(1, 2, 0).reshape(15, 8)
    plain = nearest(rows, replace(parse_scheme("w4g8_asymf"), scale_dtype="float32"), scales)
    expected = dequantize(plain).view(3, 5, 8).permute(2, 0, 1).reshape(24, 5)
    torch.testing.assert_close(dequantize(q), expected)


def test_a_fused_set_shares_the_scale_of_the_tensor(rng: torch.Generator) -> None:
    w = torch.randn(4, 32, generator=rng)
    w[3] *= 100
    q = nearest(w, parse_scheme("nvfp4"), "absmax")
    assert isinstance(q, Codebook) and isinstance(q.scale, Float) and isinstance(q.scale.scale, torch.Tensor)
    shared = float(q.scale.scale)
    assert shared == pytest.approx(float(w.abs().max()) / (448 * 6))
    # engines store the reciprocal: there and back must be the same number
    one = torch.ones((), dtype=torch.float32)
    assert float(one / (one / q.scale.scale)) == shared


def test_importance_per_tile_and_along_the_outputs(rng: torch.Generator) -> None:
    w = torch.randn(40, 128, generator=rng)
    importance = torch.rand(128, generator=rng) ** 4
    for name in ("fp8_block", "w3g8_asymf_axis0"):
        scheme = replace(parse_scheme(name), scale_dtype="float32")
        plain, found = (
            float(((dequantize(nearest(w, scheme, scales, importance)) - w).square() * importance).sum())
            for scales in ("absmax", "weighted")
        )
        assert found <= plain * (1 + 1e-6)
