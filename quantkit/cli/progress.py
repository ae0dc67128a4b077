"""Progress on stderr: a live bar on a terminal, lines elsewhere, events with `--progress json`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any, Self

from quantkit.cli.output import Output
from quantkit.cli.printable import printable
from quantkit.progress import BlockInfo, Eta, Rate, Silent
from quantkit.recipe.sizes import format_size

SILENCE = 30.0  # seconds after which a line says that work goes on
EVERY = 5.0  # seconds between two lines about one transfer
_REDRAWN = 0.2  # and between two changes of a bar


def clock(seconds: float) -> str:
    """``01:02:03``."""
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def eta_text(eta: Eta | None) -> str:
    """Time left, or ``~`` while it is unknown."""
    return "~" if eta is None or eta.seconds is None else clock(eta.seconds)


def block_text(index: int, blocks: int, info: BlockInfo) -> str:
    """One line about a finished block."""
    parts = [f"block {index + 1}/{blocks}", f"{info.seconds:.1f} s"]
    for target, error in info.errors.items():
        worst = f"worst {error.worst:.1e} {error.worst_name}"
        parts.append(f"{target} error {error.mean:.1e} ({worst})")
    if info.fallbacks:
        parts.append(f"{info.fallbacks:,} fallbacks")
    if info.rss_bytes:
        parts.append(f"RAM {format_size(info.rss_bytes)}")
    if info.stream_bytes:
        parts.append(f"streams {format_size(info.stream_bytes)}")
    return "  ".join(parts)


@dataclass(frozen=True, slots=True)
class Moved:
    """How far a transfer is, in bytes; `per_second` None: not known yet, or it stands still."""

    done: int
    total: int
    per_second: float | None

    @property
    def seconds(self) -> float | None:
        """Time that the rest takes at this rate."""
        return None if self.per_second is None else (self.total - self.done) / self.per_second

    @property
    def text(self) -> str:
        """``1.20 GB of 4.10 GB  11.5 MB/s  eta 00:04:12``."""
        text = f"{format_size(self.done)} of {format_size(self.total)}"
        if self.per_second is None or self.seconds is None:
            return text
        return f"{text}  {format_size(int(self.per_second))}/s  eta {clock(self.seconds)}"


class Flow:
    """Bytes of one step after another; each is worth telling once in `every` seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self.begin()

    def begin(self) -> None:
        """What comes is of another step."""
        self._rate, self._due = Rate(), time.monotonic() + self._every

    def moved(self, done: int, total: int) -> Moved | None:
        """What to tell, None: nothing yet."""
        now = time.monotonic()
        self._rate.update(done, now)
        if now < self._due:
            return None
        self._due = now + self._every
        return Moved(done, total, self._rate.per_second)


