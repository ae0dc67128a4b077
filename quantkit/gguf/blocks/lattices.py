"""Super-blocks of 256 that index tables of vectors: d is float16, s a whole number of each sub-block.

    iq2_xxs  d, 8 × (4 indices, word)                       8 weights per vector   32 per sub-block
    iq2_xs   d, 32 × half word, 16 s                        8                      16
    iq2_s    d, 32 indices, signs, their high bits, 16 s    8                      16
    iq3_xxs  d, 64 indices, 8 × word                        4                      32
    iq3_s    d, 64 indices, high bits, signs, 8 s           4                      32
    iq1_s    d, 32 indices, 8 × half word                   8                      32
    iq1_m    32 indices, their high bits, 4 × half word     8                      16
A word holds four sign indices of 7 bits and s; the half word of iq2_xs an index of 9 bits and a sign
index; that of iq1_s four times 3 high bits, s, and the sign of the shift; that of iq1_m four s and a
quarter of d. w = d · (s + ½) · point · sign, where the points are those of `tables.grid`; iq1 has no
signs and adds ±¼ to its points. A sign index stands for 8 signs of which an even number is negative:
the first seven, as bits; the eighth follows. Every bit has a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.blocks.planes import (
    Codec,
    as_bytes,
    cut,
    fold,
    from_bytes,
    interleave,
    join,
    sections,
    separate,
)
from quantkit.gguf.blocks.superblocks import WIDTH, half, scales
from quantkit.gguf.tables import grid
from quantkit.tensors import Affine, Lattice

_SHIFT = 0.25
_WORD = (7, 7, 7, 7, 4)
_XS_WORD = (9, 7)
_S_WORD = (3, 3, 3, 3, 3, 1)
_M_WORD = (3, 3, 3, 3, 4)


def _lattice(name: str, codes: Tensor, s: Tensor, d: Tensor, **extra: Tensor) -> Lattice:
    """`s` are (out, super-blocks, sub-blocks) of 3 bits where there is a shift, else of 4."""
    table = grid(name)
    count = s.shape[-1]
    middle = torch.full(d.shape, -0.5, device=d.device)
    nested = 3 if "shift" in extra else 4
    return Lattice(
        codes=codes.to(torch.int16).flatten(1),
        bits=table.shape[0].bit_length() - 1,
        table=table.to(d.device),
        scale=Affine(s.to(torch.uint8).flatten(1), nested, d, (1, count), zero_point=middle),
        group=(1, WIDTH // count),
        **extra,
    )


def _codes(q: Lattice) -> Tensor:
    """(out, super-blocks, vectors)."""
    return fold(q.codes, -1, WIDTH // q.table.shape[1])


def _low(codes: Tensor) -> Tensor:
    return (codes & 255).to(torch.uint8)


def _high(codes: Tensor) -> Tensor:
    return (codes >> 8).to(torch.uint8)


def _wide(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.int16) | high.to(torch.int16) << 8


def _sign_bytes(q: Lattice) -> Tensor:
    """(out, super-blocks, 32): bit i of byte k is set where weight 8k + i is negative."""
    signs = cast(Tensor, q.signs)
    if bool((signs.abs() != 1).any()):
        raise UnsupportedError("signs are 1 or −1")
    return interleave(fold((signs < 0).to(torch.uint8), -1, WIDTH), 1, 1)


def _signs(data: Tensor) -> Tensor:
    """Inverse of `_sign_bytes`: (out, in) int8."""
    return 1 - 2 * separate(data, 1, 1).flatten(1).view(torch.int8)


def _parity(data: Tensor) -> Tensor:
    """Whether the number of set bits is odd, as 0 or 1."""
    for shift in (4, 2, 1):
        data = data ^ data >> shift
    return data & 1


def _sign_indices(q: Lattice) -> Tensor:
    """(out, super-blocks, 32) uint8 of 7 bits."""
    data = _sign_bytes(q)
    if odd := int(_parity(data).sum()):
        raise UnsupportedError(
            f"{odd:,} of {data.numel():,} runs of 8 weights have an odd number of negative signs"
        )
    return data & 127


def _from_indices(indices: Tensor) -> Tensor:
    """(out, in) int8 signs of (out, super-blocks, 32) sign indices."""
    data = indices.to(torch.uint8)
    return _signs(data | _parity(data) << 7)


def _sign_words(q: Lattice, s: Tensor) -> Tensor:
    """(out, super-blocks, 8) int32: four sign indices and s each."""
    return join([*fold(_sign_indices(q), 8, 4).unbind(-1), s], _WORD, torch.int32)


def _from_sign_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) signs and (out, super-blocks, 8) s."""
    *indices, s = cut(words, _WORD)
    return _from_indices(torch.stack(indices, dim=-1).flatten(-2)), s


def _encode_iq2_xxs(q: Lattice) -> Tensor:
    s, d = scales(q)
    words = as_bytes(_sign_words(q, s)[..., None])
    runs = torch.cat((fold(_low(_codes(q)), 8, 4), words), dim=-1)
    return torch.cat((d, runs.flatten(-2)), dim=-1)


def _decode_iq2_xxs(blocks: Tensor) -> Lattice:
    d, data = sections(blocks, 2, 64)
    codes, words = sections(fold(data, 8, 8), 4, 4)
    signs, s = _from_sign_words(from_bytes(words, torch.int32)[..., 0])
    return _lattice("iq2_xxs", codes.flatten(-2), s, half(d), signs=signs)


