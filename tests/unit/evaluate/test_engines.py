"""Whatever becomes of an engine, the process that asked it lives on and is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantkit.evaluate import engines
from quantkit.evaluate.engines import Answer, Request, process
from quantkit.evaluate.engines.memory import Peak

Ask = Callable[..., tuple[Answer, object]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks the engine of `tests.fake_engine` to behave in some way."""
    monkeypatch.setattr(process, "_WORKER", "tests.fake_engine")

    def ask(how: str, seconds: float = 30.0, device: str = "cpu") -> tuple[Answer, object]:
        return engines.ask(Request("hqq", str(tmp_path / how), (1, 2), device, seconds=seconds))

    return ask


def test_logits_and_memory(asked: Ask) -> None:
    answer, found = asked("fine")
    assert answer.stage == "done" and answer.version == "7.0" and answer.problem is None
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (2, 3)
    assert answer.peak_bytes is not None and 60e6 < answer.peak_bytes < 120e6


def test_memory_of_a_gpu_is_what_the_engine_says(asked: Ask) -> None:
    assert asked("fine", device="cuda")[0].peak_bytes == 5


@pytest.mark.parametrize(
    ("how", "stage", "problem"),
    [
        ("crash", "loading", "it crashed (SIGABRT): assertion failed: rows % 4 == 0"),
        ("exit", "loading", "it ended with exit status 3"),
        ("bug", "loading", "KeyError: 'weight'"),
        ("refuse", "loading", "no such tensor in refuse"),
        ("broken", "starting", "ImportError: libnothing.so: cannot open shared object file"),
    ],
)
def test_failures_are_told(how: str, stage: str, problem: str, asked: Ask) -> None:
    answer, found = asked(how)
    assert found is None and answer.stage == stage and not answer.starved
    assert answer.problem is not None and answer.problem.startswith(problem)


@pytest.mark.parametrize(
    ("how", "problem"),
    [("kill", "it was killed, as the system"), ("starve", "RuntimeError: DefaultCPUAllocator")],
)
def test_memory_that_ran_out(how: str, problem: str, asked: Ask) -> None:
    answer, _ = asked(how)
    assert answer.starved and answer.problem is not None and answer.problem.startswith(problem)


def test_an_engine_that_never_ends_is_ended_with_all_it_started(asked: Ask, tmp_path: Path) -> None:
    answer, _ = asked("hang", seconds=2.0)
    assert answer.problem == "it gave no answer within 2 s" and answer.stage == "loading" and answer.late
    started = Path(f"/proc/{(tmp_path / 'hang').read_text()}/status")
    assert any(_is_gone(started) for _ in range(200))


def _is_gone(status: Path) -> bool:
    """Whether a process has ended; one that was killed does so when the system comes to it."""
    try:
        if "State:\tZ" in status.read_text():
            return True
    except (FileNotFoundError, ProcessLookupError):
        return True
    time.sleep(0.02)
    return False


def test_the_environment_of_an_engine(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.setenv(name, "hf_secretsecret")
    monkeypatch.setenv("MARK", "as it was")
    answer, _ = asked("environment")
    telling, kept, folder = json.loads(answer.problem or "")
    assert telling == [] and Path(folder) != Path.cwd()
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    assert kept == {**offline, "CUDA_VISIBLE_DEVICES": "", "MARK": "as it was"}


def test_a_process_that_cannot_be_started(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_command", lambda request, room: [str(room / "absent")])
    answer, _ = asked("fine")
    assert answer.stage == "starting"
    assert answer.problem == "no process could be started for it: No such file or directory"


def test_paths_of_this_machine_are_left_out(tmp_path: Path) -> None:
    request = Request("hqq", str(tmp_path / "model"), (1,))
    told = process._told(f"{tmp_path}/model/config.json and {Path.home()}/x {'y' * 900}", request)
    assert told.startswith("model/config.json and ~/x yyy") and len(told) == 601


def test_growth_of_the_peak() -> None:
    np.ones(4_000_000)  # before: does not count
    peak = Peak()
    np.ones(8_000_000)
    assert 60e6 < peak.bytes() < 80e6


def test_names() -> None:
    folder = Path(engines.__file__).parent
    assert set(engines.names()) <= {path.stem for path in folder.glob("*.py")}
