"""Recipes without the machine they ran on."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.recipe.anonymous import anonymous
from quantkit.recipe.dump import dump
from quantkit.recipe.load import load_recipe, parse_recipe
from quantkit.recipe.spec import Recipe, Target

FULL = """
quantkit: 1
source: /home/someone/models/my-model
vars: {where: /home/someone/data}
targets: [gptq:w4g128]
output: {dir: /mnt/out/run 7, shard_size: 2GB}
calibration: {file: "${vars.where}/notes.txt", rows: 7}
eval:
  perplexity:
    - {file: 'D:\\texts\\own.txt', style: gptq}
    - data: wikitext2
publish: {repo: someone/my-model-GPTQ, token_env: SECRET_NAME}
"""


def test_only_names_are_left() -> None:
    recipe = anonymous(parse_recipe(FULL), "my-model")
    assert recipe.source == "my-model"
    assert (recipe.output.dir, recipe.output.shard_size) == ("out", "2GB")
    assert (recipe.calibration.file, recipe.calibration.rows) == ("notes.txt", 7)
    assert [(text.file, text.data) for text in recipe.eval.perplexity] == [
        ("own.txt", None),
        (None, "wikitext2"),
    ]
    assert recipe.publish is None and recipe.vars == {}
    text = dump(recipe)
    for private in ("someone", "/mnt", "D:", "SECRET_NAME", "run 7", "/data"):
        assert private not in text


def test_it_loads_and_is_the_same_again() -> None:
    recipe = anonymous(parse_recipe(FULL), "org/model@0123")
    assert parse_recipe(dump(recipe)) == recipe
    assert anonymous(recipe, recipe.source) == recipe


def test_what_decides_the_result_stays() -> None:
    before = parse_recipe(FULL)
    after = anonymous(before, "x")
    assert (after.targets, after.rules, after.device) == (before.targets, before.rules, before.device)
    assert after.eval.gates == before.eval.gates
    plain = Recipe("org/model", (Target("gptq"),))
    assert anonymous(plain, "org/model") == plain


def test_an_imatrix() -> None:
    before = parse_recipe("source: x\ntargets: [gptq]\ncalibration: {imatrix: ../a/of-this.imatrix.gguf}\n")
    after = anonymous(before, "x").calibration
    assert (after.imatrix, after.file, after.set) == ("of-this.imatrix.gguf", None, None)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${env:WHERE}", "calibration.txt"),
        ("${env:WHERE}/notes.txt", "notes.txt"),
        ("${env:WHERE}-notes.txt", "calibration.txt"),
        ("/data/${env:WHERE:-a/b}", "calibration.txt"),
        ("${env:WHERE:-/a/b}/", "calibration.txt"),
        ("${env:NOTHING:-/a/b}/x/y.txt", "y.txt"),
        ("/data/}/y.txt", "y.txt"),
        ("/", "calibration.txt"),
    ],
)
def test_values_of_the_environment_are_private(written: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"source: ${{env:WHERE}}\ntargets: [gptq]\ncalibration: {{file: '{written}'}}\n")
    recipe = anonymous(load_recipe(path, env={"WHERE": "/home/someone/private"}), "a-name")
    assert recipe.calibration.file == expected
    text = dump(recipe)
    assert "private" not in text and "${" not in text
    assert parse_recipe(text) == recipe
