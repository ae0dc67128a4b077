"""Recipe × graph → assignments, with the real plugins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from quantkit import registry
from quantkit.calibrate.statistics import Need
from quantkit.model.graph import Block, ModelGraph, Role, Site, Weight
from quantkit.recipe.plan import Described, Resolved, TargetPlan, key_of, needs_of, resolve
from quantkit.recipe.rules import Rule
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Recipe
from quantkit.schemes import parse_scheme


@pytest.fixture(autouse=True)
def fake_plugins() -> None:
    """Not here: plans are made of what methods, transforms and formats answer."""


def weight(block: int, name: str, role: Role, shape: tuple[int, int] = (64, 64)) -> Weight:
    return Weight(f"model.layers.{block}.{name}.weight", shape, role)


def block(index: int, attentions: int = 1) -> Block:
    q, k, v = (weight(index, f"self_attn.{r}_proj", r) for r in ("q", "k", "v"))  # type: ignore[arg-type]
    o = weight(index, "self_attn.o_proj", "o")
    gate, up = (weight(index, f"mlp.{r}_proj", r, (96, 64)) for r in ("gate", "up"))  # type: ignore[arg-type]
    down = weight(index, "mlp.down_proj", "down", (64, 96))
    at = f"model.layers.{index}"
    sites = (
        Site(f"{at}.qkv", (q, k, v), f"{at}.input_layernorm.weight"),
        Site(f"{at}.o", (o,)),
        Site(f"{at}.gate_up", (gate, up), f"{at}.post_attention_layernorm.weight"),
        Site(f"{at}.down", (down,)),
    )
    return Block(index, sites, (f"{at}.input_layernorm.weight",), attentions)


HEAD = Weight("lm_head.weight", (160, 64), "head")
EMBED = Weight("model.embed_tokens.weight", (160, 64), "embed")


def graph(blocks: int = 3, attentions: int = 1) -> ModelGraph:
    every = tuple(block(index, attentions) for index in range(blocks))
    return ModelGraph(every, (EMBED, HEAD), {}, ("model.norm.weight",), {}, linears=("lm_head",))


def resolved(*targets: str, rules: Sequence[Rule] = (), on: ModelGraph | None = None) -> Resolved:
    made = tuple(target for text in targets for target in parse_targets(text))
    return resolve(
        Recipe("x", made, rules=tuple(rules)), on or graph(), Described("bfloat16", "llama", {}, {}), "1.2"
    )


def plan(text: str, *rules: Rule) -> TargetPlan:
    found = resolved(text, rules=rules)
    assert found.blockers == ()
    return found.targets[0]


def names(target: TargetPlan) -> dict[str, str | None]:
    """Scheme of every weight of block 0, by the end of its name."""
    return {
        w.module.rpartition(".")[2]: None if s is None else s.name
        for w in graph().blocks[0].weights()
        for s in (target.scheme_of(w),)
    }


def test_every_weight_gets_the_scheme_of_its_target() -> None:
    target = plan("gptq:w4g32")
    assert set(names(target).values()) == {"w4g32"} and len(target.schemes) == 21
    assert [a.weight.key for a in target.quantized()] == [w.key for w in graph().weights()]
    facts = target.facts
    assert (facts.method, facts.version, facts.dtype, facts.linears) == (
        "gptq",
        "1.2",
        "bfloat16",
        ("lm_head",),
    )
    assert facts.outer == (EMBED, HEAD) and facts.default == target.default and facts.kv_cache is None
    assert not facts.act_order and plan("gptq:w4g32@act_order=free").facts.act_order


@pytest.mark.parametrize(
    ("text", "dtype", "convention"),
    [
        ("gptq:w4g32", "float16", "half_step"),
        ("ct:w4g32", "bfloat16", "half_step"),
        ("ct:fp8", "bfloat16", "absmax"),
        ("ct:w8a8_static", "bfloat16", "half_step"),
        ("bnb:nf4g32", "float32", "absmax"),
    ],
)
def test_dtype_and_convention_of_scales_are_the_formats(text: str, dtype: str, convention: str) -> None:
    target = plan(text)
    every = {*target.schemes.values(), target.default}
    assert {(s.scale_dtype, s.convention) for s in every if s is not None} == {(dtype, convention)}


def test_the_first_rule_that_matches_decides() -> None:
    rules = (
        Rule("*.o_proj", keep=True),
        Rule("*.self_attn.*", scheme="w8g32"),
        Rule("*.down_proj", bits=8, blocks="0,-1"),
        Rule("*_proj", group_size=16),
    )
    target = plan("ct:w4g32", *rules)
    assert names(target) == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "w8g32"),
        "o_proj": None,
        **dict.fromkeys(("gate_proj", "up_proj"), "w4g16"),
        "down_proj": "w8g32",
    }
    middle, last = (target.scheme_of(weight(n, "mlp.down_proj", "down")) for n in (1, 2))
    assert middle is not None and last is not None and (middle.name, last.name) == ("w4g16", "w8g32")
    # the format's choices hold for what a rule names too
    q = target.scheme_of(weight(0, "self_attn.q_proj", "q"))
    assert q is not None and (q.scale_dtype, q.convention) == ("bfloat16", "half_step")
    assert len(list(target.quantized())) == 18


def test_a_rule_cannot_make_a_scheme_that_is_none() -> None:
    found = resolved("ct:nvfp4", rules=[Rule("*.o_proj", bits=8)])
    assert any("o_proj.weight`: nvfp4 has 4 bits" in blocker for blocker in found.blockers)


def test_rules_that_match_nothing_name_what_is_close() -> None:
    (found,) = resolved("gptq:w4g32", rules=[Rule("model.layers.0.self_attn.q_porj", keep=True)]).blockers
    assert "matches no weight; close: model.layers.0.self_attn.q_proj" in found
    assert resolved("gptq:w4g32", rules=[Rule("lm_head", keep=True)]).blockers == ()


NOTHING, SQUARES, ABSMAX, GRAM = Need.NOTHING, Need.SQUARES, Need.ABSMAX, Need.GRAM
HELDOUT = Need.HELDOUT


@pytest.mark.parametrize(
    ("text", "needs", "calibrated"),
    [
        ("ct:w8", NOTHING, False),
        ("ct:fp8a8", NOTHING, False),
        ("ct:w8@scales=weighted", SQUARES, True),
        ("gptq:w4g32", GRAM | HELDOUT, True),
        ("gptq:w4g32@plain=true", GRAM, True),
        ("gptq:w4g32@corrected=0.5,feedback=true", GRAM | HELDOUT | Need.CROSS, True),
        ("ct:w8a8_static", ABSMAX, True),
        ("ct:w8a8_static@method=gptq", ABSMAX | GRAM | HELDOUT, True),
        ("ct:w8a8@transforms=smoothquant,alpha=0.5", ABSMAX, True),
        ("ct:w8a8@transforms=smoothquant", ABSMAX | Need.SAMPLE, True),
        ("bnb:int8", ABSMAX, True),
        ("bnb:int8@report_outliers=false", NOTHING, False),
        # scales of a cache need text, and no statistics of any site
        ("ct:w8@kv_cache=fp8", NOTHING, True),
    ],
)
def test_what_has_to_be_known(text: str, needs: Need, calibrated: bool) -> None:
    target = plan(text)
    assert (target.needs, target.calibrated) == (needs, calibrated)


def test_static_inputs_of_one_weight_are_enough() -> None:
    assert plan("ct:w8a8", Rule("*.o_proj", scheme="w8a8_static")).needs is ABSMAX
    assert plan("ct:w8a8_static", Rule("*_proj", scheme="w8a8")).needs is NOTHING
    quantizer = registry.load("methods", "rtn").quantizer(registry.load("methods", "rtn").Params())
    assert needs_of(quantizer, (), [parse_scheme("fp8a8_static")]) is ABSMAX


def test_scales_of_a_cache_have_names_per_block() -> None:
    target = plan("ct:w8@kv_cache=int8")
    expected = ("model.layers.2.self_attn.k_scale", "model.layers.2.self_attn.v_scale")
    assert target.cache_names(graph().blocks[2]) == expected and target.facts.kv_cache == "int8"
    assert target.cache_names(block(0, attentions=0)) is None
    assert plan("ct:w8").cache_names(graph().blocks[2]) is None


def test_a_cache_that_cannot_be_seen_or_stored() -> None:
    (hidden,) = resolved("ct:w8@kv_cache=fp8", on=graph(attentions=0)).blockers
    assert "kv_cache: this model computes attention step by step" in hidden
    (nowhere,) = resolved("gptq:w4g32@kv_cache=fp8").blockers
    assert "kv_cache: gptq has no place for fp8 scales" in nowhere


def test_the_format_says_first_why_a_scheme_cannot_be() -> None:
    """bitsandbytes takes llm_int8 for any integers; "write int8" helps more than what that method is for."""
    found = resolved("bnb:w8").blockers
    assert "bitsandbytes knows 8 bits as LLM.int8 only, not w8; write int8" in found[0]
    assert found[-1] == "bitsandbytes-w8: 18 more weights likewise" and len(found) == 4


def test_problems_of_all_targets_are_collected() -> None:
    found = resolved(
        "gptq:nf4@name=a",
        "ct:w4g32@transforms=smoothquant,name=b",
        "ct:w8@name=c,kv_cache=fp8",
        "bnb:fp8@name=d",
    )
    assert {b.partition(":")[0] for b in found.blockers} == {"a", "b", "d"}
    assert [target.name for target in found.targets] == ["a", "b", "c", "d"]


def test_heads_stay_and_nothing_is_a_problem() -> None:
    (head,) = resolved("gptq:w4g32", rules=[Rule("lm_head", scheme="w8")]).blockers
    assert "`lm_head.weight` is outside the blocks and stays bfloat16" in head
    (nothing,) = resolved("gptq:w4g32", rules=[Rule("*", keep=True)]).blockers
    assert "every weight is kept by a rule" in nothing


CHANGES = (
    *("ct:w8a8", "ct:w8a8_static", "ct:w8", "ct:w8a8@kv_cache=fp8", "ct:w8a8@kv_cache=int8", "ct:w4g32"),
    *("ct:w8a8@transforms=smoothquant", "ct:w8a8@transforms=smoothquant,alpha=0.5", "ct:w8a8@scales=mse"),
    *("ct:w8a8@feedback=true", "bnb:int8", "bnb:nf4g32", "bnb:nf4g32_dq", "bnb:fp4g32", "gptq:w4g32"),
)


def test_whatever_changes_codes_changes_the_key() -> None:
    descriptions: list[Any] = [plan(text).describe() for text in CHANGES]
    assert len({key_of(d) for d in descriptions}) == len(CHANGES)
    assert key_of(descriptions[0]) == key_of(json.loads(json.dumps(plan("ct:w8a8@name=other").describe())))
    ruled = plan("ct:w8a8", Rule("*.o_proj", keep=True)).describe()
    assert key_of(ruled) != key_of(descriptions[0])


def test_a_correction_needs_the_stream_of_the_target() -> None:
    blocked = resolved("gptq:w4g32@corrected=0.5").blockers
    assert any("set feedback to true" in blocker for blocker in blocked)
    target = plan("gptq:w4g32@corrected=0.5,feedback=true")
    assert target.wants_reference and not plan("gptq:w4g32@feedback=true").wants_reference


def test_a_tuner_wants_what_the_untouched_model_makes() -> None:
    target = plan("gptq:w4g32@method=signround,feedback=true")
    assert target.tuner is not None and target.wants_reference
    assert plan("gptq:w4g32").tuner is None
