"""One description per kind of model: what llama.cpp's graph of it takes for granted, and what it reads.

`config` is Transformers' own reading of config.json, so that defaults and older spellings mean what they
mean there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from quantkit.gguf.container import Value

_QKV = frozenset(("attn_q", "attn_k", "attn_v"))
_FEED_FORWARD = frozenset(("ffn_gate", "ffn_up", "ffn_down"))
_NORMS = frozenset(("attn_norm", "attn_norm_2", "ffn_norm", "output_norm"))


def _key_value_heads(config: Any) -> int:
    given = getattr(config, "num_key_value_heads", None)  # GPT-2's config has no such field
    return int(given or config.num_attention_heads)


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp knows the models of one type.

    architecture  its name there, which decides the graph
    biases        tensors whose bias it reads; it refuses files with others
    activation    (field of the config, function that the graph computes)
    epsilon       field of the config; RMS norms where it says so
    width         field of the config: width of the feed-forward part
    kv_heads      key-value heads of a config
    rotary        which rows of a head it turns together: halves as Transformers does, neighbours, or none
    divisors      whether it reads tensors that divide rotary frequencies
    partial       whether it can turn a part of every head only
    sliding       whether it has attention within a window
    square        whether it takes for granted that all heads together are as wide as the model
    head          whether the output matrix may, must or cannot be in the file beside the embedding
    offset        what Transformers adds to the weights of norms when it uses them
    text          field of the config that describes the language model, where it is one part of several
    aside         beginnings of the names of the other parts' tensors, which do not go into the file
    keys          metadata of its own, without the architecture in front
    obstacles     what of a config its graph cannot express
    """

    architecture: str
    biases: frozenset[str] = _QKV
    activation: tuple[str, Literal["silu", "gelu"]] = ("hidden_act", "silu")
    epsilon: str = "rms_norm_eps"
    width: str = "intermediate_size"
    kv_heads: Callable[[Any], int] = _key_value_heads
    rotary: Literal["halves", "neighbours", "none"] = "halves"
    divisors: bool = False
    partial: bool = False
    sliding: bool = False
    square: bool = False
    head: Literal["may", "must", "cannot"] = "may"
    offset: float = 0.0
    text: str | None = None
    aside: tuple[str, ...] = ()
    keys: Callable[[Any], dict[str, Value]] = lambda _: {}
    obstacles: Callable[[Any], Iterator[str]] = lambda _: iter(())


def _experts(config: Any) -> dict[str, Value]:
    return {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}


def _qwen3_moe_keys(config: Any) -> dict[str, Value]:
    return {**_experts(config), "expert_feed_forward_length": config.moe_intermediate_size}


def _qwen3_moe_obstacles(config: Any) -> Iterator[str]:
    if not config.norm_topk_prob:
        yield "`norm_topk_prob` is false, and llama.cpp makes the chosen experts' weights sum to 1"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "some blocks have no experts (`mlp_only_layers`, `decoder_sparse_step`)"


def _window(config: Any, period: int) -> dict[str, Value]:
    """Keys of attention within a window; in llama.cpp every `period`-th block sees everything."""
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    keys: dict[str, Value] = {"attention.sliding_window": config.sliding_window or 0}
    if kinds != [(index + 1) % period != 0 for index in range(len(kinds))]:
        keys["attention.sliding_window_pattern"] = kinds
    return keys


