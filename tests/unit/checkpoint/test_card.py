"""The front matter of model cards that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.checkpoint import card

LLAMA = """---
license: llama3.1
language: [en, no]
base_model: https://huggingface.co/meta-llama/Llama-3.1-8B
pipeline_tag: text-generation
tags: [llama, 'license:llama3.1', 'base_model:x/y', 'region:us', /home/me/tag, llama]
datasets: [org/texts]
library_name: transformers
license_link: ./LICENSE
extra_gated_prompt: Agree first
model-index:
- name: x
---
# A model
"""


def test_values_are_texts() -> None:
    text = "---\nlicense: mit\nlanguage: [en, no]\nyes: 1.10\ndate: 2024-01-01\nnothing: ~\n"
    text += "quoted: 'null'\n---\n"
    assert card.front_matter(text) == {
        "license": "mit",
        "language": ["en", "no"],
        "yes": "1.10",
        "date": "2024-01-01",
        "nothing": "",
        "quoted": "null",
    }


@pytest.mark.parametrize(
    "text",
    ["\ufeff---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\nText", "---  \nlicense: mit\n---"],
    ids=["byte order mark", "windows", "end of the file"],
)
def test_how_it_is_framed(text: str) -> None:
    assert card.front_matter(text) == {"license": "mit"}


@pytest.mark.parametrize("loader", [yaml.BaseLoader, None], ids=["python", "fastest"])
@pytest.mark.parametrize(
    "front",
    [
        "license: [mit",
        "- mit",
        "mit",
        "[" * 100_000,
        "- " * 100_000,
        "{a: " * 5000,
        "a: &x [1, 1]\nb: [*x, *x]",
        "? [a]\n: b",
        "a: 1\n--- \nb: 2\n",
        "a: \x00",
        "'",
    ],
    ids=lambda text: text[:12],
)
def test_what_says_nothing(front: str, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader is not None:
        monkeypatch.setattr(card, "_loader", lambda: loader)
    found = card.front_matter(f"---\n{front}\n---\nlicense: gpl\n")
    assert found in ({}, {"a": "1"}) and "license" not in found


def test_tags_of_yaml_make_nothing() -> None:
    assert card.front_matter("---\na: !!python/object/apply:os.getcwd []\n---\n") == {"a": []}


def test_a_long_card_is_read_and_an_endless_one_is_not() -> None:
    rows = "- {name: x, results: [{value: 1.5}]}\n" * 2000
    assert card.front_matter(f"---\nrows:\n{rows}license: mit\n---\n")["license"] == "mit"
    padding = "#" * card.MAX_BYTES
    assert card.front_matter(f"---\nlicense: mit\n{padding}\n---\n") == {}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert card.read(path) == {} and card.read(tmp_path) == {}
    path.write_bytes(b"---\nlicense: mit\nname: \xff\n---\n")
    assert card.read(path) == {"license": "mit", "name": "\ufffd"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mit", ["mit"]),
        (["a", " b ", "", {"c": "d"}, ["e"]], ["a", "b"]),
        (None, []),
        ({"a": "b"}, []),
        (["/home/me/x", "~/x", "../x", "C:\\x", "file:///x", "base_model:/x"], []),
        (["https://example.org/a", "HTTP://example.org"], ["https://example.org/a", "HTTP://example.org"]),
    ],
    ids=str,
)
def test_lists(value: object, expected: list[str]) -> None:
    assert card.listed(value) == expected


def test_ids() -> None:
    given = ["org/model", "https://huggingface.co/a/b/", "org/model", "gpt2", "/srv/models/x", "a/b/c", "Ä/b"]
    assert card.hub_ids(given) == ["org/model", "a/b"]


def test_what_a_published_model_inherits() -> None:
    found = card.inherited(card.front_matter(LLAMA))
    assert found == {
        "license": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "base_model": ["meta-llama/Llama-3.1-8B"],
        "pipeline_tag": "text-generation",
        "tags": ["llama"],
        "datasets": ["org/texts"],
        "library_name": "transformers",
        "gated": True,
    }
    assert json.loads(json.dumps(found)) == found


def test_several_licences_stay_several() -> None:
    assert card.inherited({"license": ["mit", "apache-2.0"]}) == {"license": ["mit", "apache-2.0"]}
    assert card.inherited({"license": ["mit"]}) == {"license": "mit"}


def test_what_is_not_inherited() -> None:
    hostile = {
        "license": "a\x1b[31m",
        "license_name": {"a": "b"},
        "license_link": ["../../etc/passwd", "/etc/passwd"],
        "base_model": "./checkpoints/last",
        "tags": ["x" * 1000, *(f"t{i}" for i in range(2000))],
        "model-index": [{}],
    }
    found = card.inherited(hostile)
    assert list(found) == ["tags"] and len(found["tags"]) == 500
    assert card.inherited({}) == {}
