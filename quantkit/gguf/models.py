"""What llama.cpp calls the models that can be written, their parts and their hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.container import Value, library

# class in config.json → llama.cpp's name, which decides the graph it builds
_NAMES = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
)
# rotary embeddings act on neighbouring rows there, and on the two halves of a head in Transformers
_NEIGHBOURS = frozenset(("llama",))
_ORIGINAL_CONTEXT = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that llama.cpp can run; `config` is its config.json."""

    architecture: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """UnsupportedError when the model cannot be expressed, or is not written yet."""
        named = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
        if named not in _NAMES:
            raise UnsupportedError(
                f"`{named}` cannot be written as GGUF yet: {', '.join(_NAMES)} can",
                remedy="export to compressed_tensors, or convert the original with llama.cpp's own converter",
            )
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise UnsupportedError(f"llama.cpp computes SiLU in `{named}`, and this model has {act!r}")
        return cls(_NAMES[named], config)

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        heads = int(self.config["num_attention_heads"])
        return heads, int(self.config.get("num_key_value_heads") or heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads[0])

    @property
    def blocks(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def context(self) -> int:
        """Tokens, as far as llama.cpp computes the same: it has no sliding window for these models."""
        window = self.config.get("sliding_window") if self.config.get("use_sliding_window", True) else None
        longest = int(self.config["max_position_embeddings"])
        return longest if window is None else min(longest, int(window))

    def metadata(self) -> dict[str, Value]:
        """Hyperparameters under llama.cpp's keys."""
        c, a, (heads, kv_heads) = self.config, self.architecture, self.heads
        return {
            f"{a}.context_length": self.context,
            f"{a}.embedding_length": int(c["hidden_size"]),
            f"{a}.block_count": self.blocks,
            f"{a}.feed_forward_length": int(c["intermediate_size"]),
            f"{a}.attention.head_count": heads,
            f"{a}.attention.head_count_kv": kv_heads,
            f"{a}.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
            f"{a}.attention.key_length": self.head_dim,
            f"{a}.attention.value_length": self.head_dim,
            f"{a}.rope.freq_base": float(self._rope().get("rope_theta", 10000.0)),
            f"{a}.rope.dimension_count": self.head_dim,
            f"{a}.vocab_size": int(c["vocab_size"]),
            **self._rope_scaling(),
        }

    def names(self, tensors: Mapping[str, object]) -> dict[str, str]:
        """Checkpoint name → name in the file; UnsupportedError for a tensor without a place."""
        gguf = library()
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.blocks)
        found = {}
        for name in tensors:
            there = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if there is None:
                raise UnsupportedError(f"llama.cpp's `{self.architecture}` has no place for `{name}`")
            found[name] = there
        return found

    def rows(self, name: str) -> Tensor | None:
        """The checkpoint's row that each row of the file is, for queries and keys; None: in order."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if self.architecture not in _NEIGHBOURS or not module.endswith(("q_proj", "k_proj")):
            return None
        heads = self.heads[0] if module.endswith("q_proj") else self.heads[1]
        order = torch.arange(heads * self.head_dim)
        return order.view(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def generated(self) -> dict[str, Tensor]:
        """Tensors that no checkpoint has: the divisors of Llama 3's rotary frequencies, fp32."""
        rope = self._rope()
        if _rope_type(rope) != "llama3":
            return {}
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        original, factor = float(rope[_ORIGINAL_CONTEXT]), float(rope["factor"])
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        turns = original / (2 * math.pi * float(rope.get("rope_theta", 10000.0)) ** exponents)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)}

    def _rope(self) -> Mapping[str, Any]:
        """transformers 5 keeps everything in `rope_parameters`, earlier versions apart."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return {"rope_theta": self.config.get("rope_theta", 10000.0), **rope}

    def _rope_scaling(self) -> dict[str, Value]:
        rope, a = self._rope(), self.architecture
        match _rope_type(rope):
            case "default" | "llama3":
                return {}
            case "linear":
                kind: dict[str, Value] = {f"{a}.rope.scaling.type": "linear"}
                return {**kind, f"{a}.rope.scaling.factor": float(rope["factor"])}
            case "yarn" if not {"mscale", "mscale_all_dim", "attention_factor"} & rope.keys():
                original = rope.get(_ORIGINAL_CONTEXT, self.config["max_position_embeddings"])
                return {
                    f"{a}.rope.scaling.type": "yarn",
                    f"{a}.rope.scaling.factor": float(rope["factor"]),
                    f"{a}.rope.scaling.original_context_length": int(original),
                    f"{a}.rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
                    f"{a}.rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
                }
            case other:
                raise UnsupportedError(f"rotary embeddings scaled by {other!r} are not written as GGUF yet")


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))
