"""Roles by name."""

from __future__ import annotations

import pytest

from quantkit.model.graph import Part, Role, Weight
from quantkit.model.names import role_of


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("model.layers.0.self_attn.q_b_proj", "q"),
        ("model.layers.0.self_attn.kv_b_proj", "other"),
        ("model.layers.11.self_attn.qkv_proj", "qkv"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("transformer.h.0.mlp.c_fc", "up"),
        ("model.decoder.layers.0.fc1", "up"),
        ("model.decoder.layers.0.fc2", "down"),
        ("transformer.h.0.self_attention.dense", "o"),
        ("model.layers.0.mlp.gate_proj", "gate"),
        ("model.layers.0.mlp.gate_up_proj", "gate_up"),
        ("model.layers.0.mlp.experts.gate_up_proj[31]", "gate_up"),
        ("model.layers.0.block_sparse_moe.input_linear.weight[3]", "gate_up"),
        ("model.layers.0.block_sparse_moe.experts.7.w1", "gate"),
        ("model.layers.0.block_sparse_moe.experts.7.w2", "down"),
        ("model.layers.0.block_sparse_moe.experts.7.w3", "up"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.mlp.router", "router"),
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("model.layers.0.mlp.shared_expert.gate_proj", "gate"),
        ("model.layers.0.mixer.in_proj", "other"),
    ],
)
def test_roles(module: str, role: Role) -> None:
    assert role_of(module) == role


def test_module_of_a_stacked_weight_has_the_expert() -> None:
    weight = Weight("m.experts.down_proj", (4, 8), "down", Part(expert=3, transposed=True))
    assert (weight.key, weight.module) == ("m.experts.down_proj[3]", "m.experts.down_proj[3]")
