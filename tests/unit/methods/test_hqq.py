from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need
from quantkit.errors import NumericsError, RecipeError
from quantkit.methods.hqq import Params, quantizer
from quantkit.numerics import hqq, offsets
from quantkit.schemes import parse_scheme
from quantkit.tensors import Affine, dequantize

WORKED = torch.tensor(
    [[-0.30, -0.10, 0.05, 0.10, 0.20, 0.25, 0.40, 1.20], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2]]
)


def run(weight: Tensor, scheme: str, dtype: str = "float16", **given: float) -> Affine:
    method = quantizer(Params(**given))  # type: ignore[arg-type]
    chosen = replace(parse_scheme(scheme), scale_dtype=dtype)
    assert method.accepts(chosen) is None
    found = method.quantize(weight, method.prepare(None, chosen), chosen).weight
    assert isinstance(found, Affine)
    return found


def test_worked_example() -> None:
    q = run(WORKED, "w4g8_asymf")
    assert isinstance(q.scale, Tensor) and q.zero_point is not None
    assert q.codes.tolist() == [[0, 2, 4, 4, 5, 6, 7, 15], [15, 13, 10, 8, 6, 4, 2, 0]]
    assert q.codes.dtype == torch.uint8
    assert q.scale.tolist() == torch.tensor([[0.1], [0.046666667]]).half().tolist()
    assert q.zero_point.tolist() == torch.tensor([[3.125], [4.0357143]]).half().tolist()
    assert (q.bits, q.group, q.row_group) == (4, (1, 8), None)


def test_groups_of_outputs() -> None:
    """Axis 0: the four values of a group lie out/4 rows apart."""
    w = torch.cat([WORKED.T, WORKED.T.flip(0)], dim=1).contiguous()
    q = run(w, "w4g4_asymf_axis0")
    assert isinstance(q.scale, Tensor) and q.scale.shape == (2, 4)
    assert q.group == (4, 1) and q.row_group is not None
    assert q.row_group.tolist() == [0, 1] * 4 and q.row_group.dtype == torch.int32
    scale, zero = hqq.solve(w.reshape(4, -1), 4, 0)
    assert torch.equal(q.scale.flatten(), scale.half().flatten())
    spread = (scale.half() * (q.codes.reshape(4, -1) - zero.half().float())).view(8, 4)
    torch.testing.assert_close(dequantize(q), spread)
    alone = run(w[[0, 2, 4, 6], :1].T.contiguous(), "w4_asymf")
    torch.testing.assert_close(dequantize(q)[[0, 2, 4, 6], 0], dequantize(alone)[0], atol=0.06, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_codes_are_nearest_to_what_is_stored(bits: int, dtype: str, rng: torch.Generator) -> None:
    """The library chooses codes first and rounds scale and zero point afterwards."""
    w = torch.randn(64, 64, generator=rng) * 0.02
    q = run(w, f"w{bits}g32_asymf", dtype)
    assert isinstance(q.scale, Tensor) and q.zero_point is not None
    stored = getattr(torch, dtype)
    assert q.scale.dtype == q.zero_point.dtype == stored
    grouped = w.view(-1, 32)
    scale, zero = hqq.solve(grouped, bits, 1)
    assert torch.equal(q.scale.flatten(), scale.to(stored).flatten())
    kept, kept_zero = scale.to(stored).float(), zero.to(stored).float()
    first = kept * (hqq.codes(grouped, scale, zero, bits, 1) - kept_zero)
    ours, theirs = ((v.view(64, 64) - w).square().sum() for v in (dequantize(q), first))
    assert ours <= theirs * (1 + 1e-6)
    if (bits, dtype) == (8, "bfloat16"):
        assert ours < 0.75 * theirs


def test_numbers_that_overflow_fall_back_to_min_and_max() -> None:
    """All weights near 50: the zero point −50·20,000 does not fit float16."""
    w = torch.cat(
        [torch.full((1, 16), 50.0) + torch.linspace(0, 1.2e-4, 16), torch.linspace(-1, 1, 16)[None]]
    )
    q = run(w, "w4_asymf")
    assert isinstance(q.scale, Tensor) and q.zero_point is not None
    assert bool(torch.isfinite(q.scale).all()) and bool(torch.isfinite(q.zero_point).all())
    torch.testing.assert_close(dequantize(q)[:1], w[:1], rtol=2**-11, atol=0)
    assert torch.equal(q.scale[:1].float(), offsets.minmax(w[:1], 4, torch.float16)[0])
    assert float((dequantize(q)[1] - w[1]).abs().max()) < 0.08


def test_parameters_reach_the_solver(rng: torch.Generator) -> None:
    w = torch.randn(32, 32, generator=rng)
    usual = dequantize(run(w, "w2g32_asymf"))
    assert not torch.equal(usual, dequantize(run(w, "w2g32_asymf", iterations=1)))
    assert not torch.equal(usual, dequantize(run(w, "w2g32_asymf", p=0.5, beta=2.0)))


@pytest.mark.parametrize(
    "given", [{"iterations": 0}, {"p": 0.0}, {"p": 1.1}, {"p": float("nan")}, {"beta": 0.0}, {"beta": -1.0}]
)
def test_parameters_that_mean_nothing(given: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="hqq: "):
        Params(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w4g64", "w4g64_asym", "nf4", "fp8", "w4_tensor_asymf"])
def test_schemes_without_a_fractional_zero_point_are_refused(scheme: str) -> None:
    reason = quantizer(Params()).accepts(parse_scheme(scheme))
    assert reason is not None and len(reason) > 20 and not reason.endswith(".")


def test_nothing_is_needed_and_rows_count_together() -> None:
    method = quantizer(Params())
    assert method.needs is Need.NOTHING
    assert method.ties_rows and not method.regroups_columns


def test_non_finite_weights_are_refused() -> None:
    w = WORKED.clone()
    w[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="non-finite"):
        run(w, "w4_asymf")
