"""How far a download is, told to a `Progress` instead of drawn by the client."""

from __future__ import annotations

import threading
import time
from typing import Any

from tqdm import tqdm

from quantkit.recipe.sizes import format_size
from quantkit.run.progress import Progress

_EVERY = 5.0  # seconds between two lines
_BYTES = "huggingface_hub.snapshot_download"  # the client's name of the bar that counts bytes of files


def bar_class(progress: Progress, total: int) -> type[Any]:
    """What to give to the client as `tqdm_class`; total: bytes of all files that are to come."""
    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]  # it comes without types
        """Counts, and draws nothing; files are fetched side by side, each by a thread that updates it."""

        def __init__(self, *arguments: Any, name: str = "", **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._counts = name == _BYTES
            self._done, self._told = 0.0, time.monotonic()

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self._done += n or 0
                now = time.monotonic()
                if self._counts and now - self._told >= _EVERY:
                    self._told = now
                    progress.step("download", f"{format_size(int(self._done))} of {format_size(total)}")
            return None

    return Bar
