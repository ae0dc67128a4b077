"""Super-blocks of 256 with nested scales.

    q2_k    16 × (sc | m << 4), codes, d, dmin              w = d·sc·q − dmin·m        16 per sub-block
    q3_k    third bits, codes, 16 sc of 6 bits, d           w = d·(sc − 32)·(q − 4)    16
    q4_k    d, dmin, 8 (sc, m) of 6 bits, codes             w = d·sc·q − dmin·m        32
    q5_k    the same with fifth bits before the codes
    q6_k    codes, fifth and sixth bits, 16 signed sc, d    w = d·sc·(q − 32)          16
    iq4_xs  d, 8 sc of 6 bits (high, low), codes            w = d·(sc − 32)·V[q]       32
A minimum is held as an offset, so its own scale is −dmin. Every bit has a meaning: no two blocks say
the same, but for values that multiply to zero. d and dmin are float16, sc and m whole numbers of each
sub-block, V is `IQ4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    sections,
    separate,
)
from quantkit.numerics.bits import signed, unsigned
from quantkit.numerics.superblocks.grids import IQ4
from quantkit.tensors import Affine, Codebook, QuantizedTensor

WIDTH = 256


def scales(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """(out, super-blocks, sub-blocks) codes of nested scales, and the bytes of their float16 scale."""
    nested = cast(Affine, q.scale)
    d = cast(Tensor, nested.scale)
    return fold(nested.codes, d.shape[1], -1), per_block(d)


def half(data: Tensor) -> Tensor:
    """(out, super-blocks) float16 of their (out, super-blocks, 2) bytes."""
    return from_bytes(data, torch.float16)[..., 0]


def _minima(q: Affine) -> tuple[Tensor, Tensor]:
    """Like `scales`, of the offset. Negation is exact: it turns one bit."""
    nested = cast(Affine, q.offset)
    d = cast(Tensor, nested.scale)
    return fold(nested.codes, d.shape[1], -1), per_block(-d)


def _codes(q: Affine | Codebook) -> Tensor:
    return fold(q.codes, -1, WIDTH)


def _with_minima(codes: Tensor, bits: int, nested: int, sub: Sequence[Tensor]) -> Affine:
    """`sub` is sub-scales and sub-minima, of `nested` bits, and the bytes of d and dmin."""
    sc, m, d, dmin = sub
    count = sc.shape[-1]
    return Affine(
        codes=codes.flatten(1),
        bits=bits,
        scale=Affine(sc.flatten(1), nested, half(d), (1, count)),
        group=(1, WIDTH // count),
        offset=Affine(m.flatten(1), nested, -half(dmin), (1, count)),
    )


def _symmetric(codes: Tensor, bits: int, sc: Tensor, nested: int, d: Tensor) -> Affine:
    count = sc.shape[-1]
    scale = Affine(sc.flatten(1), nested, half(d), (1, count))
    return Affine(signed(codes, bits).flatten(1), bits, scale, (1, WIDTH // count))


def _encode_q2_k(q: Affine) -> Tensor:
    (sc, d), (m, dmin) = scales(q), _minima(q)
    return torch.cat((sc | m << 4, interleave(_codes(q), 2, 32), d, dmin), dim=-1)


def _decode_q2_k(blocks: Tensor) -> Affine:
    sub, data, d, dmin = sections(blocks, 16, 64, 2, 2)
    return _with_minima(separate(data, 2, 32), 2, 4, (sub & 15, sub >> 4, d, dmin))


def _encode_q3_k(q: Affine) -> Tensor:
    sc, d = scales(q)
    codes, sub = unsigned(_codes(q), 3), unsigned(sc, 6)
    low, high = interleave(sub & 15, 4, 8), interleave(sub >> 4, 2, 4)
    return torch.cat((interleave(codes >> 2, 1, 32), interleave(codes & 3, 2, 32), low, high, d), dim=-1)


def _decode_q3_k(blocks: Tensor) -> Affine:
    third, data, low, high, d = sections(blocks, 32, 64, 8, 4, 2)
    codes = separate(data, 2, 32) | separate(third, 1, 32) << 2
    sub = separate(low, 4, 8) | separate(high, 2, 4) << 4
    return _symmetric(codes, 3, signed(sub, 6), 6, d)


def _six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """8 sub-scales and 8 sub-minima of 6 bits in 12 bytes."""
    late_sc, late_m = sc[..., 4:], m[..., 4:]
    first = sc[..., :4] | late_sc >> 4 << 6
    second = m[..., :4] | late_m >> 4 << 6
    return torch.cat((first, second, late_sc & 15 | late_m << 4), dim=-1)


def _from_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, late = sections(data, 4, 4, 4)
    sc = torch.cat((first & 63, late & 15 | first >> 6 << 4), dim=-1)
    m = torch.cat((second & 63, late >> 4 | second >> 6 << 4), dim=-1)
    return sc, m


def _encode_q45_k(bits: int, q: Affine) -> Tensor:
    (sc, d), (m, dmin) = scales(q), _minima(q)
    codes = _codes(q)
    fifth = [interleave(codes >> 4, 1, 32)] if bits == 5 else []
    return torch.cat((d, dmin, _six_bits(sc, m), *fifth, interleave(codes & 15, 4, 32)), dim=-1)


def _decode_q45_k(bits: int, blocks: Tensor) -> Affine:
    d, dmin, sub, rest = sections(blocks, 2, 2, 12, blocks.shape[-1] - 16)
    codes = separate(rest[..., -128:], 4, 32)
    if bits == 5:
        codes = codes | separate(rest[..., :32], 1, 32) << 4
    return _with_minima(codes, bits, 6, (*_from_six_bits(sub), d, dmin))


def _encode_q6_k(q: Affine) -> Tensor:
    sc, d = scales(q)
    codes = unsigned(_codes(q), 6)
    low, high = interleave(codes & 15, 4, 64), interleave(codes >> 4, 2, 32)
    return torch.cat((low, high, as_bytes(sc), d), dim=-1)


def _decode_q6_k(blocks: Tensor) -> Affine:
    low, high, sub, d = sections(blocks, 128, 64, 16, 2)
    codes = separate(low, 4, 64) | separate(high, 2, 32) << 4
    return _symmetric(codes, 6, from_bytes(sub, torch.int8), 8, d)


def _encode_iq4_xs(q: Codebook) -> Tensor:
    sc, d = scales(q)
    sub = unsigned(sc, 6)
    high, low = interleave(sub >> 4, 2, 1), interleave(sub & 15, 4, 1)
    return torch.cat((d, high, low, interleave(_codes(q), 4, 16)), dim=-1)


def _decode_iq4_xs(blocks: Tensor) -> Codebook:
    d, high, low, data = sections(blocks, 2, 2, 4, 128)
    sub = signed(separate(low, 4, 1) | separate(high, 2, 1) << 4, 6)
    scale = Affine(sub.flatten(1), 6, half(d), (1, 8))
    table = torch.tensor(IQ4, dtype=torch.float32, device=blocks.device)
    return Codebook(separate(data, 4, 16).flatten(1), 4, table, scale, (1, 32))


CODECS: Mapping[str, Codec[Any]] = MappingProxyType(
    {
        "q2_k": Codec(_encode_q2_k, _decode_q2_k),
        "q3_k": Codec(_encode_q3_k, _decode_q3_k),
        "q4_k": Codec(partial(_encode_q45_k, 4), partial(_decode_q45_k, 4)),
        "q5_k": Codec(partial(_encode_q45_k, 5), partial(_decode_q45_k, 5)),
        "q6_k": Codec(_encode_q6_k, _decode_q6_k),
        "iq4_xs": Codec(_encode_iq4_xs, _decode_iq4_xs),
    }
)
