from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.load import load_recipe, parse_recipe, recipe_from_flags
from quantkit.recipe.overrides import assignment, flag
from quantkit.recipe.rules import Rule
from quantkit.recipe.spec import Calibration, EvalText, Recipe, Target, TransformSpec

SMALL = "source: x\ntargets: [gptq]\n"


def problems(text: str, **how: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml", **how)
    return caught.value.problems


def test_the_smallest_recipe() -> None:
    assert parse_recipe(SMALL) == Recipe("x", (Target("gptq"),))


def test_every_section() -> None:
    text = """
quantkit: 1
source: org/name@main
vars: {n: 3}
output: {dir: o, on_exists: fail, shard_size: 2GiB}
device: {map: "cuda:1", max_memory: 20GiB, dtype: float32, batch_tokens: 512}
calibration: {file: c.txt, rows: 8, length: 64, seed: null, template: chat, max_chars: 1000}
rules:
  - {match: lm_head, keep: true, why: tied}
targets:
  - gptq:w4g128,w8g128
  - {name: b, format: gptq, scheme: w4g128, method: {gptq: {damp: 1e-5, act_order: static}}, feedback: true}
  - {format: ct, method: rtn, rules: [{match: "*.v_proj", blocks: "0-1,-2--1", bits: 8}]}
eval:
  enabled: false
  perplexity:
    - {data: wikitext2, style: gptq, context: 2048}
    - {file: e.txt, chunks: 4}
  kl: false
  gates: {ppl_ratio_max: 1.03, top1_agreement_min: 1}
"""
    recipe = parse_recipe(text)
    assert recipe.output.shard_bytes("gguf") == 2 * 2**30
    assert recipe.calibration == Calibration(
        file="c.txt", rows=8, length=64, seed=None, template="chat", max_chars=1000
    )
    assert [t.name for t in recipe.targets] == ["gptq-w4g128", "gptq-w8g128", "b", "compressed_tensors-w8"]
    assert recipe.targets[2].params.damp == 1e-5
    assert recipe.targets[3].rules == (Rule("*.v_proj", blocks="0-1,-2--1", bits=8),)
    assert recipe.eval.perplexity == (
        EvalText(data="wikitext2", style="gptq", context=2048),
        EvalText(file="e.txt", chunks=4),
    )
    assert not recipe.eval.enabled
    assert recipe.eval.gates.ppl_ratio_max == 1.03


def test_the_documented_messages() -> None:
    text = """quantkit: 1
sorce: Qwen/Qwen3-8B
targets:
  - gptq:w4g128
  - {name: a,
     format: gptqq}
  - format: gptq
    format: gptq
  - name: b
"""
    assert problems(text) == (
        "r.yaml:1:1 'source' is missing",
        "r.yaml:2:1 unknown key 'sorce'; did you mean 'source'?",
        "r.yaml:6:14 targets[1].format: unknown format 'gptqq'; did you mean 'gptq'? "
        "(known: bitsandbytes, compressed_tensors, gptq)",
        "r.yaml:8:5 targets[2]: key 'format' given twice (first on line 7)",
        "r.yaml:9:5 targets[3]: 'format' is missing",
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("calibration: {rows: 010}", "3:21 calibration.rows: YAML reads 010 as 8; write plain digits"),
        ("calibration: {rows: 3:30}", "3:21 calibration.rows: YAML reads 3:30 as 210; write plain digits"),
        ("calibration: {rows: 1_000}", "3:21 calibration.rows: YAML reads 1_000 as 1000; write plain digits"),
        ("calibration: {rows: 0x10}", "3:21 calibration.rows: YAML reads 0x10 as 16; write plain digits"),
        ("calibration: {rows: ten}", "3:21 calibration.rows: must be an integer, not 'ten'"),
        ("calibration: {rows: 1.0}", "3:21 calibration.rows: must be an integer, not 1.0"),
        ("calibration: {rows: '8'}", "3:21 calibration.rows: must be an integer, not '8'"),
        ("calibration: {rows: 0}", "3:21 calibration.rows: must be at least 1, not 0"),
        ("calibration: {rows: [1]}", "3:21 calibration.rows: must be an integer, not a list"),
        ("calibration: {rows: {a: 1}}", "3:21 calibration.rows: must be an integer, not a mapping"),
        ("calibration: {set: no}", "3:20 calibration.set: YAML reads no as false; quote it: 'no'"),
        ("calibration: {set: on}", "3:20 calibration.set: YAML reads on as true; quote it: 'on'"),
        ("calibration: {set: 5}", "3:20 calibration.set: must be text or null, not 5; quote it"),
        ("calibration: {set: 2024-01-01}", "3:20 calibration.set: YAML reads 2024-01-01 as a date; quote it"),
        ("calibration: {set: a, file: b}", "3:29 calibration.file: `set` and `file` exclude each other"),
        ("calibration: 5", "3:14 calibration: must be a mapping, not 5"),
        ("calibration: [a]", "3:14 calibration: must be a mapping, not a list"),
        ("eval: {kl: yes}", "3:12 eval.kl: YAML reads yes as true; write true or false"),
        ("eval: {kl: 'true'}", "3:12 eval.kl: must be true or false, not 'true'"),
        ("eval: {perplexity: {data: a}}", "3:20 eval.perplexity: must be a list, not a mapping"),
        ("eval: {perplexity: [{chunks: 1}]}", "3:21 eval.perplexity[0]: needs exactly one of"),
        ("eval: {gates: {kl_mean_max: .inf}}", "3:29 eval.gates.kl_mean_max: YAML reads .inf as inf"),
        ("output: {shard_size: 5}", "3:22 output.shard_size: must be text or null, not 5; quote it"),
        ("output: {shard_size: 5XB}", "3:22 output.shard_size: '5XB' is not a size"),
        ("output: {dir: !!python/name:os.system x}", "3:15 output.dir: the YAML tag"),
        ("output: {dir: !mine x}", "3:15 output.dir: the YAML tag !mine has no meaning"),
        ("rules: [{match: 're:(', keep: true}]", "3:17 rules[0].match: not a regular expression"),
        ("rules: [{match: a}]", "3:9 rules[0]: a rule needs one of"),
        ("rules: [{match: a, layers: 1}]", "3:20 rules[0]: unknown key 'layers'"),
        ("quantkit: 2", "3:11 quantkit: must be 1, not 2"),
        ("1: x", "3:1 a key must be text, not '1'"),
        ("output: {dir: '${vars.x}'}", "3:15 output.dir: unknown variable 'x'"),
        ("output: {dir: '${env:NOT_SET}'}", "3:15 output.dir: the environment variable NOT_SET is not set"),
        ("output: {dir: '${HOME}'}", "3:15 output.dir: unknown reference '${HOME}'"),
        ("output: {dir: '${vars.x'}", "3:15 output.dir: the reference '${vars.x' is not closed"),
        ("calibration: {rows: '${env:ROWS:-3}'}", "3:21 calibration.rows: an environment value"),
    ],
)
def test_each_mistake_with_its_place(line: str, expected: str) -> None:
    (problem,) = problems(SMALL + line)
    assert problem.startswith(f"r.yaml:{expected}")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "{format: gptq, scheme: w4g12x}",
            "2:34 targets[0].scheme: unknown scheme 'w4g12x'; did you mean 'w4g128'?",
        ),
        (
            "{format: gptq, method: gptk}",
            "2:34 targets[0].method: unknown method 'gptk'; did you mean 'gptq'?",
        ),
        ("{format: gptq, method: {gptk: {}}}", "2:35 targets[0].method: unknown method 'gptk'"),
        ("{format: gptq, method: {gptq: {dmp: 1}}}", "2:42 targets[0].method.gptq: unknown key 'dmp'"),
        (
            "{format: gptq, method: {gptq: {damp: x}}}",
            "2:48 targets[0].method.gptq.damp: must be a number, not 'x'",
        ),
        (
            "{format: gptq, method: {gptq: {damp: 0}}}",
            "2:48 targets[0].method.gptq.damp: must be positive, not 0",
        ),
        ("{format: gptq, method: {gptq: 3}}", "2:41 targets[0].method.gptq: must be a mapping, not 3"),
        ("{format: gptq, method: {}}", "2:34 targets[0].method: must name one method"),
        ("{format: gptq, kv_cache: fp9}",
         "2:36 targets[0].kv_cache: must be 'fp8' or 'int8' or null, not 'fp9'"),
        ("{format: gptq, transforms: awq}", "2:38 targets[0].transforms: must be a list, not 'awq'"),
        ("{format: gptq, transforms: {awq: {}}}", "2:38 targets[0].transforms: must be a list, not a map"),
        ("{format: gptq, transforms: [smothquant]}",
         "2:39 targets[0].transforms[0]: unknown transform 'smothquant'; did you mean 'smoothquant'?"),
        ("{format: gptq, transforms: [{smothquant: {}}]}",
         "2:40 targets[0].transforms[0]: unknown transform 'smothquant'"),
        ("{format: gptq, transforms: [{smoothquant: {alpa: 1}}]}",
         "2:54 targets[0].transforms[0].smoothquant: unknown key 'alpa'; did you mean 'alpha'?"),
        ("{format: gptq, transforms: [{smoothquant: {alpha: x}}]}",
         "2:61 targets[0].transforms[0].smoothquant.alpha: must be a number or null, not 'x'"),
        ("{format: gptq, transforms: [{smoothquant: {alpha: 2}}]}",
         "2:61 targets[0].transforms[0].smoothquant.alpha: must be at most 1, not 2"),
        ("{format: gptq, transforms: [{awq: {}, smoothquant: {}}]}",
         "2:39 targets[0].transforms[0]: must name one transform"),
        ("{format: gptq, transforms: [awq, awq]}", "2:38 targets[0].transforms: 'awq' given twice"),
        ("{format: gptq, transforms: [1]}", "2:39 targets[0].transforms[0]: must be text, not 1"),
        ("{format: nf4, scheme: nf4_dq}", "2:20 targets[0].format: 'nf4' stands for bitsandbytes:nf4"),
        ("{format: gptq, preset: x}", "2:26 targets[0]: unknown key 'preset'"),
        ("{format: gptq, options: {}}", "2:26 targets[0]: unknown key 'options'"),
        ("gptq:w4@damp=x", "2:11 targets[0]: 'gptq:w4@damp=x': damp: must be a number"),
        ("5", "2:11 targets[0]: must be text, not 5"),
        ("[gptq]", "2:11 targets[0]: must be text, not a list"),
        ("'${env:F}'", "2:11 targets[0]: an environment value"),
    ],
)  # fmt: skip
def test_mistakes_in_targets(target: str, expected: str) -> None:
    (problem,) = problems(f"source: x\ntargets: [{target}]\n", env={"F": "gptq"})
    assert problem.startswith(f"r.yaml:{expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1:1 the recipe is empty"),
        ("# nothing\n", "r.yaml:1:1 the recipe is empty"),
        ("- a\n", "r.yaml:1:1 a recipe must be a mapping"),
        ("source: [\n", "r.yaml:2:1 not valid YAML"),
        ("source: x\n\ttargets: y\n", "r.yaml:2:1 not valid YAML"),
        ("source: x\x00\n", "r.yaml:1:1 not valid YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1 not valid YAML"),
        ("a: *b\n", "r.yaml:1:4 not valid YAML"),
        ("source: x\ntargets: gptq\n", "r.yaml:2:10 targets: must be a list, not 'gptq'"),
        ("source: x\ntargets: []\n", "r.yaml:2:10 targets: at least one is needed"),
        ("source: x\ntargets: [gptq, gptq]\n", "r.yaml:2:10 targets: numbers 1 and 2 are both named"),
        (f"source: {'[' * 5000}\n", "r.yaml: nested too deeply"),
    ],
)  # fmt: skip
def test_documents_that_are_no_recipe(text: str, expected: str) -> None:
    assert problems(text)[0].startswith(expected)


