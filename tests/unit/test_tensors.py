from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.tensors import (
    Affine,
    Codebook,
    Float,
    QuantizedTensor,
    dequantize,
    plain_grid,
    shape,
    spread,
    values,
)


def test_symmetric_groups_by_hand() -> None:
    q = Affine(
        torch.tensor([[1, -2, 3, -4], [0, 7, -8, 1]], dtype=torch.int8),
        4,
        torch.tensor([[0.5, 2.0], [1.0, -0.25]], dtype=torch.float16),
        (1, 2),
    )
    assert dequantize(q).tolist() == [[0.5, -1.0, 6.0, -8.0], [0.0, 7.0, 2.0, -0.25]]
    assert dequantize(q).dtype == torch.float32
    assert shape(q) == (2, 4)


def test_zero_points_by_hand() -> None:
    q = Affine(
        torch.tensor([[0, 3, 15, 8]], dtype=torch.uint8),
        4,
        torch.tensor([[0.5, 2.0]]),
        (1, 2),
        zero_point=torch.tensor([[3, 15]], dtype=torch.uint8),
    )
    # (0 − 3)·½, (3 − 3)·½, (15 − 15)·2, (8 − 15)·2: an unsigned subtraction would wrap
    assert dequantize(q).tolist() == [[-1.5, 0.0, 0.0, -14.0]]


def test_offsets_by_hand() -> None:
    q = Affine(
        torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        2,
        torch.tensor([[2.0]]),
        (1, 4),
        offset=torch.tensor([[-1.0]], dtype=torch.bfloat16),
    )
    assert dequantize(q).tolist() == [[-1.0, 1.0, 3.0, 5.0]]


def test_one_scale_per_tensor_and_blocks_of_rows_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6], [7, -8, 0]], dtype=torch.int8)
    whole = Affine(codes, 4, torch.tensor([[2.0]]), (3, 3))
    assert torch.equal(dequantize(whole), 2.0 * codes)
    # 2 × 2 blocks over 3 × 3: the last ones are cut
    blocks = Affine(codes, 4, torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), (2, 2))
    assert dequantize(blocks).tolist() == [[1, 2, 30], [4, 5, 60], [700, -800, 0]]


def test_regrouped_columns_by_hand() -> None:
    q = Affine(
        torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]], dtype=torch.int8),
        4,
        torch.tensor([[1.0, 10.0], [3.0, 5.0]]),
        (1, 2),
        column_group=torch.tensor([1, 0, 0, 1], dtype=torch.int32),
    )
    assert dequantize(q).tolist() == [[10, 1, 1, 10], [10, 6, 6, 10]]


def test_regrouped_zero_points_follow_their_group() -> None:
    q = Affine(
        torch.tensor([[5, 5]], dtype=torch.uint8),
        4,
        torch.tensor([[1.0, 10.0]]),
        (1, 1),
        zero_point=torch.tensor([[4, 3]], dtype=torch.uint8),
        column_group=torch.tensor([1, 0], dtype=torch.int32),
    )
    assert dequantize(q).tolist() == [[20.0, 1.0]]


def test_floats_by_hand() -> None:
    stored = torch.tensor([[1.5, -448.0], [0.25, 6.0]]).to(torch.float8_e4m3fn)
    q = Float(stored, 8, torch.tensor([[2.0], [0.5]]), (1, 2))
    assert dequantize(q).tolist() == [[3.0, -896.0], [0.125, 3.0]]
    assert shape(q) == (2, 2)


def test_codebooks_by_hand() -> None:
    table = torch.tensor([-1.0, -0.5, 0.25, 1.0])
    q = Codebook(
        torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8), 2, table, torch.tensor([[2.0, 4.0]]), (1, 2)
    )
    assert dequantize(q).tolist() == [[2.0, -2.0, -2.0, 1.0]]


def test_fractional_zero_points_by_hand() -> None:
    q = Affine(
        torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8),
        2,
        torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        (1, 2),
        zero_point=torch.tensor([[1.5, -0.25]], dtype=torch.float16),
    )
    # ½·(0 − 1½), ½·(3 − 1½), 2·(1 + ¼), 2·(2 + ¼)
    assert dequantize(q).tolist() == [[-0.75, 0.75, 2.5, 4.5]]


