from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from quantkit import registry
from quantkit.recipe.dump import dump
from quantkit.recipe.load import load_recipe, parse_recipe
from quantkit.recipe.schema import schema, schema_text

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def fake_plugins() -> None:
    """Here the real methods and formats are meant."""


def test_the_committed_schema_is_current() -> None:
    committed = (RECIPES / "recipe-1.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run: quantkit recipes schema > recipes/recipe-1.schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_satisfy_loader_and_schema(path: Path) -> None:
    recipe = load_recipe(path)
    dumped = dump(recipe)
    assert parse_recipe(dumped) == recipe
    for text in (path.read_text(encoding="utf-8"), dumped):
        jsonschema.validate(yaml.safe_load(text), schema())
    assert path.read_text(encoding="utf-8").startswith(
        "# yaml-language-server: $schema=./recipe-1.schema.json\n# "
    )


def test_recipes_are_shipped() -> None:
    assert {"demo", "w4-gptq", "w4-gptq-vllm", "w8", "many", "w3-gptq"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sorce": "x"},
        {"calibration": {"rows": 0}},
        {"calibration": {"rows": "many"}},
        {"output": {"on_exists": "Fail"}},
        {"targets": [{"scheme": "w4"}]},
        {"targets": [{"format": "gptq", "method": {"gptq": {"dmp": 1}}}]},
        {"targets": [{"format": "gptq", "method": {"gptq": {}, "rtn": {}}}]},
        {"targets": [{"format": "gptq", "kv_cache": "fp9"}]},
        {"targets": [{"format": "gptq", "transforms": "smoothquant"}]},
        {"targets": [{"format": "gptq", "transforms": ["smothquant"]}]},
        {"targets": [{"format": "gptq", "transforms": [{"smoothquant": {"alpa": 1}}]}]},
        {"targets": [{"format": "gptq", "transforms": [{"smoothquant": {}, "x": {}}]}]},
        {"eval": {"gates": {"top1_agreement_min": 2}}},
        {"quantkit": 2},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(wrong: dict[str, Any]) -> None:
    document = {"source": "x", "targets": ["gptq"], **wrong}
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    with pytest.raises(Exception, match="recipe:"):
        parse_recipe(yaml.safe_dump(document))


@pytest.mark.parametrize(
    "target",
    [
        {"kv_cache": "fp8"},
        {"kv_cache": None},
        {"transforms": []},
        {"transforms": ["smoothquant"]},
        {"transforms": [{"smoothquant": {"alpha": 0.8, "search": False}}]},
        {"transforms": [{"smoothquant": {"alpha": None}}]},
        {"method": "search"},
        {"method": {"search": {"damp": 0.02}}},
    ],
    ids=str,
)
def test_the_schema_accepts_what_the_loader_accepts(target: dict[str, Any]) -> None:
    document = {"source": "x", "targets": [{"format": "gptq", **target}]}
    jsonschema.validate(document, schema())
    recipe = parse_recipe(yaml.safe_dump(document))
    jsonschema.validate(yaml.safe_load(dump(recipe)), schema())


def test_references_are_allowed_where_numbers_are() -> None:
    document = {"source": "x", "targets": ["gptq"], "vars": {"n": 3}, "calibration": {"rows": "${vars.n}"}}
    jsonschema.validate(document, schema())
    assert parse_recipe(json.dumps(document)).calibration.rows == 3


def test_everything_is_described_and_closed() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node:
                assert node["additionalProperties"] is False
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    found = schema()
    walk(found)
    for name, section in found["properties"].items():
        assert section["description"], name
    target = found["properties"]["targets"]["items"]["anyOf"][1]["properties"]
    methods, transforms = target["method"]["anyOf"], target["transforms"]["items"]["anyOf"]
    assert methods[0]["enum"] == [*registry.names("methods"), "search"]
    assert transforms[0]["enum"] == list(registry.names("transforms"))
    assert all(option["description"] for option in transforms[1]["properties"].values())