def _encode_iq2_xs(q: Lattice) -> Tensor:
    s, d = scales(q)
    words = as_bytes(join([_codes(q), _sign_indices(q)], _XS_WORD, torch.int16))
    return torch.cat((d, words, interleave(s, 4, 1)), dim=-1)


def _decode_iq2_xs(blocks: Tensor) -> Lattice:
    d, words, s = sections(blocks, 2, 64, 8)
    codes, indices = cut(from_bytes(words, torch.int16), _XS_WORD)
    return _lattice("iq2_xs", codes, separate(s, 4, 1), half(d), signs=_from_indices(indices))


def _encode_iq2_s(q: Lattice) -> Tensor:
    (s, d), codes = scales(q), _codes(q)
    high = interleave(_high(codes), 2, 1)
    return torch.cat((d, _low(codes), _sign_bytes(q), high, interleave(s, 4, 1)), dim=-1)


def _decode_iq2_s(blocks: Tensor) -> Lattice:
    d, low, signs, high, s = sections(blocks, 2, 32, 32, 8, 8)
    codes = _wide(low, separate(high, 2, 1))
    return _lattice("iq2_s", codes, separate(s, 4, 1), half(d), signs=_signs(signs))


def _encode_iq3_xxs(q: Lattice) -> Tensor:
    s, d = scales(q)
    return torch.cat((d, _low(_codes(q)), as_bytes(_sign_words(q, s))), dim=-1)


def _decode_iq3_xxs(blocks: Tensor) -> Lattice:
    d, codes, words = sections(blocks, 2, 64, 32)
    signs, s = _from_sign_words(from_bytes(words, torch.int32))
    return _lattice("iq3_xxs", codes, s, half(d), signs=signs)


def _encode_iq3_s(q: Lattice) -> Tensor:
    (s, d), codes = scales(q), _codes(q)
    high = interleave(_high(codes), 1, 1)
    return torch.cat((d, _low(codes), high, _sign_bytes(q), interleave(s, 4, 1)), dim=-1)


def _decode_iq3_s(blocks: Tensor) -> Lattice:
    d, low, high, signs, s = sections(blocks, 2, 64, 8, 32, 4)
    codes = _wide(low, separate(high, 1, 1))
    return _lattice("iq3_s", codes, separate(s, 4, 1), half(d), signs=_signs(signs))


def _negative_shift(q: Lattice) -> Tensor:
    """(out, super-blocks, runs) uint8: 1 where the shift is negative."""
    shift = cast(Tensor, q.shift)
    if bool((shift.abs() != _SHIFT).any()):
        raise UnsupportedError(f"points are shifted by {_SHIFT} or −{_SHIFT}")
    return fold((shift < 0).to(torch.uint8), q.codes.shape[1] * q.table.shape[1] // WIDTH, -1)


def _shift(negative: Tensor) -> Tensor:
    """Inverse of `_negative_shift`: (out, runs) fp32."""
    return (_SHIFT - 2 * _SHIFT * negative.to(torch.float32)).flatten(1)


def _encode_iq1_s(q: Lattice) -> Tensor:
    (s, d), codes = scales(q), _codes(q)
    high = fold(_high(codes), 8, 4).unbind(-1)
    words = join([*high, s, _negative_shift(q)], _S_WORD, torch.int16)
    return torch.cat((d, _low(codes), as_bytes(words)), dim=-1)


def _decode_iq1_s(blocks: Tensor) -> Lattice:
    d, low, words = sections(blocks, 2, 32, 16)
    *high, s, negative = cut(from_bytes(words, torch.int16), _S_WORD)
    codes = _wide(low, torch.stack(high, dim=-1).flatten(-2))
    return _lattice("iq1_s", codes, s, half(d), shift=_shift(negative))


def _encode_iq1_m(q: Lattice) -> Tensor:
    (s, d), codes = scales(q), _codes(q)
    high = interleave(_high(codes) | _negative_shift(q) << 3, 4, 1)
    words = join([*fold(s, 4, 4).unbind(-1), separate(d, 4, 1)], _M_WORD, torch.int16)
    return torch.cat((_low(codes), high, as_bytes(words)), dim=-1)


def _decode_iq1_m(blocks: Tensor) -> Lattice:
    low, data, words = sections(blocks, 32, 16, 8)
    high = separate(data, 4, 1)
    *s, quarters = cut(from_bytes(words, torch.int16), _M_WORD)
    d = half(interleave(quarters.to(torch.uint8), 4, 1))
    scale = torch.stack(s, dim=-1).flatten(-2)
    return _lattice("iq1_m", _wide(low, high & 7), scale, d, shift=_shift(high >> 3))


CODECS: Mapping[str, Codec[Any]] = MappingProxyType(
    {
        "iq2_xxs": Codec(_encode_iq2_xxs, _decode_iq2_xxs),
        "iq2_xs": Codec(_encode_iq2_xs, _decode_iq2_xs),
        "iq2_s": Codec(_encode_iq2_s, _decode_iq2_s),
        "iq3_xxs": Codec(_encode_iq3_xxs, _decode_iq3_xxs),
        "iq3_s": Codec(_encode_iq3_s, _decode_iq3_s),
        "iq1_s": Codec(_encode_iq1_s, _decode_iq1_s),
        "iq1_m": Codec(_encode_iq1_m, _decode_iq1_m),
    }
)
