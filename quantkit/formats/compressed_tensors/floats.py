"""Float weights: float-quantized (e4m3), mxfp4-pack-quantized and nvfp4-pack-quantized (e2m1).

Of two e2m1 codes in a byte the left one is in the low half. The global scale of nvfp4 is a divisor:
    w = code · scale / global scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.formats.compressed_tensors.layouts import scale_shape
from quantkit.formats.compressed_tensors.targets import groups_of
from quantkit.numerics.levels import E2M1
from quantkit.schemes import Scheme
from quantkit.tensors import Codebook, Float, QuantizedLinear, QuantizedTensor

Part = tuple[str, torch.dtype, tuple[int, ...]]
_E4M3 = torch.float8_e4m3fn
_E8M0 = torch.float8_e8m0fnu
_SIGN = 0x80


def parts(shape: tuple[int, int], scheme: Scheme) -> list[Part]:
    """Ending, dtype and shape of each file tensor."""
    scales = scale_shape(shape, scheme)
    packed = ("weight_packed", torch.uint8, (shape[0], shape[1] // 2))
    match scheme.numbers:
        case "mxfp4":
            return [packed, ("weight_scale", torch.uint8, scales)]
        case "nvfp4":
            return [packed, ("weight_scale", _E4M3, scales), ("weight_global_scale", torch.float32, (1,))]
        case _:
            dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
            return [("weight", _E4M3, shape), ("weight_scale", dtype, scales)]


def encode(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `parts`, by ending."""
    match scheme.numbers:
        case "mxfp4":
            return _encode_mxfp4(linear)
        case "nvfp4":
            return _encode_nvfp4(linear)
        case _:
            return _encode_fp8(linear, scheme)


def decode(base: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedTensor:
    """Inverse of `encode`."""
    scale = tensors["weight_scale"]
    packed = tensors.get("weight_packed")
    if packed is None:
        return _decode_fp8(base, tensors["weight"], scale, config)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
    group = (1, codes.shape[1] // scale.shape[1])
    divisor = tensors.get("weight_global_scale")
    stored: Tensor | QuantizedTensor
    if divisor is None:
        stored = scale.view(_E8M0)
    else:
        stored = Float(scale, 8, divisor.reciprocal().view(1, 1), (scale.shape[0], scale.shape[1]))
    return Codebook(codes, 4, torch.tensor(E2M1), stored, group)


def _encode_fp8(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    q = linear.weight
    if not isinstance(q, Float) or q.values.dtype != _E4M3 or not isinstance(q.scale, Tensor):
        raise _misplaced(linear, "e4m3 floats with plain scales")
    return {"weight": q.values, "weight_scale": q.scale.flatten() if scheme.per_tensor else q.scale}


def _decode_fp8(base: str, values: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Float:
    out, width = values.shape
    weights: Mapping[str, Any] = next((g["weights"] for g in groups_of(base, config)), {})
    tile = weights.get("block_structure")
    if scale.dtype == torch.uint8:
        # mxfp8, which others write
        scale = scale.view(_E8M0)
    if tile is not None:
        return Float(values, 8, scale, (int(tile[0]), int(tile[1])))
    if scale.numel() == 1:
        return Float(values, 8, scale.view(1, 1), (out, width))
    by_row = scale.view(out, -1)
    return Float(values, 8, by_row, (1, width // by_row.shape[1]))


def _encode_mxfp4(linear: QuantizedLinear) -> dict[str, Tensor]:
    q = _e2m1(linear)
    if not isinstance(q.scale, Tensor) or q.scale.dtype != _E8M0:
        raise _misplaced(linear, "e2m1 floats with powers of two as scales")
    return {"weight_packed": _pairs(q.codes), "weight_scale": q.scale.view(torch.uint8)}


def _encode_nvfp4(linear: QuantizedLinear) -> dict[str, Tensor]:
    q = _e2m1(linear)
    fine = q.scale
    if not isinstance(fine, Float) or fine.values.dtype != _E4M3 or not isinstance(fine.scale, Tensor):
        raise _misplaced(linear, "e2m1 floats with e4m3 scales")
    if fine.scale.numel() != 1 or bool((fine.values.view(torch.uint8) >= _SIGN).any()):
        raise _misplaced(linear, "e2m1 floats with positive e4m3 scales and one scale of the tensor")
    outer = fine.scale.to(torch.float32).view(1)
    divisor = outer.reciprocal()
    if not torch.equal(divisor.reciprocal(), outer):
        raise UnsupportedError(
            f"compressed_tensors cannot store `{linear.name}`: it keeps one over the scale of the tensor, "
            f"and {float(outer):.9g} does not survive that in float32"
        )
    return {
        "weight_packed": _pairs(q.codes),
        "weight_scale": fine.values,
        "weight_global_scale": divisor,
    }


def _e2m1(linear: QuantizedLinear) -> Codebook:
    q = linear.weight
    if not isinstance(q, Codebook) or q.offset is not None or q.table.tolist() != list(E2M1):
        raise _misplaced(linear, "e2m1 floats")
    return q


def _pairs(codes: Tensor) -> Tensor:
    """(out, in) codes of 4 bits as (out, in/2) bytes."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _misplaced(linear: QuantizedLinear, wanted: str) -> UnsupportedError:
    return UnsupportedError(f"compressed_tensors cannot store `{linear.name}`: it is not {wanted}")
