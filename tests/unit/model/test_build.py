"""The graph: every tensor exactly once, and sites as one would write them by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph, Part, Rows, Site, Vector
from tests.models import FAMILIES, save_tiny

Saved = Callable[[str], Path]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite the only weight file of `folder` after `change`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def graph(folder: Path) -> ModelGraph:
    return build_graph(Checkpoint.open(folder))


def sites(found: ModelGraph, block: int = 0) -> dict[str, list[str]]:
    """Site id → keys of its weights, with the block's prefix cut off."""
    cut = f".{block}."
    return {
        s.id.split(cut, 1)[1]: [w.key.split(cut, 1)[1] for w in s.weights] for s in found.blocks[block].sites
    }


def site(found: ModelGraph, block: int, ending: str) -> Site:
    return next(s for s in found.blocks[block].sites if s.id.endswith(ending))


def test_llama_by_hand(saved: Saved) -> None:
    found = graph(saved("llama"))
    assert [s.id for s in found.blocks[1].sites] == [
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj+up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert [
        [(w.name.split(".", 3)[3], w.shape, w.role) for w in s.weights] for s in found.blocks[1].sites
    ] == [
        [
            ("self_attn.q_proj.weight", (64, 64), "q"),
            ("self_attn.k_proj.weight", (32, 64), "k"),
            ("self_attn.v_proj.weight", (32, 64), "v"),
        ],
        [("self_attn.o_proj.weight", (64, 64), "o")],
        [("mlp.gate_proj.weight", (96, 64), "gate"), ("mlp.up_proj.weight", (96, 64), "up")],
        [("mlp.down_proj.weight", (64, 96), "down")],
    ]
    assert [s.producer for s in found.blocks[1].sites] == [
        Vector("model.layers.1.input_layernorm.weight"),
        # 4 heads of 16 channels, of which 2 share values
        Rows("model.layers.1.self_attn.v_proj.weight", repeat=2, span=16),
        Vector("model.layers.1.post_attention_layernorm.weight"),
        Rows("model.layers.1.mlp.up_proj.weight"),
    ]
    assert found.blocks[1].kept == (
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    )
    assert [(w.name, w.shape, w.role) for w in found.outer] == [
        ("model.embed_tokens.weight", (160, 64), "embed"),
        ("lm_head.weight", (160, 64), "head"),
    ]
    assert found.copied == ("model.norm.weight",)
    assert (found.tied, found.dropped, found.reasons) == ({}, {}, {})


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma3_text", {"q": ("input_layernorm", 1.0), "gate": ("pre_feedforward_layernorm", 1.0)}),
        ("phi3", {"qkv": ("input_layernorm", 0.0), "gate_up": ("post_attention_layernorm", 0.0)}),
        ("cohere", {"q": ("input_layernorm", 0.0)}),
        # olmo2 normalizes what its products return
        ("olmo2", {}),
        ("mixtral", {"q": ("input_layernorm", 0.0), "gate": ("post_attention_layernorm", 0.0)}),
        ("qwen3_moe", {"q": ("input_layernorm", 0.0), "gate": ("post_attention_layernorm", 0.0)}),
        ("gpt_oss", {"q": ("input_layernorm", 0.0), "gate_up": ("post_attention_layernorm", 0.0)}),
    ],
)
def test_vectors(family: str, expected: dict[str, tuple[str, float]], saved: Saved) -> None:
    made = {
        s.weights[0].role: (s.producer.name.split(".")[-2], s.producer.offset, s.producer.bias)
        for s in graph(saved(family)).blocks[1].sites
        if isinstance(s.producer, Vector)
    }
    assert made == {role: (*found, None) for role, found in expected.items()}


@pytest.mark.parametrize("family", ["opt", "gpt2", "starcoder2"])
def test_a_layer_norm_brings_its_bias(family: str, saved: Saved) -> None:
    for block in graph(saved(family)).blocks:
        made = [s.producer for s in block.sites if isinstance(s.producer, Vector)]
        assert len(made) == 2
        assert [v.bias for v in made] == [v.name.removesuffix("weight") + "bias" for v in made]


