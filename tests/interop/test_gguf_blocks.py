"""Bytes that llama.cpp's own quantizers write, and what they stand for, in every type."""

from __future__ import annotations

import pytest
import torch

from quantkit.gguf.blocks import TYPES, pack, unpack
from quantkit.tensors import dequantize
from tests.interop.ggml import NEED_IMATRIX, Ggml

pytestmark = pytest.mark.interop

WIDTH = 768


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_bytes_of_llama_cpp(name: str, weighed: bool) -> None:
    if name in NEED_IMATRIX and not weighed:
        pytest.skip(f"llama.cpp makes no {name} without an imatrix")
    ggml, kind = Ggml.load(), TYPES[name]
    rng = torch.Generator().manual_seed(5)
    rows = torch.randn(5, WIDTH, generator=rng) * torch.rand(5, WIDTH, generator=rng) ** 3
    rows[4] = 0
    imatrix = torch.rand(WIDTH, generator=rng) + 0.01 if weighed else None
    data = ggml.quantize(name, rows, imatrix)
    q = unpack(data, kind)
    assert torch.equal(pack(q, kind), data)
    values = dequantize(q)
    assert torch.equal(values.view(torch.int32), ggml.dequantize(name, data, WIDTH).view(torch.int32))
    # and they are these rows
    assert float((values - rows).norm() / rows.norm()) < 0.8
