"""AWQ checkpoints in AutoAWQ's GEMM layout, for transformers with gptqmodel, vLLM and SGLang.

A linear X with weight (out, in) and G groups becomes
    X.qweight  int32 (in, out/8)   codes 0 … 15, eight outputs to a word
    X.qzeros   int32 (G, out/8)    zero points 0 … 15, packed likewise
    X.scales   float16 (G, out)
and, for some models, `<mlp>.act.scales`, see `activations`. The factors by which AWQ scales inputs are no
part of the file: they are folded into weights before. Symmetric codes are stored beside zero points of 8,
because no layout without zero points is agreed on. The layouts gemv, gemv_fast and llm-awq are read and never
written.
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
from quantkit.formats.awq.activations import ACTIVATIONS, divisors
from quantkit.formats.awq.claims import disagreements
from quantkit.formats.awq.engines import engines_of, kept_modules, scheme_of
from quantkit.formats.awq.layouts import BITS, MIDDLE, PER_WORD, pack_gemm, read, size_of, version_of
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.numerics.bits import unsigned
from quantkit.protocols import Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import QuantizedLinear, plain_grid

SUMMARY = "4-bit integers in groups, for vLLM, SGLang, transformers"
DEFAULT_SCHEME = "w4g128_asym"
PRESETS = ("w4g32_asym", "w4g64_asym", "w4g128_asym", "w4g32", "w4g64", "w4g128")

parse = parse_scheme

_GROUPS = (16, 32, 64, 128, None)
_PARTS = ("qweight", "qzeros", "scaled_zeros", "scales")


def default_method(_: Scheme) -> str:
    """Readers do not see how codes were chosen."""
    return "gptq"


@dataclass(frozen=True, slots=True)
class Awq:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "safetensors"

    def scale_dtype(self, source_dtype: str) -> str:
        return "float16"

    def convention(self, scheme: Scheme) -> Convention:
        # AutoAWQ writes nothing symmetric; as in gptq files, whose codes and zero points these are
        return "half_step"

    def holds_column_groups(self) -> bool:
        return False

    def cache_scales(self, attention: str, dtype: CacheDtype) -> None:
        return None

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        out, _ = weight.shape
        if not scheme.plain:
            return (
                "awq stores integers with an integer zero point or none, and inputs stay 16-bit; "
                "compressed_tensors stores floats and rounds inputs, bitsandbytes stores nf4 and int8"
            )
        if scheme.bits != BITS:
            return (
                f"awq stores 4 bits, not {scheme.bits}; gptq stores 2, 3, 4 and 8, compressed_tensors 2 to 8"
            )
        if scheme.per_tensor:
            return "awq stores one scale per row and group, not per tensor; leave out _tensor"
        if scheme.group_size not in _GROUPS:
            return f"engines read awq groups of 16, 32, 64, 128 or a whole row, not {scheme.group_size:,}"
        if out % 32:
            return f"awq engines take outputs in multiples of 32, not {out:,}; keep it with a rule"
        if weight.part is not None and weight.part.expert is not None:
            return "awq has no layout for experts stacked in one tensor; keep it with a rule"
        return scheme.misfit(weight.shape)

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        out, width = weight.shape
        groups = width // (scheme.group_size or width)
        return (
            TensorSpec(f"{base}.qweight", torch.int32, (width, out // PER_WORD)),
            TensorSpec(f"{base}.qzeros", torch.int32, (groups, out // PER_WORD)),
            TensorSpec(f"{base}.scales", torch.float16, (groups, out)),
        )

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        found = plain_grid(linear.weight)
        if found is None or found[0].bits != BITS or found[0].group[0] != 1:
            raise UnsupportedError(f"awq cannot store `{linear.name}`: it is not in groups of 4-bit integers")
        q, scale = found
        if q.column_group is not None:
            raise UnsupportedError(
                f"awq cannot store `{linear.name}`: it has no place for groups of scattered columns",
                remedy="use act_order group_aware, or gptq, which stores the group of each column",
            )
        base = linear.name.removesuffix(".weight")
        zeros = q.zero_point
        if zeros is None:
            zeros = torch.full(scale.shape, MIDDLE, dtype=torch.uint8)
        return {
            f"{base}.qweight": pack_gemm(unsigned(q.codes, BITS).T),
            f"{base}.qzeros": pack_gemm(zeros.T),
            f"{base}.scales": scale.T.contiguous(),
        }

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return divisors(facts)

    def base_name(self, tensor: str) -> str | None:
        base, _, part = tensor.rpartition(".")
        if part not in _PARTS or base.rpartition(".")[2] in ACTIVATIONS:
            return None
        return f"{base}.weight"

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        base = name.removesuffix(".weight")
        words = tensors[f"{base}.qweight"]
        return size_of(words.shape, version_of(base, words.torch_dtype, config)), BITS

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        parts = {key.removeprefix(f"{base}."): tensor for key, tensor in tensors.items()}
        return QuantizedLinear(name, read(base, parts, config))

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        return disagreements(stored, config)

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        scheme = scheme_of(facts)
        shared = (scheme.group_size, scheme.sym)
        for a in facts.assigned:
            if a.scheme is not None and (a.scheme.group_size, a.scheme.sym) != shared:
                raise UnsupportedError(
                    f"awq has one group size per file and zero points everywhere or nowhere, and "
                    f"`{a.weight.key}` is {a.scheme.name} where others are {scheme.name}",
                    remedy="use one scheme for all weights, or compressed_tensors",
                )
        config: dict[str, Any] = {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            # null where nothing is kept: vLLM then looks at the tensors itself
            "modules_to_not_convert": kept_modules(facts) or None,
        }
        if scheme.sym:
            # no key of AutoAWQ's: our reader learns from it that the zero points mean nothing
            config["sym"] = True
        return config

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return engines_of(facts)


FORMAT = Awq()
