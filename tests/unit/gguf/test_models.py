"""Names and hyperparameters of models as llama.cpp knows them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quantkit.errors import UnsupportedError
from quantkit.gguf.models import Model

pytest.importorskip("gguf")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 160,
}


def model(**changes: Any) -> Model:
    return Model.of({**CONFIG, **changes})


def test_hyperparameters() -> None:
    found = model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).metadata()
    assert found["llama.block_count"] == 2 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["llama.rope.freq_base"] == 5e5 and "llama.rope.scaling.type" not in found
    assert model(rope_theta=3e4).metadata()["llama.rope.freq_base"] == 3e4
    assert model(head_dim=32).metadata()["llama.attention.value_length"] == 32


def test_scaled_rotary_embeddings() -> None:
    linear = model(rope_scaling={"type": "linear", "factor": 4.0}).metadata()
    assert linear["llama.rope.scaling.type"] == "linear" and linear["llama.rope.scaling.factor"] == 4.0
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    found = model(rope_parameters=yarn).metadata()
    assert found["llama.rope.scaling.original_context_length"] == 32
    with pytest.raises(UnsupportedError, match="'longrope'"):
        model(rope_scaling={"rope_type": "longrope"}).metadata()


def test_divisors_of_llama3() -> None:
    """Wavelengths below 32/4 are left alone, above 32/1 divided by the factor, and between in proportion."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    divisors = model(rope_parameters=rope).generated()["rope_freqs.weight"]
    assert divisors.shape == (8,) and divisors.dtype == torch.float32
    wavelength = 2 * math.pi * 10000 ** (2 / 16)
    smooth = (32 / wavelength - 1) / 3
    expected = [1.0, 1 / ((1 - smooth) / 8 + smooth), *[8.0] * 6]
    torch.testing.assert_close(divisors, torch.tensor(expected))
    assert model().generated() == {}


def test_rows_of_queries_and_keys() -> None:
    """Rows j and j + 8 of a head of 16 lie side by side; all else, and other architectures, stay in order."""
    rows = model().rows("model.layers.0.self_attn.q_proj.weight")
    assert rows is not None and rows[:4].tolist() == [0, 8, 1, 9] and rows[16:18].tolist() == [16, 24]
    keys = model().rows("model.layers.0.self_attn.k_proj.bias")
    assert keys is not None and len(keys) == 32
    assert model().rows("model.layers.0.self_attn.v_proj.weight") is None
    qwen = model(architectures=["Qwen2ForCausalLM"])
    assert qwen.architecture == "qwen2" and qwen.rows("model.layers.0.self_attn.q_proj.weight") is None


def test_context_ends_with_the_window() -> None:
    assert model(sliding_window=8).context == 8
    assert model(sliding_window=8, use_sliding_window=False).context == 128


def test_names() -> None:
    qwen3 = model(architectures=["Qwen3ForCausalLM"])
    names = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_norm.weight", "lm_head.weight"]
    assert list(qwen3.names(dict.fromkeys(names)).values()) == [
        "token_embd.weight",
        "blk.1.attn_q_norm.weight",
        "output.weight",
    ]
    with pytest.raises(UnsupportedError, match=r"no place for `model\.layers\.0\.oddity\.weight`"):
        qwen3.names({"model.layers.0.oddity.weight": None})


def test_models_that_cannot_be_written_say_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match="`GPT2LMHeadModel` cannot be written as GGUF yet") as caught:
        model(architectures=["GPT2LMHeadModel"])
    assert "compressed_tensors" in str(caught.value)
    with pytest.raises(UnsupportedError, match="SiLU"):
        model(hidden_act="gelu")
