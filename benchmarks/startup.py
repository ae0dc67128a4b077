"""Processor time of `quantkit --help`, which must stay under .3 s: people type it all day.

python -m benchmarks.startup
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.record import ROOT, save


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def main() -> None:
    ours = [sys.executable, "-m", "quantkit", "--help"]
    empty = [sys.executable, "-c", "pass"]
    for command in (ours, empty):
        cpu_seconds(command)
    helped = statistics.median(cpu_seconds(ours) for _ in range(9))
    bare = statistics.median(cpu_seconds(empty) for _ in range(9))
    save(
        "startup", {"help_cpu_seconds": helped, "empty_interpreter_cpu_seconds": bare, "ratio": helped / bare}
    )
    print(f"quantkit --help: {helped:.3f} s of processor time; an empty interpreter: {bare:.3f} s")


if __name__ == "__main__":
    main()
