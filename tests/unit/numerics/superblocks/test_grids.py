"""What super-blocks stand for, worked by hand; codes are those of the nearest points."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.superblocks.grids import (
    IQ4,
    SUPERBLOCKS,
    Scales,
    assemble,
    codes,
    half,
    nearest_places,
    nearest_points,
    values,
)
from quantkit.schemes import GGML
from quantkit.tensors import Affine, Codebook, dequantize

KINDS = tuple(SUPERBLOCKS)


def integers(rng: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    dtype = torch.int8 if low < 0 else torch.uint8
    return torch.randint(low, high + 1, shape, generator=rng).to(dtype)


def some(kind: str, n: int, rng: torch.Generator) -> tuple[torch.Tensor, Scales]:
    """Codes and scales of n super-blocks that any file may hold."""
    block = SUPERBLOCKS[kind]
    low, high = (0, 15) if block.table else (block.low, block.high)
    found = integers(rng, low, high, n, block.columns)

    def d() -> torch.Tensor:
        return half(torch.randn(n, generator=rng) * 0.01)

    if block.scales is None:
        return found, Scales(d(), dmin=d() if block.minimum else None)
    parts = (n, block.parts)
    sub = integers(rng, *block.scales, *parts)
    if not block.minimum:
        return found, Scales(d(), sub)
    return found, Scales(d(), sub, d(), integers(rng, *block.scales, *parts))


def test_types_agree_with_the_schemes() -> None:
    for kind, block in SUPERBLOCKS.items():
        assert GGML[kind] == (block.bits, block.columns)
        assert block.columns % block.group == 0


def test_one_minimum_in_a_super_block_by_hand() -> None:
    # d = ½, s = 3, dmin = ¼, m = 2: w = 1.5·q − 0.5
    sub, submin = torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.uint8)
    sub[0, 1], submin[0, 1] = 3, 2
    scales = Scales(torch.tensor([0.5]).half(), sub, torch.tensor([0.25]).half(), submin)
    q = torch.zeros(1, 256, dtype=torch.uint8)
    q[0, 32:35] = torch.tensor([0, 1, 15])
    assert values("q4_k", q, scales)[0, 31:36].tolist() == [0.0, -0.5, 1.0, 22.0, -0.5]
    assert scales.scale("q4_k")[0, :3].tolist() == [0.0, 1.5, 0.0]
    offset = scales.offset("q4_k")
    assert offset is not None and offset[0, :3].tolist() == [0.0, -0.5, 0.0]


def test_minimum_of_q4_1_is_added() -> None:
    scales = Scales(torch.tensor([2.0]).half(), dmin=torch.tensor([-3.0]).half())
    q = torch.arange(32, dtype=torch.uint8)[None] % 16
    assert values("q4_1", q, scales)[0, :3].tolist() == [-3.0, -1.0, 1.0]


def test_points_of_a_table_by_hand() -> None:
    sub = torch.full((1, 8), -2, dtype=torch.int8)
    scales = Scales(torch.tensor([0.5]).half(), sub)
    q = torch.arange(256)[None] % 16
    assert values("iq4_xs", q.to(torch.uint8), scales)[0, :16].tolist() == [-p for p in IQ4]


def test_codes_by_hand() -> None:
    w = torch.zeros(1, 32)
    w[0, :5] = torch.tensor([-9.0, -1.6, 0.4, 0.6, 30.0])
    scales = Scales(torch.tensor([1.0]).half())
    assert codes("q4_0", w, scales)[0, :6].tolist() == [-8, -2, 0, 1, 7, 0]
    negative = Scales(torch.tensor([-1.0]).half())
    assert codes("q4_0", w, negative)[0, :6].tolist() == [7, 2, 0, -1, -8, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_nearest_points(kind: str, rng: torch.Generator) -> None:
    block = SUPERBLOCKS[kind]
    _, scales = some(kind, 3, rng)
    w = torch.randn(3, block.columns, generator=rng) * 0.05
    found = values(kind, codes(kind, w, scales), scales)
    places = range(16) if block.table else range(block.low, block.high + 1)
    every = [values(kind, torch.full_like(w, p).to(block.code_dtype), scales) for p in places]
    least = torch.stack([(w - y).abs() for y in every]).amin(0)
    torch.testing.assert_close((w - found).abs(), least, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_values_are_the_codes(kind: str, rng: torch.Generator) -> None:
    q, scales = some(kind, 4, rng)
    y = values(kind, q, scales)
    assert torch.equal(values(kind, codes(kind, y, scales), scales), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_scale_gives_codes_of_zero(kind: str) -> None:
    block = SUPERBLOCKS[kind]
    parts = (2, block.parts)
    scales = Scales(
        torch.zeros(2).half(),
        torch.ones(parts, dtype=torch.uint8) if block.scales else None,
        torch.zeros(2).half() if block.minimum else None,
        torch.ones(parts, dtype=torch.uint8) if block.scales and block.minimum else None,
    )
    q = codes(kind, torch.full((2, block.columns), 0.3), scales)
    assert q.dtype == block.code_dtype
    assert bool((q == (8 if block.table else 0)).all())
    assert bool((values(kind, q, scales) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_assembled_weights_mean_the_same(kind: str, rng: torch.Generator) -> None:
    block = SUPERBLOCKS[kind]
    q, scales = some(kind, 6, rng)
    whole = assemble(kind, q.view(2, -1), scales)
    assert isinstance(whole, Codebook if block.table else Affine)
    assert torch.equal(dequantize(whole), values(kind, q, scales).view(2, -1))


def test_nested_minima_keep_their_scale_negated() -> None:
    q, scales = some("q2_k", 2, torch.Generator().manual_seed(1))
    whole = assemble("q2_k", q, scales)
    assert isinstance(whole, Affine) and isinstance(whole.offset, Affine) and scales.dmin is not None
    assert torch.equal(whole.offset.scale, -scales.dmin[:, None])  # type: ignore[arg-type]
    assert whole.offset.bits == 4 and whole.offset.group == (1, 16)


def test_every_unit_finds_the_nearest_point() -> None:
    units = torch.linspace(-140, 130, 27001)
    table = torch.tensor(IQ4, dtype=torch.float32)
    least = (units[:, None] - table).abs().amin(1)
    torch.testing.assert_close((table[nearest_places(units.clone()).long()] - units).abs(), least)
    torch.testing.assert_close((nearest_points(units.clone()) - units).abs(), least)


def test_halves_are_finite() -> None:
    assert half(torch.tensor([1e9, -1e9, 1e-9])).tolist() == [65504.0, -65504.0, 0.0]
