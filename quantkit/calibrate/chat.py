"""Conversations as texts: a chat template filled in, within limits of time and memory.

A template is a program of strangers. Jinja's sandbox keeps it from files, but not from running for ever or
from filling the memory, and what it does in one step of C no handler of a signal and no other thread stops.
So it runs in a process of its own, by the code of Transformers that fills in templates everywhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from quantkit.calibrate.documents import Messages
from quantkit.calibrate.tokenizer import Tokenizer
from quantkit.errors import RunError, SourceError

# The usual template takes a millisecond and no memory to speak of.
SECONDS = 20.0  # for one conversation, and for all of them what each takes beyond a twentieth of this
MEMORY = 2**30  # bytes, beside what the process has before it begins

_WORKER = "quantkit.calibrate.chat_worker"
_FILE, _ELSE = "chat_template.jinja", "tokenizer_config.json"
# no part of its environment: it has no business on the Hub
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_TAIL = 200  # characters of what it said last
# The day that every template is told: what those of Llama 3 say where they cannot ask. The empty value keeps
# a line end behind it, which Jinja takes away behind a macro.
_CLOCK = "strftime_now"
_DAY = f'{{% macro {_CLOCK}(format) %}}26 Jul 2024{{% endmacro %}}{{{{ "" }}}}'


class Chat:
    """The chat template of a tokenizer, to be used in a ``with``.

    Its process is started by the first conversation, and has ended at the end of the ``with``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open = ExitStack()
        self._process: _Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def file(self) -> str | None:
        """Name of the file that holds the template; None where the tokenizer is not from a folder."""
        folder = self._tokenizer.name_or_path
        return next((name for name in (_FILE, _ELSE) if folder and Path(folder, name).is_file()), None)

    def text(self, conversation: Messages, *, answer: bool = False) -> str:
        """What the template makes of `conversation`.

        One that asks for the day gets always the same, so that a run that goes on tomorrow has the same
        tokens.

        answer  with what begins the model's own turn

        SourceError where it makes none: it fails in any way that programs do, takes more than `SECONDS` or
        `MEMORY`, or makes a text far longer than what it is given. RunError where no process can be started.
        """
        try:
            request = json.dumps({"conversation": conversation, "answer": answer}, default=_plain)
        except (RecursionError, TypeError, ValueError) as error:
            raise SourceError(f"it is given what is no conversation: {error}") from error
        if self._process is None:
            self._process = self._open.enter_context(_started(self._order()))
        found = self._process.ask(request)
        text = None if found is None else found.get("text")
        if isinstance(text, str):
            return text
        problem = self._process.end() if found is None else found["problem"]
        self._open.close()
        self._process = None
        raise SourceError(problem)

    def _order(self) -> dict[str, Any]:
        try:
            template = self._tokenizer.get_chat_template()
        except (NotImplementedError, ValueError) as error:
            raise SourceError(f"{type(error).__name__}: {error}") from error
        return {
            "template": _DAY + template if _CLOCK in template else template,
            "special": self._tokenizer.special_tokens_map,
            "seconds": SECONDS,
            "memory": MEMORY,
        }


def render(conversation: Messages, tokenizer: Tokenizer, *, answer: bool = False) -> str:
    """`Chat.text` for one conversation."""
    with Chat(tokenizer) as chat:
        return chat.text(conversation, answer=answer)


class _Process:
    """Lines of JSON go in, and for each comes one out."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, seconds: float) -> None:
        self._process, self._output, self._seconds = process, output, seconds

    def ask(self, request: str) -> dict[str, Any] | None:
        """The answer; None where it ended without one."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise ValueError("a process without pipes cannot be asked")
        try:
            process.stdin.write(request.encode("ascii") + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said before may lie in the pipe
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> str:
        """How the process ended that said nothing itself."""
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return f"it takes more than {self._seconds:g} s"
        if code == -signal.SIGKILL:
            return "it was killed, as the system does when memory runs out"
        if code < 0:
            return f"it crashed ({signal.Signals(-code).name})"
        said = self._output.read_text("utf-8", "replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "")
        return f"its process ended with exit status {code}" + (last and f": {last[-_TAIL:]}")


@contextmanager
def _started(order: dict[str, Any]) -> Iterator[_Process]:
    """The process, ready for conversations; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="quantkit-chat-") as folder:
        output = Path(folder) / "output.txt"
        try:
            with output.open("wb") as said:
                process = subprocess.Popen(
                    _command(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    start_new_session=True,  # what is typed at a terminal is for the caller
                )
        except OSError as error:
            raise RunError(f"no process can be started for the chat template: {error.strerror}") from error
        try:
            found = _Process(process, output, order["seconds"])
            if found.ask(json.dumps(order)) is None:
                raise RunError(f"the chat template could not be given to Transformers: {found.end()}")
            yield found
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
            process.wait()


def _command() -> list[str]:
    """`env` changes the environment on the way, so that nothing here reads it."""
    without = [part for name in _TOKENS for part in ("-u", name)]
    # what it imports is what is imported here, wherever that came from
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return ["env", *without, f"PYTHONPATH={path}", sys.executable, "-P", "-m", _WORKER]


def _plain(value: object) -> object:
    """What Transformers shows to a template of a value that JSON has no form for, as a date in a dataset."""
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"
