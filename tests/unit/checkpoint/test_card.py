"""The front matter of model cards that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.checkpoint import card, card_yaml

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
    ("front", "why"),
    [
        ("license: [mit", "line 3: "),
        ("x: 1\nlicense: 'mit", "line 4: "),
        ("- mit", "line 2: it holds no keys with values"),
        ("mit", "line 2: it holds no keys with values"),
        ("[" * 100_000, "line 2: it is nested too deeply"),
        ("- " * 100_000, "line 2: it is nested too deeply"),
        ("{a: " * 5000, "line 2: it is nested too deeply"),
        ("a: &x [*x]", "line 2: an alias of what is not there"),
        ("a: *x", "line 2: an alias of what is not there"),
        ("x: &x {license: gpl}\n<<: *x", "line 3: it merges the keys of another mapping (<<)"),
        ("a: 1\n...\n---\tb\n", "line 4: "),
        ("a: 1\nb: \x00", "line 3: it holds control characters"),
        ("license: mit\n\ttags: x", "line 3: "),
        ("license: gpl\nlicense: mit", "`license` is left out: it is there twice, again in line 3"),
        ("license: {a: b}", "`license` is no plain text that names a licence"),
        ("license: [[mit]]", "`license` is no plain text that names a licence"),
        ('license: "mit\\0"', "`license` is no plain text that names a licence"),
        ("license: ./LICENSE", "`license` is no plain text that names a licence"),
    ],
    ids=lambda text: text[:12],
)
def test_what_cannot_be_read_is_not_nothing(
    front: str, why: str, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loader is not None:
        monkeypatch.setattr(card_yaml, "_loader", lambda: loader)
    found = card.inherited(card.front_matter(f"---\n{front}\n---\nlicense: gpl\n"))
    assert list(found) == ["unreadable"] and found["unreadable"].startswith(why)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "# A model\n---\nlicense: gpl\n---\n",
        "----\nlicense: gpl\n---\n",
        "---\n---\n",
        "---\n# x\n---\n",
        "---\n~\n---\n",
    ],
)
def test_what_says_nothing(text: str) -> None:
    assert card.front_matter(text) == {}


def test_aliases_stand_for_what_they_name() -> None:
    front = "license: &l cc-by-nc-nd-4.0\nlicense_name: *l\ntags: &t\n- chat\ndatasets: *t\n*l : x"
    assert card.front_matter(f"---\n{front}\n---\n") == {
        "license": "cc-by-nc-nd-4.0",
        "license_name": "cc-by-nc-nd-4.0",
        "tags": ["chat"],
        "datasets": ["chat"],
        "cc-by-nc-nd-4.0": "x",
    }


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels))]
    return "\n".join(lines)


def test_aliases_that_stand_for_gigabytes() -> None:
    assert card.front_matter(f"---\n{bomb(5)}\nlicense: mit\n---\n")["license"] == "mit"
    found = card.front_matter(f"---\n{bomb(20)}\nlicense: mit\n---\n")
    assert found == {"unreadable": "line 8: its aliases stand for too much"}
    long = f"a: &a {'x' * 100_000}\ntags: [{', '.join(['*a'] * 100)}]"
    assert "unreadable" in card.front_matter(f"---\n{long}\n---\n")


def test_a_key_that_cannot_be_told_goes_alone() -> None:
    front = '? [a, b]\n: 3\nlicense: mit\n"c\\0d": 1\ntags: [x]\ntags: [y]\nlanguage: en\nlanguage: en\n~: 1'
    found = card.front_matter(f"---\n{front}\n---\n")
    twice = "is left out: it is there twice, again in line 7"
    no_text = "is left out: its key is no text"
    faults = {"line 2": no_text, "line 5": no_text, "tags": twice, "line 10": no_text}
    assert found == {"license": "mit", "language": "en", "faults": faults}
    assert card.inherited(found) == {"license": "mit", "language": ["en"], "faults": faults}


def test_no_card_says_what_we_say_of_it() -> None:
    front = "unreadable: x\nfaults: {license: y}\ngated: true\nlicense: mit"
    found = card.front_matter(f"---\n{front}\n---\n")
    assert card.inherited(found) == {"license": "mit"}


def test_what_the_hub_takes_for_metadata() -> None:
    for text in (
        "\n \n---\nlicense: mit\n---\n",
        "  ---\t\nlicense: mit\n--- \n",
        "---\rlicense: mit\r---\r",
    ):
        assert card.front_matter(text) == {"license": "mit"}
    assert card.front_matter("\n---\nlicense: mit\n") == {
        "unreadable": "line 2: no second line of --- ends it"
    }


def test_tags_of_yaml_make_nothing() -> None:
    assert card.front_matter("---\na: !!python/object/apply:os.getcwd []\n---\n") == {"a": []}


def test_a_long_card_is_read_and_an_endless_one_is_not() -> None:
    rows = "- {name: x, results: [{value: 1.5}]}\n" * 2000
    assert card.front_matter(f"---\nrows:\n{rows}license: mit\n---\n")["license"] == "mit"
    padding = "#" * card.MAX_BYTES
    large = {"unreadable": "line 1: its metadata is larger than 1,048,576 bytes"}
    assert card.front_matter(f"---\nlicense: mit\n{padding}\n---\n") == large
    assert card.front_matter(f"---\nlicense: mit\n---\n{padding}") == {"license": "mit"}
    # what is read of it ends within a line that is no rule
    cut = f"---\nlicense: mit\n#{padding}"[: card.MAX_BYTES - 3]
    assert card.front_matter(f"{cut}\n---more\nlicense: gpl\n---\n") == large


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert card.read(path) == {} and card.read(tmp_path) == {}
    path.write_bytes(b"---\nlicense: mit\nname: \xff\n---\n")
    assert card.read(path) == {"license": "mit", "name": "\ufffd"}
    path.write_bytes("---\nlicense: mit\n---\n".encode("utf-16"))
    assert card.read(path) == {"unreadable": "it is not UTF-8"}
    path.write_bytes(b"---\nlicense: mit\n#" + "ü".encode() * card.MAX_BYTES)
    assert "larger than" in card.read(path)["unreadable"]


def test_a_file_that_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert card.read(tmp_path / "README.md") == {"unreadable": "Permission denied"}


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
        "faults": {"tags": "is partly left out: not a tag"},
    }
    assert json.loads(json.dumps(found)) == found


def test_several_licences_stay_several() -> None:
    assert card.inherited({"license": ["mit", "apache-2.0"]}) == {"license": ["mit", "apache-2.0"]}
    assert card.inherited({"license": ["mit"]}) == {"license": "mit"}


def test_what_is_not_inherited() -> None:
    hostile = {
        "license_name": {"a": "b"},
        "license_link": ["../../etc/passwd", "/etc/passwd"],
        "base_model": "./checkpoints/last",
        "tags": ["x" * 1000, *(f"t{i}" for i in range(2000))],
        "model-index": [{}],
    }
    found = card.inherited(hostile)
    assert list(found) == ["tags", "faults"] and len(found["tags"]) == 500
    assert list(found["faults"]) == ["license_name", "tags", "license_link"]
    assert card.inherited({}) == {}


INVALID = {
    "pipeline_tag": "<script>",
    "library_name": "a b",
    "language": ["<b>", "en"],
    "datasets": ["x y", "a/b/c", "https://huggingface.co/datasets/org/texts", "/home/me/texts"],
    "tags": ["a\0b", 3, "ok", "license:mit"],
    "license": "other",
    "license_link": "https://x.org/a b)<script>ü",
}


def test_what_is_not_valid_is_left_out_or_repaired() -> None:
    found = card.inherited(INVALID)
    assert found == {
        "language": ["en"],
        "tags": ["ok"],
        "datasets": ["org/texts"],
        "license": "other",
        "license_link": "https://x.org/a%20b)%3Cscript%3E%C3%BC",
        "faults": {
            "pipeline_tag": "is left out: not a task, as text-generation",
            "library_name": "is left out: not the name of a library, as transformers",
            "language": "is partly left out: not the code of a language, as en",
            "tags": "is partly left out: not a tag",
            "datasets": "is partly left out: not an id of the Hub, as org/name",
            "license_link": "is written with %XX for what no address has",
        },
    }


@pytest.mark.parametrize(
    "given",
    [
        INVALID,
        {"license": [1, "mit"], "extra_gated_prompt": "x"},
        {"unreadable": "line 3: why", "faults": {"tags": "x"}},
        {"unreadable": 3, "faults": [1], "license": "mit"},
        {"unreadable": "\x1b[31m", "faults": {"\x1b": "x", "tags": "y" * 1000, "a": 1}},
    ],
)
def test_of_its_own_result_it_makes_the_same(given: dict[str, Any]) -> None:
    found = card.inherited(given)
    assert card.inherited(found) == found == json.loads(json.dumps(found))
    assert ("unreadable" in found) == ("unreadable" in given or given.get("license") == [1, "mit"])
    assert "\x1b" not in json.dumps(found) and len(json.dumps(found)) < 1000
