"""Chat templates are programs of strangers: what they make, and how those end that make nothing."""

from __future__ import annotations

import datetime
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantkit.calibrate import chat as module
from quantkit.calibrate import chat_worker
from quantkit.calibrate.chat import Chat, render
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.errors import RunError, SourceError

Words = Callable[..., Any]
TALK = [{"role": "user", "content": "w1"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"
)
MANY = "{% for a in range(99999) %}{% for b in range(99) %}{{ b / 7 }}{% endfor %}{% endfor %}"
REPLACED = DOUBLED.replace("n.t ~ n.t", "n.t|replace('x', 'xxxxxxxx')")
# the process without Transformers, which takes a second to import: the sandbox alone
SANDBOX = """
import sys, types
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from quantkit.calibrate.chat_worker import main

def refuse(why):
    raise TemplateError(why)

class PreTrainedTokenizerBase:
    def apply_chat_template(self, conversation, *, chat_template, **given):
        template = ImmutableSandboxedEnvironment().from_string(chat_template)
        return template.render(messages=conversation, raise_exception=refuse, **given)

stand_in = types.SimpleNamespace(PreTrainedTokenizerBase=PreTrainedTokenizerBase)
sys.modules["transformers.tokenization_utils_base"] = stand_in
main()
"""
# without a template: ready, and then it does as the line says
IDLE = "import os, signal, sys; sys.stdin.readline(); print('{}', flush=True); sys.stdin.readline(); "


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*module._command()[:-2], "-c", SANDBOX]
    monkeypatch.setattr(module, "_command", lambda: command)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Every process that is started; none is left over."""
    found: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*given: Any, **named: Any) -> subprocess.Popen[bytes]:
        found.append(real(*given, **named))
        return found[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    yield found
    assert all(process.returncode is not None for process in found)


def little(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Little time and memory."""
    monkeypatch.setattr(module, "SECONDS", seconds)
    monkeypatch.setattr(module, "MEMORY", 2**26)


def failed(tokenizer: Any, template: str) -> str:
    """What is said of a template, asked from a thread that handles no signals."""
    tokenizer.chat_template = template
    with ThreadPoolExecutor(1) as thread, pytest.raises(SourceError) as caught:
        thread.submit(render, TALK, tokenizer).result()
    return caught.value.message


def test_the_text_is_that_of_transformers(words: Words, started: list[Any]) -> None:
    tokenizer = words()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}\n{{ m | tojson }}\n{{ m.content }}{{ m.thinking }}"
        "{% generation %}{{ m.when }}{% endgeneration %}{% if loop.index == 3 %}{% break %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}→{% endif %}"
    )
    call = {"name": "f", "arguments": {"x": 1.5, "y": [True, None, 10**20, float("nan")]}}
    talks: list[Any] = [
        [
            {"role": "user", "content": "Hé ☃ \ud800 <b>&'\"\n"},
            {"role": "assistant", "content": "  x ", "a": None},
        ],
        [{"role": "assistant", "content": None, "reasoning": "so", "tool_calls": [{"function": call}]}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}],
                "n": np.int64(4),
                "f": np.float32(0.5),
            }
        ],
        [{"role": "user", "content": "a", "when": datetime.datetime(2020, 1, 1), "b": b"x"}] * 9,
    ]
    with Chat(tokenizer) as chat:
        for talk in talks:
            for answer in (False, True):
                expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)
                assert chat.text(talk, answer=answer) == expected
    assert len(started) == 1, "one process for all of them"


def test_the_day_is_always_the_same(words: Words) -> None:
    tokenizer = words()
    tokenizer.chat_template = {
        "default": "\n{{ strftime_now('%Y') }}\n{{ messages[0].content }}",
        "other": "x",
    }
    assert render(TALK, tokenizer) == "\n26 Jul 2024\nw1"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDLESS, "it takes more than 0.2 s"),
        # one step of the interpreter, which looks for no signals meanwhile
        ("{{ 3 ** (10 ** 8) }}", "it takes more than 0.2 s"),
        ("{{ 'x' * 10 ** 11 }}", "it takes more than 0.0625 GiB of memory"),
        (DOUBLED, "it takes more than 0.0625 GiB of memory"),
        (MANY, "it takes more than 0.0625 GiB of memory"),
        (REPLACED, "it takes more than 0.0625 GiB of memory"),
        ("{{ 'x' * 3000000 }}", "it makes 3,000,000 characters, far more than it is given"),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "RecursionError: maximum recursion depth exceeded",
        ),
        ("{{ raise_exception('no ' * 999) }}", "TemplateError: no no"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
        ("{% for a in [] %}" * 21 + "{% endfor %}" * 21, "SyntaxError: too many statically nested blocks"),
    ],
)
def test_a_template_that_makes_no_text(
    template: str,
    expected: str,
    words: Words,
    sandbox: None,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little(monkeypatch, seconds=0.2 if expected.endswith(" s") else 20.0)
    said = failed(words(), template)
    assert said.startswith(expected) and len(said) <= 400


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDLESS, "it takes more than 0.2 s"),
        (DOUBLED, "it takes more than 0.0625 GiB of memory"),
        (
            "{{ ''.__class__.__mro__ }}",
            "SecurityError: access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_in_the_sandbox_of_transformers(
    template: str, expected: str, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    little(monkeypatch, seconds=0.2 if expected.endswith(" s") else 20.0)
    assert failed(words(), template) == expected


def test_a_slow_one_is_waited_for(words: Words, sandbox: None) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{% for a in range(99999) %}{% endfor %}" * 3 + "{{ messages[0].content }}"
    assert render(TALK, tokenizer) == "w1"


def test_after_a_problem_comes_a_new_process(words: Words, sandbox: None, started: list[Any]) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ messages[1].content.strip() }}{{ messages[0].content }}"
    with Chat(tokenizer) as chat:
        for _ in range(2):
            with pytest.raises(SourceError, match="UndefinedError"):
                chat.text(TALK)
        assert chat.text(TALK * 2) == "w1w1"
    assert len(started) == 3


