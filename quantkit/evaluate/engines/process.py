"""An engine in a process of its own: what it makes of a model, or how it failed.

Engines are compiled code that strangers' files are given to: they may abort, take all memory or never end,
and several of them change Transformers for whoever imports them. None of that reaches the caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from quantkit.evaluate.engines.request import Answer, Request, logits_file, tokens_file

_WORKER = "quantkit.evaluate.engines.worker"
# of the last lines of what it printed
_LINES, _LINE, _PROBLEM, _TAIL_BYTES = 4, 200, 600, 16_384
# no part of an engine's environment: it has no business on the Hub
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
        # no compiler runs, which would take minutes for one pass
        "TORCHDYNAMO_DISABLE": "1",
    }
)


def ask(request: Request) -> tuple[Answer, npt.NDArray[np.float32] | None]:
    """What the engine says, and the (tokens, vocabulary) logits it computes where all went well.

    Whatever becomes of the engine is in the answer: no error of it is raised.
    """
    with _room() as room:
        answer = _answer(request, room)
        found = answer.problem is None
        return answer, np.load(logits_file(room), allow_pickle=False) if found else None


def ask_tokens(request: Request) -> tuple[Answer, list[list[int]] | None]:
    """As `ask`, for the ids of each text of the request."""
    with _room() as room:
        answer = _answer(request, room)
        return answer, json.loads(tokens_file(room).read_text("utf-8")) if answer.problem is None else None


@contextmanager
def _room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="quantkit-engine-") as folder:
        yield Path(folder)


def _answer(request: Request, room: Path) -> Answer:
    """Run the engine; without a problem, it is done and what it made lies in `room`."""
    request.write(room)
    output = room / "output.txt"
    try:
        with output.open("wb") as said, _started(request, room, said.fileno()) as process:
            code = process.wait(request.seconds)
    except subprocess.TimeoutExpired:
        code = None
    except OSError as error:
        return Answer("starting", problem=f"no process could be started for it: {error.strerror}")
    answer = Answer.read(room) or Answer("starting")
    if code == 0 and answer.stage == "done":
        return answer
    problem = answer.problem or f"{_end(code, request.seconds)}{_tail(output)}"
    starved = answer.starved or code == -signal.SIGKILL
    told = _told(problem, request)
    return replace(answer, problem=told, starved=starved, late=code is None)


@contextmanager
def _started(request: Request, room: Path, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process; it and all it started are gone afterwards."""
    process = subprocess.Popen(
        _command(request, room),
        cwd=room,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has ended, and left nothing behind
        process.wait()


def _command(request: Request, room: Path) -> list[str]:
    """`env` changes the environment on the way, so that nothing here reads it."""
    threads = str(request.threads)
    settings = {
        **_SETTINGS,
        "OMP_NUM_THREADS": threads,
        "GPTQMODEL_CPU_WORKERS": threads,
        # what it imports is what is imported here, wherever that came from
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
    }
    if request.device == "cpu":
        # some engines take a GPU without being asked
        settings["CUDA_VISIBLE_DEVICES"] = ""
    without = [part for name in _TOKENS for part in ("-u", name)]
    named = [f"{name}={value}" for name, value in settings.items()]
    return ["env", *without, *named, sys.executable, "-P", "-m", _WORKER, str(room)]


def _end(code: int | None, seconds: float) -> str:
    """How a process ended that said nothing itself."""
    if code is None:
        return f"it gave no answer within {seconds:,.0f} s"
    if code == -signal.SIGKILL:
        return "it was killed, as the system does when memory runs out"
    if code < 0:
        return f"it crashed ({signal.Signals(-code).name})"
    return f"it ended with exit status {code}"


def _tail(output: Path) -> str:
    """The last lines of what it printed."""
    with output.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip()[:_LINE] for line in text.splitlines() if line.strip()]
    return f": {' | '.join(lines[-_LINES:])}" if lines else ""


def _told(problem: str, request: Request) -> str:
    """A problem in a few words, without the paths of this machine."""
    try:
        home = str(Path.home())
    except RuntimeError:  # nobody's process
        home = sys.prefix
    inside = f"{Path(request.path).parent}{os.sep}"
    for place, instead in ((inside, ""), (sys.prefix, "…"), (home, "~")):
        problem = problem.replace(place, instead)
    return problem if len(problem) <= _PROBLEM else f"{problem[:_PROBLEM]}…"
