"""Integer weights: pack-quantized, and int-quantized for 8 bits with one scale per row or tensor.

Codes are signed. Packed ones are stored with 2^(b−1) added, as one bit stream along the inputs of each
row, zero points likewise but along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import UnsupportedError
from quantkit.formats.compressed_tensors.layouts import layout_of, scale_shape
from quantkit.formats.compressed_tensors.targets import groups_of
from quantkit.numerics.bits import pack, packed_width, signed, unpack, unsigned
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, plain_grid

Part = tuple[str, torch.dtype, tuple[int, ...]]


def parts(shape: tuple[int, int], scheme: Scheme) -> list[Part]:
    """Ending, dtype and shape of each file tensor."""
    out, width = shape
    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    scales = ("weight_scale", dtype, scale_shape(shape, scheme))
    if layout_of(scheme) == "int-quantized":
        return [("weight", torch.int8, shape), scales]
    words = packed_width(width, scheme.bits)
    found: list[Part] = [
        ("weight_packed", torch.int32, (out, words)),
        scales,
        ("weight_shape", torch.int64, (2,)),
    ]
    if not scheme.sym:
        groups = width // (scheme.group_size or width)
        found.append(("weight_zero_point", torch.int32, (packed_width(out, scheme.bits), groups)))
    return found


def encode(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `parts`, by ending."""
    found = plain_grid(linear.weight)
    if found is None:
        raise UnsupportedError(
            f"compressed_tensors cannot store `{linear.name}`: it is not on a plain integer grid"
        )
    q, stored = found
    if q.column_group is not None:
        raise UnsupportedError(f"compressed_tensors cannot store the column groups of `{linear.name}`")
    out, width = q.codes.shape
    if layout_of(scheme) == "int-quantized":
        return {"weight": q.codes, "weight_scale": stored.flatten() if scheme.per_tensor else stored}
    tensors = {
        "weight_packed": pack(unsigned(q.codes, q.bits), q.bits),
        "weight_scale": stored,
        "weight_shape": torch.tensor([out, width]),
    }
    if q.zero_point is not None:
        packed = pack(q.zero_point.T, q.bits)
        # not `contiguous`: a single word would keep a stride that cannot be viewed as bytes
        tensors["weight_zero_point"] = packed.T.clone(memory_format=torch.contiguous_format)
    return tensors


def measure(
    base: str, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """((out, in), bits) of packed codes from their headers, by ending."""
    rows, words = infos["weight_packed"].shape
    weights = next((g["weights"] for g in groups_of(base, config)), {"num_bits": 8})
    bits = int(weights["num_bits"])
    groups = infos["weight_scale"].shape[1]
    # one scale per row leaves only the words to count, which pad a width that is no multiple of 32
    width = groups * (weights.get("group_size") or words * 32 // bits)
    return (rows, width), bits


def decode(base: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Affine:
    """Inverse of `encode`."""
    scale = tensors["weight_scale"]
    zeros = tensors.get("weight_zero_point")
    stated = groups_of(base, config)
    if "weight_packed" in tensors:
        out, width = (int(n) for n in tensors["weight_shape"])
        codes, bits = _unpacked(tensors["weight_packed"], width, stated)
        codes = signed(codes, bits) if zeros is None else codes
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpack(zeros.T.contiguous(), bits, out).T.contiguous()
    else:
        codes, bits = tensors["weight"], 8
        out, width = codes.shape
    per_tensor = scale.numel() == 1
    grid = (1, 1) if per_tensor else (out, scale.shape[1])
    own = tensors.get("weight_g_idx")
    return Affine(
        codes=codes if zeros is None else unsigned(codes, bits),
        bits=bits,
        scale=scale.view(grid),
        group=(out if per_tensor else 1, _columns(width, grid[1], stated)),
        # those that are not packed are signed, as codes are that are not packed
        zero_point=None if zeros is None else unsigned(zeros, bits).view(grid),
        # −1 where nobody set them
        column_group=None if own is None or bool((own < 0).all()) else own.to(torch.int32),
    )


def _columns(width: int, groups: int, stated: list[Mapping[str, Any]]) -> int:
    """Columns that share a scale, from the config if that makes so many groups; the last can be short."""
    sizes = (int(g["weights"].get("group_size") or 0) for g in stated)
    return next((s for s in sizes if s > 0 and -(-width // s) == groups), -(-width // groups))


def _unpacked(packed: Tensor, width: int, stated: list[Mapping[str, Any]]) -> tuple[Tensor, int]:
    """Unsigned codes and their bits. Up to version 0.17 the library left the rest of a word empty where 32 is
    no multiple of the bits."""
    words = packed.shape[1]
    for bits in (int(g["weights"]["num_bits"]) for g in stated):
        in_word = 32 // bits
        if words == -(-width // in_word) != packed_width(width, bits):
            shifts = torch.arange(in_word, dtype=torch.int32) * bits
            codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
            return codes.flatten(1)[:, :width].to(torch.uint8), bits
    bits = _bits_of(words, width, stated)
    return unpack(packed, bits, width), bits


def _bits_of(words: int, width: int, groups: list[Mapping[str, Any]]) -> int:
    """Width of a code: what the config says if the words a row takes agree, else what they imply.

    The words alone are ambiguous below 32 codes.
    """
    stated = (int(g["weights"]["num_bits"]) for g in groups)
    for bits in chain(stated, range(1, 9)):
        if packed_width(width, bits) == words:
            return bits
    raise UnsupportedError(f"{words:,} words for {width:,} codes is no dense packing of 1 to 8 bits")