def test_many_slow_ones_together_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take a second of its own; what it takes more is gone for the others."""
    taken = iter([0, 5, 5, 10, 10, 10.5, 11, 29.5, 29.5, 29.5])
    order = {"template": "", "special": {}, "seconds": 20.0, "memory": 2**30}
    requests = [order, *[{"conversation": TALK, "answer": False}] * 5]
    alarms: list[float] = []
    told = SimpleNamespace(
        stdin=io.StringIO("".join(f"{json.dumps(request)}\n" for request in requests)),
        stdout=io.StringIO(),
        stderr=io.StringIO(),
    )
    tokenizer = SimpleNamespace(apply_chat_template=lambda *_, **__: "text")
    library = SimpleNamespace(PreTrainedTokenizerBase=lambda: tokenizer)
    monkeypatch.setattr(chat_worker, "sys", told)
    monkeypatch.setattr(chat_worker, "time", SimpleNamespace(monotonic=lambda: next(taken)))
    monkeypatch.setattr(chat_worker, "import_module", lambda name: library)
    monkeypatch.setattr(chat_worker, "_limit_memory", lambda more: None)
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: alarms.append(seconds))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    chat_worker.main()
    assert alarms[1::2] == [0] * 5
    assert alarms[::2] == [20.0, 16.0, 12.0, 12.5, 1.0]


def test_the_time_between_two_does_not_count(
    words: Words, sandbox: None, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    little(monkeypatch, seconds=0.3)
    with Chat(words(chat=True)) as chat:
        chat.text(TALK)
        with pytest.raises(subprocess.TimeoutExpired):
            started[0].wait(0.4)


def test_what_is_no_template(words: Words, started: list[Any]) -> None:
    tokenizer = words()
    for template in (None, {"other": "x"}):
        tokenizer.chat_template = template
        with pytest.raises(SourceError, match="ValueError: "):
            render(TALK, tokenizer)
    tokenizer.chat_template = "x"
    with pytest.raises(SourceError, match="no conversation"):
        render([{"role": "user", ("a", "b"): "x"}], tokenizer)  # type: ignore[dict-item]
    assert started == []


def test_the_file_of_a_template(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words(chat=True).save_pretrained(tmp_path)
    assert Chat(load_tokenizer(tmp_path)).file == "chat_template.jinja"
    (tmp_path / "chat_template.jinja").unlink()
    assert Chat(load_tokenizer(tmp_path)).file == "tokenizer_config.json"
    monkeypatch.chdir(tmp_path)
    assert Chat(words(chat=True)).file is None


# The process


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed, as the system does when memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("print('half an ', end='', flush=True); os._exit(3)", "its process ended with exit status 3"),
        ("sys.exit('why it ended')", "its process ended with exit status 1: why it ended"),
    ],
)
def test_a_process_that_ends(
    does: str, said: str, words: Words, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", IDLE + does])
    assert failed(words(), "x") == said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/no/such/program"], "no process can be started for the chat template: No such file or directory"),
        (
            [sys.executable, "-c", "import no_such"],
            "exit status 1: ModuleNotFoundError: No module named 'no_such'",
        ),
    ],
)
def test_no_process(
    command: list[str], said: str, words: Words, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(module, "_command", lambda: command)
    with pytest.raises(RunError) as caught:
        render(TALK, words(chat=True))
    assert caught.value.message.endswith(said)


def test_it_is_not_told_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    command = module._command()
    shown = subprocess.run(
        [*command[: command.index(sys.executable)], "env"], capture_output=True, text=True, check=True
    )
    assert "PYTHONPATH=" in shown.stdout and "hf_secret" not in shown.stdout


@pytest.fixture
def alarm() -> Iterator[Callable[[Any], Any]]:
    """Sets what an alarm does here."""
    before = signal.getsignal(signal.SIGALRM)
    yield partial(signal.signal, signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, before)


def test_ignored_alarms_are_heard(
    words: Words, sandbox: None, monkeypatch: pytest.MonkeyPatch, alarm: Callable[[Any], Any]
) -> None:
    little(monkeypatch, seconds=0.2)
    alarm(signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    tokenizer = words()
    tokenizer.chat_template = ENDLESS
    with pytest.raises(SourceError, match="more than"):
        render(TALK, tokenizer)


def test_who_interrupts_does_not_wait(
    words: Words, started: list[Any], monkeypatch: pytest.MonkeyPatch, alarm: Callable[[Any], Any]
) -> None:
    forever = f"{IDLE}os.kill(os.getppid(), signal.SIGALRM); signal.pause()"
    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", forever])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    alarm(stop)
    with pytest.raises(KeyboardInterrupt):
        render(TALK, words(chat=True))
    assert started[0].returncode == -signal.SIGKILL
