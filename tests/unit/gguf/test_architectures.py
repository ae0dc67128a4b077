"""Models as llama.cpp knows them: hyperparameters, where tensors go, and what cannot be said there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.architectures import Model, Placed
from quantkit.gguf.architectures.families import FAMILIES as KNOWN
from quantkit.gguf.architectures.placement import Places
from quantkit.model.build import build_graph
from tests.models import FAMILIES, save_tiny

pytest.importorskip("gguf")

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 160,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
MIXTURE = {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 4, "norm_topk_prob": True}
# changes that make the tiny models ones that llama.cpp can run
EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi3": {},
    "gpt2": {},
    "starcoder2": {},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmo2": {},
}
OUTSIDE = ("token_embd", "position_embd", "output_norm", "output")


def model(kind: str = "llama", **changes: Any) -> Model:
    return Model.of({"model_type": kind, **SMALL, **changes})


def saved(folder: Path, kind: str, **changes: Any) -> tuple[Model, dict[str, Placed], Checkpoint]:
    checkpoint = Checkpoint.open(save_tiny(kind, folder, **EXPRESSIBLE[kind], **changes))
    found = Model.of(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    placed = found.placements(build_graph(checkpoint), shapes)
    return found, {one.name: one for one in placed}, checkpoint


def test_hyperparameters() -> None:
    found = model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5).metadata()
    assert found["llama.block_count"] == 2 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["llama.attention.layer_norm_rms_epsilon"] == 1e-5 and found["llama.vocab_size"] == 160
    assert found["llama.rope.freq_base"] == 5e5 and "llama.rope.scaling.type" not in found
    wide = model(head_dim=32)
    assert wide.metadata()["llama.attention.value_length"] == wide.head_dim == 32 and wide.heads == (4, 2)


def test_older_spellings_and_defaults_are_those_of_transformers() -> None:
    assert model(rope_theta=3e4).metadata()["llama.rope.freq_base"] == 3e4
    assert model("mixtral").metadata()["llama.rope.freq_base"] == 1e6
    assert model("smollm3").metadata()["smollm3.rope.freq_base"] == 2e6
    gemma = model(
        "gemma3_text", **GEMMA, rope_local_base_freq=5e3, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    keys = gemma.metadata()
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 5e3)
    assert keys["gemma3.rope.scaling.factor"] == 8.0


def test_scaled_rotary_embeddings() -> None:
    linear = model(rope_scaling={"type": "linear", "factor": 4.0}).metadata()
    assert linear["llama.rope.scaling.type"] == "linear" and linear["llama.rope.scaling.factor"] == 4.0
    yarn = model("qwen2", rope_scaling=YARN).metadata()
    assert yarn["qwen2.rope.scaling.original_context_length"] == 32
    assert "qwen2.rope.scaling.attn_factor" not in yarn
    louder = model("qwen2", rope_scaling={**YARN, "attention_factor": 1.5}).metadata()
    assert louder["qwen2.rope.scaling.attn_factor"] == pytest.approx(1.5 / (0.1 * math.log(4) + 1))


def test_longrope() -> None:
    """Stretched from 32 to 128 tokens: cosines grow by √(1 + ln 4 / ln 32) = √1.4."""
    found = model("phi3", rope_scaling=LONG, original_max_position_embeddings=32)
    assert found.metadata()["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1.4))
    assert found.metadata()["phi3.rope.scaling.original_context_length"] == 32
    assert found.generated()["rope_factors_long.weight"].tolist() == [2.0] * 8
    assert any("LongRoPE" in note for note in found.notes())


def test_divisors_of_llama3() -> None:
    """Wavelengths below 32/4 are left alone, above 32/1 divided by the factor, and between in proportion."""
    divisors = model(rope_parameters=LLAMA3).generated()["rope_freqs.weight"]
    assert divisors.shape == (8,) and divisors.dtype == torch.float32
    wavelength = 2 * math.pi * 10000 ** (2 / 16)
    smooth = (32 / wavelength - 1) / 3
    expected = [1.0, 1 / ((1 - smooth) / 8 + smooth), *[8.0] * 6]
    torch.testing.assert_close(divisors, torch.tensor(expected))
    assert model().generated() == {}


def test_context_ends_with_a_window_that_llama_cpp_does_not_know() -> None:
    mistral = model("mistral", sliding_window=8)
    assert mistral.context == 8 and "from 128 to 8 tokens" in mistral.notes()[0]
    assert model("qwen2", sliding_window=8, use_sliding_window=False).context == 128
    assert model("gemma2", **GEMMA, sliding_window=8).context == 128


def test_windows_that_it_knows() -> None:
    usual = model("gemma2", **GEMMA, sliding_window=8).metadata()
    assert usual["gemma2.attention.sliding_window"] == 8
    assert "gemma2.attention.sliding_window_pattern" not in usual
    kinds = ["full_attention", "sliding_attention"]
    odd = model("gemma2", **GEMMA, layer_types=kinds).metadata()
    assert odd["gemma2.attention.sliding_window_pattern"] == [False, True]


def test_mixtures() -> None:
    found = model("qwen3_moe", **MIXTURE, num_experts_per_tok=2)
    keys = found.metadata()
    assert found.experts == keys["qwen3moe.expert_count"] == 4 and keys["qwen3moe.expert_used_count"] == 2
    assert keys["qwen3moe.expert_feed_forward_length"] == 48 and keys["qwen3moe.feed_forward_length"] == 96
    assert model().experts == 0


def test_falcon() -> None:
    """Its key-value heads are told in three ways; GELU is the exact one, which llama.cpp does not have."""
    assert model("falcon").heads == (4, 1)
    assert model("falcon", multi_query=False).heads == (4, 4)
    grouped = model("falcon", new_decoder_architecture=True, num_kv_heads=2)
    assert grouped.heads == (4, 2) and "tanh" in grouped.notes()[0]
    assert grouped.metadata()["falcon.tensor_data_layout"] == "jploski"
    assert grouped.metadata()["falcon.feed_forward_length"] == 256


@pytest.mark.parametrize("kind", EXPRESSIBLE)
def test_every_tensor_has_one_place(kind: str, tmp_path: Path) -> None:
    found, placed, checkpoint = saved(tmp_path, kind)
    used = [source.key.partition("[")[0] for one in placed.values() for source in one.sources]
    assert set(used) == set(checkpoint.tensors)
    twice = {name for name in used if used.count(name) > 1}
    assert twice == set() and next(iter(placed)) == "token_embd.weight"
    assert all(one.name.startswith("blk.") or one.name.split(".")[0] in OUTSIDE for one in placed.values())
    width = found.metadata()[f"{found.architecture}.embedding_length"]
    assert placed["token_embd.weight"].shape == (160, width)
    assert not any(one.matrix for one in placed.values() if one.name.endswith(("norm.weight", ".bias")))


def test_queries_and_keys_lie_in_pairs(tmp_path: Path) -> None:
    """Rows j and j + 8 of a head of 16 lie side by side, biases too; other families keep the order."""
    _, placed, _ = saved(tmp_path / "llama", "llama", attention_bias=True)
    for name, count in (("attn_q", 64), ("attn_k", 32)):
        for kind in ("weight", "bias"):
            rows = placed[f"blk.1.{name}.{kind}"].sources[0].rows
            assert rows is not None and len(rows) == count
            assert rows[:4].tolist() == [0, 8, 1, 9] and rows[16:18].tolist() == [16, 24]
    assert placed["blk.0.attn_v.weight"].sources[0].rows is None
    _, halves, _ = saved(tmp_path / "qwen2", "qwen2")
    assert halves["blk.0.attn_q.weight"].sources[0].rows is None


def test_rows_of_falcon() -> None:
    """Two groups of two queries, a key and a value, heads of 2: queries, then keys, then values."""
    rows = Places(KNOWN["falcon"], (4, 2), 2, 1, 0).rows("blk.0.attn_qkv.weight")
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def test_experts_are_stacked(tmp_path: Path) -> None:
    _, placed, _ = saved(tmp_path, "mixtral")
    gate = placed["blk.1.ffn_gate_exps.weight"]
    assert gate.shape == (4, 96, 64) and gate.matrix
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert [source.key for source in gate.sources] == [f"{prefix}.{e}.w1.weight" for e in range(4)]
    assert placed["blk.1.ffn_down_exps.weight"].sources[3].key == f"{prefix}.3.w2.weight"
    assert not placed["blk.0.ffn_gate_inp.weight"].matrix


def test_norms_of_gemma_are_one_less_on_disk(tmp_path: Path) -> None:
    _, placed, _ = saved(tmp_path, "gemma3_text")
    assert {one.add for one in placed.values() if one.name.endswith("norm.weight")} == {1.0}
    assert {one.add for one in placed.values() if not one.name.endswith("norm.weight")} == {0.0}
    assert placed["blk.0.ffn_norm.weight"].sources[0].key == "model.layers.0.pre_feedforward_layernorm.weight"


def test_transposed_matrices_have_the_shape_that_is_multiplied_with(tmp_path: Path) -> None:
    _, placed, checkpoint = saved(tmp_path, "gpt2")
    assert placed["blk.0.attn_qkv.weight"].shape == (192, 64)
    assert checkpoint.tensors[placed["blk.0.attn_qkv.weight"].sources[0].key].shape == (64, 192)
    assert not placed["position_embd.weight"].matrix


def test_tied_output(tmp_path: Path) -> None:
    _, llama, _ = saved(tmp_path / "llama", "llama", tie_word_embeddings=True)
    assert "output.weight" not in llama
    _, olmo, _ = saved(tmp_path / "olmo2", "olmo2", tie_word_embeddings=True)
    assert olmo["output.weight"].sources[0].key == olmo["token_embd.weight"].sources[0].key
    with pytest.raises(UnsupportedError, match=r"`lm_head\.weight` is another one"):
        saved(tmp_path / "gemma2", "gemma2", tie_word_embeddings=False)


def test_biases_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"no place for `model\.layers\.0\.self_attn\.o_proj\.bias`"
    ) as caught:
        saved(tmp_path, "qwen3", attention_bias=True)
    assert "compressed_tensors" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu', the graph computes silu"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        ("qwen2", {"num_attention_heads": 2, "head_dim": 16}, "2 heads of 16 are not 64 channels"),
        ("qwen2", {"rope_scaling": LLAMA3}, "no tensors for"),
        (
            "qwen3",
            {"rope_scaling": {**YARN, "beta_fast": 64}},
            "`beta_fast` and `beta_slow` are not 32 and 1",
        ),
        ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, "`truncate`"),
        ("qwen3_moe", {**MIXTURE, "norm_topk_prob": False}, "`norm_topk_prob`"),
        ("qwen3_moe", {**MIXTURE, "mlp_only_layers": [0]}, "`mlp_only_layers`"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 24}, "is 24, and llama.cpp scales attention by 1/√32"),
        ("gemma2", {**GEMMA, "num_hidden_layers": 46}, "1/√16"),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "caps logits"),
        ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}, "`use_bidirectional_attention`"),
        ("gemma3_text", {**GEMMA, "rope_scaling": {**YARN, "rope_theta": 1e6}}, "would act on all blocks"),
        ("smollm3", {"no_rope_layer_interval": 2}, "`no_rope_layers`"),
        ("starcoder2", {"use_bias": False}, "`use_bias`"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx`"),
        ("falcon", {"alibi": True}, "`alibi`"),
        ("falcon", {"parallel_attn": False}, "`parallel_attn`"),
    ],
)
def test_what_cannot_be_expressed_says_why(kind: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        model(kind, **changes)
    assert reason in str(caught.value) and "compressed_tensors" in str(caught.value)


def test_all_reasons_at_once() -> None:
    with pytest.raises(UnsupportedError, match=r"gelu.*dynamic"):
        model(hidden_act="gelu", rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def test_types_that_are_not_known() -> None:
    with pytest.raises(UnsupportedError, match="models of type 'opt' cannot be written as GGUF: llama, "):
        model("opt")
    with pytest.raises(SourceError, match="not a valid llama config"):
        model(hidden_size="wide")


def test_every_expressible_family_of_the_tests_is_tried() -> None:
    assert set(EXPRESSIBLE) == set(FAMILIES) & set(KNOWN)
