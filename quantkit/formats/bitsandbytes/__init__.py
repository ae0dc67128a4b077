"""bitsandbytes checkpoints: NF4 and FP4 with optional double quantization, and LLM.int8.

A linear X with weight (out, in), groups of B inputs, n = out·in/B groups in row order, becomes
    4 bit   X.weight                        uint8 (out·in/2, 1), the first of two codes in the high nibble
            X.weight.absmax                 float32 (n,), may be negative; double-quantized: uint8 (n,)
            X.weight.quant_map              float32 (16,)
            X.weight.nested_absmax          float32 (⌈n/256⌉,)   these two when double-quantized only
            X.weight.nested_quant_map       float32 (256,)
            X.weight.quant_state.bitsandbytes__nf4 or __fp4   uint8: JSON with B, the shape, the offset
    8 bit   X.weight int8 (out, in), X.SCB float32 (out,) the largest magnitude of each row,
            X.weight_format uint8 () 0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import UnsupportedError
from quantkit.formats.bitsandbytes import int8, tables
from quantkit.formats.bitsandbytes.claims import disagreements
from quantkit.model.fused import fusing_problem
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.numerics.stored import NESTED_GROUP
from quantkit.protocols import Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, Lattice, QuantizedLinear

SUMMARY = "NF4, FP4 and LLM.int8, for transformers and SGLang"
DEFAULT_SCHEME = "nf4"
PRESETS = ("nf4", "nf4_dq", "nf4g128", "fp4", "fp4_dq", "w8a8_mixed")

_GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_PARTS = (*tables.PARTS, *int8.PARTS)


def default_method(scheme: Scheme) -> str:
    """LLM.int8 is a method of its own; 4 bits gain from calibration, in files that load like any other."""
    return "llm_int8" if scheme.numbers == "int" else "gptq"


def parse(text: str) -> Scheme:
    """The scheme of a preset name; `int8` and `llm_int8` are what the library's users call w8a8_mixed."""
    known = text.strip().lower() in ("int8", "llm_int8")
    return parse_scheme("w8a8_mixed" if known else text)


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "safetensors"

    def scale_dtype(self, source_dtype: str) -> str:
        return "float32"

    def convention(self, scheme: Scheme) -> Convention:
        return "absmax"

    def holds_column_groups(self) -> bool:
        return False

    def cache_scales(self, attention: str, dtype: CacheDtype) -> tuple[str, str] | None:
        return None

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        stacked = weight.part is not None and weight.part.expert is not None
        if stacked or ".experts." in weight.name:
            return (
                "beside bitsandbytes transformers holds experts in 16 bits and cannot load quantized ones; "
                "keep them with a rule '*.experts.*=keep'"
            )
        if _threshold(scheme) is not None:
            return None
        if scheme.numbers == "int" and scheme.bits == 8:
            return f"bitsandbytes knows 8 bits as LLM.int8 only, not {scheme.name}; write int8"
        if scheme.numbers not in tables.TABLES:
            return f"bitsandbytes stores nf4, fp4 and int8 (LLM.int8), not {scheme.name}"
        if scheme.group_size not in _GROUPS:
            return f"bitsandbytes has groups of 32, 64, 128 … 4,096 inputs, not {scheme.group_size}"
        return _misfit(scheme.numbers, scheme.group_size, weight.shape[1])

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        out, width = weight.shape
        if _threshold(scheme) is not None:
            return (
                TensorSpec(f"{base}.weight", torch.int8, (out, width)),
                TensorSpec(f"{base}.SCB", torch.float32, (out,)),
                TensorSpec(f"{base}.weight_format", torch.uint8, ()),
            )
        group = scheme.group_size or width
        groups = out * width // group
        absmax = torch.uint8 if scheme.nested else torch.float32
        specs = [
            TensorSpec(f"{base}.weight", torch.uint8, (out * width // 2, 1)),
            TensorSpec(f"{base}.weight.absmax", absmax, (groups,)),
            TensorSpec(f"{base}.weight.quant_map", torch.float32, (16,)),
        ]
        if scheme.nested:
            outer = -(-groups // NESTED_GROUP)
            specs.append(TensorSpec(f"{base}.weight.nested_absmax", torch.float32, (outer,)))
            specs.append(TensorSpec(f"{base}.weight.nested_quant_map", torch.float32, (256,)))
        length = tables.state_length(scheme.numbers, group, weight.shape, scheme.nested)
        specs.append(TensorSpec(f"{base}.{tables.STATE}{scheme.numbers}", torch.uint8, (length,)))
        return tuple(specs)

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        tensors: dict[str, Tensor] | None = None
        match linear.weight:
            case Codebook() as q:
                tensors = tables.encode(q, dtype)
            case Affine(column_group=Tensor()):
                raise UnsupportedError(f"bitsandbytes cannot store the column groups of `{linear.name}`")
            case Affine() as q:
                tensors = int8.encode(q)
            case Float() | Lattice():
                pass
            case _:
                assert_never(linear.weight)
        if tensors is None:
            raise UnsupportedError(
                f"bitsandbytes cannot store `{linear.name}`: it is neither nf4, fp4 nor LLM.int8"
            )
        base = linear.name.removesuffix(".weight")
        return {f"{base}.{part}": tensor for part, tensor in tensors.items()}

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return {}

    def base_name(self, tensor: str) -> str | None:
        for part in _PARTS:
            if tensor.endswith(f".{part}"):
                return tensor.removesuffix(part) + "weight"
        return None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        """Headers of 4-bit weights do not tell rows from columns: their shape is (elements, 1)."""
        stored = tensors[name]
        if f"{name.removesuffix('.weight')}.SCB" in tensors:
            return (stored.shape[0], stored.shape[1]), 8
        return (2 * stored.nbytes, 1), 4

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        parts = {key.removeprefix(f"{base}."): tensor for key, tensor in tensors.items()}
        weight = int8.decode(parts) if "SCB" in parts else tables.decode(name, parts)
        return QuantizedLinear(name, weight)

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        return disagreements(stored, config)

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        schemes = [a.scheme for a in facts.assigned if a.scheme is not None] or [facts.default]
        thresholds = {_threshold(scheme) for scheme in schemes}
        if len(thresholds) > 1:
            raise UnsupportedError(
                "bitsandbytes has one kind of weight per file: 4 bits, or 8 bits with one outlier threshold",
                remedy="keep the others with a rule, or use compressed_tensors",
            )
        (threshold,) = thresholds
        found = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": threshold is None,
            "load_in_8bit": threshold is not None,
            "llm_int8_skip_modules": _kept(facts),
        }
        if threshold is not None:
            # an integer, which JSON may make of 6.0 elsewhere, is refused by readers
            return {**found, "llm_int8_threshold": float(threshold), "llm_int8_has_fp16_weight": False}
        # files say per weight what they hold: these describe the target as a whole
        main = facts.default if facts.default in schemes else schemes[0]
        return {
            **found,
            "bnb_4bit_quant_type": main.numbers,
            "bnb_4bit_use_double_quant": main.nested,
            "bnb_4bit_compute_dtype": facts.dtype,
            "bnb_4bit_quant_storage": "uint8",
        }

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        loads = ["transformers"]
        notes = [
            "vLLM 0.33 reads no bitsandbytes files any more: compressed_tensors is for vLLM",
            'leave dtype at "auto" when loading: norms and embeddings keep the stored dtype whatever it says',
        ]
        if any(".experts." in a.weight.name for a in facts.assigned):
            notes.append("experts stay in 16 bits, which are most weights of such a model")
        elif (problem := fusing_problem((a.weight, a.scheme) for a in facts.assigned)) is not None:
            notes.append(problem)
        else:
            loads.append("SGLang")
        quantized = [(a.scheme, a.weight) for a in facts.assigned if a.scheme is not None]
        if any(_threshold(scheme) is None and weight.shape[0] % 32 for scheme, weight in quantized):
            notes.append(
                "on CPUs with AVX512-BF16 bitsandbytes stops at 4-bit weights whose out_features is not a "
                "multiple of 32; GPUs and other CPUs compute them"
            )
        return tuple(loads), tuple(notes)


FORMAT = Bitsandbytes()


def _threshold(scheme: Scheme) -> float | None:
    """From which magnitude on inputs stay 16-bit; None: 4-bit weights."""
    return None if scheme.activations is None else scheme.activations.outliers


def _misfit(numbers: str, group: int, width: int) -> str | None:
    if width % group == 0:
        return None
    smaller = next((g for g in (64, 32) if g < group and width % g == 0), None)
    use = "" if smaller is None else f"use {numbers}{'' if smaller == 64 else f'g{smaller}'}, or "
    return (
        f"in_features is {width:,}, not a multiple of {group}, and bitsandbytes on a CPU would dequantize "
        f"it wrongly without an error; {use}keep the weight with a rule"
    )


def _kept(facts: FormatFacts) -> list[str]:
    """Full names of the linear layers that stay float; a list replaces the readers' own choice, the head.

    Experts are named by the module that holds them: readers fuse them, and try every name on every module.
    """
    heads = (w.module for w in facts.outer if w.role == "head")
    names = (a.weight.name.removesuffix(".weight") for a in facts.assigned if a.scheme is None)
    kept = (f"{n.partition('.experts.')[0]}.experts" if ".experts." in n else n for n in names)
    return list(dict.fromkeys([*heads, *facts.linears, *kept]))