def test_groups_along_the_outputs_by_hand() -> None:
    """Rows 0 and 2 share a scale per input, rows 1 and 3 another."""
    q = Affine(
        torch.tensor([[1, 2], [1, 2], [3, 0], [3, 0]], dtype=torch.uint8),
        2,
        torch.tensor([[1.0, 10.0], [100.0, 1000.0]]),
        (2, 1),
        zero_point=torch.tensor([[0.5, 0.0], [1.0, 0.0]]),
        row_group=torch.tensor([0, 1, 0, 1], dtype=torch.int32),
    )
    assert dequantize(q).tolist() == [[0.5, 20.0], [0.0, 2000.0], [2.5, 0.0], [200.0, 0.0]]
    offset = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    shifted = dequantize(Affine(q.codes, 2, q.scale, (2, 1), offset=offset, row_group=q.row_group))
    assert shifted.tolist() == [[2.0, 22.0], [103.0, 2004.0], [4.0, 2.0], [303.0, 4.0]]


def test_shifted_codebooks_by_hand() -> None:
    table, codes = torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([[0, 2, 1]], dtype=torch.uint8)
    q = Codebook(codes, 8, table, torch.tensor([[4.0, 2.0]]), (1, 2), torch.tensor([0.25]))
    assert dequantize(q).tolist() == [[-3.75, 2.25, 0.25]]


def test_scales_that_are_laid_out_flat_cross_rows() -> None:
    """Double quantization: six scales of two rows in outer groups of four, shifted by their mean."""
    table = torch.tensor([-1.0, 0.0, 1.0])
    flat = Codebook(
        torch.tensor([[2, 0, 1, 1, 2, 0]], dtype=torch.uint8),
        8,
        table,
        torch.tensor([[0.5, 0.25]]),
        (1, 4),
        torch.tensor([2.0]),
    )
    assert values(flat).tolist() == [[2.5, 1.5, 2.0, 2.0, 2.25, 1.75]]
    q = Codebook(torch.full((2, 6), 2, dtype=torch.uint8), 4, table, flat, (1, 2))
    assert dequantize(q).tolist() == [[2.5, 2.5, 1.5, 1.5, 2.0, 2.0], [2.0, 2.0, 2.25, 2.25, 1.75, 1.75]]
    assert shape(q) == (2, 6)


def test_tiles_may_be_cut_short() -> None:
    """130 × 256 in squares of 128: the last two rows have tiles of their own."""
    stored = torch.ones(130, 256).to(torch.float8_e4m3fn)
    q = Float(stored, 8, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (128, 128))
    found = dequantize(q)
    for rows, columns, value in (
        (slice(0, 128), slice(0, 128), 1),
        (slice(0, 128), slice(128, 256), 2),
        (slice(128, 130), slice(0, 128), 3),
        (slice(128, 130), slice(128, 256), 4),
    ):
        assert bool((found[rows, columns] == value).all())


def test_scales_of_two_levels_by_hand() -> None:
    # nvfp4: 1.5 and 448 times ½; e2m1 codes 7 and 10 are 6 and −1
    fine = Float(torch.tensor([[1.5, 448.0]]).to(torch.float8_e4m3fn), 8, torch.tensor([[0.5]]), (1, 2))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    q = Codebook(torch.tensor([[7, 10, 7, 10]], dtype=torch.uint8), 4, table, fine, (1, 2))
    assert dequantize(q).tolist() == [[4.5, -0.75, 1344.0, -224.0]]
    # LLM.int8: the largest magnitude of a row and 1/127
    row = Float(torch.tensor([[127.0], [254.0]]), 32, torch.tensor([[1 / 127]]), (2, 1))
    rows = Affine(torch.tensor([[127, -1], [64, 0]], dtype=torch.int8), 8, row, (1, 2))
    assert dequantize(rows).tolist() == [[127.0, -1.0], [128.0, 0.0]]


