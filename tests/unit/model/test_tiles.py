"""Tiles: worked small cases, then any chain of operations against the same chain on numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.model.graph import Part
from quantkit.model.tiles import Tile, Traced, element, strides


def test_strides_and_elements() -> None:
    assert strides((2, 3, 4)) == (12, 4, 1)
    assert strides((5,)) == (1,)
    assert element((2, 3, 4), (1, 2, 3)) == 23


def test_two_experts_stacked_then_joined() -> None:
    """gate and up of two experts → (2, 3 + 3, 4): what Mixtral's file becomes."""
    gate = [Traced.whole(f"{e}.gate", (3, 4)) for e in range(2)]
    up = [Traced.whole(f"{e}.up", (3, 4)) for e in range(2)]
    fused = torch.cat([torch.stack(gate, dim=0), torch.stack(up, dim=0)], dim=1)
    assert tuple(fused.shape) == (2, 6, 4)
    full = ((0, 3), (0, 4))
    assert fused.tiles == (
        Tile("0.gate", full, "", ((0, 1), (0, 3), (0, 4)), (None, 0, 1)),
        Tile("1.gate", full, "", ((1, 2), (0, 3), (0, 4)), (None, 0, 1)),
        Tile("0.up", full, "", ((0, 1), (3, 6), (0, 4)), (None, 0, 1)),
        Tile("1.up", full, "", ((1, 2), (3, 6), (0, 4)), (None, 0, 1)),
    )
    parameter = torch.arange(48).reshape(2, 6, 4)
    assert torch.equal(fused.tiles[2].at_runtime(parameter), parameter[0, 3:6])


def test_transposed_and_split() -> None:
    """(2, 6) on disk → transposed (6, 2) → two of (3, 2)."""
    first, second = torch.chunk(torch.transpose(Traced.whole("w", (2, 6)), 0, 1), 2, dim=0)
    assert first.tiles == (Tile("w", ((0, 2), (0, 3)), "", ((0, 3), (0, 2)), (1, 0)),)
    assert second.tiles == (Tile("w", ((0, 2), (3, 6)), "", ((0, 3), (0, 2)), (1, 0)),)
    disk = torch.arange(12).reshape(2, 6)
    assert torch.equal(second.tiles[0].on_disk(disk), disk[:, 3:])


def test_one_expert_of_a_stacked_tensor() -> None:
    (tile,) = torch.transpose(Traced.whole("w", (4, 2, 3)), 1, 2).tiles
    only = tile.of(Part(expert=2))
    parameter = torch.arange(24).reshape(4, 3, 2)
    assert torch.equal(only.at_runtime(parameter), parameter[2:3].transpose(1, 2))
    assert only.take == ((2, 3), (0, 2), (0, 3))
    assert tile.of(None) is tile


def test_whatever_cannot_be_followed_is_no_longer_traced() -> None:
    assert not isinstance(torch.flip(Traced.whole("w", (2, 3)), (0,)), Traced)


@given(st.data())
def test_filling_by_tiles_equals_the_operations(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    values = [torch.arange(rows * columns).reshape(rows, columns) + 100 * i for i in range(count)]
    traced = [Traced.whole(str(i), (rows, columns)) for i in range(count)]

    def convert(tensors: list[Tensor], plan: list[int]) -> list[Tensor]:
        joined = torch.stack(tensors, dim=plan[0] % 3) if plan[1] % 2 else torch.cat(tensors, dim=plan[0] % 2)
        turned = torch.transpose(joined, plan[2] % joined.dim(), plan[3] % joined.dim()).contiguous()
        return list(torch.chunk(turned, 1 + plan[4] % 3, dim=plan[5] % turned.dim()))

    plan = data.draw(st.lists(st.integers(0, 11), min_size=6, max_size=6))
    for expected, pieces in zip(convert(values, plan), convert(list(traced), plan), strict=True):
        assert isinstance(pieces, Traced)
        filled = torch.full(expected.shape, -1)
        for tile in pieces.tiles:
            tile.at_runtime(filled).copy_(tile.on_disk(values[int(tile.source)]))
        assert torch.equal(filled, expected)
