"""The configuration of the model in a GGUF file, from its metadata: what config.json would say.

Every value that the file states is set, and what llama.cpp computes without stating it; a key that is not
understood is an error, because a guess would change what the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from quantkit.errors import SourceError, UnsupportedError
from quantkit.run.gguf_source.keys import Keys
from quantkit.run.gguf_source.rope import rope_parameters

_Config = dict[str, Any]
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Described:
    """A file as far as its configuration depends on it.

    shapes     name in the file → shape, (out, in)
    generated  divisors of rotary frequencies, by their names in the file
    """

    keys: Keys
    shapes: Mapping[str, tuple[int, ...]]
    generated: Mapping[str, Tensor]

    def has(self, suffix: str) -> bool:
        """Whether the first block has a tensor."""
        return f"blk.0.{suffix}" in self.shapes


def config_from_metadata(described: Described) -> _Config:
    """config.json of the model. UnsupportedError when the architecture or one of its keys is not known."""
    keys, shapes = described.keys, described.shapes
    if keys.architecture not in _ARCHITECTURES:
        raise UnsupportedError(
            f"`{keys.where}` is a model of llama.cpp's architecture {keys.architecture!r:.60}, "
            f"which quantkit cannot read: {', '.join(_ARCHITECTURES)} can be",
            remedy="give the checkpoint that it was made from",
        )
    if len(shapes.get(_EMBEDDING, ())) != 2:
        raise SourceError(
            f"`{keys.where}` has no matrix `{_EMBEDDING}`",
            remedy="the file holds no language model, or is one shard of several: give the first",
        )
    config = _ARCHITECTURES[keys.architecture](described)
    keys.finish()
    return {
        **config,
        "vocab_size": shapes[_EMBEDDING][0],
        "tie_word_embeddings": _HEAD not in shapes,
        **{f"{name}_token_id": keys.token(key) for name, key in _SPECIALS},
        "dtype": "float32",
    }


_SPECIALS = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))


def _kind(model_type: str, name: str) -> _Config:
    return {"model_type": model_type, "architectures": [name]}


def _sizes(keys: Keys) -> _Config:
    heads = keys.integer("attention.head_count")
    return {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
    }


def _head_dim(keys: Keys, *, partial: bool = False) -> int:
    """Width of a head; UnsupportedError where keys and values differ, or part of it is rotated."""
    heads, width = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if not heads:
        raise SourceError(f"`{keys.where}` has no attention heads")
    size = keys.integer("attention.key_length", width // heads)
    keys.require("attention.value_length", size, f"keys have {size:,} per head, values have to as well")
    if not partial:
        keys.require("rope.dimension_count", size, f"heads have {size:,}, and this model rotates all of them")
    return size


def _dense(d: Described, model_type: str, name: str, *, explicit: bool = True) -> _Config:
    """A decoder of the Llama kind; `explicit`: its heads may have any width."""
    keys = d.keys
    config = {**_kind(model_type, name), **_sizes(keys), "hidden_act": "silu"}
    size = _head_dim(keys)
    if explicit:
        config["head_dim"] = size
    elif size * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(f"`{keys.where}`: {name} has heads of hidden size / heads, not {size:,}")
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    config["rope_parameters"] = rope_parameters(keys, d.generated)
    return config


def _biases(d: Described) -> _Config:
    return {"attention_bias": d.has("attn_q.bias"), "mlp_bias": d.has("ffn_up.bias")}


def _llama(d: Described) -> _Config:
    experts = d.keys.integer("expert_count", 0)
    used = d.keys.integer("expert_used_count", 0)
    if not experts:
        return _dense(d, "llama", "LlamaForCausalLM") | _biases(d)
    own = {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}
    return _dense(d, "mixtral", "MixtralForCausalLM") | own


def _qwen2(d: Described) -> _Config:
    return _dense(d, "qwen2", "Qwen2ForCausalLM", explicit=False) | {"use_sliding_window": False}


def _qwen3(d: Described) -> _Config:
    return _dense(d, "qwen3", "Qwen3ForCausalLM") | {"attention_bias": d.has("attn_q.bias")}


def _qwen3_moe(d: Described) -> _Config:
    return _dense(d, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "attention_bias": d.has("attn_q.bias"),
        "num_experts": d.keys.integer("expert_count"),
        "num_experts_per_tok": d.keys.integer("expert_used_count"),
        "moe_intermediate_size": d.keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _window(keys: Keys, blocks: int, period: int) -> _Config:
    """Attention within a window; every `period`-th block sees all where the file does not say which do."""
    pattern = keys.flags("attention.sliding_window_pattern", blocks) or period
    if isinstance(pattern, int):
        pattern = [(index + 1) % pattern > 0 for index in range(blocks)]
    return {
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if near else "full_attention" for near in pattern],
    }


def _gemma(d: Described, model_type: str, name: str, period: int, largest: int) -> _Config:
    """`largest`: blocks of the model that scales its queries by the width of the model over the heads, not by
    the width of a head."""
    keys = d.keys
    config = _dense(d, model_type, name)
    del config["hidden_act"]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    biggest = config["num_hidden_layers"] == largest
    return config | {
        **_window(keys, config["num_hidden_layers"], period),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": d.has("attn_q.bias"),
        "query_pre_attn_scalar": per_head if biggest else config["head_dim"],
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0.0) or None,
    }


def _gemma2(d: Described) -> _Config:
    config = _gemma(d, "gemma2", "Gemma2ForCausalLM", 2, 46)
    # llama.cpp caps them whether the file says so or not
    for key, usual in (("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0)):
        config[key] = config[key] or usual
    return config


def _gemma3(d: Described) -> _Config:
    near = d.keys.number("rope.freq_base_swa", 10000.0)
    config = _gemma(d, "gemma3_text", "Gemma3ForCausalLM", 6, 62)
    local = {"rope_type": "default", "rope_theta": near}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return config


def _phi3(d: Described) -> _Config:
    keys = d.keys
    sizes, size = _sizes(keys), _head_dim(keys, partial=True)
    if size * sizes["num_attention_heads"] != sizes["hidden_size"]:
        raise UnsupportedError(f"`{keys.where}`: Phi-3 has heads of hidden size / heads, not {size:,}")
    rotated = keys.integer("rope.dimension_count", size)
    rope = rope_parameters(keys, d.generated) | {"partial_rotary_factor": rotated / size}
    original = keys.integer("rope.scaling.original_context_length", sizes["max_position_embeddings"])
    keys.number("rope.scaling.attn_factor", 1.0)
    return {
        **_kind("phi3", "Phi3ForCausalLM"),
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
    }


def _olmo2(d: Described) -> _Config:
    if not d.keys.integer("attention.sliding_window", 0):
        return _dense(d, "olmo2", "Olmo2ForCausalLM", explicit=False) | {"attention_bias": False}
    config = _dense(d, "olmo3", "Olmo3ForCausalLM", explicit=False)
    return config | {"attention_bias": False, **_window(d.keys, config["num_hidden_layers"], 4)}


def _gpt2(d: Described) -> _Config:
    keys = d.keys
    heads = keys.integer("attention.head_count")
    keys.require("attention.head_count_kv", heads, "GPT-2 has as many keys as queries")
    _head_dim(keys)
    return {
        **_kind("gpt2", "GPT2LMHeadModel"),
        "n_layer": keys.integer("block_count"),
        "n_embd": keys.integer("embedding_length"),
        "n_head": heads,
        "n_positions": keys.integer("context_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _smollm3(d: Described) -> _Config:
    return _dense(d, "smollm3", "SmolLM3ForCausalLM", explicit=False) | {
        **_biases(d),
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    }


def _starcoder2(d: Described) -> _Config:
    keys = d.keys
    config = {**_kind("starcoder2", "Starcoder2ForCausalLM"), **_sizes(keys)}
    if _head_dim(keys) * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(f"`{keys.where}`: StarCoder2 has heads of hidden size / heads")
    return config | {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "use_bias": True,
        "sliding_window": None,
        "rope_parameters": rope_parameters(keys, d.generated),
    }


def _granite(d: Described) -> _Config:
    keys = d.keys
    keys.require("expert_count", 0, "Granite's mixtures are not read yet")
    config = _dense(d, "granite", "GraniteForCausalLM", explicit=False) | _biases(d)
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "attention_multiplier": keys.number("attention.scale", 0.0) or per_head**-0.5,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": keys.number("logit_scale"),
    }


def _falcon(d: Described) -> _Config:
    keys, sizes = d.keys, _sizes(d.keys)
    _head_dim(keys)
    kv = sizes.pop("num_key_value_heads")
    wide = sizes.pop("intermediate_size")
    two_norms = d.has("attn_norm_2.weight")
    grouped = two_norms or kv > 1
    return {
        **_kind("falcon", "FalconForCausalLM"),
        **sizes,
        "num_kv_heads": kv,
        "ffn_hidden_size": wide,
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "multi_query": True,
        "parallel_attn": True,
        "bias": d.has("attn_qkv.bias"),
        "alibi": False,
        "rope_parameters": rope_parameters(keys, d.generated),
    }


_ARCHITECTURES: Mapping[str, Callable[[Described], _Config]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "qwen3moe": _qwen3_moe,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": _phi3,
        "olmo2": _olmo2,
        "gpt2": _gpt2,
        "smollm3": _smollm3,
        "starcoder2": _starcoder2,
        "granite": _granite,
        "falcon": _falcon,
    }
)
