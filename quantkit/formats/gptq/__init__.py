"""GPTQ checkpoints, as AutoGPTQ wrote them and gptqmodel, vLLM, SGLang and ExLlama read them.

A linear X with weight (out, in), b bits, G groups becomes
    X.qweight  int32 (in·b/32, out)   codes, one bit stream along the inputs of each output
    X.qzeros   int32 (G, out·b/32)    zero points, one bit stream along the outputs of each group
    X.scales   float16 (G, out)
    X.g_idx    int32 (in,)            group of each input, in file order
v1 stores zero point − 1. Asymmetric files are written as v2 (the zero point itself): a zero of 0 wraps
in v1 and readers that add the constant word-wise then damage the neighbouring channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import UnsupportedError
from quantkit.formats.gptq.claims import disagreements
from quantkit.formats.gptq.engines import engines_of
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.numerics.bits import pack, packed_width, signed, unpack, unsigned
from quantkit.protocols import Assigned, Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, plain_grid

SUMMARY = "integer weights, 2, 3, 4 or 8 bits, for vLLM, SGLang, ExLlamaV2, transformers"
DEFAULT_SCHEME = "w4g128"
PRESETS = ("w2g64", "w3g128", "w4g32", "w4g64", "w4g128", "w4g128_asym", "w8g128", "w4", "w8")

parse = parse_scheme

_BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_V1, _V2 = "gptq", "gptq_v2"


def default_method(scheme: Scheme) -> str:
    """8 bits lose next to nothing however they are rounded: no calibration by default."""
    return "rtn" if scheme.bits == 8 else "gptq"


@dataclass(frozen=True, slots=True)
class Gptq:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "safetensors"

    def scale_dtype(self, source_dtype: str) -> str:
        return "float16"

    def convention(self, scheme: Scheme) -> Convention:
        # AutoGPTQ's: a zero point in the middle of unsigned codes, so both ends are used
        return "half_step"

    def holds_column_groups(self) -> bool:
        return True

    def cache_scales(self, attention: str, dtype: CacheDtype) -> None:
        return None

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        out, width = weight.shape
        if not scheme.plain:
            return (
                "gptq stores integers with an integer zero point or none, and inputs stay 16-bit; "
                "compressed_tensors stores floats and rounds inputs, bitsandbytes stores nf4 and int8"
            )
        if scheme.bits not in _BITS:
            return f"gptq stores 2, 3, 4 or 8 bits, not {scheme.bits}; compressed_tensors stores 2 to 8"
        if scheme.per_tensor:
            return "gptq stores one scale per row and group, not per tensor"
        if width % 32 or out % 32:
            return f"gptq packs 32 codes at a time and the shape is {out:,} × {width:,}; keep it with a rule"
        if weight.part is not None and weight.part.expert is not None:
            return "gptq has no layout for experts stacked in one tensor; keep it with a rule"
        return scheme.misfit(weight.shape)

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        out, width = weight.shape
        groups = width // (scheme.group_size or width)
        return (
            TensorSpec(f"{base}.qweight", torch.int32, (packed_width(width, scheme.bits), out)),
            TensorSpec(f"{base}.qzeros", torch.int32, (groups, packed_width(out, scheme.bits))),
            TensorSpec(f"{base}.scales", torch.float16, (groups, out)),
            TensorSpec(f"{base}.g_idx", torch.int32, (width,)),
        )

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        found = plain_grid(linear.weight)
        if found is None:
            raise UnsupportedError(f"gptq cannot store `{linear.name}`: it is not on a plain integer grid")
        q, scale = found
        base = linear.name.removesuffix(".weight")
        middle = 1 << (q.bits - 1)
        width = q.codes.shape[1]
        stored = q.zero_point
        if stored is None:
            stored = torch.full(scale.shape, middle - 1, dtype=torch.uint8)
        column_group = q.column_group
        if column_group is None:
            column_group = torch.arange(width, dtype=torch.int32) // q.group[1]
        return {
            f"{base}.qweight": pack(unsigned(q.codes, q.bits), q.bits).T.contiguous(),
            f"{base}.qzeros": pack(stored.T, q.bits).contiguous(),
            f"{base}.scales": scale.T.contiguous(),
            f"{base}.g_idx": column_group.to(torch.int32),
        }

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return {}

    def base_name(self, tensor: str) -> str | None:
        base, _, part = tensor.rpartition(".")
        return f"{base}.weight" if part in _PARTS else None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        base = name.removesuffix(".weight")
        bits = _bits(base, config)
        words, out = tensors[f"{base}.qweight"].shape
        return (out, words * 32 // bits), bits

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        bits = _bits(base, config)
        scale = tensors[f"{base}.scales"].T.contiguous()
        out, groups = scale.shape
        packed = tensors[f"{base}.qweight"]
        width = packed.shape[0] * 32 // bits
        codes = unpack(packed.T.contiguous(), bits, width)
        zeros = unpack(tensors[f"{base}.qzeros"], bits, out).T.contiguous()
        if config.get("checkpoint_format", config.get("format", _V1)) == _V1:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        columns = _columns(base, width, groups, config)
        trivial = torch.arange(width, dtype=torch.int32) // columns
        g_idx = tensors.get(f"{base}.g_idx", trivial)
        middle = 1 << (bits - 1)
        # an asymmetric scheme may happen to need the middle everywhere: the config says which it is
        sym = _sym(base, config) and bool((zeros == middle).all())
        return QuantizedLinear(
            name,
            Affine(
                codes=signed(codes, bits) if sym else codes,
                bits=bits,
                scale=scale,
                group=(1, columns),
                zero_point=None if sym else zeros,
                column_group=None if torch.equal(g_idx, trivial) else g_idx,
            ),
        )

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        return disagreements(stored, config)

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        default = facts.default
        for a in facts.assigned:
            if a.scheme is not None and a.scheme.sym != default.sym:
                raise UnsupportedError(
                    f"gptq stores zero points one way per file, and `{a.weight.key}` is {a.scheme.name} "
                    f"where the target is {default.name}",
                    remedy="use one of symmetric and _asym for all weights, or compressed_tensors",
                )
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size or -1,
            "desc_act": facts.act_order,
            "sym": default.sym,
            "lm_head": False,
            "checkpoint_format": _V1 if default.sym else _V2,
            "format": _V1 if default.sym else _V2,
            "pack_dtype": "int32",
            "damp_percent": 0.01,
            "true_sequential": False,
            "static_groups": not facts.act_order,
        }
        if not default.sym:
            # transformers gives files with this key not to auto-round, which reads zero points as those of v1
            config["meta"] = {"quantizer": [f"quantkit:{facts.version}"], "method": facts.method}
        exceptions = _dynamic(facts)
        if exceptions:
            config["dynamic"] = exceptions
            config["modules_in_block_to_quantize"] = _suffixes(facts.assigned)
        return config

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return engines_of(facts)


FORMAT = Gptq()


def _dynamic(facts: FormatFacts) -> dict[str, dict[str, Any]]:
    """Exceptions from the default as gptqmodel and vLLM read them; weights left alone come first."""
    kept: dict[str, dict[str, Any]] = {}
    other: dict[str, dict[str, Any]] = {}
    for a in facts.assigned:
        pattern = re.escape(a.weight.module)
        if a.scheme is None:
            kept[f"-:{pattern}$"] = {}
        elif (a.scheme.bits, a.scheme.group_size) != (facts.default.bits, facts.default.group_size):
            size = a.scheme.group_size or -1
            other[f"+:{pattern}$"] = {"bits": a.scheme.bits, "group_size": size, "sym": a.scheme.sym}
    return kept | other


def _suffixes(assigned: Sequence[Assigned]) -> list[list[str]]:
    """Module suffixes that are quantized, the list transformers' reader needs when some are not.

    It matches with `endswith`, so a suffix must not be quantized in one block and kept in another:
    then full names are listed instead.
    """
    kept = {_suffix(a.weight) for a in assigned if a.scheme is None}
    chosen = [a.weight for a in assigned if a.scheme is not None]
    listed = [w.module if _suffix(w) in kept else _suffix(w) for w in chosen]
    return [[name] for name in dict.fromkeys(listed)]


def _suffix(weight: Weight) -> str:
    return re.sub(r"^.*?\.\d+\.", "", weight.module, count=1)


def _override(base: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for pattern, override in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), base):
            return dict(override)
    return {}


def _bits(base: str, config: Mapping[str, Any]) -> int:
    return int(_override(base, config).get("bits", config["bits"]))


def _columns(base: str, width: int, groups: int, config: Mapping[str, Any]) -> int:
    """Columns that share a scale, from the config if that makes so many groups; the last can be short."""
    size = int(_override(base, config).get("group_size", config.get("group_size", -1)))
    return size if size > 0 and -(-width // size) == groups else -(-width // groups)


def _sym(base: str, config: Mapping[str, Any]) -> bool:
    return bool(_override(base, config).get("sym", config.get("sym", True)))
