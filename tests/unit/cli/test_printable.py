from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkit.cli.printable import printable


def test_a_terminal_is_told_nothing() -> None:
    assert printable("a\x1b]0;owned\x07.gguf\x9b2J") == "a\\x1b]0;owned\\x07.gguf\\x9b2J"
    assert printable("über\t±\n") == "über\t±\n"


def test_in_errors(quantkit: Callable[..., Any]) -> None:
    shown = quantkit("inspect", "a\x1b]0;owned\x07")
    assert shown.code == 2 and "\x1b" not in shown.err and "\\x1b]0;owned" in shown.err
