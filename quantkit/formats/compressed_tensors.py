"""compressed-tensors checkpoints, the native format of vLLM, also read by transformers and SGLang.

A linear X with weight (out, in) and G groups becomes, with every scale oriented like the weight,
    pack-quantized  X.weight_packed int32 (out, ⌈in·b/32⌉), X.weight_scale (out, G), X.weight_shape int64 (2,)
                    and, asymmetric, X.weight_zero_point int32 (⌈out·b/32⌉, G), packed along the outputs
    int-quantized   X.weight int8 (out, in), X.weight_scale (out, 1) or (1,)
Codes are signed, packed ones stored with 2^(b−1) added. 8 bits with one scale per row or tensor are
written int-quantized, everything else pack-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import UnsupportedError
from quantkit.model.graph import Weight
from quantkit.numerics.bits import pack, packed_width, unpack
from quantkit.protocols import FormatFacts
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, plain_grid

SUMMARY = "integer weights, 2 to 8 bits, for vLLM, transformers, SGLang"
DEFAULT_SCHEME = "w4g128"
PRESETS = ("w3g128", "w4g32", "w4g64", "w4g128", "w4g128_asym", "w8", "w8g128", "w8_tensor")

_PACKED, _INT = "pack-quantized", "int-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
# the library version whose schema is written; readers use it to pick the dense packing of odd widths
_SCHEMA = "0.20.0"


def default_method(scheme: Scheme) -> str:
    """8 bits lose next to nothing however they are rounded: no calibration by default."""
    return "rtn" if scheme.bits == 8 else "gptq"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The format; it has no parameters."""

    def scale_dtype(self, source_dtype: str) -> str:
        # readers hold scales in the dtype of the model, so a wider one would be rounded again at load
        return source_dtype

    def holds_column_groups(self) -> bool:
        return False

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        if weight.part is not None:
            stored = "in a stack of experts" if weight.part.expert is not None else "transposed (Conv1D)"
            return f"compressed_tensors replaces nn.Linear, and this is stored {stored}; keep it with a rule"
        if scheme.per_tensor and scheme.bits != 8:
            return "compressed_tensors stores one scale per tensor with 8 bits only"
        if _layout(scheme) == _INT and not scheme.sym:
            return "compressed_tensors writes 8 bits per row symmetric; leave out _asym or add a group size"
        return scheme.misfit(weight.shape)

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        out, width = weight.shape
        dtype = getattr(torch, scheme.scale_dtype)
        groups = width // (scheme.group_size or width)
        if _layout(scheme) == _INT:
            scales = (1,) if scheme.per_tensor else (out, 1)
            return (
                TensorSpec(f"{base}.weight", torch.int8, (out, width)),
                TensorSpec(f"{base}.weight_scale", dtype, scales),
            )
        specs = [
            TensorSpec(f"{base}.weight_packed", torch.int32, (out, packed_width(width, scheme.bits))),
            TensorSpec(f"{base}.weight_scale", dtype, (out, groups)),
            TensorSpec(f"{base}.weight_shape", torch.int64, (2,)),
        ]
        if not scheme.sym:
            zeros = (packed_width(out, scheme.bits), groups)
            specs.append(TensorSpec(f"{base}.weight_zero_point", torch.int32, zeros))
        return tuple(specs)

    def encode(self, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        found = plain_grid(linear.weight)
        if found is None:
            raise UnsupportedError(
                f"compressed_tensors cannot store `{linear.name}`: it is not on a plain integer grid"
            )
        q, stored = found
        if q.column_group is not None:
            raise UnsupportedError(f"compressed_tensors cannot store the column groups of `{linear.name}`")
        base = linear.name.removesuffix(".weight")
        out, width = q.codes.shape
        if _layout(scheme) == _INT:
            scale = stored.flatten() if scheme.per_tensor else stored
            return {f"{base}.weight": q.codes, f"{base}.weight_scale": scale}
        middle = 1 << (q.bits - 1)
        codes = q.codes.to(torch.int32) + (middle if q.zero_point is None else 0)
        tensors = {
            f"{base}.weight_packed": pack(codes, q.bits),
            f"{base}.weight_scale": stored,
            f"{base}.weight_shape": torch.tensor([out, width]),
        }
        if q.zero_point is not None:
            packed = pack(q.zero_point.T.to(torch.int32), q.bits)
            # not `contiguous`: a single word would keep a stride that cannot be viewed as bytes
            tensors[f"{base}.weight_zero_point"] = packed.T.clone(memory_format=torch.contiguous_format)
        return tensors

    def base_name(self, tensor: str) -> str | None:
        base, _, part = tensor.rpartition(".")
        return f"{base}.weight" if part in _PARTS else None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        base = name.removesuffix(".weight")
        packed = tensors.get(f"{base}.weight_packed")
        if packed is None:
            out, width = tensors[f"{base}.weight"].shape
            return (out, width), 8
        weights = next((g["weights"] for g in _groups_of(base, config)), {"num_bits": 8})
        bits = int(weights["num_bits"])
        groups = tensors[f"{base}.weight_scale"].shape[1]
        # one scale per row leaves only the words to count, which pad a width that is no multiple of 32
        width = groups * (weights.get("group_size") or packed.shape[1] * 32 // bits)
        return (packed.shape[0], width), bits

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        scale = tensors[f"{base}.weight_scale"]
        if f"{base}.weight_packed" not in tensors:
            codes = tensors[f"{base}.weight"]
            rows = codes.shape[0] if scale.numel() == 1 else 1
            groups = 1 if scale.numel() == 1 else scale.shape[1]
            group = (rows, codes.shape[1] // groups)
            return QuantizedLinear(name, Affine(codes, 8, scale.view(-1, groups), group))
        out, width = (int(n) for n in tensors[f"{base}.weight_shape"])
        packed = tensors[f"{base}.weight_packed"]
        bits = _bits_of(packed.shape[1], width, _groups_of(base, config))
        codes = unpack(packed, bits, width)
        middle = 1 << (bits - 1)
        zeros = tensors.get(f"{base}.weight_zero_point")
        return QuantizedLinear(
            name,
            Affine(
                codes=(codes.to(torch.int16) - middle).to(torch.int8) if zeros is None else codes,
                bits=bits,
                scale=scale,
                group=(1, width // scale.shape[1]),
                zero_point=None if zeros is None else unpack(zeros.T.contiguous(), bits, out).T.contiguous(),
            ),
        )

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        by_scheme: dict[Scheme, list[str]] = {}
        # a linear layer that is targeted and stored float is filled with random values
        heads = (w.module for w in facts.outer if w.role == "head")
        ignore = list(dict.fromkeys([*heads, *facts.linears]))
        for a in facts.assigned:
            if a.scheme is None:
                ignore.append(a.weight.module)
            else:
                by_scheme.setdefault(a.scheme, []).append(a.weight.module)
        single = len(by_scheme) == 1
        groups = {
            f"group_{n}": _group(scheme, ["Linear"] if single else _patterns(modules))
            for n, (scheme, modules) in enumerate(by_scheme.items())
        }
        layouts = {_layout(s) for s in by_scheme}
        return {
            "quant_method": "compressed-tensors",
            "version": _SCHEMA,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignore,
            "config_groups": groups,
        }

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        loads = ["transformers"]
        notes = []
        schemes = {a.scheme for a in facts.assigned if a.scheme}
        if any(_layout(s) == _INT for s in schemes):
            notes.append("vLLM reads 8-bit weight-only files packed only: w8g128 loads there")
        else:
            loads.append("vLLM")
            if all(s.bits in (4, 8) and s.sym for s in schemes):
                loads.append("SGLang")
        if any(not s.sym for s in schemes):
            notes.append(
                "transformers needs CompressedTensorsConfig(dequantize=True) for asymmetric packed weights"
            )
        experts = {a.scheme for a in facts.assigned if ".experts." in a.weight.name and a.weight.part is None}
        if len(experts) > 1:
            loads.clear()
            notes.append("transformers, vLLM and SGLang fuse experts, which must all have one scheme there")
        elif any(s is None or not s.sym or _layout(s) == _INT for s in experts):
            loads.remove("transformers")
            notes.append("transformers reads experts packed and symmetric only: not kept, not w8, not _asym")
        if any(s.bits in (3, 5, 6, 7) for s in schemes):
            notes.append("3, 5, 6 and 7 bits need compressed-tensors 0.18 or newer")
        return tuple(loads), tuple(notes)


FORMAT = CompressedTensors()


def _layout(scheme: Scheme) -> str:
    return _INT if scheme.bits == 8 and scheme.group_size is None else _PACKED


def _patterns(modules: Sequence[str]) -> list[str]:
    """Targets for these modules: names, and one pattern for the experts of a layer.

    Transformers fuses experts, so it finds no module of that name; it takes the group that names
    experts in a pattern.
    """
    numbered = {m: re.sub(r"\.experts\.\d+\.", ".experts.#.", m) for m in modules}
    patterns = (n if n == m else f"re:{re.escape(n)}$".replace(r"\#", r"\d+") for m, n in numbered.items())
    return list(dict.fromkeys(patterns))


def _groups_of(module: str, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config groups that apply to a module: by name or pattern first, then by class."""
    groups: list[Mapping[str, Any]] = list(config["config_groups"].values())
    named = [g for g in groups if any(_targets(t, module) for t in g["targets"])]
    return named or [g for g in groups if "Linear" in g["targets"]]


def _targets(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _bits_of(words: int, width: int, groups: Sequence[Mapping[str, Any]]) -> int:
    """Width of a code: what the config says if the words a row takes agree, else what they imply.

    The words alone are ambiguous below 32 codes.
    """
    stated = (int(g["weights"]["num_bits"]) for g in groups)
    for bits in chain(stated, range(1, 9)):
        if packed_width(width, bits) == words:
            return bits
    raise UnsupportedError(f"{words:,} words for {width:,} codes is no dense packing of 1 to 8 bits")


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    strategy = "tensor" if scheme.per_tensor else "channel" if scheme.group_size is None else "group"
    return {
        "targets": targets,
        "format": _layout(scheme),
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.sym,
            "strategy": strategy,
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": None,
        "output_activations": None,
    }
