"""Which type each tensor gets. The engine itself is asked in tests/interop/test_gguf_mix.py."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import groupby
from typing import Any, get_type_hints

import pytest

from quantkit.allocate.gguf_mix import (
    Choice,
    Facts,
    Item,
    Params,
    assign,
    quantizable,
)
from quantkit.errors import RecipeError
from quantkit.gguf.mixes import ALIASES, MIXES, Mix, parse_mix, parse_type

BITS = {
    **{"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "mxfp4": 4.25},
    **{"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "tq1_0": 1.6875},
    **{"iq1_s": 1.5625, "iq1_m": 1.75, "iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625},
    **{"iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq4_nl": 4.5, "iq4_xs": 4.25, "tq2_0": 2.0625},
}


def model(
    facts: Facts, width: int, ffn: int, vocabulary: int, *, tied: bool = False, head: int = 128
) -> list[Item]:
    """Every tensor of a Llama-like model, norms included."""
    q, kv, e = facts.heads * head, facts.kv_heads * head, facts.experts
    items = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if not tied:
        items["output.weight"] = (vocabulary, width)
    for block in range(facts.blocks):
        stack, exps = ((e,), "_exps") if e else ((), "")
        parts: dict[str, tuple[int, ...]] = {
            **{"attn_norm": (width,), "ffn_norm": (width,)},
            **{"attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, q)},
            **{f"ffn_{n}{exps}": (*stack, ffn, width) for n in ("gate", "up")},
            f"ffn_down{exps}": (*stack, width, ffn),
        }
        if e:
            parts["ffn_gate_inp"] = (e, width)
        items |= {f"blk.{block}.{name}.weight": shape for name, shape in parts.items()}
    return [Item(name, shape) for name, shape in items.items()]


def bits(mix: Mix, items: list[Item], facts: Facts, *, imatrix: bool) -> float:
    """Bits per weight of the whole file."""
    choices = assign(mix, matrices(items), facts, imatrix=imatrix)
    sizes = [math.prod(item.shape) for item in items]
    kinds = [choices[item.name].type if item.name in choices else "f32" for item in items]
    return sum(size * BITS[kind] for size, kind in zip(sizes, kinds, strict=True)) / sum(sizes)


def matrices(items: list[Item]) -> list[Item]:
    return [item for item in items if quantizable(item.name, item.shape)]


LLAMA_8B = Facts("llama", 32, 32, 8)
LLAMA_7B = Facts("llama", 32, 32, 32)
LLAMA_70B = Facts("llama", 80, 64, 8)
MIXTRAL = Facts("llama", 32, 32, 8, 8)
QWEN_MOE = Facts("qwen3moe", 48, 32, 4, 128)
QWEN_HALF_B = Facts("qwen2", 24, 14, 2)
MODELS = {
    "Llama-3.1-8B": (LLAMA_8B, model(LLAMA_8B, 4096, 14336, 128256)),
    "Llama-2-7B": (LLAMA_7B, model(LLAMA_7B, 4096, 11008, 32000)),
    "Llama-3-70B": (LLAMA_70B, model(LLAMA_70B, 8192, 28672, 128256)),
    "Mixtral-8x7B": (MIXTRAL, model(MIXTRAL, 4096, 14336, 32000)),
    "Qwen3-30B-A3B": (QWEN_MOE, model(QWEN_MOE, 2048, 768, 151936)),
    "Qwen2.5-0.5B": (QWEN_HALF_B, model(QWEN_HALF_B, 896, 4864, 151936, tied=True, head=64)),
}
# Bits per weight that llama-quantize announces for the models above, with an imatrix.
ANNOUNCED = {
    "iq1_s": (2.00, 1.81, 1.74, 1.68, 1.68, 5.02),
    "iq1_m": (2.15, 1.96, 1.90, 1.86, 1.85, 5.05),
    "tq1_0": (2.19, 1.84, 1.80, 1.75, 1.78, 5.01),
    "iq2_xxs": (2.38, 2.20, 2.16, 2.15, 2.14, 5.11),
    "tq2_0": (2.52, 2.20, 2.17, 2.12, 2.15, 5.09),
    "iq2_xs": (2.59, 2.42, 2.40, 2.38, 2.38, 5.16),
    "iq2_s": (2.74, 2.61, 2.52, 2.42, 2.43, 5.18),
    "iq2_m": (2.93, 2.80, 2.73, 2.65, 2.66, 5.22),
    "q2_k_s": (2.97, 2.75, 2.77, 2.75, 2.75, 5.26),
    "q2_k": (3.16, 3.01, 2.99, 2.97, 2.95, 5.39),
    "iq3_xxs": (3.25, 3.07, 3.11, 3.12, 3.10, 5.31),
    "iq3_xs": (3.50, 3.32, 3.32, 3.31, 3.30, 5.39),
    "q3_k_s": (3.64, 3.50, 3.50, 3.50, 3.48, 5.38),
    "iq3_s": (3.66, 3.50, 3.50, 3.50, 3.48, 5.39),
    "iq3_m": (3.76, 3.70, 3.62, 3.67, 3.54, 5.45),
    "q3_k_m": (4.00, 3.91, 3.88, 3.86, 3.85, 5.66),
    "q3_k_l": (4.30, 4.27, 4.21, 4.14, 4.16, 5.88),
    "iq4_xs": (4.42, 4.30, 4.30, 4.30, 4.29, 5.56),
    "iq4_nl": (4.65, 4.54, 4.54, 4.54, 4.53, 5.61),
    "q4_0": (4.65, 4.55, 4.55, 4.55, 4.55, 5.62),
    "q4_k_s": (4.67, 4.58, 4.57, 4.58, 4.57, 6.14),
    "mxfp4_moe": (8.50, 8.50, 8.50, 4.40, 4.47, 8.50),
    "q4_k_m": (4.89, 4.84, 4.82, 4.87, 4.86, 6.34),
    "q4_1": (5.10, 5.03, 5.02, 5.03, 5.03, 5.97),
    "q5_0": (5.59, 5.54, 5.53, 5.54, 5.54, 6.34),
    "q5_k_s": (5.57, 5.52, 5.52, 5.52, 5.52, 6.59),
    "q5_k_m": (5.70, 5.68, 5.66, 5.69, 5.69, 6.70),
    "q5_1": (6.04, 6.01, 6.01, 6.02, 6.02, 6.69),
    "q6_k": (6.56, 6.56, 6.56, 6.57, 6.57, 8.09),
    "q8_0": (8.50, 8.50, 8.50, 8.50, 8.51, 8.50),
}
# The same without one, where that makes a difference.
ALONE = {
    "iq3_xxs": (3.37, 3.21, 3.25, 3.29, 3.26, 5.41),
    "iq4_xs": (4.46, 4.33, 4.34, 4.35, 4.34, 5.59),
    "iq4_nl": (4.68, 4.57, 4.57, 4.58, 4.57, 5.64),
    "q4_0": (4.64, 4.54, 4.53, 4.53, 4.53, 5.60),
    "q5_0": (5.57, 5.52, 5.52, 5.52, 5.52, 6.33),
}


@pytest.mark.parametrize("name", ANNOUNCED)
def test_sizes_of_known_models(name: str) -> None:
    for imatrix, announced in ((True, ANNOUNCED[name]), (False, ALONE.get(name, ANNOUNCED[name]))):
        for (facts, items), expected in zip(MODELS.values(), announced, strict=True):
            found = bits(MIXES[name], items, facts, imatrix=imatrix)
            assert found == pytest.approx(expected, abs=0.0051)


GROUPED = Facts("llama", 24, 4, 1)
HALF = Facts("llama", 17, 4, 2)
FALCON = Facts("falcon", 32, 4, 1)
EIGHT = Facts("llama", 16, 4, 1, 8)
FOUR = Facts("llama", 16, 4, 4, 4)
SPREAD = "3·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 4·q6_k"


@pytest.mark.parametrize(
    "facts, mix, part, imatrix, expected",
    [
        (GROUPED, "q4_k_m", "attn_v", False, SPREAD),
        (GROUPED, "q4_k_m", "ffn_down", False, SPREAD),
        (
            *(HALF, "q5_k_m", "ffn_down", False),
            "2·q6_k 2·q5_k 1·q6_k 2·q5_k 1·q6_k 2·q5_k 1·q6_k 2·q5_k 4·q6_k",
        ),
        (GROUPED, "q4_k_s", "attn_v", False, "4·q5_k 20·q4_k"),
        (GROUPED, "q4_k_s", "ffn_down", False, "3·q5_k 21·q4_k"),
        (GROUPED, "q3_k_m", "attn_v", False, "2·q5_k 22·q4_k"),
        (GROUPED, "q3_k_m", "ffn_down", False, "1·q5_k 23·q4_k"),
        (GROUPED, "iq3_xs", "ffn_gate", False, "3·iq3_s 18·iq3_xxs 3·iq3_s"),
        (GROUPED, "iq3_xxs", "ffn_down", False, "3·q4_k 21·q3_k"),
        (GROUPED, "iq3_xxs", "ffn_down", True, "24·iq3_xxs"),
        (HALF, "iq3_xxs", "attn_v", False, "17·iq3_s"),
        (HALF, "iq3_xxs", "attn_v", True, "17·iq3_xxs"),
        (GROUPED, "q4_0", "ffn_down", True, "3·q4_1 21·q4_0"),
        (GROUPED, "iq2_m", "ffn_down", True, "3·iq3_s 21·iq2_s"),
        (FOUR, "iq2_xs", "attn_v", True, "16·q4_k"),
        (
            *(EIGHT, "q4_k_m", "ffn_down_exps", False),
            "2·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 1·q6_k 2·q4_k 3·q6_k",
        ),
        (
            *(EIGHT, "iq3_m", "ffn_down_exps", False),
            "2·q4_k 2·iq3_s 1·q4_k 2·iq3_s 1·q4_k 2·iq3_s 1·q4_k 2·iq3_s 3·q4_k",
        ),
        (EIGHT, "q6_k", "attn_v", False, "16·q8_0"),
        (EIGHT, "iq1_s", "ffn_down_exps", True, "2·q2_k 14·iq1_s"),
        (
            *(FALCON, "q4_k_m", "attn_qkv", False),
            "4·q6_k 2·q4_k" + 7 * " 1·q6_k 2·q4_k" + " 5·q6_k",
        ),
        (
            *(FALCON, "q4_k_m", "ffn_down", False),
            "2·q6_k 2·q5_k 2·q4_k" + 7 * " 1·q5_k 2·q4_k" + " 5·q5_k",
        ),
        (
            *(FALCON, "q3_k_m", "ffn_down", False),
            "2·q5_k 2·q4_k 2·q3_k" + 7 * " 1·q4_k 2·q3_k" + " 5·q4_k",
        ),
        (FALCON, "q4_k_s", "ffn_down", False, "32·q4_k"),
        (FALCON, "q2_k", "attn_output", False, "32·q2_k"),
    ],
)
def test_which_blocks_get_more(facts: Facts, mix: str, part: str, imatrix: bool, expected: str) -> None:
    items = [Item(f"blk.{block}.{part}.weight", (8, 256)) for block in range(facts.blocks)]
    choices = assign(MIXES[mix], items[::-1], facts, imatrix=imatrix)
    assert list(choices) == [item.name for item in items]
    runs = groupby(choice.type for choice in choices.values())
    assert " ".join(f"{len(list(run))}·{kind}" for kind, run in runs) == expected


def small(mix: str, items: list[Item] | None = None, *, imatrix: bool = False, **more: Any) -> dict[str, str]:
    """Types in a model of one block, whose embedding is tied if `items` leave the output out."""
    items = items or [Item("output.weight", (8, 256)), Item("token_embd.weight", (8, 256))]
    choices = assign(MIXES[mix], items, Facts("llama", 1, 4, 4), imatrix=imatrix, **more)
    return {name: choice.type for name, choice in choices.items()}


TIED = [Item("token_embd.weight", (8, 256))]


def test_the_ends_of_the_model() -> None:
    assert small("q4_k_m") == {"output.weight": "q6_k", "token_embd.weight": "q4_k"}
    assert small("iq2_xs") == {"output.weight": "q5_k", "token_embd.weight": "q2_k"}
    assert small("mxfp4_moe") == {"output.weight": "q8_0", "token_embd.weight": "q8_0"}
    assert small("q4_k_m", TIED) == {"token_embd.weight": "q6_k"}
    odd = [Item("output.weight", (8, 288)), Item("token_embd.weight", (8, 288))]
    assert small("q4_k_m", odd) == {"output.weight": "q8_0", "token_embd.weight": "q5_0"}


def test_options_of_a_target() -> None:
    block = Item("blk.0.attn_v.weight", (8, 256))
    assert small("q4_k_m", [block], params=Params(pure=True)) == {block.name: "q4_k"}
    assert small("q4_k_m", params=Params(pure=True)) == {"output.weight": "q4_k", "token_embd.weight": "q4_k"}
    both = Params(output="Q8_0", embedding=" q5-k ")
    assert small("q4_k_m", params=both) == {"output.weight": "q8_0", "token_embd.weight": "q5_k"}
    assert small("q4_k_m", TIED, params=both) == {"token_embd.weight": "q5_k"}
    assert small("q4_k_m", TIED, params=Params(output="q8_0")) == {"token_embd.weight": "q8_0"}
    assert small("q4_k_m", TIED, params=Params(pure=True, output="q8_0")) == {"token_embd.weight": "q8_0"}
    assert small("f16", params=Params(output="q8_0")) == {"output.weight": "q8_0", "token_embd.weight": "f16"}


def test_fixed_types_are_not_counted() -> None:
    items = [Item(f"blk.{block}.attn_v.weight", (8, 256)) for block in range(6)]
    fixed = {items[0].name: "q8_0", items[1].name: "bf16"}
    choices = assign(MIXES["q3_k_m"], items, Facts("llama", 6, 4, 4), imatrix=False, fixed=fixed)
    assert [c.type for c in choices.values()] == ["q8_0", "bf16", "q5_k", "q5_k", "q4_k", "q4_k"]


def test_an_option_outranks_a_fixed_type() -> None:
    found = small("q4_k_m", params=Params(output="q8_0"), fixed={"output.weight": "q5_k"})
    assert found["output.weight"] == "q8_0"


@pytest.mark.parametrize(
    "kind, width, expected",
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 896, "q5_0"),
        ("q5_k", 896, "q5_1"),
        ("q6_k", 896, "q8_0"),
        ("q2_k", 896, "q4_0"),
        ("tq1_0", 896, "q4_0"),
        ("iq1_m", 896, "iq4_nl"),
        ("iq4_xs", 896, "iq4_nl"),
        ("q4_k", 100, "f16"),
        ("q8_0", 100, "f16"),
        ("mxfp4", 100, "f16"),
        ("f16", 100, "f16"),
        ("bf16", 100, "bf16"),
    ],
)
def test_rows_that_a_type_does_not_divide(kind: str, width: int, expected: str) -> None:
    item = Item("blk.0.ffn_up.weight", (8, width))
    found = assign(MIXES["q8_0"], [item], GROUPED, imatrix=False, fixed={item.name: kind})[item.name]
    assert found.type == expected
    assert (found.why is None) == (kind == expected)


def test_why_another_type_was_taken() -> None:
    item = Item("blk.0.ffn_up.weight", (8, 1120))
    assert assign(MIXES["q4_k_m"], [item], GROUPED, imatrix=False)[item.name] == Choice(
        "q5_0", "row length 1,120 is not a multiple of 256: q5_0 instead of q4_k"
    )


def test_models_of_seventy_billion() -> None:
    item = Item("blk.0.attn_v.weight", (8, 256))

    def kind(mix: str, architecture: str, blocks: int, kv_heads: int) -> str:
        facts = Facts(architecture, blocks, 8, kv_heads)
        return assign(MIXES[mix], [item], facts, imatrix=True)[item.name].type

    assert kind("q4_0", "llama", 80, 1) == "q4_0" and kind("q3_k_s", "llama", 80, 1) == "q5_k"
    assert kind("q3_k_s", "llama", 80, 8) == "q3_k" and kind("q3_k_s", "qwen2", 80, 8) == "q5_k"
    assert kind("q3_k_s", "llama", 79, 1) == "q3_k" and kind("iq2_xs", "llama", 80, 1) == "q4_k"


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("blk.0.attn_q.weight", (8, 8), True),
        ("blk.0.ffn_up_exps.weight", (2, 8, 8), True),
        ("blk.0.attn_q.weight", (1, 8), False),
        ("blk.0.attn_q.bias", (8,), False),
        ("output_norm.weight", (8,), False),
        ("blk.0.ffn_gate_inp.weight", (8, 8), False),
        ("position_embd.weight", (8, 8), False),
        ("rope_freqs.weight", (8,), False),
    ],
)
def test_what_is_rounded_at_all(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert quantizable(name, shape) is expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Q4_K_M", "q4_k_m"),
        (" q4-k-s ", "q4_k_s"),
        ("q4_k", "q4_k_m"),
        ("Q3_K", "q3_k_m"),
        ("mxfp4", "mxfp4_moe"),
    ],
)
def test_names_of_mixes(text: str, expected: str) -> None:
    mix = parse_mix(text)
    assert mix.name == expected and mix.label == expected.upper()


def test_names_that_are_none() -> None:
    with pytest.raises(RecipeError, match="unknown GGUF file type 'q4_k_xl'; did you mean 'q4_k_s'"):
        parse_mix("q4_k_xl")
    with pytest.raises(RecipeError, match="unknown GGUF type 'q4_k_m'; did you mean 'q4_k'"):
        parse_type("q4_k_m")
    with pytest.raises(RecipeError, match="unknown GGUF type 'q9_z'"):
        Params(output="q9_z")


def test_every_table_speaks_of_known_types() -> None:
    assert len({mix.file_type for mix in MIXES.values()}) == len(MIXES) == 33
    assert set(ALIASES.values()) <= set(MIXES)
    for mix in MIXES.values():
        assert parse_type(mix.default) == mix.default


def test_every_option_is_documented() -> None:
    hints = get_type_hints(Params, include_extras=True)
    assert list(hints) == ["pure", "output", "embedding"]
    assert all(len(hint.__metadata__[0]) > 20 for hint in hints.values())


def test_rules_do_without_torch() -> None:
    code = "import sys, quantkit.allocate.gguf_mix; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
