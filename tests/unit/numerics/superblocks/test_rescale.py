"""Sub-scales revisited through the gram."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature, curvature
from quantkit.numerics.superblocks import solve
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, codes, values
from quantkit.numerics.superblocks.rescale import rescale
from quantkit.numerics.superblocks.search import search

NESTED = [name for name, block in SUPERBLOCKS.items() if block.scales is not None]


def seen(gram: Tensor, kind: str) -> Curvature:
    found = curvature(gram, 1, shrink=False)
    return found.ordered(solve.order(kind, found.diagonal))


def loss(values: Tensor, w: Tensor, gram: Tensor) -> Tensor:
    """Of each row."""
    error = (values - w).double()
    return ((error @ gram.double()) * error).sum(1)


def test_a_scale_worked_by_hand() -> None:
    # 16 weights of 3 beside codes of 1 and d = 1: the sub-scale that fits is 3; all others are right at 1
    w = torch.ones(1, 256)
    w[0, :16] = 3.0
    scales = Scales(torch.ones(1, dtype=torch.float16), torch.ones(1, 16, dtype=torch.int8))
    found = rescale(
        "q6_k", torch.ones(256, 1), w.T.contiguous(), scales, curvature(torch.eye(256), 1, shrink=False)
    )
    assert found.sub is not None
    assert found.sub.tolist() == [[3, *[1] * 15]]


def test_a_minimum_worked_by_hand() -> None:
    # 32 weights of ±½ around 7 on codes 0 and 1: 1·(1·q) + 6.5 in units of dmin = ½ is a stored 0, as nothing
    # above zero can be said; around −7 it is −7.5 = −½ · 15
    w = torch.tensor([-0.5, 0.5]).repeat(128)[None] - 7
    q = torch.tensor([0.0, 1.0]).repeat(128)[:, None]
    half = torch.ones(1, dtype=torch.float16)
    ones = torch.ones(1, 8, dtype=torch.uint8)
    scales = Scales(half, ones, half / 2, ones)
    found = rescale("q4_k", q, w.T.contiguous(), scales, curvature(torch.eye(256), 1, shrink=False))
    assert found.sub is not None and found.submin is not None
    assert found.sub.tolist() == [[1] * 8] and found.submin.tolist() == [[15] * 8]


@pytest.mark.parametrize("kind", NESTED)
def test_no_row_gets_worse_and_codes_stay(kind: str, rng: torch.Generator) -> None:
    x = torch.randn(600, 512, generator=rng) @ torch.randn(512, 512, generator=rng)
    gram = x.T @ x / 600
    w = torch.randn(6, 512, generator=rng)
    scales = search(kind, w.reshape(-1, 256), gram.diagonal().reshape(2, 256).repeat(6, 1))
    chosen = codes(kind, w.reshape(-1, 256), scales)
    curve = seen(gram, kind)
    codes_io = chosen.reshape(6, 512).T[curve.order].float()
    kept = codes_io.clone()
    found = rescale(kind, codes_io, w.T[curve.order].contiguous(), scales, curve)
    before = loss(values(kind, chosen, scales).reshape(6, 512), w, gram)
    after = loss(values(kind, chosen, found).reshape(6, 512), w, gram)
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < float(before.sum())
    assert torch.equal(codes_io, kept) and torch.equal(found.d, scales.d)


def test_types_without_sub_scales_come_back_as_they_are() -> None:
    scales = Scales(torch.ones(8, dtype=torch.float16))
    curve = curvature(torch.eye(256), 1, shrink=False)
    assert rescale("q4_0", torch.ones(256, 1), torch.ones(256, 1), scales, curve) is scales
