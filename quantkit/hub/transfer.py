"""How far a download is, told to a `Progress` instead of drawn by the client."""

from __future__ import annotations

import threading
from typing import Any

from tqdm import tqdm

from quantkit.progress import Progress

_BYTES = "huggingface_hub.snapshot_download"  # the client's name of the bar that counts bytes of files


class Meter:
    """Counts the bytes of a download, of `total`, and tells of them; files are fetched side by side."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._lock = threading.Lock()
        self._done = 0.0

    def restart(self, done: int) -> None:
        """Another attempt begins, with so much in place."""
        with self._lock:
            self._done = done

    def add(self, size: float) -> None:
        """`size` bytes more are there."""
        with self._lock:
            self._done += size
            self._progress.amount(int(self._done), self._total)


def bar_class(meter: Meter) -> type[Any]:
    """What to give to the client as `tqdm_class`."""

    class Bar(tqdm):  # type: ignore[misc]  # it comes without types
        """Counts, and draws nothing."""

        def __init__(self, *arguments: Any, name: str = "", **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._counts = name == _BYTES

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                meter.add(n or 0)
            return None

    return Bar