def test_powers_of_two_as_scales_by_hand() -> None:
    powers = torch.tensor([[0.25, 2.0**20]]).to(torch.float8_e8m0fnu)
    q = Codebook(torch.tensor([[0, 1]], dtype=torch.uint8), 4, torch.tensor([1.5, -6.0]), powers, (1, 1))
    assert dequantize(q).tolist() == [[0.375, -6.0 * 2**20]]


def test_what_a_plain_grid_is() -> None:
    codes, scale = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 2)
    whole = torch.zeros(2, 2, dtype=torch.uint8)
    plain = Affine(codes, 4, scale, (1, 2), zero_point=whole)
    found = plain_grid(plain)
    assert found is not None and found[0] is plain and found[1] is scale
    assert plain_grid(Affine(codes, 4, scale, (1, 2))) is not None
    others: tuple[QuantizedTensor, ...] = (
        Affine(codes, 4, scale, (1, 2), zero_point=whole.float()),
        Affine(codes, 4, scale, (1, 2), offset=scale),
        Affine(codes, 4, Affine(whole, 6, torch.ones(2, 1), (1, 2)), (1, 2)),
        Affine(codes, 4, torch.ones(1, 4), (2, 1), row_group=torch.zeros(2, dtype=torch.int32)),
        Codebook(codes, 4, torch.ones(16), scale, (1, 2)),
        Float(codes.float(), 8, scale, (1, 2)),
    )
    assert [plain_grid(q) for q in others] == [None] * len(others)


def test_scales_of_scales_by_hand() -> None:
    # two groups whose scales are 3·½ and 5·½, one group of scales
    scale = Affine(torch.tensor([[3, 5]], dtype=torch.uint8), 6, torch.tensor([[0.5]]), (1, 2))
    q = Affine(torch.tensor([[1, 2, 1, 2]], dtype=torch.int8), 4, scale, (1, 2))
    assert values(scale).tolist() == [[1.5, 2.5]]
    assert dequantize(q).tolist() == [[1.5, 3.0, 2.5, 5.0]]
    offset = Affine(torch.tensor([[1, 0]], dtype=torch.uint8), 6, torch.tensor([[-2.0]]), (1, 2))
    shifted = Affine(q.codes, 4, scale, (1, 2), offset=offset)
    assert dequantize(shifted).tolist() == [[-0.5, 1.0, 2.5, 5.0]]


def test_values_of_a_plain_scale_are_fp32() -> None:
    found = values(torch.tensor([[0.1]], dtype=torch.float16))
    assert found.dtype == torch.float32
    assert float(found) == float(torch.tensor(0.1).half())


def test_spread_repeats_and_cuts() -> None:
    grid = torch.tensor([[1.0, 2.0]])
    assert spread(grid, (1, 2), (1, 3)).tolist() == [[1, 1, 2]]
    assert spread(grid.T, (2, 4), (3, 4)).tolist() == [[1] * 4, [1] * 4, [2] * 4]
    assert spread(torch.tensor([[3.0]]), (2, 2), (2, 2)).tolist() == [[3, 3], [3, 3]]


# Blocks of llama.cpp: nested values must reproduce the reader's own arithmetic bit for bit.

ROWS, BLOCKS = 4, 3


def halves(rng: np.random.Generator, *size: int) -> np.ndarray:
    """fp16 scales of a plausible size."""
    return (rng.uniform(0.001, 0.02, size) * rng.choice([-1, 1], size)).astype(np.float16)


def raw(*parts: np.ndarray) -> np.ndarray:
    """(rows, bytes) of whole rows from parts of (rows, blocks, …)."""
    flat = [np.ascontiguousarray(p).view(np.uint8).reshape(ROWS, BLOCKS, -1) for p in parts]
    return np.concatenate(flat, axis=-1).reshape(ROWS, -1)


def tensor(a: np.ndarray, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a.reshape(ROWS, columns)))


