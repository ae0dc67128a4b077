"""Rounding to nearest on the lattice grids."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from quantkit.numerics.lattices import KINDS, LatticeKind, nearest, search
from quantkit.tensors import Affine, Lattice, dequantize
from tests.unit.numerics.lattices.tables import table_of

ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
PARITY = pytest.mark.parametrize("name", ["iq2_xxs", "iq2_xs", "iq3_xxs"])


def weights(rows: int, width: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def importances(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(9)).exp()


def error(q: Lattice, w: Tensor, v: Tensor) -> float:
    return float((v * (dequantize(q) - w).square()).sum() / (v * w.square()).sum())


def steps(q: Lattice) -> Tensor:
    assert isinstance(q.scale, Affine)
    return dequantize(q.scale)


@ALL
def test_what_is_stored(kind: LatticeKind) -> None:
    q = nearest(kind, table_of(kind), weights(3, 512), importances(512))
    assert q.codes.shape == (3, 512 // kind.length)
    assert q.codes.dtype == torch.int16
    assert int(q.codes.min()) >= 0
    assert int(q.codes.max()) < 2**kind.bits
    assert isinstance(q.scale, Affine)
    assert isinstance(q.scale.scale, Tensor)
    assert q.scale.codes.dtype == torch.uint8
    assert int(q.scale.codes.max()) <= kind.top
    assert q.scale.codes.shape == (3, 2 * kind.subs)
    assert q.scale.scale.dtype == torch.float16
    assert q.scale.scale.shape == (3, 2)
    assert (q.signs is None) == (kind.signs == "none")
    if kind.run is None:
        assert q.shift is None
    else:
        assert q.shift is not None
        assert q.shift.shape == (3, 512 // kind.run)
        assert bool((q.shift.abs() == 0.25).all())
    if kind.signs == "parity":
        assert q.signs is not None
        assert bool(((q.signs < 0).view(-1, 8).sum(1) % 2 == 0).all())


# of a trained search: no more than this share of the energy is lost on Gaussian weights
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        *(("iq2_xxs", 0.10), ("iq2_xs", 0.075), ("iq2_s", 0.06), ("iq3_xxs", 0.035), ("iq3_s", 0.02)),
        *(("iq1_s", 0.20), ("iq1_m", 0.16)),
    ],
)
def test_the_error_is_that_of_a_good_search(name: str, bound: float) -> None:
    w, v = weights(16, 256), importances(256)
    assert error(nearest(KINDS[name], table_of(KINDS[name]), w, v), w, v) < bound


@ALL
def test_points_of_the_grid_are_all_but_found_again(kind: LatticeKind) -> None:
    """d = 2⁻⁸ and s = 13 in every sub-block (6 of 3 bits), codes and even signs at random."""
    rng = torch.Generator().manual_seed(3)
    table, sub = table_of(kind), 13 if kind.scale_bits == 4 else 6
    points = table[torch.randint(len(table), (4, kind.codes), generator=rng)].flatten(1)
    if kind.signs == "none":
        points = points + 0.25
    else:
        signs = torch.where(torch.rand(4, 128, generator=rng) < 0.5, -1.0, 1.0)
        points = points * signs.repeat_interleave(2, 1)
    w = points * (sub + 0.5) / 256
    assert error(nearest(kind, table, w, None), w, torch.ones(256)) < 1e-3


@PARITY
def test_codes_and_signs_are_the_best_there_are(name: str) -> None:
    """Given the scales, against all rows of a small table with all even sign patterns."""
    kind = KINDS[name]
    table = table_of(kind)[:8].contiguous()
    w, v = weights(3, 256, seed=4), importances(256)
    q = nearest(kind, table, w, v)
    per = 8 // kind.length
    rows = torch.stack([torch.cat(each) for each in product(table, repeat=per)])
    patterns = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 8)
    patterns = patterns[patterns.prod(1) > 0]
    points = (patterns[:, None] * rows).flatten(0, 1)
    step = steps(q).repeat_interleave(kind.group // 8, 1).flatten()
    wide, weight = w.view(-1, 8), (v / v.mean()).repeat(3).view(-1, 8)
    found = (weight * (dequantize(q).view(-1, 8) - wide).square()).sum(1)
    for unit in range(len(wide)):
        least = (weight[unit] * (wide[unit] - step[unit] * points).square()).sum(1).amin()
        torch.testing.assert_close(found[unit], least, rtol=2e-3, atol=1e-9)


@ALL
def test_scales_are_better_than_their_neighbours(kind: LatticeKind) -> None:
    """No d 5 % away, codes chosen anew, does better than the one that was found."""
    table, w, v = table_of(kind), weights(8, 256, seed=5), importances(256)
    found = error(nearest(kind, table, w, v), w, v)
    for factor in (0.95, 1.05):
        assert error(nearest(replace(kind, gamma=factor), table, w, v), w, v) > found


@ALL
def test_gamma_stretches_d(kind: LatticeKind) -> None:
    table, w = table_of(kind), weights(4, 256)
    plain = dequantize(nearest(kind, table, w, None)).square().sum()
    stretched = dequantize(nearest(replace(kind, gamma=1.1), table, w, None)).square().sum()
    assert 1.05 < float(stretched / plain) < 1.3


@ALL
def test_search_finds_the_scales_of_nearest(kind: LatticeKind) -> None:
    table, w, v = table_of(kind), weights(5, 256), importances(256)
    scales = search(kind, table, w, (v / v.mean())[None])
    assert scales.d.dtype == torch.float16
    assert scales.sub.dtype == torch.uint8
    torch.testing.assert_close(scales.steps(), steps(nearest(kind, table, w, v)))


@ALL
def test_rows_are_independent_and_runs_agree(kind: LatticeKind) -> None:
    table, w, v = table_of(kind), weights(9, 512), importances(512)
    whole = dequantize(nearest(kind, table, w, v))
    assert torch.equal(whole, dequantize(nearest(kind, table, w, v)))
    torch.testing.assert_close(dequantize(nearest(kind, table, w[4:6], v)), whole[4:6])


@ALL
def test_zero_weights_stay_zero(kind: LatticeKind) -> None:
    w = weights(3, 512)
    w[1] = 0.0
    w[0, :256] = 0.0
    found = dequantize(nearest(kind, table_of(kind), w, importances(512)))
    assert float(found[1].abs().max()) == 0.0
    assert float(found[0, :256].abs().max()) == 0.0
    assert bool(torch.isfinite(found).all())


@ALL
def test_a_zero_sub_block_beside_others_stays_small(kind: LatticeKind) -> None:
    w = weights(2, 256)
    w[:, : kind.group] = 0.0
    found = dequantize(nearest(kind, table_of(kind), w, None))
    assert float(found[:, : kind.group].abs().max()) < 0.02


@ALL
@pytest.mark.parametrize("dead", [128, 256])
def test_columns_without_importance_still_count_a_little(kind: LatticeKind, dead: int) -> None:
    v = importances(256)
    v[:dead] = 0.0
    w = weights(4, 256)
    assert error(nearest(kind, table_of(kind), w, v), w, torch.ones(256)) < 0.9


@ALL
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_tiny_and_huge_weights(kind: LatticeKind, size: float) -> None:
    w = weights(2, 256) * size
    found = dequantize(nearest(kind, table_of(kind), w, None))
    assert bool(torch.isfinite(found).all())
    assert float((found - w).square().sum() / w.square().sum()) < (0.3 if size > 1 else 1.01)
