"""Where log records go: warnings to stderr, more with `-v`, everything to `--log-file`."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from quantkit.errors import UsageError

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def masked(text: str) -> str:
    """`text` without Hub tokens."""
    return _TOKEN.sub("hf_***", text)


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def set_up(verbose: int, quiet: bool, log_file: str | None) -> None:
    """Handlers of the `quantkit` logger, replacing those of an earlier call."""
    logger = logging.getLogger("quantkit")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(
        logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    )
    screen.setFormatter(_Masked("%(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [screen]
    if log_file is not None:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            to_file = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: cannot be written: {error.strerror}") from error
        to_file.setFormatter(_Masked("%(asctime)s %(levelname)s %(name)s %(message)s"))
        handlers.append(to_file)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(to_file)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
