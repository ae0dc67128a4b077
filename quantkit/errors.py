"""Every error quantkit raises on purpose.

QuantkitError
├── UsageError                what was asked cannot be done          exit 2
│   ├── RecipeError           a recipe, flag or shorthand is wrong
│   ├── SourceError           the checkpoint is missing, malformed or hostile
│   ├── UnsupportedError      scheme × method × format × weight, with the reason
│   ├── CalibrationError      the text cannot give the rows that were asked for
│   └── ResumeError           the store belongs to another plan
├── RunError                  what was possible failed               exit 1
│   ├── NumericsError         non-finite values, a factorisation that fails
│   ├── BudgetError           memory or disk does not suffice
│   ├── CoverageError         weights a recipe meant to quantize stayed 16-bit
│   └── VerifyError           a written file does not say what was stored
├── HubError                  the Hub said no, or nothing             exit 3
├── GateError                 an evaluation gate of the recipe failed exit 4
└── Interrupted               stopped on request; resumable           exit 130

A message has up to four parts: what happened, where, expected against found, and what to do.
The first line of ``str(error)`` holds the first three; ``remedy`` holds the last.
"""

from __future__ import annotations

from collections.abc import Sequence


class QuantkitError(Exception):
    """Base of all errors that quantkit raises on purpose; carries the exit code and a remedy."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    @property
    def kind(self) -> str:
        """Name of the error class, stable for scripts (``error.kind`` in ``--json`` output)."""
        return type(self).__name__

    @property
    def in_one_line(self) -> str:
        """What happened and what to do, for a list of problems."""
        return self.message if self.remedy is None else f"{self.message}; {self.remedy}"

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  → {self.remedy}"


class UsageError(QuantkitError):
    """What was asked cannot be done."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, flag or shorthand is wrong; `problems` lists every complaint as ``file:line:col …``."""

    def __init__(self, problems: Sequence[str] | str, *, remedy: str | None = None) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems), remedy=remedy)


class SourceError(UsageError):
    """The source checkpoint is missing, malformed or hostile."""


class UnsupportedError(UsageError):
    """This combination of scheme, method, format and weight is not possible; says why."""


class CalibrationError(UsageError):
    """The text cannot give the rows that were asked for, or calibration and evaluation overlap."""


class ResumeError(UsageError):
    """The store belongs to another plan, or is damaged; `differences` names the fields."""

    def __init__(self, message: str, *, differences: Sequence[str] = (), remedy: str | None = None) -> None:
        self.differences = tuple(differences)
        super().__init__("\n  ".join((message, *self.differences)), remedy=remedy)


class RunError(QuantkitError):
    """What was possible failed."""


class NumericsError(RunError):
    """Non-finite values, or a factorisation that no remedy could save."""


class BudgetError(RunError):
    """Memory or disk does not suffice; `needed` and `available` in bytes."""

    def __init__(self, message: str, *, needed: int, available: int, remedy: str | None = None) -> None:
        self.needed = needed
        self.available = available
        super().__init__(message, remedy=remedy)


class CoverageError(RunError):
    """Weights that the recipe meant to quantize stayed in 16 bits."""


class VerifyError(RunError):
    """A written file does not read back as what the store holds."""


class HubError(QuantkitError):
    """The Hub refused, does not know the repository, or cannot be reached."""

    exit_code = 3


class GateError(QuantkitError):
    """An evaluation gate of the recipe failed; the files are kept."""

    exit_code = 4


class Interrupted(QuantkitError):
    """Stopped on request after a commit; running the same command again continues."""

    exit_code = 130
