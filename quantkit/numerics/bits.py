"""Dense bit packing: codes as one little-endian bit stream inside 32-bit words.

Code n occupies bits n·bits … n·bits+bits−1 of the stream; stream bit t is bit (t mod 32) of word
(t div 32). GPTQ and compressed-tensors share this rule and differ only in the axis they pack along,
so both call these two functions. 32 codes fill exactly `bits` words, which is why the loops below
run over 32 positions and serve every width.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def packed_width(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack (…, n) integer codes in [0, 2^bits) to (…, ⌈n·bits/32⌉) int32; the last word is zero padded."""
    count = codes.shape[-1]
    runs = -(-count // WORD)
    lead = codes.shape[:-1]
    padded = torch.zeros(*lead, runs * WORD, dtype=torch.int32, device=codes.device)
    padded[..., :count] = codes
    padded = padded.view(*lead, runs, WORD)
    words = torch.zeros(*lead, runs, bits, dtype=torch.int32, device=codes.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = padded[..., position]
        # int32 shifts wrap in two's complement, which is exactly the truncation wanted here
        words[..., word] |= code << shift
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.view(*lead, runs * bits)[..., : packed_width(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: (…, ⌈count·bits/32⌉) int32 words to (…, count) uint8 codes."""
    lead = words.shape[:-1]
    runs = -(-count // WORD)
    padded = torch.zeros(*lead, runs * bits, dtype=torch.int32, device=words.device)
    padded[..., : words.shape[-1]] = words
    padded = padded.view(*lead, runs, bits)
    codes = torch.empty(*lead, runs, WORD, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        # the right shift is arithmetic: masking afterwards removes the copies of the sign bit
        code = padded[..., word] >> shift
        inside = WORD - shift
        if inside < bits:
            code = (code & ((1 << inside) - 1)) | (padded[..., word + 1] << inside)
        codes[..., position] = code & mask
    return codes.view(*lead, runs * WORD)[..., :count].contiguous()
