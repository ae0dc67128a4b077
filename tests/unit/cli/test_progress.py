from __future__ import annotations

import io
import json
import time

import pytest

from quantkit.cli.output import Output
from quantkit.cli.progress import (
    Bar,
    Events,
    Flow,
    Lines,
    Moved,
    Off,
    OnlyWarnings,
    block_text,
    choose,
    clock,
    eta_text,
)
from quantkit.progress import SILENT, BlockError, BlockInfo, Eta, Progress, Rate

INFO = BlockInfo(2.0, 100, {"a": BlockError(0.001, 0.01, "down_proj")}, 9_800_000_000, 1_000_000, 2)


def play(progress: Progress) -> None:
    progress.step("calibrate", "8 rows")
    progress.step("sweep")
    progress.start(300, 2)
    progress.tensor("a", "x.weight", 0.001)
    progress.block(0, INFO)
    progress.amount(5, 10)  # too early to be told
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


def test_rate_of_the_last_half_minute() -> None:
    rate = Rate(span=30.0)
    assert rate.per_second is None
    for second in range(101):  # 10 bytes in each, then 20
        rate.update(10 * second, float(second))
    assert rate.per_second == pytest.approx(10)
    for second in range(101, 116):
        rate.update(1000 + 20 * (second - 100), float(second))
    assert rate.per_second == pytest.approx(15)
    for second in range(116, 200):
        rate.update(1000 + 20 * (second - 100), float(second))
    assert rate.per_second == pytest.approx(20)


def test_rate_of_what_stands_still_or_begins_anew() -> None:
    rate = Rate()
    rate.update(500, 1.0)
    assert rate.per_second is None
    rate.update(700, 3.0)
    assert rate.per_second == 100
    rate.update(200, 4.0)  # sent once more, so that what was measured says nothing
    assert rate.per_second is None
    rate.update(260, 6.0)
    assert rate.per_second == 30
    for second in range(7, 60):
        rate.update(260, float(second))
    assert rate.per_second is None


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("quantkit.cli.progress.time", found)
    return found


def test_moved() -> None:
    assert Moved(1_200_000_000, 4_100_000_000, None).text == "1.20 GB of 4.10 GB"
    moved = Moved(1_200_000_000, 4_100_000_000, 11_500_000.0)
    assert moved.text == "1.20 GB of 4.10 GB  11.5 MB/s  eta 00:04:12"


def test_a_flow_is_told_once_in_a_while(clocked: Clock) -> None:
    flow = Flow(5.0)
    told = []
    for second in range(12):
        clocked.now = 100.0 + second
        told.append(flow.moved(second * 10, 1000))
    assert [second for second, moved in enumerate(told) if moved] == [5, 10]
    assert told[10] == Moved(100, 1000, 10.0)
    flow.begin()  # what was there before is no speed of what begins now
    clocked.now = 117.0
    assert flow.moved(900, 1000) == Moved(900, 1000, None)


def transfer(progress: Progress, clocked: Clock) -> None:
    """Two files at 10 MB/s; of the second, half is sent once more."""
    for n in (1, 2):
        progress.step("upload", f"model-{n}.gguf (100 MB, {n} of 2)")
        for second in range(11):
            progress.amount((n - 1) * 100_000_000 + second * 10_000_000, 200_000_000)
            clocked.now += 1
    progress.amount(150_000_000, 200_000_000)


def test_lines_of_a_transfer(clocked: Clock) -> None:
    stream = io.StringIO()
    transfer(Lines(stream), clocked)
    assert [line[11:] for line in stream.getvalue().splitlines()] == [
        "upload  model-1.gguf (100 MB, 1 of 2)",
        "upload  50.0 MB of 200 MB  10.0 MB/s  eta 00:00:15",
        "upload  100 MB of 200 MB  10.0 MB/s  eta 00:00:10",
        "upload  model-2.gguf (100 MB, 2 of 2)",
        "upload  150 MB of 200 MB  10.0 MB/s  eta 00:00:05",
        "upload  200 MB of 200 MB  10.0 MB/s  eta 00:00:00",
    ]


def test_events_of_a_transfer(clocked: Clock) -> None:
    stream = io.StringIO()
    transfer(Events(stream), clocked)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["step", "amount", "amount"] * 2
    told = {"event": "amount", "elapsed_s": 5.0, "done": 50_000_000, "total": 200_000_000}
    assert events[1] == told | {"per_second": 10_000_000.0, "eta_s": 15.0}


def test_bar_of_a_transfer(clocked: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(color=False) as progress:
        transfer(progress, clocked)
        (task,) = progress._bar.tasks
        assert (task.completed, task.total) == (150_000_000, 200_000_000)
        assert task.fields["eta"] == "150 MB of 200 MB"
    shown = capsys.readouterr().err
    for n in (1, 2):  # stays above the bar, once
        assert shown.count(f"upload  model-{n}.gguf (100 MB, {n} of 2)") == 1


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
