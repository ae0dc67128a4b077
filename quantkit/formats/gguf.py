"""GGUF files, for llama.cpp and what is built on it.

A file is a whole model: embedding and head are quantized too, and every tensor has a type of its own, one of
ggml's. A preset (`q4_k_m`) is a set of rules by which types are given, see `allocate.gguf_mix`. What a file
holds beside matrices is the matter of `run.gguf`; here is how one matrix becomes rows of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import UnsupportedError
from quantkit.gguf.blocks import TYPES, pack, type_of, unpack
from quantkit.gguf.mixes import MIXES, parse_mix
from quantkit.gguf.rounding import EXACT
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.protocols import Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear

SUMMARY = "one file with everything, 1.6 to 16 bits, for llama.cpp, Ollama, LM Studio"
DEFAULT_SCHEME = "q4_k_m"
PRESETS = tuple(MIXES)

# of a matrix; in a file it has the name that llama.cpp gives it
_ROWS = ".rows"


def parse(text: str) -> Scheme:
    """The scheme of a preset: the type of most weights, and the rules by which the others get theirs."""
    mix = parse_mix(text)
    return replace(parse_scheme(mix.default), mix=mix.name)


def default_method(scheme: Scheme) -> str:
    """Types whose rounding leaves nothing to win are rounded as llama.cpp does."""
    return "rtn" if scheme.numbers in EXACT else "gptq"


@dataclass(frozen=True, slots=True)
class Gguf:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "gguf"

    def scale_dtype(self, source_dtype: str) -> str:
        return "float16"

    def convention(self, scheme: Scheme) -> Convention:
        return "full_range"

    def holds_column_groups(self) -> bool:
        return False

    def cache_scales(self, attention: str, dtype: CacheDtype) -> None:
        return None

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        if not scheme.ggml and scheme.numbers != "mxfp4":
            return f"gguf stores ggml's types, not {scheme.name}; write q4_k, q6_k or the like"
        return scheme.misfit(weight.shape)

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        out, width = weight.shape
        return (TensorSpec(_stored(weight.key), torch.uint8, (out, type_of(scheme).row_bytes(width))),)

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        if isinstance(linear.weight, Affine) and linear.weight.column_group is not None:
            raise UnsupportedError(f"gguf cannot store the column groups of `{linear.name}`")
        try:
            return {_stored(linear.name): pack(linear.weight, type_of(scheme))}
        except UnsupportedError as error:
            raise UnsupportedError(f"`{linear.name}`: {error.message}", remedy=error.remedy) from error

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return {}

    def base_name(self, tensor: str) -> str | None:
        return tensor.removesuffix(_ROWS) if tensor.endswith(_ROWS) else None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        kind = TYPES[config["types"][name]]
        out, row_bytes = tensors[_stored(name)].shape
        return (out, row_bytes // kind.nbytes * kind.elements), parse_scheme(kind.name).bits

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        return QuantizedLinear(name, unpack(tensors[_stored(name)], TYPES[config["types"][name]]))

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        # a file says what it holds in its directory of tensors alone
        return iter(())

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        """Which type each matrix has; a file says so in its directory of tensors."""
        found = {a.weight.key: a.scheme.numbers for a in facts.assigned if a.scheme is not None}
        return {"quant_method": "gguf", "types": found}

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("llama.cpp", "Ollama", "LM Studio"), ()


def _stored(key: str) -> str:
    return key + _ROWS


FORMAT = Gguf()
