from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.rules import Rule, parse_blocks
from quantkit.recipe.sizes import format_size, parse_size
from quantkit.recipe.spec import (
    Calibration,
    Device,
    Eval,
    EvalText,
    Gates,
    Output,
    Recipe,
    Target,
    TransformSpec,
)
from quantkit.schemes import parse_scheme


def problems(make: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        make(*args, **kwargs)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("20GiB", 20 * 2**30),
        ("12G", 12_000_000_000),
        ("1.5 kb", 1500),
        ("3mib", 3 * 2**20),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-5GB", "5 XB", "", "5GBs", "1e3GB", "0GB"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (5_030_000_000, "5.03 GB"), (16_400_000_000, "16.4 GB"),
     (999_600, "1.00 MB"), (212_000_000_000, "212 GB"), (4 * 10**15, "4000 TB")],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


def test_defaults_are_those_documented() -> None:
    recipe = Recipe("org/model", (Target("gptq"),))
    assert (recipe.output.dir, recipe.output.on_exists, recipe.output.shard_bytes("safetensors")) == (
        "out",
        "resume",
        5 * 10**9,
    )
    assert (recipe.device.map, recipe.device.max_bytes, recipe.device.batch_tokens) == ("auto", None, 2048)
    assert (recipe.calibration.set, recipe.calibration.rows) == ("wikitext103", 256)
    assert (recipe.calibration.length, recipe.calibration.seed) == (None, 0)
    assert recipe.eval.perplexity == (EvalText(data="wikitext2", style="llamacpp", context=512),)


