"""`kill -9` at every durable step, then the same command: identical bytes of every output file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.killed import FAILED
from tests.e2e.runs import sums

ROOT = Path(__file__).parents[2]
# rewritten norms, scales of inputs and of a cache, nested scales, scales of two levels, a stream of its own
TARGETS = (
    "compressed_tensors:w8a8_static@transforms=smoothquant,alpha=0.5,kv_cache=fp8",
    "bitsandbytes:nf4g32_dq",
    "compressed_tensors:nvfp4@feedback=true",
)
Run = Callable[[str, int], int]


@pytest.fixture
def run(checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path) -> Iterator[Run]:
    """Runs the conversion up to one side of a step; its exit code, see `tests.e2e.killed`."""
    where = [str(x) for x in (checkpoint, calibration_text, evaluation_text, tmp_path / "out")]
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.killed", *where, *TARGETS],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process:
            assert process.stdin is not None and process.stdout is not None

            def ask(side: str, number: int) -> int:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(f"{side} {number}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                assert answer.strip() not in ("", str(FAILED)), (tmp_path / "errors").read_text()
                return int(answer)

            yield ask
            process.stdin.close()


def test_kill_at_every_step_gives_identical_bytes(run: Run, tmp_path: Path) -> None:
    # one output folder for all: its name is part of the resolved recipe
    out = tmp_path / "out"
    assert run("never", 0) == 2 + 1 + 3, "two blocks, the evaluation, three folders"
    expected = sums(out)
    assert len([p for p in expected if p.endswith(".safetensors")]) == 3
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
        (2, "before"),
    ):
        assert run(side, number) == -signal.SIGKILL
        for folder in out.iterdir():
            if folder.is_dir() and folder.name != ".quantkit" and not folder.name.endswith(".partial"):
                assert (folder / "quantkit.json").is_file(), "a folder looks complete and is not"
    assert run("never", 0) == 1, "only the last folder was missing"
    assert sums(out) == expected
