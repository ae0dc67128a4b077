from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.calibrate.text import (
    EvalSpec,
    FileSource,
    HubSource,
    Part,
    SetSpec,
    as_set,
    find_set,
    load_set,
    set_names,
)
from quantkit.errors import RecipeError


def test_the_shipped_sets_load_and_every_dataset_is_pinned() -> None:
    assert set_names() == ("c4", "chat", "embedded", "wikitext103", "wikitext2")
    for name in set_names():
        for part in find_set(name).parts:
            assert part.licence != "not stated"
            if isinstance(part.source, HubSource):
                assert re.fullmatch("[0-9a-f]{40}", part.source.revision)
            else:
                assert part.source.path.is_file()


def test_the_chat_set_says_what_its_file_says() -> None:
    chat, wiki = find_set("chat").parts
    assert (chat.share, chat.template, chat.column, chat.join) == (0.6, "chat", "messages", None)
    assert (wiki.share, wiki.template, wiki.column, wiki.join) == (0.4, "raw", "text", "")
    assert isinstance(chat.source, HubSource)
    assert chat.source.label == (
        "HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a:default/train_sft"
    )


def test_files_of_a_set_lie_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("parts:\n- {file: a.txt, share: 0.25, max_chars: 9}\n- {hub: org/data, share: 0.75}\n")
    assert load_set(path) == SetSpec(
        "mine",
        (
            Part(FileSource(tmp_path / "a.txt"), share=0.25, max_chars=9),
            Part(HubSource("org/data"), share=0.75),
        ),
    )
    assert as_set(path) == load_set(path)


def test_a_text_file_is_a_set_of_one_part() -> None:
    spec = as_set(Path("notes/own.txt"))
    assert spec == SetSpec("own", (Part(FileSource(Path("notes/own.txt"))),))
    assert as_set(spec) is spec


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("parts: [{file: a.txt, colum: x}]", ["parts[0]", "'colum'", "did you mean 'column'"]),
        ("parts: [{file: a.txt, split: train}]", ["parts[0]", "'split'"]),
        ("parts: [{file: a.txt, hub: org/data}]", ["parts[0]", "'file' or 'hub'"]),
        ("parts: [{share: 1}]", ["parts[0]", "'file' or 'hub'"]),
        ("parts: [{file: a.txt, share: 0.5}]", ["0.5"]),
        ("parts: [{file: a.txt, share: 2}]", ["parts[0]", "share", "2"]),
        ("parts: [{file: a.txt, share: true}]", ["parts[0]", "'share'", "True"]),
        ("parts: [{file: a.txt, max_chars: 0}]", ["parts[0]", "max_chars"]),
        ("parts: [{file: a.txt, join: x}]", ["parts[0]", "join"]),
        ("parts: [{file: a.txt, template: chta}]", ["parts[0]", "template"]),
        ("parts: []", ["add up to 0"]),
        ("part: []", ["'parts'"]),
        ("{", ["bad.yaml"]),
    ],
)
def test_a_mistake_in_a_set_is_named(tmp_path: Path, content: str, names: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_set(path)
    assert [name for name in names if name not in str(caught.value)] == []


def test_a_missing_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="wikitext2"):
        find_set("wikitxt2")
    with pytest.raises(RecipeError):
        load_set(tmp_path / "none.yaml")


def test_evaluation_texts() -> None:
    embedded = EvalSpec("embedded").source
    assert isinstance(embedded, FileSource)
    assert embedded.path.is_file()
    assert EvalSpec("wikitext2").source == HubSource(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "b08601e04326c79dfdd32d625aee71d232d685c3"
    )
    assert EvalSpec("mine", file=Path("a.txt")).source == FileSource(Path("a.txt"))


@pytest.mark.parametrize(
    "wrong", [{"name": "wikitext3"}, {"style": "gguf"}, {"context": 3}, {"chunks": 0}], ids=str
)
def test_an_impossible_evaluation_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        EvalSpec(**{"name": "embedded", **wrong})  # type: ignore[arg-type]


def test_specifications_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, quantkit.calibrate.text as t; t.find_set('chat');"
        "print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
