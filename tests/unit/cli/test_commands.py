from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from quantkit import __version__
from quantkit.errors import Interrupted, UnsupportedError
from quantkit.recipe.load import load_recipe
from quantkit.table import Table


@dataclass
class Library:
    """Stands in for the run layer; `calls` are the arguments it got."""

    blockers: tuple[str, ...] = ()
    broken_gates: tuple[str, ...] = ()
    unsound: tuple[str, ...] = ()
    error: Exception | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def plan(self, recipe: Any, **how: Any) -> Any:
        def check() -> None:
            if self.blockers:
                raise UnsupportedError("; ".join(self.blockers))

        self.calls.append({"recipe": recipe, **how})
        status = {"status": "blocked"} if self.blockers else {}
        table = Table("the plan", ("target",), (("gptq-w4g128",),), blockers=self.blockers)
        return SimpleNamespace(table=lambda: table, to_json=lambda: {"peak": 1, **status}, check=check)

    def convert(self, recipe: Any, *, progress: Any, stop: Event, **how: Any) -> Any:
        self.calls.append({"recipe": recipe, **how})
        progress.step("sweep")
        progress.warn("careful")
        if self.error is not None:
            raise self.error
        table = Table("the result", ("target",), tuple((t.name,) for t in recipe.targets))
        targets = [SimpleNamespace(folder=t.name) for t in recipe.targets]
        return SimpleNamespace(
            table=lambda: table,
            to_json=lambda: {"targets": []},
            targets=targets,
            broken_gates=self.broken_gates,
            unsound=self.unsound,
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, fakes: object) -> Library:
    found = Library()
    for name in ("plan", "convert"):
        module = ModuleType(f"quantkit.run.{name}")
        vars(module)[name] = getattr(found, name)
        monkeypatch.setitem(sys.modules, f"quantkit.run.{name}", module)
    return found


def test_plan(quantkit: Callable[..., Any], library: Library) -> None:
    shown = quantkit("plan", "x", "--to", "gptq", "--offline", "--cache-dir", "c")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == "the plan\n target\n gptq-w4g128\n"
    assert library.calls[0]["offline"] is True
    assert library.calls[0]["cache_dir"] == Path("c")
    document = json.loads(quantkit("plan", "x", "--to", "gptq", "--json").out)
    assert document == {"schema": "quantkit/plan/1", "status": "ok", "peak": 1}
    assert quantkit("convert", "x", "--to", "gptq", "--dry-run").out == shown.out


def test_a_plan_with_blockers(quantkit: Callable[..., Any], library: Library) -> None:
    library.blockers = ("80 is not a multiple of 128",)
    shown = quantkit("plan", "x", "--to", "gptq")
    assert shown.code == 2
    assert "✗ 80 is not a multiple of 128" in shown.out
    shown = quantkit("plan", "x", "--to", "gptq", "--json")
    assert shown.code == 2
    assert json.loads(shown.out)["status"] == "blocked"
    shown = quantkit("convert", "x", "--to", "gptq")
    assert shown.code == 2
    assert "error: 80 is not a multiple of 128" in shown.err
    assert shown.out == ""


def test_convert(quantkit: Callable[..., Any], library: Library) -> None:
    shown = quantkit("convert", "x", "--to", "gptq", "-o", "o", "--restart")
    assert shown.code == 0
    assert shown.out == "the result\n target\n gptq-w4g128\n"
    assert shown.err.startswith("the plan\n")
    assert "warning: careful" in shown.err
    assert library.calls[-1]["restart"] is True
    quiet = quantkit("convert", "x", "--to", "gptq", "-o", "o", "-q")
    assert (quiet.out, quiet.err) == (f"{Path('o') / 'gptq-w4g128'}\n", "")
    both = quantkit("convert", "x", "--to", "gptq", "--json", "--progress", "json")
    assert json.loads(both.out)["schema"] == "quantkit/convert/1"
    events = [json.loads(line)["event"] for line in both.err.splitlines() if line.startswith("{")]
    assert events == ["step", "warning", "finish"]


def test_an_engine_that_does_not_agree_shows_the_results(
    quantkit: Callable[..., Any], library: Library
) -> None:
    library.unsound = ("gptq-w4g128: transformers 5: it does not load",)
    shown = quantkit("convert", "x", "--to", "gptq")
    assert shown.code == 1
    assert shown.out.startswith("the result\n") and "they are kept" in shown.err


