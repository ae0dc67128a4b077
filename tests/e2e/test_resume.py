"""`kill -9` at every durable step, then the same command: identical bytes of every output file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import sums

ROOT = Path(__file__).parents[2]
TARGETS = ("gptq:w4g32", "compressed_tensors:w4g32@feedback=true")


def run(
    source: Path, calibration: Path, evaluation: Path, out: Path, side: str, number: int
) -> subprocess.CompletedProcess[str]:
    arguments = [str(x) for x in (source, calibration, evaluation, out, side, number, *TARGETS)]
    return subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kill_at_every_step_gives_identical_bytes(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    inputs = (checkpoint, calibration_text, evaluation_text)
    # one output folder for all: its name is part of the resolved recipe
    out = tmp_path / "out"
    whole = run(*inputs, out, "never", 0)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout.splitlines()[-1])
    assert steps == 2 + 1 + 2, "two blocks, the evaluation, two folders"
    expected = sums(out)
    assert len([p for p in expected if p.endswith(".safetensors")]) == 2
    out.rename(tmp_path / "uninterrupted")
    # killed before and after each step in turn: all runs but the last die, each continues the one before
    for number, side in (
        (1, "before"),
        (1, "after"),
        (1, "before"),
        (2, "before"),
        (1, "after"),
        (1, "after"),
        (1, "before"),
    ):
        died = run(*inputs, out, side, number)
        assert died.returncode == -signal.SIGKILL, died.stderr
        for folder in out.iterdir():
            if folder.is_dir() and folder.name != ".quantkit" and not folder.name.endswith(".partial"):
                assert (folder / "quantkit.json").is_file(), "a folder looks complete and is not"
    finished = run(*inputs, out, "never", 0)
    assert finished.returncode == 0, finished.stderr
    assert sums(out) == expected
