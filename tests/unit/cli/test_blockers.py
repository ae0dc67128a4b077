"""`quantkit plan` on a real model with real plugins: what cannot be is refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 64 and 96, so that groups of 128 and tiles do not fit."""
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 128, which every group divides."""
    return save_tiny(
        "llama", tmp_path_factory.mktemp("llama") / "wide", hidden_size=128, intermediate_size=128
    )


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention is computed step by step."""
    return save_tiny("gemma2", tmp_path_factory.mktemp("gemma2") / "tiny")


def blockers(quantkit: Callable[..., Any], source: Path, *arguments: str) -> list[str]:
    """What `plan` says stands in the way."""
    shown = quantkit("plan", str(source), *arguments, "--no-eval", "--json")
    document = json.loads(shown.out)
    found: list[str] = document["blockers"]
    assert (shown.code, document["status"]) == ((2, "blocked") if found else (0, "ok")), shown.err
    return found


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        # scheme × format
        ("gptq:nf4", "cannot be nf4: gptq stores integers with an integer zero point or none"),
        ("gptq:w8a8", "cannot be w8a8: gptq stores integers"),
        ("gptq:w4g32_asymf", "cannot be w4g32_asymf: gptq stores integers with an integer zero point"),
        ("gptq:w8_tensor", "gptq stores one scale per row and group, not per tensor"),
        ("bitsandbytes:w8", "bitsandbytes knows 8 bits as LLM.int8 only, not w8; write int8"),
        ("bitsandbytes:w8a8", "bitsandbytes knows 8 bits as LLM.int8 only, not w8a8; write int8"),
        ("bitsandbytes:w4g64", "bitsandbytes stores nf4, fp4 and int8 (LLM.int8), not w4g64"),
        ("bitsandbytes:nf4g16", "bitsandbytes has groups of 32, 64, 128"),
        ("compressed_tensors:nf4", "has no table for nf4; use mxfp4 or nvfp4, or bitsandbytes"),
        ("compressed_tensors:w4g64_asymf", "compressed_tensors stores whole zero points; use _asym, or hqq"),
        (
            "compressed_tensors:w8_asym",
            "writes 8 bits per row symmetric; leave out _asym or add a group size",
        ),
        ("compressed_tensors:w8a8_mixed@method=llm_int8", "keeps no columns of the inputs in 16 bits"),
        ("compressed_tensors:w4a8", "engines disagree on how narrower codes lie beside 8-bit inputs"),
        ("compressed_tensors:w4_tensor@method=rtn", "stores one scale per tensor with 8 bits only"),
        # scheme × method
        ("compressed_tensors:fp8_block@method=gptq", "one scale per tile ties them; use the method rtn"),
        ("compressed_tensors:w8_tensor@method=gptq", "one scale per tensor ties them; use the method rtn"),
        ("compressed_tensors:w4g64@method=llm_int8", "llm_int8 is for w8a8_mixed"),
        ("bitsandbytes:nf4@method=llm_int8", "llm_int8 is for w8a8_mixed"),
        ("bitsandbytes:int8@method=rtn", "LLM.int8 fixes how weights are rounded; use the method llm_int8"),
        ("bitsandbytes:int8@method=gptq", "LLM.int8 fixes how weights are rounded; use the method llm_int8"),
        ("compressed_tensors:w4g64@method=hqq", "hqq's gain is in the fractional zero point"),
        ("bitsandbytes:nf4@method=gptq,act_order=free", "act_order free regroups columns of plain integers"),
        # the target as a whole
        (
            "compressed_tensors:w4g64@act_order=free",
            "a file that records column groups, which compressed_tensors",
        ),
        ("gptq:w4g64@kv_cache=fp8", "kv_cache: gptq has no place for fp8 scales"),
        ("bitsandbytes:nf4@kv_cache=int8", "kv_cache: bitsandbytes has no place for int8 scales"),
        ("compressed_tensors:w4g64@transforms=smoothquant", "smoothquant: weights alone gain nothing"),
        (
            "bitsandbytes:int8@transforms=smoothquant",
            "smoothquant: LLM.int8 keeps outlier columns in 16 bits",
        ),
    ],
)
def test_impossible_combinations(target: str, reason: str, wide: Path, quantkit: Callable[..., Any]) -> None:
    found = blockers(quantkit, wide, "--to", target)
    assert found and any(reason in blocker for blocker in found), found
    # fourteen weights have the same problem, of which a user reads three
    assert len(found) <= 5