def test_transforms_caches_and_other_names() -> None:
    text = """
source: x
targets:
  - {format: nf4, method: search, name: a}
  - {format: bnb, scheme: int8, method: {search: {damp: 0.1}}}
  - {format: w8a8, transforms: [smoothquant], kv_cache: int8}
  - format: compressed_tensors
    scheme: fp8a8
    kv_cache: null
    transforms: [{smoothquant: {alpha: 1, search: false}}, {awq: }, {Smoothquant: {}}]
  - w8a8@transforms=smoothquant,kv_cache=fp8
"""
    assert problems(text) == ("r.yaml:10:17 targets[3].transforms: 'smoothquant' given twice",)
    recipe = parse_recipe(text.replace(", {Smoothquant: {}}", ""))
    assert recipe.targets == (
        Target("bitsandbytes", "nf4", "gptq", name="a"),
        Target("bitsandbytes", "w8a8_mixed", "gptq", {"damp": 0.1}),
        Target("ct", "w8a8", transforms=(TransformSpec("smoothquant"),), kv_cache="int8"),
        Target(
            "ct",
            "fp8a8",
            transforms=(TransformSpec("smoothquant", {"alpha": 1, "search": False}), TransformSpec("awq")),
        ),
        Target("ct", "w8a8", transforms=(TransformSpec("smoothquant"),), kv_cache="fp8"),
    )