def test_a_failed_gate_shows_the_results(quantkit: Callable[..., Any], library: Library) -> None:
    library.broken_gates = ("gptq-w4g128: kl_mean_max is 0.1, measured 0.2",)
    shown = quantkit("convert", "x", "--to", "gptq")
    assert shown.code == 4
    assert shown.out.startswith("the result\n") and "gate failed; the files are kept" in shown.err


def test_a_stopped_conversion(quantkit: Callable[..., Any], library: Library) -> None:
    library.error = Interrupted("stopped after block 3", remedy="run it again")
    shown = quantkit("convert", "x", "--to", "gptq")
    assert shown.code == 130
    assert shown.err.endswith("error: stopped after block 3\n  → run it again\n")


def test_recipes_list(quantkit: Callable[..., Any]) -> None:
    shown = quantkit("recipes", "list")
    assert "w4-gptq-vllm" in shown.out
    document = json.loads(quantkit("recipes", "list", "--json").out)
    assert {row["name"] for row in document["recipes"]} >= {"demo", "many", "w8"}
    assert all(row["summary"] for row in document["recipes"])


def test_recipes_init(quantkit: Callable[..., Any], tmp_path: Path, fakes: object) -> None:
    assert quantkit("recipes", "init", "w4-gptq", "--source", "./a: b").out == "wrote w4-gptq.yaml\n"
    path = tmp_path / "w4-gptq.yaml"
    assert load_recipe(path).source == "./a: b"
    assert "$schema=file:///" in path.read_text().splitlines()[0]
    again = quantkit("recipes", "init", "w4-gptq")
    assert (again.code, "exists" in again.err) == (2, True)
    assert quantkit("recipes", "init", "w4-gptq", "--force", "-q").out == "w4-gptq.yaml\n"
    unknown = quantkit("recipes", "init", "w4gptq")
    assert (unknown.code, "did you mean 'w4-gptq'?" in unknown.err) == (2, True)
    nowhere = quantkit("recipes", "init", "w8", "-o", "no/such/folder.yaml")
    assert (nowhere.code, "cannot be written" in nowhere.err) == (2, True)


def test_recipes_validate(quantkit: Callable[..., Any], tmp_path: Path, fakes: object) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("source: x\ntargets: [gptq]\n")
    bad.write_text("source: x\ntargets: [gptqq]\nrows: 3\n")
    shown = quantkit("recipes", "validate", "good.yaml")
    assert shown.code == 0
    assert "good.yaml  valid  gptq-w4g128" in shown.out
    shown = quantkit("recipes", "validate", "good.yaml", "bad.yaml")
    assert shown.code == 2
    assert shown.err.startswith("error: 2 problems\nbad.yaml:2:11 targets[0]: 'gptqq'")
    assert quantkit("recipes", "validate").code == 2


def test_recipes_schema(quantkit: Callable[..., Any], fakes: object) -> None:
    shown = quantkit("recipes", "schema")
    assert json.loads(shown.out)["additionalProperties"] is False


def test_doctor(quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(quantkit("doctor", "--json").out)
    assert document["quantkit"] == __version__
    assert document["packages"]["PyYAML"] == yaml.__version__
    assert document["disk_free_bytes"] > 0
    from quantkit.cli import doctor

    versions = {"llm-quantkit": "0.3", "torch": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    shown = quantkit("doctor")
    assert shown.code == 0
    assert "✗ torch is missing: pip install torch" in shown.out
    assert "pip uninstall llm-quantkit" in shown.out


def test_doctor_tells_what_downloads_left_behind(
    quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.12345678.incomplete").write_bytes(b"x" * 1000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    shown = quantkit("doctor")
    assert "1 unfinished files of 1.00 kB" in shown.out and "there is one" in shown.out
    assert "secret" not in shown.out + quantkit("doctor", "--json").out


def test_inspect_of_nothing(quantkit: Callable[..., Any]) -> None:
    shown = quantkit("inspect", "nowhere")
    assert shown.code == 2
    assert "'nowhere' is neither a folder nor a repo id" in shown.err


def test_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr("sys.argv", ["quantkit", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("quantkit", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"quantkit {__version__}\n"
