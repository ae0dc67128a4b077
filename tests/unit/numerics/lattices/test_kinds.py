"""Shapes of the lattice kinds and the processing order."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.lattices import KINDS, order


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        *(("iq2_xxs", 2.0625), ("iq2_xs", 2.3125), ("iq2_s", 2.5625), ("iq3_xxs", 3.0625)),
        *(("iq3_s", 3.4375), ("iq1_s", 1.5625), ("iq1_m", 1.75)),
    ],
)
def test_a_kind_accounts_for_every_bit_of_its_file(name: str, bits_per_weight: float) -> None:
    kind = KINDS[name]
    signs = {"parity": 7 * 32, "free": 256, "none": 0}[kind.signs]
    shifts = 0 if kind.run is None else 256 // kind.run
    total = 16 + kind.subs * kind.scale_bits + kind.codes * kind.bits + signs + shifts
    assert total / 256 == bits_per_weight


def test_order_takes_super_blocks_then_units_by_falling_mean() -> None:
    diagonal = torch.ones(512)
    diagonal[256 + 40 : 256 + 44] = 9.0  # 4 of the unit at 296
    diagonal[8] = 5.0

    found = order(KINDS["iq2_s"], diagonal).tolist()

    assert found[:8] == list(range(296, 304))
    assert found[8:16] == list(range(256, 264))
    assert found[256:272] == [*range(8, 16), *range(8)]
    assert order(KINDS["iq3_s"], diagonal)[:8].tolist() == [296, 297, 298, 299, 256, 257, 258, 259]
    assert order(KINDS["iq3_xxs"], diagonal)[:8].tolist() == list(range(296, 304))


@pytest.mark.parametrize("name", KINDS)
def test_order_is_a_permutation_within_super_blocks(name: str) -> None:
    found = order(KINDS[name], torch.rand(768, generator=torch.Generator().manual_seed(0)))
    blocks = found.view(3, 256)
    assert sorted(found.tolist()) == list(range(768))
    assert bool((blocks // 256 == blocks[:, :1] // 256).all())
