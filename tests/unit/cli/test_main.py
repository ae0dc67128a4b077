from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import quantkit as package
from quantkit.cli import main as main_module
from quantkit.errors import (
    BudgetError,
    GateError,
    HubError,
    Interrupted,
    QuantkitError,
    RecipeError,
    ResumeError,
    SourceError,
    UsageError,
)

HEAVY = ("torch", "transformers", "huggingface_hub", "rich", "yaml", "numpy")


def imported_by(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has imported after `code`."""
    report = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(package.__file__).parents[1],
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "--help"], ["convert", "--help"], ["recipes", "--help"], ["--version"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(f"from quantkit.cli.main import run\nassert run({arguments!r}) == 0") == set()


@pytest.mark.parametrize(
    "module",
    [
        "quantkit",
        "quantkit.recipe.spec",
        "quantkit.recipe.shorthand",
        "quantkit.progress",
        "quantkit.table",
    ],
)
def test_imports_are_cheap(module: str) -> None:
    assert imported_by(f"import {module}") == set()


def test_reading_yaml_needs_no_torch() -> None:
    assert imported_by("import quantkit.recipe.load, quantkit.recipe.schema, quantkit.recipe.dump") <= {
        "yaml"
    }


def test_first_screen(quantkit: Callable[..., Any]) -> None:
    shown = quantkit("--help")
    assert shown.code == 0
    assert len(shown.out.splitlines()) < 30
    for word in ("Examples:", "Make:", "Look:", "Share:", *main_module.EXAMPLES):
        assert word in shown.out
    bare = quantkit()
    assert (bare.code, bare.out) == (0, shown.out)


def test_short_help_is_the_same_in_both_places() -> None:
    with click.Context(main_module.cli) as context:
        for commands in main_module.COMMANDS.values():
            for name, text in commands.items():
                command = main_module.cli.get_command(context, name)
                assert command is not None
                assert (command.help or "").startswith(text)


def test_version(quantkit: Callable[..., Any]) -> None:
    assert quantkit("--version").out == f"quantkit {package.__version__}\n"


def test_public_names_exist() -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert dir(package) == sorted(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (["convrt"], "No such command 'convrt'. Did you mean 'convert'?", "try 'quantkit --help'"),
        (["plan", "--calib-row", "3"], "'--calib-row'", "try 'quantkit plan --help'"),
        (
            ["plan", "x", "--calib-rows", "many"],
            "'many' is not a valid integer",
            "try 'quantkit plan --help'",
        ),
        (["plan", "x", "--dtype", "fp8"], "'fp8' is not one of", "try 'quantkit plan --help'"),
        (["recipes", "lst"], "Did you mean 'list'?", "try 'quantkit recipes --help'"),
    ],
)
def test_wrong_flags(quantkit: Callable[..., Any], arguments: list[str], message: str, remedy: str) -> None:
    shown = quantkit(*arguments)
    assert shown.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert f"→ {remedy}" in shown.err
    document = json.loads(quantkit(*arguments, "--json").out)
    assert document["status"] == "error"
    assert document["error"]["kind"] == "UsageError"
    assert document["error"]["code"] == 2
    assert document["error"]["remedy"] == remedy


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the command line fail with `error` whatever it is asked."""

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main_module.cli, "main", fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a", remedy="b"), 2),
        (RecipeError("a"), 2),
        (SourceError("a"), 2),
        (ResumeError("a", differences=["x"]), 2),
        (BudgetError("a", needed=2, available=1), 1),
        (HubError("a"), 3),
        (GateError("a"), 4),
        (Interrupted("a"), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, QuantkitError) else "",
)
def test_exit_codes(
    quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: QuantkitError, code: int
) -> None:
    failing(monkeypatch, error)
    shown = quantkit("plan", "--json")
    assert shown.code == code
    assert json.loads(shown.out)["error"] == {
        "kind": type(error).__name__,
        "message": error.message,
        "remedy": error.remedy,
        "code": code,
    }
    assert shown.err == f"error: {error}\n"
    assert "Traceback" in quantkit("plan", "-vv").err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()], ids=repr)
def test_interrupt(
    quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing(monkeypatch, error)
    shown = quantkit("convert")
    assert shown.code == 130
    assert "run the same command again" in shown.err


def test_several_problems_are_counted(quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RecipeError(["r.yaml:1:1 a", "r.yaml:2:1 b"]))
    assert quantkit().err == "error: 2 problems\nr.yaml:1:1 a\nr.yaml:2:1 b\n"


def test_a_bug_leaves_a_report(
    quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, ZeroDivisionError("hf_abcdefghijklmnop"))
    shown = quantkit("convert", "--token", "hf_abcdefghijklmnop")
    assert shown.code == 1
    assert "a bug in quantkit: ZeroDivisionError" in shown.err
    assert "Traceback" not in shown.err
    (report,) = tmp_path.glob("quantkit-crash-*.txt")
    assert str(report) in shown.err
    text = report.read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError" in text
    assert "hf_abcdefghijklmnop" not in text
    assert "Traceback" in quantkit("convert", "-vv").err


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        ([], 0),
        (["-v"], 1),
        (["-vv"], 2),
        (["-v", "x", "-v"], 2),
        (["--verbose", "-v"], 2),
        (["--version"], 0),
    ],
)
def test_verbosity(arguments: list[str], level: int) -> None:
    assert main_module._verbosity(arguments) == level
