"""Blocks of 32 against the worked examples of the format, and against the `gguf` package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.blocks import Q4_0, Q4_1, Q8_0, TYPES, BlockType, pack, unpack
from quantkit.tensors import Affine, dequantize

gguf = pytest.importorskip("gguf")

# one block each, written by llama.cpp from x[i] = ((37·i mod 101) − 50)/25, and what it stands for
EXAMPLES = {
    Q4_0: ("0034e046acf258bd1379df358be046acf268", (-2.0, -0.5, 1.0, -1.5, 0.0, 1.25), (1.75, -0.5)),
    Q4_1: (
        "443400c0d0369bf157ad1369ce258ad0469cf257",
        (-2.0, -0.4003906, 0.9326172, -1.733398, -0.1337891, 1.46582),
        (1.999023, -0.6669922),
    ),
    Q8_0: (
        "082481df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc",
        (-1.999878, -0.5196533, 0.9605713, -1.606201, -0.1259766, 1.354248),
        (1.999878, -0.5668945),
    ),
}
KINDS = pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.name)


def on_grid(kind: BlockType, rows: int, width: int, seed: int) -> Affine:
    """Random codes, scales of either sign and minima."""
    rng = torch.Generator().manual_seed(seed)
    groups = (rows, width // 32)
    low = 0 if kind.minimum else -(1 << (kind.bits - 1))
    codes = torch.randint(low, low + (1 << kind.bits), (rows, width), generator=rng)
    return Affine(
        codes=codes.to(torch.uint8 if kind.minimum else torch.int8),
        bits=kind.bits,
        scale=torch.randn(groups, generator=rng).to(torch.float16),
        group=(1, 32),
        offset=torch.randn(groups, generator=rng).to(torch.float16) if kind.minimum else None,
    )


@KINDS
def test_worked_examples(kind: BlockType) -> None:
    text, first, last = EXAMPLES[kind]
    block = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)[None]
    assert block.shape[1] == kind.nbytes == kind.row_bytes(32)
    found = unpack(block, kind)
    values = dequantize(found)[0]
    torch.testing.assert_close(values[:6], torch.tensor(first), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(values[-2:], torch.tensor(last), rtol=1e-6, atol=1e-7)
    assert torch.equal(pack(found, kind), block)


@KINDS
@given(rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_packing_loses_nothing_and_the_library_agrees(
    kind: BlockType, rows: int, groups: int, seed: int
) -> None:
    q = on_grid(kind, rows, 32 * groups, seed)
    packed = pack(q, kind)
    assert packed.shape == (rows, kind.row_bytes(32 * groups))
    back = unpack(packed, kind)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(dequantize(back), dequantize(q))
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(theirs), dequantize(q))


@KINDS
def test_sizes_are_those_of_the_library(kind: BlockType) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (32, kind.nbytes)
    assert gguf.LlamaFileType[f"MOSTLY_{kind.name}"] == kind.file_type


@KINDS
def test_other_grids_are_refused(kind: BlockType) -> None:
    q = on_grid(kind, 2, 64, 0)
    zeros = torch.zeros(q.scale.shape, dtype=torch.uint8)
    wider = [replace(q, group=(1, 64)), replace(q, zero_point=zeros), replace(q, bits=5)]
    for other in (*wider, replace(q, scale=q.scale.to(torch.float32))):
        with pytest.raises(UnsupportedError, match=r"grid of|float16"):
            pack(other, kind)
    assert all(t is kind or t.nbytes != kind.nbytes for t in TYPES.values())


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(SourceError, match="no whole Q4_0 blocks of 18"):
        unpack(torch.zeros(2, 17, dtype=torch.uint8), Q4_0)
