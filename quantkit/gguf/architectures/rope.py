"""Rotary embeddings: how llama.cpp is told their frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.gguf.architectures.families import Family
from quantkit.gguf.container import Value

# tensors that no checkpoint has
DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
GENERATED = (DIVISORS, LONG, SHORT)
_FAST, _SLOW = 32.0, 1.0  # turns in the original context between which YaRN passes over, in llama.cpp


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings of a model.

    parameters  what Transformers 5 calls `rope_parameters`; of blocks that see everything where kinds differ
    head_dim    channels of a head
    context     `max_position_embeddings`
    """

    parameters: Mapping[str, Any]
    head_dim: int
    context: int

    @classmethod
    def of(cls, config: Any, head_dim: int) -> Rope:
        parameters = config.rope_parameters
        return cls(parameters.get("full_attention", parameters), head_dim, config.max_position_embeddings)

    @property
    def kind(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def theta(self) -> float:
        return float(self.parameters["rope_theta"])

    @property
    def dims(self) -> int:
        """Channels of a head that are turned."""
        return int(self.head_dim * (self.parameters.get("partial_rotary_factor") or 1.0))

    @property
    def original(self) -> int:
        """Tokens that the model was trained on before it was stretched."""
        return int(self.parameters.get("original_max_position_embeddings") or self.context)

    @property
    def factor(self) -> float:
        return float(self.parameters.get("factor") or self.context / self.original)

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by: YaRN's and LongRoPE's attention factor."""
        given, stretch = self.parameters.get("attention_factor"), math.log(max(self.factor, 1.0))
        if given is not None:
            return float(given)
        if self.kind == "longrope":
            return math.sqrt(1 + stretch / math.log(self.original))
        over, under = self.parameters.get("mscale"), self.parameters.get("mscale_all_dim")
        if over and under:
            return float((0.1 * over * stretch + 1) / (0.1 * under * stretch + 1))
        return 0.1 * stretch + 1

    def obstacles(self, family: Family) -> Iterator[str]:
        """What llama.cpp's graph of `family` cannot turn as this model does."""
        p = self.parameters
        match self.kind:
            case "default" | "linear":
                pass
            case "llama3" | "longrope":
                if not family.divisors:
                    yield f"rotary embeddings are scaled by {self.kind!r}, which it has no tensors for here"
            case "yarn":
                if (p.get("beta_fast") or _FAST, p.get("beta_slow") or _SLOW) != (_FAST, _SLOW):
                    yield f"YaRN's `beta_fast` and `beta_slow` are not {_FAST:g} and {_SLOW:g}"
                if not p.get("truncate", True):
                    yield "YaRN's `truncate` is false"
            case other:
                yield f"rotary embeddings are scaled by {other!r}"
        if self.dims != self.head_dim and not family.partial:
            yield f"only {self.dims} of {self.head_dim} channels are turned (`partial_rotary_factor`)"

    def keys(self) -> dict[str, Value]:
        """Metadata, without the architecture in front."""
        found: dict[str, Value] = {"rope.freq_base": self.theta, "rope.dimension_count": self.dims}
        match self.kind:
            case "linear":
                scaling: dict[str, Value] = {"type": "linear", "factor": self.factor}
            case "yarn":
                scaling = {"type": "yarn", "factor": self.factor, "original_context_length": self.original}
                # it multiplies by 0.1·ln(factor) + 1 itself, and by this on top
                own = 0.1 * math.log(self.factor) + 1
                if self.magnitude != own:
                    scaling["attn_factor"] = self.magnitude / own
            case "longrope":
                scaling = {"type": "longrope", "original_context_length": self.original}
                scaling["attn_factor"] = self.magnitude
            case _:
                scaling = {}
        return {**found, **{f"rope.scaling.{key}": value for key, value in scaling.items()}}

    def divisors(self) -> dict[str, Tensor]:
        """Tensors that divide the frequencies, fp32 (dims / 2,)."""
        p = self.parameters
        if self.kind == "longrope":
            factors = {LONG: p["long_factor"], SHORT: p["short_factor"]}
            return {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
        if self.kind != "llama3":
            return {}
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims
        turns = self.original / (2 * math.pi * self.theta**exponents)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return {DIVISORS: (1 / ((1 - smooth) / self.factor + smooth)).to(torch.float32)}
