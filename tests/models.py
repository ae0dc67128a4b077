"""Factories of tiny random models, one per family: two blocks, seeded, under 1 MB, no tokenizer.

Dimensions differ from one another wherever the architecture lets them, so that a transposed or
swapped matrix shows as a shape error; they are multiples of 32 so that common group sizes fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 160
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **SPECIAL,
}
_GEMMA = {**_DENSE, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _DENSE,
    "mistral": {**_DENSE, "head_dim": 32, "sliding_window": 8},
    "qwen2": _DENSE,
    "qwen3": {**_DENSE, "head_dim": 32},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_DENSE, "original_max_position_embeddings": 128},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        **SPECIAL,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        **SPECIAL,
    },
    "cohere": {**_DENSE, "logit_scale": 0.25, "use_qk_norm": True},
    "starcoder2": {**_DENSE, "sliding_window": 8},
    "mixtral": {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **_DENSE,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "deepseek_v3": {
        **_DENSE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "olmo2": _DENSE,
    "gpt_oss": {
        **_DENSE,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# Families that must be refused, and why: blocks get per-token inputs beside their hidden states.
REFUSED: Mapping[str, Mapping[str, Any]] = {
    "gemma3n_text": {
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of `family`; every parameter is random, norms and biases included."""
    config = CONFIG_MAPPING[family](**{**FAMILIES, **REFUSED}[family] | changes)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        parameter.data = centre + noise * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model


def save_tiny(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_model(family)` as safetensors into `folder` and return the folder."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    return folder


def tiny_tokens(rows: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """(rows, length) int64 token ids that avoid the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
