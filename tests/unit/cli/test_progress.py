from __future__ import annotations

import io
import json
import time

import pytest

from quantkit.cli.output import Output
from quantkit.cli.progress import Bar, Events, Lines, Off, OnlyWarnings, block_text, choose, clock, eta_text
from quantkit.run.progress import SILENT, BlockError, BlockInfo, Eta, Progress

INFO = BlockInfo(2.0, 100, {"a": BlockError(0.001, 0.01, "down_proj")}, 9_800_000_000, 1_000_000, 2)


def play(progress: Progress) -> None:
    progress.step("calibrate", "8 rows")
    progress.step("sweep")
    progress.start(300, 2)
    progress.tensor("a", "x.weight", 0.001)
    progress.block(0, INFO)
    progress.note("a [note]")
    progress.warn("a [warning]")
    progress.finish()


def test_eta_is_unknown_before_the_first_block() -> None:
    assert Eta(100).seconds is None
    assert eta_text(None) == eta_text(Eta(100)) == "~"


def test_eta_goes_by_parameters() -> None:
    eta = Eta(400, weight=0.5)
    eta.update(100, 0.0)  # resumed: shortens what is left, says nothing about speed
    assert eta.seconds is None
    eta.update(100, 10.0)
    assert eta.seconds == pytest.approx(200 * 0.1)
    eta.update(100, 30.0)  # the rate moves half way from 0.1 to 0.3 s
    assert eta.seconds == pytest.approx(100 * 0.2)
    eta.update(500, 1.0)
    assert eta.seconds == 0


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.9, 3600, 100 * 3600 + 61)] == [
        "00:00:00",
        "00:00:59",
        "01:00:00",
        "100:01:01",
    ]


def test_block_text() -> None:
    assert block_text(0, 2, INFO) == (
        "block 1/2  2.0 s  a error 1.0e-03 (worst 1.0e-02 down_proj)  2 fallbacks  "
        "RAM 9.80 GB  streams 1.00 MB"
    )


def test_lines() -> None:
    stream = io.StringIO()
    with Lines(stream) as progress:
        play(progress)
    lines = stream.getvalue().splitlines()
    assert [line[11:] for line in lines] == [
        "calibrate  8 rows",
        "sweep",
        "300 parameters in 2 blocks",
        f"{block_text(0, 2, INFO)}  eta 00:00:04",
        "a [note]",
        "warning: a [warning]",
    ]
    assert "\x1b" not in stream.getvalue()


def test_lines_say_that_work_goes_on() -> None:
    stream = io.StringIO()
    with Lines(stream, silence=0.02) as progress:
        progress.step("sweep")
        deadline = time.monotonic() + 5
        while "still working: sweep  eta ~" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "still working: sweep  eta ~" in stream.getvalue()


def test_events() -> None:
    stream = io.StringIO()
    with Events(stream) as progress:
        play(progress)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == [
        "step", "step", "start", "tensor", "block", "note", "warning", "finish",
    ]  # fmt: skip
    assert events[4]["eta_s"] == pytest.approx(4.0)
    assert events[4]["errors"]["a"]["worst_name"] == "down_proj"
    assert all("elapsed_s" in event for event in events)


def test_bar_keeps_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(color=False) as progress:
        play(progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in ("down_proj", "a [note]", "warning: a [warning]"):
        assert text in shown.err


def test_quiet_ways(capsys: pytest.CaptureFixture[str]) -> None:
    play(SILENT)
    with Off() as progress:
        play(progress)
    assert capsys.readouterr().err == ""
    with OnlyWarnings() as progress:
        play(progress)
    assert capsys.readouterr().err == "warning: a [warning]\n"


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(choose(Output())) is Lines
    assert type(choose(Output(progress="json"))) is Events
    assert type(choose(Output(progress="off"))) is OnlyWarnings
    assert type(choose(Output(progress="bar"))) is Bar
    assert type(choose(Output(quiet=True, progress="bar"))) is Off
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert type(choose(Output())) is Bar
