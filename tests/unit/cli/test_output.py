from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.logs import masked, set_up
from quantkit.cli.output import Output, plain, to_json
from quantkit.errors import UsageError
from quantkit.table import Table

TABLE = Table("title", ("name", "size"), (("a", "10 GB"), ("long", "[1]")), ("a note",), ("too big",))


def test_plain() -> None:
    assert plain(TABLE).splitlines() == [
        "title",
        " name  size",
        " a     10 GB",
        " long  [1]",
        " ✗ too big",
        " a note",
    ]


def test_a_table_without_rows_or_title() -> None:
    assert plain(Table("", ("a",), ())) == ""
    assert plain(Table("done", (), ())) == "done"


def test_rows_must_fit_the_columns() -> None:
    with pytest.raises(ValueError, match="2 cells under 1 columns"):
        Table("", ("a",), (("b", "c"),))


def test_results_in_each_mode(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(output: Output) -> str:
        output.result(
            "plan", [TABLE, TABLE], {"size_bytes": 1.5, "at": Path("x")}, [Path("out/a"), Path("out/b")]
        )
        return capsys.readouterr().out

    assert shown(Output()) == f"{plain(TABLE)}\n\n{plain(TABLE)}\n"
    assert shown(Output(quiet=True)) == "out/a\nout/b\n"
    assert json.loads(shown(Output(as_json=True))) == {
        "schema": "quantkit/plan/1",
        "status": "ok",
        "size_bytes": 1.5,
        "at": "x",
    }


def test_talk_and_previews_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Output().talk("hello")
    Output().preview(TABLE)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"hello\n{plain(TABLE)}\n"
    Output(quiet=True).talk("hello")
    Output(quiet=True).preview(TABLE)
    assert capsys.readouterr().err == ""


def test_terminals_get_the_same_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Output(color=False).result("plan", [TABLE], {})
    out = capsys.readouterr().out
    for word in ("title", "10 GB", "[1]", "✗ too big", "a note"):
        assert word in out


def test_numbers_that_json_does_not_know() -> None:
    assert json.loads(to_json({"a": [float("nan"), (float("inf"), 1)], "b": "é"})) == {
        "a": [None, [None, 1]],
        "b": "é",
    }


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "run.log"
    logger = logging.getLogger("quantkit.test")
    set_up(0, False, str(path))
    try:
        logger.debug("token hf_abcdefghijklmnop")
        logger.warning("careful")
    finally:
        set_up(0, False, None)
    assert capsys.readouterr().err == "WARNING careful\n"
    text = path.read_text()
    assert "token hf_***" in text
    assert "careful" in text
    assert masked("hf_short hf_abcdefghijklmnop") == "hf_short hf_***"


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        set_up(0, False, str(tmp_path))


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = {
        "as_json": False, "quiet": False, "verbose": 0,
        "no_color": False, "progress": "auto", "log_file": None,
    }  # fmt: skip
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Output.from_flags(flags).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Output.from_flags(flags).color


def test_every_command_has_the_same_ways_to_talk(quantkit: Callable[..., Any]) -> None:
    for command in (["convert"], ["plan"], ["inspect"], ["formats"], ["doctor"], ["recipes", "list"]):
        shown = quantkit(*command, "--help").out
        for flag in ("--json", "--progress", "--quiet", "--verbose", "--no-color", "--log-file"):
            assert flag in shown
