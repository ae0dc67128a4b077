"""Runs `convert` and kills it at the n-th durable step: `python -m tests.e2e.killed SOURCE … TARGET…`.

A durable step is a commit in the journal, or the rename that makes a finished folder count. Each line of
stdin, `before 2` or `after 1`, says on which side of which step the kill falls; `never 0` lets the run end.
Every run is a process of its own, forked after the imports. The answer to a line is its exit code: minus the
signal that ended it, or the number of steps when it survived.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantkit
from quantkit.recipe.spec import Recipe
from quantkit.run import export, store
from tests.e2e.runs import recipe

FAILED = 99


def convert(made: Recipe, side: str, number: int) -> int:
    """The number of durable steps."""
    count = 0

    def deadly(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = step(*arguments)
            if count == number and side == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    store.RunStore._append = deadly(store.RunStore._append)  # type: ignore[method-assign]
    export.replace_dir = deadly(export.replace_dir)
    quantkit.convert(made)
    return count


def main() -> None:
    made = recipe(*(Path(argument) for argument in sys.argv[1:5]), *sys.argv[5:])
    # imports what a run will need
    quantkit.plan(made)
    for line in sys.stdin:
        side, number = line.split()
        child = os.fork()
        if child == 0:
            try:
                os._exit(convert(made, side, int(number)))
            except BaseException:
                traceback.print_exc()
                os._exit(FAILED)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
