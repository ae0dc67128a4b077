"""Blocks of 32: d, m are float16, q codes, V the table `IQ4`.

    q4_0    d, 16 bytes             w = d · (q − 8)
    q4_1    d, m, 16 bytes          w = d · q + m
    q5_0    d, fifth bits, 16 bytes w = d · (q − 16)
    q5_1    d, m, fifth bits, 16    w = d · q + m
    q8_0    d, 32 signed bytes      w = d · q
    iq4_nl  d, 16 bytes             w = d · V[q]
Byte j of 16 holds code j in its low half and code j + 16 in its high half. Bit i of the fifth bits
belongs to code i.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.gguf.blocks.planes import (
    Codec,
    as_bytes,
    fold,
    from_bytes,
    interleave,
    per_block,
    separate,
)
from quantkit.numerics.bits import signed, unsigned
from quantkit.numerics.superblocks.grids import IQ4
from quantkit.tensors import Affine, Codebook

WIDTH = 32
_HALF = WIDTH // 2
_GROUP = (1, WIDTH)


def _encode(bits: int, q: Affine) -> Tensor:
    codes = fold(unsigned(q.codes, bits), -1, WIDTH)
    halves = [v for v in (q.scale, q.offset) if v is not None]
    pieces = [per_block(cast(Tensor, half)) for half in halves]
    if bits == 5:
        pieces.append(interleave(codes >> 4, 1, 1))
    return torch.cat((*pieces, interleave(codes & 15, 4, _HALF)), dim=-1)


def _decode(bits: int, minimum: bool, blocks: Tensor) -> Affine:
    head = 4 if minimum else 2
    halves = from_bytes(blocks[..., :head], torch.float16)
    codes = separate(blocks[..., -_HALF:], 4, _HALF)
    if bits == 5:
        codes = codes | separate(blocks[..., head : head + 4], 1, 1) << 4
    flat = codes.flatten(1)
    return Affine(
        codes=flat if minimum else signed(flat, bits),
        bits=bits,
        scale=halves[..., 0],
        group=_GROUP,
        offset=halves[..., 1] if minimum else None,
    )


def _encode_q8_0(q: Affine) -> Tensor:
    codes = fold(as_bytes(q.codes), -1, WIDTH)
    return torch.cat((per_block(cast(Tensor, q.scale)), codes), dim=-1)


def _decode_q8_0(blocks: Tensor) -> Affine:
    scale = from_bytes(blocks[..., :2], torch.float16)[..., 0]
    return Affine(from_bytes(blocks[..., 2:], torch.int8).flatten(1), 8, scale, _GROUP)


def _encode_iq4_nl(q: Codebook) -> Tensor:
    codes = fold(q.codes, -1, WIDTH)
    return torch.cat((per_block(cast(Tensor, q.scale)), interleave(codes, 4, _HALF)), dim=-1)


def _decode_iq4_nl(blocks: Tensor) -> Codebook:
    scale = from_bytes(blocks[..., :2], torch.float16)[..., 0]
    codes = separate(blocks[..., 2:], 4, _HALF).flatten(1)
    return Codebook(codes, 4, torch.tensor(IQ4, dtype=torch.float32, device=blocks.device), scale, _GROUP)


def _integers(bits: int, *, minimum: bool) -> Codec[Affine]:
    return Codec(partial(_encode, bits), partial(_decode, bits, minimum))


CODECS: Mapping[str, Codec[Any]] = MappingProxyType(
    {
        "q4_0": _integers(4, minimum=False),
        "q4_1": _integers(4, minimum=True),
        "q5_0": _integers(5, minimum=False),
        "q5_1": _integers(5, minimum=True),
        "q8_0": Codec(_encode_q8_0, _decode_q8_0),
        "iq4_nl": Codec(_encode_iq4_nl, _decode_iq4_nl),
    }
)
