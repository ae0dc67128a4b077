"""`verify` and `eval`: what they pass on, print and return."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quantkit.table import Table


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the run layer; a folder called `bad` is damaged. The arguments it got."""
    seen: list[dict[str, Any]] = []

    def verify(folder: Path, *, progress: Any, **how: Any) -> Any:
        seen.append({"folder": folder, **how})
        sound = folder.name != "bad"
        document = {"schema": "quantkit/verify/1", "status": "ok" if sound else "damaged"}
        table = Table(str(folder), (), ())
        return SimpleNamespace(sound=sound, tables=lambda: [table], to_json=lambda: document)

    def score(paths: Any, *, progress: Any, **how: Any) -> Any:
        seen.append({"paths": paths, **how})
        table = Table("evaluation", (), ())
        return SimpleNamespace(table=lambda: table, to_json=lambda: {"models": []})

    for name, function in (("verify", verify), ("score", score)):
        module = ModuleType(f"quantkit.run.{name}")
        vars(module)[name] = function
        monkeypatch.setitem(sys.modules, f"quantkit.run.{name}", module)
    monkeypatch.setattr(
        "quantkit.run.plan.locate", lambda name, **_: SimpleNamespace(path=Path(name), id=None)
    )
    return seen


def test_verify(quantkit: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    shown = quantkit("verify", "good", "--against", "org/name", "--offline")
    assert (shown.code, shown.out) == (0, "good\n")
    how = {"against": "org/name", "engine": True, "offline": True, "cache_dir": None}
    assert calls == [{"folder": Path("good"), **how}]
    quantkit("verify", "good", "--no-engine")
    assert calls[-1]["engine"] is False
    assert quantkit("verify", "good", "-q").out == "good\n"


def test_verify_of_a_damaged_folder(quantkit: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    shown = quantkit("verify", "bad", "--json")
    assert shown.code == 1 and json.loads(shown.out)["status"] == "damaged"
    quiet = quantkit("verify", "bad", "-q")
    assert (quiet.code, quiet.out) == (1, "")


def test_eval(quantkit: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    arguments = (
        "--baseline",
        "./source",
        "--eval",
        "my.txt",
        "--eval-style",
        "gptq-64",
        "--eval-chunks",
        "3",
    )
    shown = quantkit("eval", "one", "two", *arguments, "--device", "cpu", "--dtype", "bfloat16")
    assert (shown.code, shown.out) == (0, "evaluation\n")
    (call,) = calls
    assert call["paths"] == ("one", "two") and call["baseline"] == "./source"
    (text,) = call["texts"]
    assert (text.file, text.style, text.context, text.chunks) == ("my.txt", "gptq", 64, 3)
    assert (call["device"].map, call["device"].dtype) == ("cpu", "bfloat16")


def test_eval_has_the_defaults_of_convert(quantkit: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    assert json.loads(quantkit("eval", "one", "--json").out) == {
        "schema": "quantkit/eval/1",
        "status": "ok",
        "models": [],
    }
    (text,) = calls[0]["texts"]
    assert (text.data, text.style, text.context) == ("wikitext2", "llamacpp", 512)


def test_eval_of_nothing(quantkit: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    shown = quantkit("eval")
    assert shown.code == 2 and "there is nothing to measure" in shown.err