def _gemma2_keys(config: Any) -> dict[str, Value]:
    return {
        **_window(config, 2),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma_obstacles(config: Any, largest: int) -> Iterator[str]:
    """`largest`: blocks of the biggest model, by which llama.cpp tells how attention is scaled."""
    scalar, expected = config.query_pre_attn_scalar, config.head_dim
    if config.num_hidden_layers == largest:
        expected = config.hidden_size // config.num_attention_heads
    if scalar != expected:
        yield f"`query_pre_attn_scalar` is {scalar}, and llama.cpp scales attention by 1/√{expected}"
    if config.use_bidirectional_attention:
        yield "`use_bidirectional_attention` is on"


def _gemma2_obstacles(config: Any) -> Iterator[str]:
    yield from _gemma_obstacles(config, 46)
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        yield "it caps logits, this model does not (`attn_logit_softcapping`, `final_logit_softcapping`)"


def _gemma3_keys(config: Any) -> dict[str, Value]:
    keys = _window(config, 6)
    if config.final_logit_softcapping is not None:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return {**keys, "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}


def _gemma3_obstacles(config: Any) -> Iterator[str]:
    yield from _gemma_obstacles(config, 62)
    if config.attn_logit_softcapping is not None:
        yield "`attn_logit_softcapping` is set"
    if (kind := config.rope_parameters["sliding_attention"]["rope_type"]) != "default":
        yield f"rotary embeddings of sliding blocks are scaled ({kind!r})"
    if (kind := config.rope_parameters["full_attention"]["rope_type"]) not in ("default", "linear"):
        yield f"rotary embeddings of global blocks are scaled by {kind!r}, which would act on all blocks"


def _granite_keys(config: Any) -> dict[str, Value]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _phi3_keys(config: Any) -> dict[str, Value]:
    original = config.rope_parameters.get("original_max_position_embeddings")
    return {
        "attention.sliding_window": config.sliding_window or 0,
        "rope.scaling.original_context_length": original or config.original_max_position_embeddings,
    }


def _smollm3_obstacles(config: Any) -> Iterator[str]:
    if [bool(on) for on in config.no_rope_layers] != [
        (index + 1) % 4 != 0 for index in range(config.num_hidden_layers)
    ]:
        yield "`no_rope_layers` names others than every fourth block, where llama.cpp leaves rotation out"


def _starcoder2_obstacles(config: Any) -> Iterator[str]:
    if not config.use_bias:
        yield "`use_bias` is false, and llama.cpp wants the biases"


def _gpt2_obstacles(config: Any) -> Iterator[str]:
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        yield "scaled attention (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`)"
    if config.add_cross_attention:
        yield "`add_cross_attention` is on"


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon_obstacles(config: Any) -> Iterator[str]:
    if config.alibi:
        yield "`alibi` positions"
    if not config.parallel_attn:
        yield "attention and feed-forward part come one after the other (`parallel_attn` is false)"


_LLAMA = Family("llama", _QKV | _FEED_FORWARD | {"attn_output"}, rotary="neighbours", divisors=True)
_GEMMA = Family("gemma2", activation=("hidden_activation", "gelu"), sliding=True, offset=1.0)
_GEMMA3 = replace(_GEMMA, architecture="gemma3", keys=_gemma3_keys, obstacles=_gemma3_obstacles)
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_OLMO = Family("olmo2", square=True, head="must")

# model_type in config.json → how llama.cpp knows it
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": replace(_LLAMA, keys=_experts),
        "qwen2": Family("qwen2", square=True),
        "qwen3": Family("qwen3"),
        "qwen3_moe": Family("qwen3moe", keys=_qwen3_moe_keys, obstacles=_qwen3_moe_obstacles),
        "gemma2": replace(_GEMMA, head="cannot", keys=_gemma2_keys, obstacles=_gemma2_obstacles),
        "gemma3_text": _GEMMA3,
        "gemma3": replace(_GEMMA3, text="text_config", aside=_VISION),
        "phi3": Family("phi3", divisors=True, partial=True, square=True, keys=_phi3_keys),
        "olmo2": _OLMO,
        "olmo3": replace(_OLMO, sliding=True, keys=lambda config: _window(config, 4)),
        "gpt2": Family(
            "gpt2",
            _NORMS | {"attn_qkv", "attn_output", "ffn_up", "ffn_down"},
            activation=("activation_function", "gelu"),
            epsilon="layer_norm_epsilon",
            width="n_inner",
            rotary="none",
            square=True,
            obstacles=_gpt2_obstacles,
        ),
        "smollm3": Family("smollm3", rotary="neighbours", obstacles=_smollm3_obstacles),
        "starcoder2": Family(
            "starcoder2",
            _NORMS | _QKV | {"attn_output", "ffn_up", "ffn_down"},
            activation=("hidden_act", "gelu"),
            epsilon="norm_epsilon",
            square=True,
            obstacles=_starcoder2_obstacles,
        ),
        "granite": replace(_LLAMA, architecture="granite", keys=_granite_keys),
        "falcon": Family(
            "falcon",
            _NORMS,
            activation=("activation", "gelu"),
            epsilon="layer_norm_epsilon",
            width="ffn_hidden_size",
            kv_heads=_falcon_kv_heads,
            square=True,
            keys=lambda _: {"tensor_data_layout": "jploski"},  # the order of the rows of attn_qkv
            obstacles=_falcon_obstacles,
        ),
    }
)