@pytest.mark.parametrize(
    "target",
    [
        *("gptq:w4g64", "bitsandbytes:int8", "nf4_dq", "compressed_tensors:w8a8_static@kv_cache=fp8"),
        *("compressed_tensors:fp8a8@transforms=smoothquant", "ct:nvfp4@kv_cache=int8", "fp8_block", "mxfp4"),
    ],
)
def test_possible_combinations(target: str, wide: Path, quantkit: Callable[..., Any]) -> None:
    if target == "fp8_block":
        target = "ct:fp8_block"
    assert blockers(quantkit, wide, "--to", target) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("gptq:w4g128", "in_features is 64, not a multiple of 128; use group_size 64 or 32 or 16"),
        ("compressed_tensors:fp8_block", "in_features is 64, not a multiple of 128; use fp8 with one scale"),
        ("bitsandbytes:nf4", "in_features is 96, not a multiple of 64, and bitsandbytes on a CPU"),
        ("bitsandbytes:nf4g128", "use nf4, or keep the weight with a rule"),
    ],
)
def test_shapes_that_do_not_divide(
    target: str, reason: str, llama: Path, quantkit: Callable[..., Any]
) -> None:
    found = blockers(quantkit, llama, "--to", target)
    assert any(reason in blocker for blocker in found), found
    assert all("model.layers." in blocker or "more weights likewise" in blocker for blocker in found)


def test_attention_that_cannot_be_seen(gemma2: Path, quantkit: Callable[..., Any]) -> None:
    (found,) = blockers(quantkit, gemma2, "--to", "compressed_tensors:w8@kv_cache=fp8")
    assert "kv_cache: this model computes attention step by step" in found


def test_rules_that_a_file_cannot_hold(wide: Path, quantkit: Callable[..., Any]) -> None:
    mixed = blockers(quantkit, wide, "--to", "bitsandbytes:nf4@method=rtn", "--rule", "*.down_proj=fp8")
    assert any("cannot be fp8: bitsandbytes stores nf4, fp4 and int8" in b for b in mixed)
    found = blockers(quantkit, wide, "--to", "gptq:w4g64", "--rule", "*.down_proj=w4g64_asym")
    assert any("gptq stores zero points one way per file" in b for b in found)
    head = blockers(quantkit, wide, "--to", "gptq:w4g64", "--rule", "lm_head=w8")
    assert any("`lm_head.weight` is outside the blocks" in b for b in head)
    nothing = blockers(quantkit, wide, "--to", "gptq:w4g64", "--rule", "*=keep")
    assert any("every weight is kept by a rule" in b for b in nothing)
    # smoothquant meets a weight whose inputs are not rounded
    beside = blockers(
        quantkit, wide, "--to", "compressed_tensors:w8a8@transforms=smoothquant", "--rule", "*.down_proj=w8"
    )
    assert any("smoothquant: weights alone gain nothing" in b for b in beside)


def test_every_target_says_what_is_wrong_with_it(wide: Path, quantkit: Callable[..., Any]) -> None:
    """In the document, in the table, and when `convert` is asked to do it all the same."""
    targets = ["--to", "gptq:nf4@name=a", "--to", "bitsandbytes:w8@name=b", "--to", "ct:w8@name=c"]
    found = blockers(quantkit, wide, *targets)
    assert {blocker.partition(":")[0] for blocker in found} == {"a", "b"}
    table = quantkit("plan", str(wide), *targets, "--no-eval").out
    assert all(f" ✗ {blocker}" in table for blocker in found)
    refused = quantkit("convert", str(wide), *targets, "--no-eval", "-o", "out", "--progress", "off")
    assert refused.code == 2 and all(blocker in refused.err for blocker in found)
    assert "Traceback" not in refused.err and not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "nf5"), "unknown format 'nf5'"),
        (("--to", "nf4:nf4_dq"), "stands for bitsandbytes:nf4 and takes no scheme"),
        (("--to", "bitsandbytes:nf4_dg"), "unknown scheme 'nf4_dg'; did you mean 'nf4_dq'?"),
        (("--to", "w4g128"), "'w4g128' is a scheme, write FORMAT:w4g128"),
        (("--to", "ct:w8a8@transforms=smothquant"), "did you mean 'smoothquant'?"),
        (("--to", "ct:w8a8@transforms=smoothquant,alpha=2"), "alpha must lie between 0 and 1, not 2"),
        (("--to", "ct:w8@kv_cache=fp4"), "must be 'fp8' or 'int8' or null, not 'fp4'"),
    ],
)
def test_names_and_values_that_do_not_exist(
    arguments: tuple[str, ...], message: str, quantkit: Callable[..., Any]
) -> None:
    shown = quantkit("plan", "x", *arguments)
    assert shown.code == 2 and message in shown.err, shown.err