class Off(Silent):
    """Says nothing but warnings."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class Lines(Off):
    """One line per event, and one at least every 30 seconds; no escape codes."""

    def __init__(self, stream: IO[str] | None = None, silence: float = SILENCE) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._silence = silence
        self._begun = self._last = time.monotonic()
        self._now = "starting"
        self._eta: Eta | None = None
        self._blocks = 0
        self._flow = Flow(EVERY)
        self._lock = threading.RLock()  # a signal handler may write while a line is being written
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._reassure, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def step(self, name: str, detail: str = "") -> None:
        self._now = name
        self._flow.begin()
        self._line(f"{name}  {detail}".rstrip())

    def start(self, total_parameters: int, blocks: int) -> None:
        self._eta, self._blocks = Eta(total_parameters), blocks
        self._line(f"{total_parameters:,} parameters in {blocks:,} blocks")

    def block(self, index: int, info: BlockInfo) -> None:
        if self._eta is not None:
            self._eta.update(info.parameters, info.seconds)
        self._now = (
            f"block {index + 2}/{self._blocks}" if index + 1 < self._blocks else "after the last block"
        )
        self._line(f"{block_text(index, self._blocks, info)}  eta {eta_text(self._eta)}")

    def amount(self, done: int, total: int) -> None:
        if (moved := self._flow.moved(done, total)) is not None:
            self._line(f"{self._now}  {moved.text}")

    def note(self, text: str) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def finish(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _line(self, text: str) -> None:
        with self._lock:
            self._last = time.monotonic()
            self._stream.write(f"[{clock(self._last - self._begun)}] {printable(text)}\n")
            self._stream.flush()

    def _reassure(self) -> None:
        wait = self._silence
        while not self._stop.wait(wait):
            quiet_for = time.monotonic() - self._last
            if quiet_for >= self._silence:
                self._line(f"still working: {self._now}  eta {eta_text(self._eta)}")
                quiet_for = 0.0
            wait = self._silence - quiet_for


class Events(Off):
    """One JSON object per line: what `--progress json` is for."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._begun = time.monotonic()
        self._eta: Eta | None = None
        self._flow = Flow(EVERY)
        self._finished = False

    def step(self, name: str, detail: str = "") -> None:
        self._flow.begin()
        self._event("step", name=name, detail=detail)

    def start(self, total_parameters: int, blocks: int) -> None:
        self._eta = Eta(total_parameters)
        self._event("start", total_parameters=total_parameters, blocks=blocks)

    def block(self, index: int, info: BlockInfo) -> None:
        left = None
        if self._eta is not None:
            self._eta.update(info.parameters, info.seconds)
            left = self._eta.seconds
        self._event("block", index=index, eta_s=left, **asdict(info))

    def tensor(self, target: str, name: str, error: float) -> None:
        self._event("tensor", target=target, name=name, error=error)

    def amount(self, done: int, total: int) -> None:
        if (moved := self._flow.moved(done, total)) is not None:
            self._event("amount", **asdict(moved), eta_s=moved.seconds)

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def warn(self, text: str) -> None:
        self._event("warning", text=text)

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._event("finish")

    def _event(self, kind: str, **fields: Any) -> None:
        from quantkit.cli.output import finite

        event = {"event": kind, "elapsed_s": round(time.monotonic() - self._begun, 3), **fields}
        self._stream.write(json.dumps(finite(event), ensure_ascii=False) + "\n")
        self._stream.flush()


class Bar(Off):
    """A live line under the lines of finished blocks, drawn by rich."""

    def __init__(self, *, color: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, no_color=not color, highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, count="", eta="")
        self._eta: Eta | None = None
        self._blocks = 0
        self._flow = Flow(_REDRAWN)
        self._detail = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def step(self, name: str, detail: str = "") -> None:
        self._flow.begin()
        self._detail = f"{name}  {detail}"
        # A new task, because rich cannot take the total of a task away again.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=None, count=detail, eta="")

    def start(self, total_parameters: int, blocks: int) -> None:
        self._eta, self._blocks = Eta(total_parameters), blocks
        self._bar.update(self._task, total=total_parameters, completed=0, count=f"0/{blocks}", eta="eta ~")

    def block(self, index: int, info: BlockInfo) -> None:
        if self._eta is not None:
            self._eta.update(info.parameters, info.seconds)
        self.note(block_text(index, self._blocks, info))
        count, eta = f"{index + 1}/{self._blocks}", f"eta {eta_text(self._eta)}"
        self._bar.update(self._task, advance=info.parameters, count=count, eta=eta)

    def tensor(self, target: str, name: str, error: float) -> None:
        self._bar.update(self._task, description=f"{target}  {name}  error {error:.1e}")

    def amount(self, done: int, total: int) -> None:
        if (moved := self._flow.moved(done, total)) is None:
            return
        if self._detail:  # has no room beside the numbers in a narrow window
            self.note(self._detail)
            self._detail = ""
        self._bar.update(self._task, total=total, completed=done, count="", eta=moved.text)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def finish(self) -> None:
        self._bar.stop()


class OnlyWarnings(Off):
    """What `--progress off` leaves."""

    def warn(self, text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")


def choose(output: Output) -> Off:
    """The progress that the flags and the terminal ask for."""
    if output.quiet:
        return Off()
    makers: dict[str, Callable[[], Off]] = {
        "bar": lambda: Bar(color=output.color),
        "lines": Lines,
        "json": Events,
        "off": OnlyWarnings,
    }
    mode = output.progress
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    return makers[mode]()
