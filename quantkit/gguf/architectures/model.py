"""`Model`: a model as llama.cpp can run it, or why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.architectures.families import FAMILIES, Family
from quantkit.gguf.architectures.placement import Placed, Places
from quantkit.gguf.architectures.rope import Rope
from quantkit.gguf.container import Value
from quantkit.model.graph import ModelGraph

_REMEDY = "export to compressed_tensors or gptq, which run it as Transformers does"
# what Transformers calls the functions that the graphs compute; the first of GELU's is not the same
_GELU_EXACT = "gelu"
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": (_GELU_EXACT, "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model that llama.cpp can run; `config` is Transformers' reading of its (text) config."""

    family: Family
    config: Any

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """UnsupportedError with all that llama.cpp cannot express; SourceError for a malformed config."""
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise UnsupportedError(
                f"models of type {kind!r} cannot be written as GGUF: {', '.join(FAMILIES)} can",
                remedy="export to compressed_tensors, or convert the original with llama.cpp's own converter",
            )
        family, whole = FAMILIES[kind], _read(kind, config)
        model = cls(family, whole if family.text is None else getattr(whole, family.text))
        if problems := list(model._obstacles()):
            raise UnsupportedError(
                f"llama.cpp's `{model.architecture}` cannot compute this model: {'; '.join(problems)}",
                remedy=_REMEDY,
            )
        return model

    @property
    def architecture(self) -> str:
        return self.family.architecture

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        return int(self.config.num_attention_heads), self.family.kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        explicit = getattr(self.config, "head_dim", None)  # several configs have no such field
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def experts(self) -> int:
        """Experts of a block, 0 without."""
        found = self.family.keys(self.config).get("expert_count", 0)
        return found if isinstance(found, int) else 0

    @property
    def context(self) -> int:
        """Tokens, as far as llama.cpp computes the same: not beyond a window that it does not know."""
        longest, window = int(self.config.max_position_embeddings), self._unknown_window()
        return longest if window is None else min(longest, window)

    def metadata(self) -> dict[str, Value]:
        """Hyperparameters under llama.cpp's keys."""
        c, (heads, kv_heads) = self.config, self.heads
        norm = "rms_epsilon" if self.family.epsilon == "rms_norm_eps" else "epsilon"
        keys: dict[str, Value] = {
            "context_length": self.context,
            "embedding_length": int(c.hidden_size),
            "block_count": self.blocks,
            "feed_forward_length": int(getattr(c, self.family.width) or 4 * c.hidden_size),
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            f"attention.layer_norm_{norm}": float(getattr(c, self.family.epsilon)),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "vocab_size": int(c.vocab_size),
            **({} if self._rope is None else self._rope.keys()),
            **self.family.keys(c),
        }
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def generated(self) -> dict[str, Tensor]:
        """Tensors that no checkpoint has: divisors of rotary frequencies, fp32."""
        return {} if self._rope is None else self._rope.divisors()

    def notes(self) -> tuple[str, ...]:
        """What llama.cpp computes otherwise than Transformers, though the model can be written."""
        return tuple(self._notes())

    def placements(self, graph: ModelGraph, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Placed, ...]:
        """Every tensor of the file in its order: embedding, blocks, the rest.

        `shapes` are those of the checkpoint's tensors. UnsupportedError names what has no place.
        """
        places = Places(self.family, self.heads, self.head_dim, self.blocks, self.experts)
        return places.all_of(graph, shapes)

    @property
    def _rope(self) -> Rope | None:
        return None if self.family.rotary == "none" else Rope.of(self.config, self.head_dim)

    @property
    def _activation(self) -> str:
        return str(getattr(self.config, self.family.activation[0]))

    @property
    def _kinds(self) -> frozenset[str]:
        """Kinds of attention that blocks have, as far as the config names them."""
        return frozenset(getattr(self.config, "layer_types", None) or ())  # newer configs do

    def _unknown_window(self) -> int | None:
        window: int | None = getattr(self.config, "sliding_window", None)  # a field of models that may slide
        slides = not self._kinds or "sliding_attention" in self._kinds
        return window if slides and not self.family.sliding else None

    def _obstacles(self) -> Iterator[str]:
        expected = self.family.activation[1]
        if self._activation not in _ACTIVATIONS[expected]:
            yield f"its activation is {self._activation!r}, the graph computes {expected}"
        if self.family.square and self.heads[0] * self.head_dim != self.config.hidden_size:
            yield f"{self.heads[0]} heads of {self.head_dim} are not {self.config.hidden_size} channels"
        if odd := self._kinds - {"full_attention", "sliding_attention"}:
            yield f"attention of kind {', '.join(map(repr, sorted(odd)))}"
        yield from self.family.obstacles(self.config)
        if self._rope is not None:
            yield from self._rope.obstacles(self.family)

    def _notes(self) -> Iterator[str]:
        asked = int(self.config.max_position_embeddings)
        if self.context < asked:
            yield (
                f"llama.cpp has no sliding window for `{self.architecture}`: the context is cut from "
                f"{asked:,} to {self.context:,} tokens"
            )
        if self.family.aside:
            yield "the file holds the language model alone: llama.cpp wants other parts in another file"
        if self._activation == _GELU_EXACT:
            yield "llama.cpp computes GELU by its tanh approximation, the model exactly: up to 0.0005 apart"
        if self._rope is not None and self._rope.kind == "longrope":
            yield (
                f"llama.cpp uses the long factors of LongRoPE when its context is set to more than "
                f"{self._rope.original:,} tokens, Transformers when a text is that long"
            )


def _read(kind: str, config: Mapping[str, Any]) -> PretrainedConfig:
    values = copy.deepcopy(dict(config))  # Transformers changes what it is given
    values.pop("quantization_config", None)
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"config.json is not a valid {kind} config: {error}") from error
