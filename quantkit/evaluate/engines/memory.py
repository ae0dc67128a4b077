"""How much memory this process has taken at most, since a moment of its choice."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR, _KILL_FIRST = (Path("/proc/self") / n for n in ("status", "clear_refs", "oom_score_adj"))
_PEAK_SO_FAR = "5"  # what resets VmHWM, see proc(5)


class Peak:
    """The growth of the peak resident set from here on.

    On Linux the kernel's own record of it is reset first: `ru_maxrss` would not do, which a process inherits
    from the one that started it.
    """

    def __init__(self) -> None:
        try:
            _CLEAR.write_text(_PEAK_SO_FAR)
        except OSError:
            pass  # without it what importing took counts where it was more
        self._before = _status("VmRSS") or _largest()

    def bytes(self) -> int:
        return max(0, (_status("VmHWM") or _largest()) - self._before)


def kill_first() -> None:
    """Where memory runs out, Linux shall end this process rather than the one that waits for it."""
    try:
        _KILL_FIRST.write_text("1000")
    except OSError:
        pass


def _status(name: str) -> int | None:
    """Bytes; None where there is no such thing."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _largest() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
