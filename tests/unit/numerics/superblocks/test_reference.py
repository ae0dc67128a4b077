"""The plain rules of llama.cpp on the vectors of its own library."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.superblocks.reference import reference
from quantkit.tensors import Affine, dequantize

# Σ(x − y)², the first and the last weights as the C library decodes what it wrote
VECTORS = {
    "q4_0": (0.229800, [-2.0, -0.5, 1.0, -1.5, 0.0, 1.25], [1.75, -0.5]),
    "q4_1": (0.242232, [-2.0, -0.4003906, 0.9326172, -1.733398, -0.1337891, 1.46582], [1.999023, -0.6669922]),
    "q5_0": (0.049175, [-2.0, -0.5, 1.0, -1.625, -0.125, 1.375], [1.875, -0.5]),
    "q5_1": (
        0.035036,
        [-2.0, -0.5806885, 0.9676514, -1.612915, -0.0645752, 1.354736],
        [1.999878, -0.5806885],
    ),
    "q8_0": (0.000610, [-1.999878, -0.5196533, 0.9605713, -1.606201, -0.1259766, 1.354248], None),
    "tq1_0": (84.052803, [-2.0, 0.0, 0.0, -2.0, 0.0, 2.0], [-2.0, 0.0]),
    "tq2_0": (84.052803, [-2.0, 0.0, 0.0, -2.0, 0.0, 2.0], [-2.0, 0.0]),
}


def example(columns: int) -> torch.Tensor:
    return (((37 * torch.arange(columns)) % 101 - 50).float() / 25)[None]


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors(kind: str) -> None:
    error, first, last = VECTORS[kind]
    x = example(256 if kind[0] == "t" else 32)
    y = dequantize(reference(kind, x))
    assert y[0, :6].tolist() == pytest.approx(first, rel=1e-6)
    assert last is None or y[0, -2:].tolist() == pytest.approx(last, rel=1e-6)
    assert float((x - y).square().sum()) == pytest.approx(error, abs=1e-6)


def test_halves_round_away_from_zero() -> None:
    # d = 1: 2.5 and −2.5 are exact halves
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([127.0, 2.5, -2.5, 0.49999997])
    found = reference("q8_0", w)
    assert isinstance(found, Affine) and found.codes[0, :4].tolist() == [127, 3, -3, 0]


def test_of_equal_magnitudes_the_first_gives_the_sign() -> None:
    w = torch.zeros(2, 32)
    w[0, 3], w[0, 9] = 8.0, -8.0
    w[1, 3], w[1, 9] = -8.0, 8.0
    found = reference("q4_0", w)
    assert isinstance(found, Affine) and isinstance(found.scale, torch.Tensor)
    assert found.scale[:, 0].tolist() == [-1.0, 1.0]
    assert found.codes[:, [3, 9]].tolist() == [[-8, 7], [-8, 7]]


@pytest.mark.parametrize("kind", VECTORS)
def test_zeros(kind: str) -> None:
    assert bool((dequantize(reference(kind, torch.zeros(2, 256))) == 0).all())


def test_searched_types_have_no_plain_rule() -> None:
    with pytest.raises(NumericsError, match="q4_k has no rule without a search"):
        reference("q4_k", torch.zeros(1, 256))