def test_lines_come_in_order() -> None:
    places = [p.split(" ")[0] for p in problems("targets: [gptqq]\noutput: {dir: 1, x: 2}\ndevice: 3\n")]
    assert places == ["r.yaml:1:1", "r.yaml:1:11", "r.yaml:2:15", "r.yaml:2:18", "r.yaml:3:9"]


def test_keys_for_anchors_are_ignored_at_the_top_only() -> None:
    text = "x-cal: &c {rows: 8}\nsource: x\ntargets: [gptq]\ncalibration: *c\n"
    assert parse_recipe(text).calibration.rows == 8
    assert problems(SMALL + "output: {x-a: 1}")[0].startswith("r.yaml:3:10 output: unknown key 'x-a'")


def test_variables_and_environment() -> None:
    text = """
vars: {name: demo, rows: 8, scratch: "${env:SCRATCH:-./out}"}
source: org/${vars.name}
targets: ["gptq@name=${vars.name}-4"]
calibration: {rows: "${vars.rows}"}
output: {dir: "${vars.scratch}/${vars.name}/$${kept}"}
"""
    recipe = parse_recipe(text, env={"SCRATCH": "/private"})
    assert recipe.source == "org/demo"
    assert recipe.targets[0].name == "demo-4"
    assert recipe.calibration.rows == 8
    assert recipe.output.dir == "/private/demo/${kept}"
    assert parse_recipe(text).output.dir == "./out/demo/${kept}"


