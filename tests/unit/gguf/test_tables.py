"""The tables of the lattice types, with the factor that their decoding multiplies by."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import UnsupportedError
from quantkit.gguf.tables import grid

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("name", "shape", "points"),
    [
        ("iq2_xxs", (256, 8), {8, 25, 43}),
        ("iq2_xs", (512, 8), {8, 25, 43}),
        ("iq2_s", (1024, 8), {8, 25, 43}),
        ("iq3_xxs", (256, 4), {4, 12, 20, 28, 36, 44, 52, 62}),
        ("iq3_s", (512, 4), {1, 3, 5, 7, 9, 11, 13, 15}),
        ("iq1_s", (2048, 8), {-1, 0, 1}),
        ("iq1_m", (2048, 8), {-1, 0, 1}),
    ],
)
def test_points(name: str, shape: tuple[int, int], points: set[int]) -> None:
    factor = {"iq2": 0.25, "iq3_xxs": 0.5, "iq3_s": 2.0, "iq1": 2.0}
    table = grid(name)
    assert tuple(table.shape) == shape and table.dtype == torch.float32
    times = next(value for start, value in factor.items() if name.startswith(start))
    rows = [tuple(row) for row in (table / times).tolist()]
    assert {point for row in rows for point in row} == points
    assert len(set(rows)) == shape[0]
    assert grid(name) is table


def test_both_types_of_one_bit_share_a_table() -> None:
    assert torch.equal(grid("iq1_s"), grid("iq1_m"))


def test_types_without_a_table() -> None:
    with pytest.raises(UnsupportedError, match="q4_k has no table of vectors"):
        grid("q4_k")