def q4_0(rng: np.random.Generator) -> tuple[np.ndarray, QuantizedTensor]:
    d = halves(rng, ROWS, BLOCKS, 1)
    codes = rng.integers(0, 16, (ROWS, BLOCKS, 32), dtype=np.uint8)
    data = raw(d, codes[..., :16] | codes[..., 16:] << 4)
    signed = codes.astype(np.int8) - 8
    return data, Affine(tensor(signed, 32 * BLOCKS), 4, tensor(d, BLOCKS), (1, 32))


def q4_1(rng: np.random.Generator) -> tuple[np.ndarray, QuantizedTensor]:
    d, m = halves(rng, ROWS, BLOCKS, 1), halves(rng, ROWS, BLOCKS, 1)
    codes = rng.integers(0, 16, (ROWS, BLOCKS, 32), dtype=np.uint8)
    data = raw(d, m, codes[..., :16] | codes[..., 16:] << 4)
    return data, Affine(tensor(codes, 32 * BLOCKS), 4, tensor(d, BLOCKS), (1, 32), offset=tensor(m, BLOCKS))


def q4_k(rng: np.random.Generator) -> tuple[np.ndarray, QuantizedTensor]:
    """256 weights: eight groups with 6-bit scales and minima under two fp16 numbers."""
    d, dmin = halves(rng, ROWS, BLOCKS, 1), halves(rng, ROWS, BLOCKS, 1)
    sc = rng.integers(0, 64, (ROWS, BLOCKS, 8), dtype=np.uint8)
    m = rng.integers(0, 64, (ROWS, BLOCKS, 8), dtype=np.uint8)
    low_sc, low_m = sc[..., :4] | (sc[..., 4:] >> 4) << 6, m[..., :4] | (m[..., 4:] >> 4) << 6
    packed = np.concatenate([low_sc, low_m, (sc[..., 4:] & 15) | (m[..., 4:] & 15) << 4], axis=-1)
    codes = rng.integers(0, 16, (ROWS, BLOCKS, 4, 2, 32), dtype=np.uint8)
    data = raw(d, dmin, packed, codes[..., 0, :] | codes[..., 1, :] << 4)
    scale = Affine(tensor(sc, 8 * BLOCKS), 6, tensor(d, BLOCKS), (1, 8))
    offset = Affine(tensor(m, 8 * BLOCKS), 6, tensor(-dmin, BLOCKS), (1, 8))
    return data, Affine(tensor(codes, 256 * BLOCKS), 4, scale, (1, 32), offset=offset)


def q6_k(rng: np.random.Generator) -> tuple[np.ndarray, QuantizedTensor]:
    """256 weights: sixteen groups with signed 8-bit scales under one fp16 number."""
    d = halves(rng, ROWS, BLOCKS, 1)
    sc = rng.integers(-128, 128, (ROWS, BLOCKS, 16)).astype(np.int8)
    codes = rng.integers(0, 64, (ROWS, BLOCKS, 2, 4, 32), dtype=np.uint8)
    # in each half of 128: quarters 0 and 2 share the nibbles of 32 bytes, 1 and 3 those of the next 32
    low = np.stack([(codes[..., k, :] & 15) | (codes[..., k + 2, :] & 15) << 4 for k in (0, 1)], axis=-2)
    high = sum((codes[..., k, :] >> 4) << (2 * k) for k in range(4))
    data = raw(low, np.asarray(high, dtype=np.uint8), sc, d)
    scale = Affine(tensor(sc, 16 * BLOCKS), 8, tensor(d, BLOCKS), (1, 16))
    return data, Affine(tensor(codes.astype(np.int8) - 32, 256 * BLOCKS), 6, scale, (1, 16))


@pytest.mark.parametrize(
    "kind, make", [("Q4_0", q4_0), ("Q4_1", q4_1), ("Q4_K", q4_k), ("Q6_K", q6_k)], ids=lambda v: str(v)[:4]
)
def test_nested_values_equal_the_dequantization_of_gguf(kind: str, make: object) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    data, q = make(np.random.default_rng(3))  # type: ignore[operator]
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = dequantize(q).numpy()
    assert found.shape == expected.shape
    assert np.array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32))
