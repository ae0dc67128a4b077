"""`Progress`: what a run tells while it works. Passed in, silent by default."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockError:
    """Relative output error of one target over the weights of a block."""

    mean: float
    worst: float
    worst_name: str


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known once a block is committed. `errors` by target name; sizes in bytes."""

    seconds: float
    parameters: int
    errors: Mapping[str, BlockError] = field(default_factory=dict)
    rss_bytes: int = 0
    stream_bytes: int = 0
    fallbacks: int = 0


class Progress(Protocol):
    """Receives events in order: `step`, `start`, then `tensor`s and a `block` for each block, `finish`."""

    def step(self, name: str, detail: str = "") -> None:
        """A pipeline step begins: calibrate, sweep, export, verify, evaluate."""

    def start(self, total_parameters: int, blocks: int) -> None:
        """The sweep knows its size; resumed blocks are reported like others, with their parameters."""

    def block(self, index: int, info: BlockInfo) -> None:
        """Block `index` is committed."""

    def tensor(self, target: str, name: str, error: float) -> None:
        """A weight is quantized; `error` is relative to its output."""

    def amount(self, done: int, total: int) -> None:
        """Bytes of what the current step is about, often; fewer than before where some go once more.

        May come from another thread than the rest.
        """

    def note(self, text: str) -> None:
        """Something worth a line."""

    def warn(self, text: str) -> None:
        """Something the user should know."""

    def finish(self) -> None:
        """Nothing follows."""


class Silent:
    """A `Progress` that says nothing."""

    def step(self, name: str, detail: str = "") -> None: ...

    def start(self, total_parameters: int, blocks: int) -> None: ...

    def block(self, index: int, info: BlockInfo) -> None: ...

    def tensor(self, target: str, name: str, error: float) -> None: ...

    def amount(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def finish(self) -> None: ...


SILENT: Progress = Silent()


class Eta:
    """Remaining seconds from an exponential average of the time per parameter.

    Blocks differ in size, so time is counted per parameter. A resumed block has taken no time
    (seconds = 0) and only shortens what is left.
    """

    def __init__(self, total_parameters: int, weight: float = 0.3) -> None:
        self._left = total_parameters
        self._weight = weight
        self._rate: float | None = None

    def update(self, parameters: int, seconds: float) -> None:
        """One block is done."""
        self._left = max(0, self._left - parameters)
        if parameters > 0 and seconds > 0:
            rate = seconds / parameters
            self._rate = rate if self._rate is None else self._rate + self._weight * (rate - self._rate)

    @property
    def seconds(self) -> float | None:
        """Seconds left; None before the first block."""
        return None if self._rate is None else self._rate * self._left


class Rate:
    """Bytes per second over the last `span` seconds.

    Where fewer bytes are done than before, they go once more, and what was measured is forgotten.
    """

    def __init__(self, span: float = 30.0) -> None:
        self._span = span
        self._seen: deque[tuple[float, int]] = deque()
        self._last = (0.0, 0)

    def update(self, done: int, now: float) -> None:
        """`done` bytes at `now`, in seconds of any clock that does not go back."""
        if done < self._last[1]:
            self._seen.clear()
        if not self._seen or now - self._seen[-1][0] >= self._span / 100:
            self._seen.append((now, done))
        while len(self._seen) > 1 and now - self._seen[1][0] >= self._span:
            self._seen.popleft()
        self._last = (now, done)

    @property
    def per_second(self) -> float | None:
        """None where nothing moved, or only one moment is known."""
        if not self._seen:
            return None
        (begun, before), (now, done) = self._seen[0], self._last
        return (done - before) / (now - begun) if now > begun and done > before else None
