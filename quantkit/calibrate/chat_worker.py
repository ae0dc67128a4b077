"""``python -m quantkit.calibrate.chat_worker``: one chat template, in a process of its own.

Lines of JSON come in: first the template with its limits, then conversations. For each goes out one line.
No error is caught: it ends the process, and its text is the answer. When the time is up an alarm ends the
process, whatever it does, and whether or not anyone still waits for it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

_SIZE = Path("/proc/self/statm")
_PROBLEM = 400  # characters
# A text of so many characters, and so many times what it is given, is not for a model to read.
_ROOM, _TIMES = 100_000, 10
_EARNED = 1 / 20  # of the time, that each conversation may take; what any takes beyond it is for all together


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    # bare: the special tokens come with the order, and templates are filled in as for every tokenizer
    tokenizer = import_module("transformers.tokenization_utils_base").PreTrainedTokenizerBase()
    order = json.loads(sys.stdin.readline())
    _limit_memory(order["memory"])
    # what the caller does with alarms is inherited
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _say(answers, {})
    sys.excepthook = partial(_died, answers, order["memory"])
    given = {"chat_template": order["template"], "tokenize": False, **order["special"]}
    left = order["seconds"]
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, left)
        text = tokenizer.apply_chat_template(
            request["conversation"], add_generation_prompt=request["answer"], **given
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        left = _left(left - (time.monotonic() - begun), order["seconds"])
        if len(text) > _ROOM + _TIMES * len(line):
            _say(answers, {"problem": f"it makes {len(text):,} characters, far more than it is given"})
            return
        _say(answers, {"text": text})


def _left(rest: float, seconds: float) -> float:
    """Seconds for the next conversation; never none, which would be no limit."""
    return min(seconds, max(rest, 0.0) + _EARNED * seconds)


def _limit_memory(more: int) -> None:
    """`more` bytes than now; only the time is limited where the system does not say what it has."""
    try:
        pages = int(_SIZE.read_text("utf-8").split()[0])
    except OSError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([pages * resource.getpagesize() + more, *limits]), hard))


def _died(answers: TextIO, memory: int, kind: type[BaseException], error: BaseException, *_: object) -> None:
    if isinstance(error, MemoryError):
        problem = f"it takes more than {memory / 2**30:g} GiB of memory"
    else:
        problem = f"{kind.__name__}: {error}"
    _say(answers, {"problem": problem[:_PROBLEM]})


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
