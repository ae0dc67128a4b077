"""Floats as they are, three-valued weights and e2m1 floats.

    f32 f16 bf16  the values
    tq1_0    5 trits a byte (160 + 80 weights), 4 trits a byte (16), d    w = d · (t − 1)
    tq2_0    codes of 2 bits, d                                           w = d · (q − 1)
    mxfp4    exponent e, 16 bytes of codes (blocks of 32)                 w = 2^(e−127) · e2m1[q]
A byte of tq1_0 is ⌈256/243 · (81·t₀ + 27·t₁ + 9·t₂ + 3·t₃ + t₄)⌉; in the last four t₄ is 0. Bytes that
no trits encode to decode all the same, so several bytes say one thing; code 3 of tq2_0 means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.gguf.blocks.planes import (
    Codec,
    as_bytes,
    fold,
    from_bytes,
    interleave,
    per_block,
    sections,
    separate,
)
from quantkit.gguf.blocks.superblocks import WIDTH, half
from quantkit.numerics.levels import E2M1
from quantkit.tensors import Affine, Codebook, Float

# trits of a byte, weights that it takes in all, bytes
_TRITS = ((5, 160, 32), (5, 80, 16), (4, 16, 4))
_FULL = 5
_MX = 32


def _encode_float(q: Float) -> Tensor:
    return as_bytes(q.values[..., None])


def _decode_float(dtype: torch.dtype, blocks: Tensor) -> Float:
    values = from_bytes(blocks, dtype)[..., 0]
    one = torch.ones((1, 1), device=blocks.device)
    return Float(values, dtype.itemsize * 8, one, (values.shape[0], values.shape[1]))


def _encode_tq1_0(q: Affine) -> Tensor:
    trits = fold(q.codes + 1, -1, WIDTH)
    pieces = []
    parts = sections(trits, *(weights for _, weights, _ in _TRITS))
    for part, (count, _, width) in zip(parts, _TRITS, strict=True):
        number = torch.zeros_like(part[..., :width], dtype=torch.int32)
        for trit in fold(part, count, width).unbind(-2):
            number = number * 3 + trit
        number *= 3 ** (_FULL - count)
        pieces.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat((*pieces, per_block(cast(Tensor, q.scale))), dim=-1)


def _decode_tq1_0(blocks: Tensor) -> Affine:
    *parts, d = sections(blocks, *(width for _, _, width in _TRITS), 2)
    trits = [
        (part * 3**n).to(torch.int16) * 3 >> 8  # bytes wrap: the trits before n fall off
        for part, (count, _, _) in zip(parts, _TRITS, strict=True)
        for n in range(count)
    ]
    return Affine(torch.cat(trits, dim=-1).flatten(1).to(torch.int8) - 1, 2, half(d), (1, WIDTH))


def _encode_tq2_0(q: Affine) -> Tensor:
    codes = fold((q.codes + 1).view(torch.uint8), -1, WIDTH)
    return torch.cat((interleave(codes, 2, 32), per_block(cast(Tensor, q.scale))), dim=-1)


def _decode_tq2_0(blocks: Tensor) -> Affine:
    data, d = sections(blocks, 64, 2)
    codes = separate(data, 2, 32).flatten(1)
    if bool((codes == 3).any()):
        raise SourceError("tq2_0 has codes 0, 1 and 2, and here is a 3")
    return Affine(codes.view(torch.int8) - 1, 2, half(d), (1, WIDTH))


def _encode_mxfp4(q: Codebook) -> Tensor:
    codes = fold(q.codes, -1, _MX)
    return torch.cat((per_block(cast(Tensor, q.scale)), interleave(codes, 4, _MX // 2)), dim=-1)


def _decode_mxfp4(blocks: Tensor) -> Codebook:
    scale = from_bytes(blocks[..., :1], torch.float8_e8m0fnu)[..., 0]
    # plus zero: ggml decodes the code of −0 as 0
    table = torch.tensor(E2M1, device=blocks.device) + 0.0
    return Codebook(separate(blocks[..., 1:], 4, _MX // 2).flatten(1), 4, table, scale, (1, _MX))


def _float(dtype: torch.dtype) -> Codec[Float]:
    return Codec(_encode_float, partial(_decode_float, dtype))


CODECS: Mapping[str, Codec[Any]] = MappingProxyType(
    {
        "f32": _float(torch.float32),
        "f16": _float(torch.float16),
        "bf16": _float(torch.bfloat16),
        "tq1_0": Codec(_encode_tq1_0, _decode_tq1_0),
        "tq2_0": Codec(_encode_tq2_0, _decode_tq2_0),
        "mxfp4": Codec(_encode_mxfp4, _decode_mxfp4),
    }
)
