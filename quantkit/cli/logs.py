"""Where log records go: warnings to stderr, more with `-v`, everything to `--log-file`; tokens go nowhere.

Handlers are attached to `quantkit` alone: what the libraries that talk to the Hub log stays theirs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.hub import secrets

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_OURS, _WARNINGS = "quantkit", "py.warnings"


class _Masked(logging.Formatter):
    """Leaves out tokens of the environment and those that `keep_secret` was told."""

    secrets: frozenset[str] = frozenset()

    def format(self, record: logging.LogRecord) -> str:
        return secrets.masked(super().format(record), {*_from_environment(), *self.secrets})


def masked(text: str) -> str:
    """`text` without tokens: those in use, and what looks like one."""
    told = (value for formatter in _formatters() for value in formatter.secrets)
    return secrets.masked(text, {*_from_environment(), *told})


def keep_secret(value: str) -> None:
    """Leave `value` out of everything that is written from now on until the next `set_up`.

    For tokens that come from a file or from a variable of another name.
    """
    for formatter in _formatters():
        formatter.secrets |= {value}


def set_up(verbose: int, quiet: bool, log_file: str | None) -> None:
    """Handlers of the `quantkit` logger, replacing those of an earlier call."""
    _remove()
    logger = logging.getLogger(_OURS)
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(
        logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    )
    screen.setFormatter(_Masked("%(levelname)s %(message)s"))
    logger.addHandler(screen)
    if log_file is not None:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            to_file = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: cannot be written: {error.strerror}") from error
        to_file.setFormatter(_Masked("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(to_file)
        logging.getLogger(_WARNINGS).addHandler(to_file)
    logging.captureWarnings(log_file is not None)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _remove() -> None:
    """Take off the handlers of an earlier call."""
    for name in (_OURS, _WARNINGS):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            if name == _OURS or isinstance(old.formatter, _Masked):
                logger.removeHandler(old)
                old.close()


def _formatters() -> Iterator[_Masked]:
    for handler in logging.getLogger(_OURS).handlers:
        if isinstance(handler.formatter, _Masked):
            yield handler.formatter


def _from_environment() -> list[str]:
    return [os.environ.get(name, "") for name in _TOKEN_VARIABLES]
