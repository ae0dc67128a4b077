"""Searched scales beat every plain rule, and stand what weights can be."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.superblocks import search as module
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, Superblock, codes, half, inverse, values
from quantkit.numerics.superblocks.plans import PLANS, Effort
from quantkit.numerics.superblocks.search import nearest, search
from quantkit.tensors import Affine, dequantize

SEARCHED = tuple(PLANS["best"])
EFFORTS: tuple[Effort, ...] = ("fast", "best")


def error(kind: str, w: torch.Tensor, v: torch.Tensor | None, scales: Scales) -> torch.Tensor:
    """Σ v·(w − y)² of every super-block."""
    square = (w.double() - values(kind, codes(kind, w, scales), scales).double()).square()
    return (square if v is None else square * v).sum(1)


def plain(block: Superblock, w: torch.Tensor) -> Scales:
    """The usual rule: scales span the weights, and the largest scale gets the last sub-scale."""
    x = w.view(w.shape[0], -1, block.group)
    if not block.minimum:
        scale = x.gather(2, x.abs().argmax(2, keepdim=True))[..., 0] / block.low
        if block.scales is None:
            return Scales(half(scale[:, 0]))
        d = scale.gather(1, scale.abs().argmax(1, keepdim=True)) / block.scales[0]
        return Scales(half(d[:, 0]), (scale * inverse(d)).round().clamp(*block.scales).to(torch.int8))
    low, high = x.amin(2), x.amax(2)
    if block.scales is None:
        return Scales(half((high - low)[:, 0] / block.high), dmin=half(low[:, 0]))
    low = low.clamp(max=0)
    scale, top = (high - low) / block.high, block.scales[1]
    d, dmin = scale.amax(1, keepdim=True) / top, -low.amin(1, keepdim=True) / top
    sub, submin = ((s * inverse(u)).round().to(torch.uint8) for s, u in ((scale, d), (-low, dmin)))
    return Scales(half(d[:, 0]), sub, half(dmin[:, 0]), submin)


def weights(rng: torch.Generator, n: int, columns: int) -> torch.Tensor:
    """Gaussian, and in every second super-block heavy-tailed."""
    w = torch.randn(n, columns, generator=rng) * 0.02
    w[::2] *= torch.randn(n, columns, generator=rng)[::2].abs()
    return w


def test_a_grid_of_integers_is_found() -> None:
    w = torch.arange(-8, 8, dtype=torch.float32).repeat(2)[None] * 0.25
    assert search("q4_0", w, None).d.tolist() == [0.25]
    # the mirrored grid has no point at +8
    assert search("q4_0", -w, None).d.tolist() == [-0.25]


def test_a_grid_with_a_minimum_is_found() -> None:
    w = torch.arange(16, dtype=torch.float32).repeat(2)[None] * 0.5 + 3
    found = search("q4_1", w, None)
    assert found.d.tolist() == [0.5]
    assert found.dmin is not None and found.dmin.tolist() == [3.0]


def test_super_blocks_of_equal_sub_blocks_are_found() -> None:
    # scale 1 and minimum 4 everywhere; d·s = 1 and dmin·m = 4 exactly, for some s and m
    w = (torch.arange(16, dtype=torch.float32).repeat(16) - 4)[None]
    found = search("q4_k", w, None)
    assert error("q4_k", w, None, found).item() < 1e-3


def test_importance_decides_which_weight_is_met() -> None:
    # two weights that no scale of q4_0 can meet both: the one that counts is met
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 1.0, 0.09
    for column in (0, 1):
        v = torch.full((32,), 0.01)
        v[column] = 100.0
        found = search("q4_0", w, v)
        y = values("q4_0", codes("q4_0", w, found), found)
        assert y[0, column] == pytest.approx(float(w[0, column]), rel=2e-2)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", SEARCHED)
def test_no_super_block_is_worse_than_by_the_plain_rule(
    kind: str, weighted: bool, effort: Effort, rng: torch.Generator
) -> None:
    block = SUPERBLOCKS[kind]
    w = weights(rng, 96, block.columns)
    v = torch.exp(torch.randn(1, block.columns, generator=rng)) if weighted else None
    found, by_rule = error(kind, w, v, search(kind, w, v, effort)), error(kind, w, v, plain(block, w))
    assert bool((found <= by_rule * 1.001).all())
    assert float(found.sum()) < 0.93 * float(by_rule.sum())


@pytest.mark.parametrize("kind", SEARCHED)
def test_the_best_effort_is_best(kind: str, rng: torch.Generator) -> None:
    columns = SUPERBLOCKS[kind].columns
    w, v = weights(rng, 128, columns), torch.exp(torch.randn(128, columns, generator=rng))
    fast, best = (float(error(kind, w, v, search(kind, w, v, effort)).sum()) for effort in EFFORTS)
    assert best < fast


@pytest.mark.parametrize("kind", SEARCHED)
def test_super_blocks_do_not_influence_one_another(kind: str, rng: torch.Generator) -> None:
    columns = SUPERBLOCKS[kind].columns
    w, v = weights(rng, 40, columns), torch.exp(torch.randn(40, columns, generator=rng))
    together = search(kind, w, v)
    w[:8] *= 1000
    among_others = search(kind, w, v)
    for name in ("d", "sub", "dmin", "submin"):
        one, other = getattr(together, name), getattr(among_others, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one[8:], other[8:])


@pytest.mark.parametrize("kind", SEARCHED)
def test_zeros_stay_zeros(kind: str, rng: torch.Generator) -> None:
    columns = SUPERBLOCKS[kind].columns
    w = weights(rng, 3, columns)
    w[1] = 0
    scales = search(kind, w, torch.rand(columns, generator=rng))
    assert bool((values(kind, codes(kind, w, scales), scales)[1] == 0).all())
    assert scales.d[1] == 0


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_single_weight_is_met(kind: str, rng: torch.Generator) -> None:
    columns = SUPERBLOCKS[kind].columns
    w = torch.zeros(2, columns)
    w[0, 5], w[1, columns - 1] = 0.7, -0.3
    scales = search(kind, w, None)
    y = values(kind, codes(kind, w, scales), scales)
    # the points of iq4_nl have no zero: the others come off by 1/127 of the largest
    torch.testing.assert_close(y, w, rtol=2e-3, atol=0.01 if SUPERBLOCKS[kind].table else 1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e-4, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("kind", SEARCHED)
def test_weights_of_any_size(kind: str, size: float, rng: torch.Generator) -> None:
    block = SUPERBLOCKS[kind]
    w = torch.randn(16, block.columns, generator=rng) * size
    scales = search(kind, w, torch.rand(block.columns, generator=rng))
    y = values(kind, codes(kind, w, scales), scales)
    assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(scales.d).all())
    if 1e-4 <= size <= 1e4:
        assert float((w - y).square().sum() / w.square().sum()) < (0.2 if block.bits < 4 else 0.02)
    elif size < 1:
        # scales are float16 below its normal numbers, or nothing
        assert float((w - y).square().sum()) <= float(w.square().sum()) * 1.001


@pytest.mark.parametrize("kind", ["q4_1", "q5_1"])
def test_weights_much_alike_keep_their_differences(kind: str, rng: torch.Generator) -> None:
    w = 1 + torch.randn(8, 32, generator=rng) * 0.01
    scales = search(kind, w, None)
    y = values(kind, codes(kind, w, scales), scales)
    assert float((w - y).abs().max()) < 0.003


@pytest.mark.parametrize("kind", ["q2_k", "q4_k", "q5_k"])
def test_weights_all_above_or_below_zero(kind: str, rng: torch.Generator) -> None:
    for sign in (1, -1):
        w = sign * (1 + torch.rand(8, 256, generator=rng))
        scales = search(kind, w, None)
        assert scales.dmin is not None and bool((scales.d >= 0).all()) and bool((scales.dmin >= 0).all())
        by_rule = error(kind, w, None, plain(SUPERBLOCKS[kind], w))
        assert bool((error(kind, w, None, scales) <= by_rule).all())


def test_constant_super_blocks() -> None:
    for kind in SEARCHED:
        block = SUPERBLOCKS[kind]
        w = torch.tensor([[0.5], [-0.5]]).expand(2, block.columns).contiguous()
        scales = search(kind, w, None)
        torch.testing.assert_close(values(kind, codes(kind, w, scales), scales), w, rtol=5e-3, atol=0)


def test_importance_of_every_shape_means_the_same(rng: torch.Generator) -> None:
    w, v = weights(rng, 20, 256), torch.rand(256, generator=rng)
    found = [search("q4_k", w, form) for form in (v, v[None], v.expand(20, 256), v.double() * 1e6)]
    assert all(torch.equal(other.d, found[0].d) for other in found[1:])


def test_importance_of_zero_has_a_floor(rng: torch.Generator) -> None:
    w, v = weights(rng, 20, 256), torch.rand(256, generator=rng)
    v[::4] = 0
    scales = search("q2_k", w, v)
    y = values("q2_k", codes("q2_k", w, scales), scales)
    assert float((w - y)[:, ::4].abs().max()) < 3 * float(w.abs().max())
    assert torch.equal(search("q2_k", w, torch.zeros(256)).d, search("q2_k", w, None).d)


def test_a_transposed_view_gives_the_same(rng: torch.Generator) -> None:
    w, v = weights(rng, 48, 256), torch.rand(256, generator=rng)
    seen, other = search("q6_k", w, v), search("q6_k", w.T.contiguous().T, v)
    assert torch.equal(seen.d, other.d)


def test_weights_are_not_changed(rng: torch.Generator) -> None:
    w, v = weights(rng, 8, 256), torch.rand(8, 256, generator=rng)
    before = w.clone(), v.clone()
    search("q5_k", w.T.contiguous().T, v)
    search("q5_k", w, v)
    assert torch.equal(w, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(bad: float) -> None:
    w = torch.ones(2, 256)
    w[1, 3] = bad
    with pytest.raises(NumericsError, match="weights hold non-finite"):
        search("q4_k", w, None)
    with pytest.raises(NumericsError, match="importance of the inputs holds non-finite"):
        search("q4_k", torch.ones(2, 256), w)


@pytest.mark.parametrize("kind", ["q4_1", "q3_k", "q4_k", "iq4_xs"])
@pytest.mark.parametrize("chunk", [1, 2048])
def test_whole_weights_in_chunks(
    kind: str, chunk: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, v = weights(rng, 12, 512), torch.exp(torch.randn(512, generator=rng))
    columns = SUPERBLOCKS[kind].columns
    per_block = v.view(1, -1, columns).expand(12, -1, -1).reshape(-1, columns)
    flat = w.view(-1, columns)
    scales = search(kind, flat, per_block)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    whole = nearest(kind, w, v)
    # sums of few and of many super-blocks are added in another order, which can decide between equals
    apart = (dequantize(whole) - w).square() * v
    torch.testing.assert_close(
        apart.sum(1).double(), error(kind, flat, per_block, scales).view(12, -1).sum(1), rtol=1e-3, atol=0
    )


def test_whole_weights_without_importance(rng: torch.Generator) -> None:
    w = weights(rng, 6, 256)
    whole = nearest("q8_0", w, None)
    assert isinstance(whole, Affine) and whole.codes.dtype == torch.int8
    assert torch.equal(dequantize(whole), dequantize(nearest("q8_0", w, torch.full((256,), 3.0))))
