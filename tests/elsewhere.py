"""Pushes in processes of their own, what happens between requests of one, and what is there in the end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from quantkit.errors import QuantkitError
from quantkit.hub.client import connect
from quantkit.recipe.spec import Publish
from tests import pushing
from tests.hubserver import HubServer
from tests.hubserver.client import tame
from tests.pushing import Pusher, Targets

STOPPED = 3
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class _Elsewhere:
    """A server in another process: all that a push knows of it."""

    url: str


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No push of this process waits, for the Hub or for the disk; all use one client, so that one may begin
    while another is at work."""
    tame(monkeypatch)
    connect()
    monkeypatch.setattr(pushing, "connect", lambda url, token: HfApi(endpoint=url, token=token))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def begin(push: Pusher) -> BaseProcess:
    """The same push in another process, which ends with 0, or with `STOPPED` where it said why it stops."""
    given = (push.hub.url, push.targets, push.how, push.record)
    process = _PROCESSES.Process(target=_push, args=given, daemon=True)
    process.start()
    return process


def _push(url: str, targets: Targets, how: Publish, record: Path) -> None:
    logging.disable()
    tame(pytest.MonkeyPatch())
    try:
        Pusher(_Elsewhere(url), targets, how, record)()  # type: ignore[arg-type]
    except QuantkitError:
        os._exit(STOPPED)


def kill(process: BaseProcess) -> None:
    """As `kill -9` does: nothing that waits for an answer does anything any more."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def before(hub: HubServer, number: int, do: Callable[[], object]) -> None:
    """Call `do` before the request after the next `number` ones is answered."""
    hub.when("", do if number == 0 else lambda: before(hub, number - 1, do))


def turning_points(log: list[str]) -> list[int]:
    """Of the requests of a push those that change a repository, and those that look at it right after."""
    changes = re.compile(r"(POST|PUT) .*/(create|commit/[^/]+|tag/.*|settings|batch)")
    chosen = [number for number, line in enumerate(log) if changes.fullmatch(line)]
    return sorted({*chosen, *(n + 1 for n in chosen if n + 1 < len(log) and log[n + 1].startswith("GET"))})


def picture(hub: HubServer, repo: str) -> dict[str, object]:
    """All that a repository is, by branch, tag and pull request, but for the hashes of commits."""
    found = hub.repo(repo)
    files = {ref: {path: found.read(path, ref) for path in found.files(ref)} for ref in found.refs}
    titles = {ref: [commit.title for commit in found.history(ref)] for ref in found.refs}
    requests = [(each.title, each.status) for each in found.pull_requests]
    return {
        "files": files, "titles": titles, "requests": requests, "private": found.private, "gated": found.gated
    }  # fmt: skip
