"""Runs `convert` and kills this very process at the n-th durable step: `python -m tests.e2e.killed …`.

A durable step is a commit in the journal, or the rename that makes a finished folder count. `before`
and `after` say on which side of the step the kill falls. Prints the number of steps when it survives.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantkit
from quantkit.run import export, store
from tests.e2e.runs import recipe


def main() -> None:
    source, calibration, evaluation, out, side, number = sys.argv[1:7]
    count = 0

    def deadly(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            last = count == int(number)
            if last and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = step(*arguments)
            if last and side == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    store.RunStore._append = deadly(store.RunStore._append)  # type: ignore[method-assign]
    export.replace_dir = deadly(export.replace_dir)
    made = recipe(Path(source), Path(calibration), Path(evaluation), Path(out), *sys.argv[7:])
    quantkit.convert(made)
    sys.stdout.write(f"{count}\n")


if __name__ == "__main__":
    main()
