from __future__ import annotations

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.recipe.dump import dump
from quantkit.recipe.load import parse_recipe
from quantkit.recipe.rules import Rule
from quantkit.recipe.spec import (
    Calibration,
    Eval,
    EvalText,
    Gates,
    Output,
    Recipe,
    Target,
    TransformSpec,
)


def full() -> Recipe:
    return Recipe(
        source="org/model@main",
        targets=(
            Target("gptq", "w4g128", "rtn", {"scales": "mse"}, feedback=True),
            Target("ct", rules=(Rule("*", bits=8, group_size=64, blocks="0--1", why="because"),)),
            Target("gptq", options={"damp": 1e-05, "limit": 3}, name="b"),
            Target("w8a8", transforms=(TransformSpec("smoothquant", {"alpha": 0.8}),), kv_cache="fp8"),
            Target("int8", method="search", transforms=(TransformSpec("awq"), TransformSpec("smoothquant"))),
        ),
        output=Output("on", "fail", "2GiB"),
        calibration=Calibration(file="010", seed=None, length=64),
        eval=Eval(False, (EvalText(file="yes", style="gptq", chunks=2),), False, Gates(1.1, 0.5, 0)),
        rules=(Rule("re:.*", keep=True),),
        vars={"a": "null", "b": 1, "c": 1.5, "d": True},
    )


def test_round_trip() -> None:
    assert parse_recipe(dump(full())) == full()
    small = Recipe("x", (Target("gptq"),))
    assert parse_recipe(dump(small)) == small


def test_defaults_are_written_out() -> None:
    text = dump(Recipe("x", (Target("gptq"),)))
    for line in ("quantkit: 1", "method:", "damp: 0.01", "rows: 256", "set: wikitext103"):
        assert line in text
    assert text.startswith("quantkit: 1\nsource: x\n")
    assert "transforms" not in text and "kv_cache" not in text


def test_transforms_are_written_with_their_parameters() -> None:
    spec = TransformSpec("smoothquant", {"alpha": 0.8, "search": False})
    text = dump(Recipe("x", (Target("nf4", transforms=(spec,), kv_cache="int8"),)))
    target = yaml.safe_load(text)["targets"][0]
    assert target["transforms"] == [{"smoothquant": {"alpha": 0.8, "search": False}}]
    assert (target["format"], target["scheme"], target["kv_cache"]) == ("bitsandbytes", "nf4", "int8")


def test_environment_values_are_never_written() -> None:
    text = (
        'vars: {p: "${env:SECRET}/v"}\nsource: "${vars.p}/a$${b}"\ntargets: [gptq]\n'
        'output: {dir: "${env:SECRET}/${env:NONE:-x}"}\n'
    )
    env = {"SECRET": "hidden"}
    recipe = parse_recipe(text, env=env)
    assert recipe.source == "hidden/v/a${b}"
    dumped = dump(recipe)
    assert "hidden" not in dumped
    assert "dir: ${env:SECRET}/${env:NONE:-x}" in dumped
    assert parse_recipe(dumped, env=env) == recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_any_text_survives(text: str) -> None:
    recipe = Recipe(text, (Target("gptq"),))
    assert parse_recipe(dump(recipe)) == recipe
