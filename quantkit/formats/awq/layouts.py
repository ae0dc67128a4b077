"""The words of AWQ files and what they stand for.

gemm      qweight int32 (in, out/8), qzeros int32 (G, out/8), scales (G, out); the eight outputs of a word lie
          in it with the even ones first: 0 2 4 6 1 3 5 7 from the lowest bits
gemv      qweight int32 (out, in/8), qzeros int32 (out, Z), scales (out, 8Z), all in plain order; what lies
          behind the last group is padding
fast      gemv_fast and llm-awq: qweight int16 (out/4, in), scales (8Z, out), and float zeros (8Z, out), the
          products −scale · zero point
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.numerics.bits import pack, signed, unpack
from quantkit.tensors import Affine

BITS, MIDDLE, PER_WORD = 4, 8, 8

Version = Literal["gemm", "gemv", "fast"]


def pack_gemm(codes: Tensor) -> Tensor:
    """(rows, out) codes to (rows, out/8) int32 words, even outputs of eight before odd ones."""
    eights = codes.reshape(codes.shape[0], -1, 4, 2)
    return pack(eights.transpose(-1, -2).reshape(codes.shape), BITS)


def unpack_gemm(words: Tensor) -> Tensor:
    """Inverse of `pack_gemm`."""
    rows, out = words.shape[0], words.shape[1] * PER_WORD
    return unpack(words, BITS, out).view(rows, -1, 2, 4).transpose(-1, -2).reshape(rows, out)


def version_of(base: str, words: torch.dtype, config: Mapping[str, Any]) -> Version:
    """How `base` is laid out; llm-awq goes by several names and is known by its 16-bit words."""
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise UnsupportedError(f"`{base}.qweight` is AWQ with {bits} bits, and only 4 are read")
    stated = str(config.get("version") or config.get("format") or "gemm").lower()
    if words == torch.int16:
        return "fast"
    if stated == "gemm":
        return "gemm"
    if stated == "gemv":
        return "gemv"
    raise UnsupportedError(
        f"`{base}.qweight` is laid out as {stated!r}, and gemm, gemv, gemv_fast and llm-awq are read",
        remedy="convert from the checkpoint that it was made from",
    )


def size_of(words: tuple[int, ...], version: Version) -> tuple[int, int]:
    """(out, in) of the weight whose `qweight` has the shape `words`."""
    rows, columns = words
    match version:
        case "gemm":
            return columns * PER_WORD, rows
        case "gemv":
            return rows, columns * PER_WORD
        case "fast":
            return rows * 4, columns


def read(base: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Affine:
    """The weight `base` from its file tensors by part, in any of the layouts."""
    words, scales = parts["qweight"], parts["scales"]
    zeros = parts.get("qzeros", parts.get("scaled_zeros"))
    if zeros is None:
        raise UnsupportedError(
            f"`{base}` has no qzeros, and tools do not agree on what AWQ codes mean without them",
            remedy="convert from the checkpoint that it was made from",
        )
    version = version_of(base, words.dtype, config)
    size = size_of(tuple(words.shape), version)
    match version:
        case "gemm":
            codes, zeros, scale = unpack_gemm(words).T, unpack_gemm(zeros).T, scales.T
        case "gemv":
            groups = size[1] // _group_size(config, size[1])
            codes = unpack(words, BITS, size[1])
            zeros = unpack(zeros, BITS, zeros.shape[1] * PER_WORD)[:, :groups]
            scale = scales[:, :groups]
        case "fast":
            groups = size[1] // _group_size(config, size[1])
            codes, zeros, scale = _unpack_fast(words), zeros[:groups].T, scales[:groups].T
    group = size[1] // max(1, scale.shape[1])
    if zeros.shape != scale.shape or size != (scale.shape[0], scale.shape[1] * group):
        raise UnsupportedError(
            f"`{base}.scales` of shape {tuple(scales.shape)} does not fit `{base}.qweight` of shape "
            f"{tuple(words.shape)}, read as {version}",
            remedy="check version and group_size in quantization_config",
        )
    grid = Affine(codes.contiguous(), BITS, scale.contiguous(), (1, group), zeros.contiguous())
    return _symmetric(_whole(grid), config)


def _group_size(config: Mapping[str, Any], width: int) -> int:
    """Inputs per group; readers take 128 where the config is silent, −1 is the whole row."""
    size = int(config.get("group_size", config.get("q_group_size", 128)))
    return size if size > 0 else width


def _unpack_fast(words: Tensor) -> Tensor:
    """(out/4, in) int16 words to (out, in) codes.

    A line holds four rows: for every 64 inputs row by row, two halves of 32, each 8 words of 4 inputs that
    are 8 apart.
    """
    quads, width = words.shape
    nibbles = unpack(words.contiguous().view(torch.int32), BITS, 4 * width)
    lines = nibbles.view(quads, width // 64, 4, 2, 8, 4)
    return lines.permute(0, 2, 1, 3, 5, 4).reshape(4 * quads, width)


def _whole(q: Affine) -> Affine:
    """Whole zero points from float ones, −scale · zero point, which were rounded to the dtype of the file.

    Where no whole one gives exactly what is stored, that stays, as an offset.
    """
    stored, scale = q.zero_point, q.scale
    if stored is None or not stored.is_floating_point() or not isinstance(scale, Tensor):
        return q
    zeros = torch.round(-stored.float() / scale.float()).nan_to_num(0, 0, 0).clamp(0, 15)
    if torch.equal((-scale.float() * zeros).to(stored.dtype), stored):
        return Affine(q.codes, BITS, scale, q.group, zeros.to(torch.uint8))
    return Affine(q.codes, BITS, scale, q.group, torch.zeros_like(zeros, dtype=torch.uint8), offset=stored)


def _symmetric(q: Affine, config: Mapping[str, Any]) -> Affine:
    """Signed codes where the config says that there are no zero points, and those in the file are all 8.

    auto-round says ``zero_point: false`` beside zero points of 8. An asymmetric weight may happen to need 8
    everywhere, too.
    """
    sym = config.get("sym", not config.get("zero_point", True))
    if not sym or q.offset is not None or q.zero_point is None or bool((q.zero_point != MIDDLE).any()):
        return q
    return Affine(signed(q.codes, BITS), BITS, q.scale, q.group)
