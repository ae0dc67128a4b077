"""Calls to the Hub, tried again while their failure may pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants

from quantkit.errors import HubError
from quantkit.hub import problems
from quantkit.hub.push import refusals
from quantkit.hub.push.refusals import FAILURES, Place
from quantkit.progress import Progress

T = TypeVar("T")
TRIES = len(problems.WAITS) + 1


class Patience:
    """Waits between tries, by `sleep`, and says so."""

    def __init__(self, sleep: Callable[[float], None], progress: Progress) -> None:
        self._sleep = sleep
        self.progress = progress

    def ask(self, call: Callable[[], T], place: Place, doing: str) -> T:
        """The result of `call`; a QuantkitError in words once it failed for good."""
        try:
            return self.attempt(call, place, doing)
        except FAILURES as error:
            raise refusals.explain(error, place, doing) from error

    def attempt(self, call: Callable[[], T], place: Place, doing: str) -> T:
        """As `ask`, but raises what the client raised."""
        failed = 0
        while True:
            try:
                return call()
            except FAILURES as error:
                if self.without_xet(error, place):
                    continue
                failed += 1
                if failed == TRIES or refusals.hopeless(error):
                    raise
                self.wait(failed, error, place, doing)

    def without_xet(self, error: Exception, place: Place) -> bool:
        """Whether the call can go on by other means: the server has no Xet, and the client now knows."""
        if not refusals.lacks_xet(error):
            return False
        constants.HF_HUB_DISABLE_XET = True
        self.progress.note(f"{place.api.endpoint} has no Xet storage: files are sent by LFS")
        return True

    @contextmanager
    def heard(self) -> Iterator[None]:
        """What the client only warns of is told like all else."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
        for warning in said:
            if not issubclass(warning.category, DeprecationWarning):
                self.progress.warn(str(warning.message))

    def wait(self, failed: int, error: Exception, place: Place, doing: str) -> None:
        """Before the next try, after `failed` of them."""
        seconds = max(problems.WAITS[failed - 1], problems.requested_wait(error))
        status = refusals.status_of(error)
        why = type(error).__name__ if status is None else str(status)
        self.progress.warn(f"{place.repo}: {doing}: {why}; trying again in {seconds:.0f} s")
        self._sleep(seconds)


def failed_for_good(error: Exception, place: Place, doing: str, state: list[str]) -> Exception:
    """`refusals.explain`, with what became of each file below the first line when the Hub is to blame."""
    said = refusals.explain(error, place, doing)
    if not isinstance(said, HubError) or not state:
        return said
    return HubError("\n  ".join((said.message, *state)), remedy=said.remedy)