@pytest.mark.parametrize(
    ("family", "experts", "router"),
    [
        ("mixtral", [f"block_sparse_moe.experts.{e}.w1+w3" for e in range(4)], "block_sparse_moe.gate"),
        ("qwen3_moe", [f"mlp.experts.{e}.gate_proj+up_proj" for e in range(4)], "mlp.gate"),
        ("gpt_oss", [f"mlp.experts.gate_up_proj[{e}]" for e in range(4)], "mlp.router"),
        (
            "deepseek_v3",
            [f"mlp.{of}.gate_proj+up_proj" for of in ("shared_experts", *(f"experts.{e}" for e in range(4)))],
            "mlp.gate",
        ),
    ],
)
def test_one_norm_scales_all_experts_and_their_router(
    family: str, experts: list[str], router: str, saved: Saved
) -> None:
    block = graph(saved(family)).blocks[1]
    fed = [s for s in block.sites if s.producer == Vector("model.layers.1.post_attention_layernorm.weight")]
    assert [s.id for s in fed] == [f"model.layers.1.{name}" for name in experts]
    assert {s.readers for s in fed} == {(f"model.layers.1.{router}.weight",)}
    assert all(block.together(s) == tuple(fed) for s in fed)
    assert all(s.readers == () and block.together(s) == (s,) for s in block.sites if s not in fed)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"o": ("self_attn.v_proj", 0, 2, 16), "down": ("mlp.up_proj", 0, 1, 1)}),
        # attention that Transformers writes out in products
        ("gemma2", {"o": ("self_attn.v_proj", 0, 2, 32), "down": ("mlp.up_proj", 0, 1, 1)}),
        ("cohere", {"o": ("self_attn.v_proj", 0, 2, 16), "down": ("mlp.up_proj", 0, 1, 1)}),
        # 64 queries and 32 keys lie before the values, 96 gates before the rest
        ("phi3", {"o": ("self_attn.qkv_proj", 96, 2, 16), "down": ("mlp.gate_up_proj", 96, 1, 1)}),
        ("gpt2", {"o": ("attn.c_attn", 128, 1, 1), "down": ("mlp.c_fc", 0, 1, 1)}),
        ("opt", {"o": ("self_attn.v_proj", 0, 1, 1), "down": ("fc1", 0, 1, 1)}),
        ("deepseek_v3", {"down": ("mlp.up_proj", 0, 1, 1)}),
    ],
)
def test_rows(family: str, expected: dict[str, tuple[str, int, int, int]], saved: Saved) -> None:
    found = graph(saved(family))
    made = {s.weights[0].role: s.producer for s in found.blocks[0].sites if isinstance(s.producer, Rows)}
    assert {
        role: (r.weight.split(".0.", 1)[1].removesuffix(".weight"), r.start, r.repeat, r.span)
        for role, r in made.items()
    } == expected
    for rows in made.values():
        biased = f"{rows.weight.removesuffix('weight')}bias"
        assert rows.bias == (biased if biased in found.blocks[0].kept else None)


