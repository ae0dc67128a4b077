"""compressed-tensors checkpoints, the native format of vLLM, also read by transformers and SGLang.

A linear X with weight (out, in) and G groups becomes, with every scale oriented like the weight,
    pack-quantized         X.weight_packed int32 (out, ⌈in·b/32⌉), X.weight_scale (out, G), X.weight_shape
                           int64 (2,) and, asymmetric, X.weight_zero_point int32 (⌈out·b/32⌉, G)
    int-quantized          X.weight int8 (out, in), X.weight_scale (out, 1) or (1,)
    float-quantized        X.weight e4m3 (out, in), X.weight_scale (out, 1), (1,) or (⌈out/128⌉, in/128)
    mxfp4-pack-quantized   X.weight_packed uint8 (out, in/2), X.weight_scale uint8 (out, in/32): e + 127
    nvfp4-pack-quantized   X.weight_packed uint8 (out, in/2), X.weight_scale e4m3 (out, in/16),
                           X.weight_global_scale float32 (1,), by which the others are divided
and X.input_scale (1,) where one scale of the inputs comes from calibration. Key-value caches have
<attention>.k_scale and .v_scale (1,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import UnsupportedError
from quantkit.formats.compressed_tensors import floats, integers
from quantkit.formats.compressed_tensors.claims import disagreements
from quantkit.formats.compressed_tensors.config import config_of
from quantkit.formats.compressed_tensors.engines import engines_of
from quantkit.formats.compressed_tensors.layouts import PARTS, refusal, static_inputs
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.protocols import Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import QuantizedLinear

SUMMARY = "integers of 2 to 8 bits, fp8, mxfp4, nvfp4, 8-bit inputs, for vLLM, transformers, SGLang"
DEFAULT_SCHEME = "w4g128"
PRESETS = (
    *("w3g128", "w4g32", "w4g64", "w4g128", "w4g128_asym", "w8", "w8g128", "w8_tensor"),
    *("w8a8", "w8a8_static", "fp8", "fp8_tensor", "fp8_block", "fp8a8", "fp8a8_static", "fp8a8_block"),
    *("mxfp4", "nvfp4"),
)

_INPUTS = "input_scale"
# What llm-compressor calls them. Its fp8_block rounds inputs too: that is fp8a8_block here, and fp8_block
# is our own name of weights alone
_NAMES = {
    "w4a16": "w4g128",
    "w4a16_asym": "w4g128_asym",
    **{f"w{bits}a16": f"w{bits}g128" for bits in (2, 3, 5, 6, 7, 8)},
    "int8": "w8a8",
    "fp8_dynamic": "fp8a8",
    "fp8_static": "fp8a8_tensor_static",
    "nvfp4a16": "nvfp4",
    "mxfp4a16": "mxfp4",
}


def parse(text: str) -> Scheme:
    """The scheme of a preset name, ours or one of llm-compressor's, in any case.

    w4a16, w8a16 …, w4a16_asym → w4g128, w8g128 …, w4g128_asym; int8 → w8a8; fp8_dynamic → fp8a8;
    fp8_static → fp8a8_tensor_static; nvfp4a16, mxfp4a16 → nvfp4, mxfp4. Only a8 rounds inputs: fp8,
    fp8_block, nvfp4 and mxfp4 are weights alone here, where llm-compressor's of these names round inputs too.
    """
    name = text.strip().lower()
    return parse_scheme(_NAMES.get(name, text))


def default_method(scheme: Scheme) -> str:
    """8 bits lose next to nothing however they are rounded: no calibration by default."""
    return "rtn" if scheme.bits == 8 else "gptq"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "safetensors"

    def scale_dtype(self, source_dtype: str) -> str:
        # readers hold scales in the dtype of the model, so a wider one would be rounded again at load
        return source_dtype

    def convention(self, scheme: Scheme) -> Convention:
        # the library maps max|W| half a step past the last code, / 7.5 and / 127.5, and that of mxfp4 groups
        # into [3.5, 7) times its power of two
        return "half_step" if scheme.numbers in ("int", "mxfp4") else "absmax"

    def holds_column_groups(self) -> bool:
        return False

    def cache_scales(self, attention: str, dtype: CacheDtype) -> tuple[str, str] | None:
        return f"{attention}.k_scale", f"{attention}.v_scale"

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        return refusal(scheme, weight)

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        parts = (integers if scheme.numbers == "int" else floats).parts(weight.shape, scheme)
        if static_inputs(scheme):
            parts.append((_INPUTS, getattr(torch, scheme.scale_dtype), (1,)))
        return tuple(TensorSpec(f"{base}.{part}", dtype, shape) for part, dtype, shape in parts)

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        tensors = (integers if scheme.numbers == "int" else floats).encode(linear, scheme)
        if static_inputs(scheme) != (linear.input_scale is not None):
            has = "a scale" if static_inputs(scheme) else "no scale"
            raise UnsupportedError(
                f"`{linear.name}` as {scheme.name} has {has} of its inputs in compressed_tensors, "
                f"and was given {'none' if linear.input_scale is None else 'one'}"
            )
        if linear.input_scale is not None:
            tensors[_INPUTS] = linear.input_scale
        base = linear.name.removesuffix(".weight")
        return {f"{base}.{part}": tensor for part, tensor in tensors.items()}

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return {}

    def base_name(self, tensor: str) -> str | None:
        base, _, part = tensor.rpartition(".")
        return f"{base}.weight" if part in PARTS else None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        base = name.removesuffix(".weight")
        parts = {key.removeprefix(f"{base}."): info for key, info in tensors.items()}
        packed = parts.get("weight_packed")
        if packed is None:
            out, width = parts["weight"].shape
            return (out, width), 8
        if packed.torch_dtype == torch.uint8:
            return (packed.shape[0], packed.shape[1] * 2), 4
        return integers.measure(base, parts, config)

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        parts = {key.removeprefix(f"{base}."): tensor for key, tensor in tensors.items()}
        codes = parts.get("weight_packed", parts.get("weight"))
        whole = codes is not None and codes.dtype in (torch.int32, torch.int8)
        weight = (integers if whole else floats).decode(base, parts, config)
        scale = parts.get(_INPUTS)
        return QuantizedLinear(name, weight, None if scale is None else scale.view(1))

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        return disagreements(stored, config)

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        return config_of(facts)

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return engines_of(facts)


FORMAT = CompressedTensors()
