"""Dense bit packing: codes as one little-endian bit stream inside 32-bit words.

Code n occupies bits n·bits … n·bits+bits−1 of the stream; stream bit t is bit (t mod 32) of word
(t div 32). GPTQ and compressed-tensors share this rule and differ only in the axis they pack along,
so both call these two functions. 32 codes fill exactly `bits` words, which is why the loops below
run over 32 positions and serve every width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32
_CHUNK = 1 << 18


def packed_width(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // WORD)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes from 0 of int8 codes around 0; uint8 ones as they are. Bytes wrap, so 8 bits work too."""
    return codes.view(torch.uint8) + (1 << (bits - 1)) if codes.dtype == torch.int8 else codes


def signed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unsigned`: uint8 codes from 0 to int8 codes around 0."""
    return (codes - (1 << (bits - 1))).view(torch.int8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack (…, n) integer codes in [0, 2^bits) to (…, ⌈n·bits/32⌉) int32; the last word is zero padded."""
    count = codes.shape[-1]
    lead = codes.shape[:-1]
    rows = codes.reshape(math.prod(lead), count)
    words = torch.empty(rows.shape[0], packed_width(count, bits), dtype=torch.int32, device=codes.device)
    step = _step(count)
    for at in range(0, rows.shape[0] if count else 0, step):
        part = rows[at : at + step]
        padded = torch.zeros(part.shape[0], -(-count // WORD) * WORD, dtype=torch.uint8, device=codes.device)
        padded[:, :count] = part
        found = _pack_bytes(padded, bits) if 8 % bits == 0 else _pack_straddling(padded, bits)
        words[at : at + step] = found[:, : words.shape[1]]
    return words.view(*lead, words.shape[1])


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: (…, ⌈count·bits/32⌉) int32 words to (…, count) uint8 codes."""
    lead = words.shape[:-1]
    rows = words.reshape(math.prod(lead), words.shape[-1])
    codes = torch.empty(rows.shape[0], count, dtype=torch.uint8, device=words.device)
    step = _step(count)
    for at in range(0, rows.shape[0] if count else 0, step):
        part = rows[at : at + step]
        padded = torch.zeros(part.shape[0], -(-count // WORD) * bits, dtype=torch.int32, device=words.device)
        padded[:, : part.shape[1]] = part
        found = _unpack_bytes(padded, bits) if 8 % bits == 0 else _unpack_straddling(padded, bits)
        codes[at : at + step] = found[:, :count]
    return codes.view(*lead, count)


def _step(count: int) -> int:
    """Rows handled at once: what is made on the way stays in the processor's cache."""
    return max(1, _CHUNK // max(1, count))


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8, n a multiple of 32, to int32 words; no code straddles a byte.

    Neighbours are merged two by two, seen as one number of 16 bits, until a byte is full.
    """
    while bits < 8:
        pairs = codes.view(torch.int16)
        codes = (pairs | (pairs >> (8 - bits))).to(torch.uint8)
        bits *= 2
    return codes.contiguous().view(torch.int32)


def _unpack_bytes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack_bytes`: every number is split in two until it is of `bits` bits."""
    codes, width = words.view(torch.uint8), 8
    while width > bits:
        width //= 2
        wide = codes.to(torch.int16)
        codes = ((wide | (wide << (8 - width))) & (((1 << width) - 1) * 0x0101)).view(torch.uint8)
    return codes


def _pack_straddling(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8, n a multiple of 32, to int32 words, of widths that do not divide a byte."""
    runs = codes.to(torch.int32).view(codes.shape[0], -1, WORD)
    words = torch.zeros(*runs.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = runs[..., position]
        # int32 shifts wrap in two's complement, which is exactly the truncation wanted here
        words[..., word] |= code << shift
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.view(codes.shape[0], -1)


def _unpack_straddling(words: Tensor, bits: int) -> Tensor:
    runs = words.view(words.shape[0], -1, bits)
    codes = torch.empty(*runs.shape[:2], WORD, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        # the right shift is arithmetic: masking afterwards removes the copies of the sign bit
        code = runs[..., word] >> shift
        inside = WORD - shift
        if inside < bits:
            code = (code & ((1 << inside) - 1)) | (runs[..., word + 1] << inside)
        codes[..., position] = code & mask
    return codes.view(words.shape[0], -1)