@pytest.mark.parametrize(
    ("family", "changes", "made"),
    [
        # attention and MLP side by side behind one norm; 4 heads of queries share one of keys and of values
        (
            "falcon",
            {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
            {
                "qkv": Vector(
                    "transformer.h.0.input_layernorm.weight", "transformer.h.0.input_layernorm.bias"
                ),
                "o": Rows("transformer.h.0.self_attention.query_key_value.weight", 80, None, 4, 16),
                "down": Rows("transformer.h.0.mlp.dense_h_to_4h.weight"),
            },
        ),
        (
            "gemma",
            {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 16},
            {
                "q": Vector("model.layers.0.input_layernorm.weight", None, 1.0),
                "o": Rows("model.layers.0.self_attn.v_proj.weight", 0, None, 4, 16),
                "gate": Vector("model.layers.0.post_attention_layernorm.weight", None, 1.0),
                "down": Rows("model.layers.0.mlp.up_proj.weight"),
            },
        ),
    ],
)
def test_other_families(
    family: str, changes: dict[str, Any], made: dict[str, Vector | Rows], tmp_path: Path
) -> None:
    size: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = CONFIG_MAPPING[family](**size, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert {s.weights[0].role: s.producer for s in graph(tmp_path).blocks[0].sites} == made


def test_rows_of_an_expert_are_of_the_same_expert(saved: Saved) -> None:
    for family, down, up, start in (
        ("mixtral", "block_sparse_moe.experts.{}.w2", "block_sparse_moe.experts.{}.w3.weight", 0),
        ("gpt_oss", "mlp.experts.down_proj[{}]", "mlp.experts.gate_up_proj[{}]", 96),
    ):
        found = graph(saved(family))
        for e in range(4):
            expected = Rows(f"model.layers.0.{up.format(e)}", start)
            assert site(found, 0, down.format(e)).producer == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_seen_where_it_is_a_call(family: str, saved: Saved) -> None:
    seen = 0 if family in ("gemma2", "gpt_oss") else 1  # Transformers has no SDPA for these
    assert [block.attentions for block in graph(saved(family)).blocks] == [seen, seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_exactly_once(family: str, saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved(family))
    found = build_graph(checkpoint)
    in_sites = {w.name for w in found.weights()}
    kept = [name for block in found.blocks for name in block.kept]
    names = Counter([*in_sites, *kept, *(w.name for w in found.outer), *found.copied, *found.dropped])
    assert names == Counter(dict.fromkeys(checkpoint.tensors, 1))
    keys = Counter(w.key for w in found.weights())
    assert max(keys.values()) == 1
    ids = Counter(s.id for block in found.blocks for s in block.sites)
    assert max(ids.values()) == 1
    assert [block.index for block in found.blocks] == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_left_out_have_a_reason(family: str, saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved(family))
    found = build_graph(checkpoint)
    for block in found.blocks:
        matrices = {name for name in block.kept if len(checkpoint.tensors[name].shape) > 1}
        assert matrices == {name for name in found.reasons if name in block.kept}
    allowed = {"mixtral": {"router"}, "qwen3_moe": {"router"}, "deepseek_v3": {"router"}}
    allowed |= {"gpt_oss": {"router", "bias"}, "cohere": {"not a matrix product"}}
    assert set(found.reasons.values()) == allowed.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_orientation_follow_the_file(family: str, saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved(family))
    for weight in build_graph(checkpoint).weights():
        rows, columns = checkpoint.tensors[weight.name].shape[-2:]
        transposed = weight.part is not None and weight.part.transposed
        assert weight.shape == ((columns, rows) if transposed else (rows, columns))
        assert transposed == (family == "gpt2" or (family == "gpt_oss" and "experts" in weight.name))
        assert weight.role != "router"


def test_cohere_five_weights_share_one_activation(saved: Saved) -> None:
    found = graph(saved("cohere"))
    assert [[w.role for w in s.weights] for s in found.blocks[0].sites] == [
        ["q", "k", "v", "gate", "up"],
        ["o"],
        ["down"],
    ]


def test_mixtral_has_two_sites_per_expert(saved: Saved) -> None:
    found = graph(saved("mixtral"))
    experts = {
        name: weights for name, weights in sites(found).items() if name.startswith("block_sparse_moe.experts")
    }
    expected: dict[str, list[str]] = {}
    for e in range(4):
        at = f"block_sparse_moe.experts.{e}"
        expected[f"{at}.w1+w3"] = [f"{at}.w1.weight", f"{at}.w3.weight"]
        expected[f"{at}.w2"] = [f"{at}.w2.weight"]
    assert experts == expected
    assert [w.role for w in site(found, 0, "experts.2.w1+w3").weights] == ["gate", "up"]
    assert found.reasons["model.layers.0.block_sparse_moe.gate.weight"] == "router"


def test_qwen3_moe_names_experts_as_on_disk(saved: Saved) -> None:
    found = graph(saved("qwen3_moe"))
    assert sites(found)["mlp.experts.3.gate_proj+up_proj"] == [
        "mlp.experts.3.gate_proj.weight",
        "mlp.experts.3.up_proj.weight",
    ]


def test_gpt_oss_experts_are_parts_of_a_stacked_tensor(saved: Saved) -> None:
    found = graph(saved("gpt_oss"))
    weight = site(found, 1, "experts.gate_up_proj[2]").weights[0]
    assert (weight.name, weight.key) == (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.gate_up_proj[2]",
    )
    assert (weight.part, weight.shape, weight.role) == (Part(2, transposed=True), (192, 64), "gate_up")


def test_deepseek_blocks_differ(saved: Saved) -> None:
    found = graph(saved("deepseek_v3"))
    attention = {
        "self_attn.q_a_proj+kv_a_proj_with_mqa",
        "self_attn.q_b_proj",
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
    }
    assert set(sites(found, 0)) == attention | {"mlp.gate_proj+up_proj", "mlp.down_proj"}
    shared = {"mlp.shared_experts.gate_proj+up_proj", "mlp.shared_experts.down_proj"}
    experts = {f"mlp.experts.{e}.{w}" for e in range(4) for w in ("gate_proj+up_proj", "down_proj")}
    assert set(sites(found, 1)) == attention | shared | experts
    q_a = Vector("model.layers.1.self_attn.q_a_layernorm.weight")
    assert site(found, 1, "self_attn.q_b_proj").producer == q_a
    # values lie between keys, head by head, in the rows of kv_b_proj
    assert site(found, 1, "self_attn.o_proj").producer is None


def test_fused_weights_are_one_weight(saved: Saved) -> None:
    found = graph(saved("phi3"))
    assert [[w.role for w in s.weights] for s in found.blocks[0].sites] == [
        ["qkv"],
        ["o"],
        ["gate_up"],
        ["down"],
    ]


def test_tied_by_absence_even_against_the_config(tmp_path: Path) -> None:
    folder = edit(save_tiny("llama", tmp_path), lambda t: t.__delitem__("lm_head.weight"))
    found = graph(folder)
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [w.role for w in found.outer] == ["embed"]


def test_tied_duplicate_is_dropped_by_name(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = graph(edit_config(folder, tie_word_embeddings=True))
    assert found.dropped == {"lm_head.weight": "tied duplicate of model.embed_tokens.weight"}
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_tied_in_the_config_but_different_in_the_file(tmp_path: Path) -> None:
    found = graph(edit_config(save_tiny("llama", tmp_path), tie_word_embeddings=True))
    assert (found.tied, found.dropped) == ({}, {})
    assert [w.role for w in found.outer] == ["embed", "head"]


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    found = graph(edit(save_tiny("gpt2", tmp_path), strip))
    assert found.blocks[0].sites[0].weights[0].name == "h.0.attn.c_attn.weight"
    assert found.outer[0].name == "wte.weight"
    assert found.dropped == {"h.0.attn.bias": "buffer (attention mask)"}


def test_stale_rotary_buffers_are_dropped_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = graph(edit(save_tiny("llama", tmp_path), lambda t: t.update({name: torch.ones(8)})))
    assert found.dropped == {name: "rotary inv_freq buffer"}


def test_orphans_are_listed(tmp_path: Path) -> None:
    folder = edit(
        save_tiny("llama", tmp_path), lambda t: t.update({"model.layers.0.self_attn.extra": torch.ones(2)})
    )
    with pytest.raises(SourceError, match=r"does not use: `model\.layers\.0\.self_attn\.extra`"):
        graph(folder)


def test_blocks_beyond_the_config_are_orphans(tmp_path: Path) -> None:
    folder = edit_config(save_tiny("llama", tmp_path), num_hidden_layers=1)
    with pytest.raises(SourceError, match=r"9 tensors that the model does not use"):
        graph(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.norm.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_missing_tensors_are_listed(family: str, name: str, tmp_path: Path) -> None:
    folder = edit(save_tiny(family, tmp_path), lambda t: t.__delitem__(name))
    with pytest.raises(SourceError, match=rf"1 parameters that no tensor fills: `{name}`"):
        graph(folder)


@pytest.mark.parametrize("weight", ["w1", "w2"])
def test_a_missing_expert_is_refused(weight: str, tmp_path: Path) -> None:
    name = f"model.layers.0.block_sparse_moe.experts.1.{weight}.weight"
    folder = edit(save_tiny("mixtral", tmp_path), lambda t: t.__delitem__(name))
    with pytest.raises(SourceError, match=r"model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj"):
        graph(folder)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = edit(save_tiny("llama", tmp_path), lambda t: t.update({name: t[name][:32]}))
    with pytest.raises(
        SourceError, match=r"q_proj\.weight` has shape \(32, 64\), the config says \(64, 64\)"
    ):
        graph(folder)


def test_unknown_model_type(tmp_path: Path) -> None:
    folder = edit_config(save_tiny("llama", tmp_path), model_type="llamba")
    with pytest.raises(UnsupportedError, match="type 'llamba', which this Transformers does not know"):
        graph(folder)


def test_invalid_config(tmp_path: Path) -> None:
    folder = edit_config(save_tiny("llama", tmp_path), hidden_size="wide")
    with pytest.raises(SourceError, match="is not a valid llama config"):
        graph(folder)


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = edit_config(save_tiny("llama", tmp_path), auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('was imported')")
    assert len(graph(folder).blocks) == 2
