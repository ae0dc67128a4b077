"""``python -m quantkit.evaluate.engines.worker ROOM``: one engine, one model, in a process of its own.

ROOM is a folder with a request; the answer is written there, again and again as it comes further, so that
what is known outlives a crash. Nothing is caught: an error ends the process, and its text is the answer.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.engines.memory import Peak, kill_first
from quantkit.evaluate.engines.request import Answer, Request, logits_file, tokens_file

_STARVED = ("can't allocate memory", "cannot allocate memory", "out of memory", "failed to allocate")


def main(folder: str) -> None:
    room = Path(folder)
    sys.excepthook = partial(_died, room)
    request = Request.read(room)
    kill_first()
    Answer("starting").write(room)
    engine = importlib.import_module(f"quantkit.evaluate.engines.{request.engine}")
    version = engine.begin(request)
    peak = Peak()
    Answer("loading", version).write(room)
    if request.texts:
        tokens_file(room).write_text(json.dumps(engine.tokens(request)), "utf-8")
        Answer("done", version).write(room)
        return
    found = engine.logits(request)
    taken = engine.peak_bytes(request) if request.device != "cpu" else None
    np.save(logits_file(room), np.ascontiguousarray(found, dtype=np.float32), allow_pickle=False)
    Answer("done", version, peak_bytes=peak.bytes() if taken is None else taken).write(room)


def _died(room: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    said = " ".join(str(error).split())
    problem = said if isinstance(error, QuantkitError) else f"{kind.__name__}: {said}"
    starved = isinstance(error, MemoryError) or any(words in said.lower() for words in _STARVED)
    reached = Answer.read(room) or Answer("starting")
    replace(reached, problem=problem, starved=starved).write(room)


if __name__ == "__main__":
    main(*sys.argv[1:])
