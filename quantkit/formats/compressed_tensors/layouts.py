"""Which layout a scheme is written in, the parts of each, and what none of them can hold."""

from __future__ import annotations

from typing import Literal

from quantkit.model.graph import Weight
from quantkit.schemes import Scheme

Layout = Literal[
    "pack-quantized", "int-quantized", "float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
]
# endings of file tensors that belong to a weight, beside `weight` itself; the last two are not written here:
# groups of columns, and what inputs of 4 bits are divided by, which does not change the weight
PARTS = frozenset(
    (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
        *("input_scale", "weight_g_idx", "input_global_scale"),
    )
)


def layout_of(scheme: Scheme) -> Layout:
    """8-bit integers with one scale per row or tensor are not packed; every table has its own layout."""
    match scheme.numbers:
        case "fp8":
            return "float-quantized"
        case "mxfp4":
            return "mxfp4-pack-quantized"
        case "nvfp4":
            return "nvfp4-pack-quantized"
        case _:
            return "int-quantized" if scheme.bits == 8 and scheme.group_size is None else "pack-quantized"


def scale_shape(shape: tuple[int, int], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the stored scales of a weight of `shape` (out, in)."""
    if scheme.per_tensor:
        return (1,)
    rows, columns = scheme.group(shape)
    return -(-shape[0] // rows), shape[1] // columns


def static_inputs(scheme: Scheme) -> bool:
    """A scale of the inputs is stored."""
    return scheme.activations is not None and not scheme.activations.dynamic


def refusal(scheme: Scheme, weight: Weight) -> str | None:
    """None, or the reason why `weight` cannot be stored as `scheme`, with what to use instead."""
    if weight.part is not None:
        stored = "in a stack of experts" if weight.part.expert is not None else "transposed (Conv1D)"
        return f"compressed_tensors replaces nn.Linear, and this is stored {stored}; keep it with a rule"
    if scheme.numbers in ("nf4", "fp4"):
        return f"compressed_tensors has no table for {scheme.numbers}; use mxfp4 or nvfp4, or bitsandbytes"
    if scheme.fractional:
        return "compressed_tensors stores whole zero points; use _asym, or hqq"
    if scheme.axis == 0:
        return "compressed_tensors groups inputs, not outputs; leave out _axis0, or use hqq"
    if scheme.per_tensor and scheme.bits != 8:
        return "compressed_tensors stores one scale per tensor with 8 bits only"
    if problem := _inputs_refusal(scheme):
        return problem
    if layout_of(scheme) == "int-quantized" and not scheme.sym:
        instead = "leave out _asym" + ("" if scheme.activations else " or add a group size")
        return f"compressed_tensors writes 8 bits per row symmetric; {instead}"
    return scheme.misfit(weight.shape)


def _inputs_refusal(scheme: Scheme) -> str | None:
    inputs = scheme.activations
    if inputs is None:
        return None
    if inputs.outliers is not None:
        return "compressed_tensors keeps no columns of the inputs in 16 bits; use w8a8, or bitsandbytes"
    if scheme.bits != 8:
        # vLLM takes them packed, one per byte (Arm), or for fp8 (Hopper), depending on the machine
        return "engines disagree on how narrower codes lie beside 8-bit inputs; use w8a8, or leave out a8"
    if scheme.group_size is not None:
        return "engines read 8-bit inputs beside one weight scale per row or tensor; leave out the group size"
    if inputs.group_size != scheme.tile or (scheme.tile is not None and not inputs.dynamic):
        return "blocks go with dynamic inputs in groups of 128 and those with blocks; use fp8a8_block"
    return None