def test_target_fills_in_what_is_usual_for_its_format() -> None:
    target = Target("GPTQ")
    assert (target.format, target.scheme, target.method) == ("gptq", "w4g128", "gptq")
    assert target.name == "gptq-w4g128"
    assert target.options["damp"] == 0.01
    assert target.params.damp == 0.01
    assert target == Target("gptq", "W4G128", "gptq", {"damp": 0.01}, name="gptq-w4g128")
    assert target.parsed_scheme() == parse_scheme("w4g128")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"format": "gptq", "method": "rtn"}, "gptq-w4g128-rtn"),
        ({"format": "gptq", "feedback": True}, "gptq-w4g128-feedback"),
        ({"format": "ct", "scheme": "w4g128", "method": "gptq", "feedback": True},
         "compressed_tensors-w4g128-gptq-feedback"),
        ({"format": "compressed-tensors"}, "compressed_tensors-w8"),
        ({"format": "w8a8", "transforms": ["smoothquant"]},
         "compressed_tensors-w8a8-smoothquant"),
        ({"format": "fp8", "kv_cache": "fp8"}, "compressed_tensors-fp8a8-kv_fp8"),
        ({"format": "w8a8", "method": "gptq", "transforms": ["awq"], "kv_cache": "int8",
          "feedback": True}, "compressed_tensors-w8a8-gptq-awq-kv_int8-feedback"),
    ],
)  # fmt: skip
def test_default_names(arguments: dict[str, Any], name: str) -> None:
    transforms = tuple(TransformSpec(given) for given in arguments.pop("transforms", ()))
    assert Target(**arguments, transforms=transforms).name == name


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (Calibration, {"rows": 0}, "rows: must be at least 1, not 0"),
        (Calibration, {"rows": True}, "rows: must be an integer, not true"),
        (Calibration, {"set": "a", "file": "b"}, "file: `set` and `file` exclude each other"),
        (Calibration, {"template": "chatml"}, "template: must be 'raw' or 'chat', not 'chatml'"),
        (Output, {"dir": ""}, "dir: is empty"),
        (Output, {"shard_size": "5"}, "shard_size: '5' is not a size"),
        (Device, {"map": "gpu"}, "map: must be auto, cpu, cuda or cuda:N, not 'gpu'"),
        (Device, {"max_memory": "lots"}, "max_memory: 'lots' is not a size"),
        (EvalText, {}, "needs exactly one of `data` and `file`"),
        (EvalText, {"data": "a", "file": "b"}, "needs exactly one of `data` and `file`"),
        (Gates, {"top1_agreement_min": 1.5}, "top1_agreement_min: must be between 0 and 1, not 1.5"),
        (Gates, {"kl_mean_max": float("nan")}, "kl_mean_max: must be a number or null, not nan"),
        (Eval, {"perplexity": [EvalText(data="a")]}, "perplexity: must be a tuple, not a list"),
        (Rule, {"match": "a"}, "a rule needs one of"),
        (Rule, {"match": "a", "keep": True, "bits": 4}, "a rule needs one of"),
        (Rule, {"match": "a", "scheme": "w4", "bits": 4}, "a rule needs one of"),
        (Rule, {"match": "re:(", "keep": True}, "match: not a regular expression"),
        (Rule, {"match": "", "keep": True}, "match: is empty"),
        (Rule, {"match": "a", "bits": 9}, "bits: must be between 1 and 8, not 9"),
        (Rule, {"match": "a", "scheme": "w99"}, "scheme: bits must be 1 to 8"),
        (Rule, {"match": "a", "keep": True, "blocks": "x"}, "blocks: 'x' is not a block"),
        (Target, {"format": "gptqq"}, "format: unknown format 'gptqq'; did you mean 'gptq'?"),
        (Target, {"format": "gptq", "scheme": "w4g12x"}, "scheme: unknown scheme 'w4g12x'; did you mean"),
        (Target, {"format": "gptq", "method": "gptk"}, "method: unknown method 'gptk'; did you mean 'gptq'?"),
        (Target, {"format": "gptq", "options": {"dmp": 1.0}}, "has no parameter 'dmp'; did you mean 'damp'?"),
        (Target, {"format": "gptq", "options": {"damp": "x"}}, "damp: must be a number, not 'x'"),
        (Target, {"format": "nf4", "scheme": "nf4_dq"},
         "format: 'nf4' stands for bitsandbytes:nf4 and takes no scheme (write bitsandbytes:nf4_dq)"),
        (Target, {"format": "w4g128"},
         "format: unknown format 'w4g128'; 'w4g128' is a scheme, write FORMAT:w4g128 (known: bits"),
        (Target, {"format": "nf44"}, "format: unknown format 'nf44'; did you mean 'nf4'?"),
        (Target, {"format": "bitsandbytes", "scheme": "int88"},
         "scheme: unknown scheme 'int88'; did you mean 'int8'?"),
        (Target, {"format": "ct", "scheme": "int8"}, "scheme: unknown scheme 'int8'"),
        (Target, {"format": "gptq", "kv_cache": "fp16"},
         "kv_cache: must be 'fp8' or 'int8' or null, not 'fp16'"),
        (Target, {"format": "gptq", "transforms": ("awq",)}, "transforms: must be a list"),
        (TransformSpec, {"name": "smothquant"},
         "unknown transform 'smothquant'; did you mean 'smoothquant'?"),
        (TransformSpec, {"name": "awq", "options": {"dmp": 1}}, "'awq' has no parameter 'dmp'; did you mean"),
        (TransformSpec, {"name": "smoothquant", "options": {"alpha": "x"}}, "alpha: must be a number or"),
        (TransformSpec, {"name": "smoothquant", "options": {"alpha": 2}}, "alpha must be at most 1, not 2"),
        (Target, {"format": "gptq", "name": "../up"}, "name: '../up' cannot be a folder name"),
        (Target, {"format": "gptq", "name": "a/b"}, "name: 'a/b' cannot be a folder name"),
        (Target, {"format": "gptq", "name": "dot."}, "name: 'dot.' cannot be a folder name"),
        (Recipe, {"source": "x", "targets": ()}, "targets: at least one is needed"),
        (Recipe, {"source": "x", "targets": (), "quantkit": 2}, "quantkit: must be 1, not 2"),
    ],
)  # fmt: skip
def test_values_refuse_what_makes_no_sense(make: Any, arguments: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(problems(make, **arguments))


@pytest.mark.parametrize(
    ("short", "written"),
    [
        ({"format": "nf4"}, {"format": "bitsandbytes", "scheme": "nf4"}),
        ({"format": "FP4"}, {"format": "bitsandbytes", "scheme": "fp4"}),
        ({"format": "int8"}, {"format": "bnb", "scheme": "int8"}),
        ({"format": "llm-int8"}, {"format": "bitsandbytes", "scheme": "w8a8_mixed"}),
        ({"format": "fp8"}, {"format": "ct", "scheme": "fp8a8"}),
        ({"format": "w8a8"}, {"format": "compressed_tensors", "scheme": "w8a8"}),
        ({"format": "mxfp4"}, {"format": "compressed_tensors", "scheme": "mxfp4"}),
        ({"format": "nvfp4"}, {"format": "compressed_tensors", "scheme": "nvfp4"}),
        ({"format": "bnb"}, {"format": "bitsandbytes", "scheme": "nf4"}),
        (
            {"format": "nf4", "method": "search"},
            {"format": "bitsandbytes", "scheme": "nf4", "method": "gptq"},
        ),
    ],
)
def test_what_people_call_a_result(short: dict[str, Any], written: dict[str, Any]) -> None:
    assert Target(**short) == Target(**written)


def test_a_format_reads_schemes_in_its_own_words() -> None:
    target = Target("bitsandbytes", "INT8")
    assert (target.scheme, target.name) == ("w8a8_mixed", "bitsandbytes-w8a8_mixed")
    assert target.parsed_scheme() == parse_scheme("w8a8_mixed")
    assert Target("bitsandbytes", target.scheme) == target


def test_transforms_are_canonical() -> None:
    spec = TransformSpec("SmoothQuant", {"alpha": 0.8})
    assert (spec.name, spec.options) == ("smoothquant", {"alpha": 0.8, "search": True})
    assert spec.params.alpha == 0.8
    assert TransformSpec("smoothquant") == TransformSpec("smoothquant", {"alpha": None, "search": True})
    assert Target("gptq", transforms=(spec,)).transforms == (spec,)
    assert Target("gptq").transforms == () and Target("gptq").kv_cache is None
    assert problems(Target, "gptq", transforms=(spec, spec)) == ("transforms: 'smoothquant' given twice",)


def test_every_problem_is_listed() -> None:
    found = problems(Calibration, rows=0, length="x", seed=-1)
    assert [problem.partition(":")[0] for problem in found] == ["rows", "length", "seed"]


def test_targets_need_different_names_even_where_case_is_ignored() -> None:
    targets = (Target("gptq", name="A"), Target("ct", name="a"))
    assert problems(Recipe, "x", targets) == (
        "targets: numbers 1 and 2 are both named 'a'; give one another `name`",
    )


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Calibration().rows = 1  # type: ignore[misc]


def test_blocks() -> None:
    assert parse_blocks("3") == ((3, 3),)
    assert parse_blocks("0-1, -2--1") == ((0, 1), (-2, -1))
    assert parse_blocks("2--1") == ((2, -1),)
    for wrong in ("", "1,", "3-1", "-1--2", "a-b", "1-2-3"):
        with pytest.raises(RecipeError):
            parse_blocks(wrong)


@pytest.mark.parametrize(
    ("rule", "module", "block", "hit"),
    [
        (Rule("lm_head", keep=True), "lm_head", None, True),
        (Rule("lm_head", keep=True), "model.lm_head", None, False),
        (Rule("*.mlp.*", keep=True), "model.layers.3.mlp.up_proj", 3, True),
        (Rule("re:.*[.]v_proj", keep=True), "model.layers.3.self_attn.v_proj", 3, True),
        (Rule("re:v_proj", keep=True), "model.layers.3.self_attn.v_proj", 3, False),
        (Rule("*", keep=True, blocks="0-1,-2--1"), "x", 1, True),
        (Rule("*", keep=True, blocks="0-1,-2--1"), "x", 2, False),
        (Rule("*", keep=True, blocks="0-1,-2--1"), "x", 9, True),
        (Rule("*", keep=True, blocks="2--1"), "x", 9, True),
        (Rule("*", keep=True, blocks="0"), "x", None, False),
    ],
)
def test_what_rules_match(rule: Rule, module: str, block: int | None, hit: bool) -> None:
    assert rule.matches(module, block, 10) is hit


def test_negative_blocks_beyond_the_model_match_nothing() -> None:
    rule = Rule("*", keep=True, blocks="-5")
    assert [block for block in range(3) if rule.matches("x", block, 3)] == []


def test_what_rules_do() -> None:
    scheme = dataclasses.replace(parse_scheme("w4g128"), scale_dtype="bfloat16")
    assert Rule("*", keep=True).apply(scheme) is None
    assert Rule("*", bits=8).apply(scheme) == dataclasses.replace(scheme, bits=8)
    assert Rule("*", group_size=32).apply(scheme) == dataclasses.replace(scheme, group_size=32)
    replaced = Rule("*", scheme="w8").apply(scheme)
    assert replaced == dataclasses.replace(parse_scheme("w8"), scale_dtype="bfloat16")


def test_target_rules_come_first() -> None:
    mine, shared = Rule("a", keep=True), Rule("b", keep=True)
    target = Target("gptq", rules=(mine,))
    assert Recipe("x", (target,), rules=(shared,)).rules_for(target) == (mine, shared)