def test_variables_cannot_refer_to_one_another() -> None:
    assert "unknown variable 'b'" in problems(SMALL + "vars: {a: '${vars.b}', b: 1}")[0]


def test_flags_replace_and_add() -> None:
    text = SMALL + "calibration: {set: embedded, rows: 8}\nrules: [{match: a, keep: true}]\n"
    recipe = parse_recipe(
        text,
        overrides=[
            flag("source", "no", "SOURCE"),
            flag("calibration.set", None, "--calib"),
            flag("calibration.file", "1.0", "--calib"),
            flag("rules", [{"match": "b", "keep": True}], "--rule", prepend=True),
            assignment("output.dir='${vars.d}'"),
            assignment("vars={d: there}"),
            assignment("targets[0]=ct:w8"),
            assignment("calibration.seed=null"),
        ],
    )
    assert recipe.source == "no"
    assert recipe.calibration == Calibration(file="1.0", rows=8, seed=None)
    assert recipe.rules == (Rule("b", keep=True), Rule("a", keep=True))
    assert recipe.output.dir == "there"
    assert recipe.targets == (Target("ct", "w8"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("calibration.rows=0", "--set calibration.rows calibration.rows: must be at least 1, not 0"),
        ("calibration.rws=1", "--set calibration.rws calibration: unknown key 'rws'; did you mean 'rows'?"),
        ("targets[3].scheme=w8", "--set targets[3].scheme: there is no item 3"),
        ("targets.x=w8", "--set targets.x: 'x' cannot be set"),
        ("source.x=1", "--set source.x: 'x' cannot be set"),
        ("a b=1", "--set a b: 'a b' is not a path"),
        ("calibration.rows", "--set calibration.rows: write PATH=VALUE"),
        ("calibration.set=[", "--set calibration.set: '[' is not valid YAML"),
    ],
)
def test_mistakes_in_assignments(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SMALL, overrides=[assignment(text)])
    assert caught.value.message.startswith(expected)


def test_flags_alone_make_a_recipe() -> None:
    recipe = recipe_from_flags([flag("source", "x", "SOURCE"), flag("targets", ["gptq"], "--to")])
    assert recipe == Recipe("x", (Target("gptq"),))
    with pytest.raises(RecipeError) as caught:
        recipe_from_flags([flag("source", "x", "SOURCE")])
    assert caught.value.problems == ("command line 'targets' is missing",)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SMALL)
    assert load_recipe(path).source == "x"
    path.write_bytes(b"source: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
