"""`push` that is killed, or meets a fault, at each of its requests: given again it ends as if undisturbed.

The processes are real, and so is the signal. One is killed while its request is at the server: the request
is answered, the answer never read. So the server stands as after each request, and as before the next one.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import pytest

from quantkit.errors import QuantkitError
from quantkit.hub.push.record import RECORD
from quantkit.recipe.spec import Publish
from tests.elsewhere import before, begin, hurry, kill, picture
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import SENDS_FILES
from tests.hubserver.faults import Action
from tests.pushing import Pusher, Targets, nothing_false
from tests.targets import gguf

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
CHANGES = re.compile("(POST|PUT) .*/(create|branch|commit|tag|settings|discussions)")
THEN_PUBLIC: Final = "private-then-public"
WAYS = {
    "one branch": Publish(REPO, visibility=THEN_PUBLIC, tag="v1"),
    "branches": Publish(REPO, visibility=THEN_PUBLIC, layout="branches", tag="v1"),
    "private": Publish(REPO, visibility="private", branch="next"),
    "request": Publish(REPO, create_pr=True),
}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@dataclass
class Scene:
    """A push and a server that it was never given at; `log` is what it asks when nobody disturbs it."""

    folder: Path
    how: Publish
    targets: Targets
    log: list[str] = field(default_factory=list)
    end: dict[str, object] = field(default_factory=dict)
    record: Any = None

    def push(self, hub: HubServer, name: str) -> Pusher:
        if self.how.create_pr:
            hub.add(REPO, {"x": b"x"}, private=True)
        (self.folder / name).mkdir()
        return Pusher(hub, self.targets, self.how, self.folder / name / RECORD)

    def finished(self, hub: HubServer, push: Pusher, when: str) -> None:
        """Everything is as it is after a push that nobody disturbed."""
        assert picture(hub, REPO) == self.end, when
        assert recorded(hub, push) == self.record, when
        assert [path.name for path in push.record.parent.iterdir()] == [RECORD], when


def recorded(hub: HubServer, push: Pusher) -> Any:
    """`publish.json`, but for where the server is, and whether weights were verified at the last commit."""
    found = json.loads(push.record.read_text().replace(hub.url, ""))
    for told in found["publications"]:
        del told["weights_commit"]
    return found


@pytest.fixture(scope="module", params=list(WAYS))
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("killed")
    made = Scene(folder, WAYS[request.param], [gguf(folder / "out", "q4_k_m")])
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        hurry(patch)
        push = made.push(hub, "quiet")
        push()
        made.log, made.end, made.record = list(hub.log), picture(hub, REPO), recorded(hub, push)
    yield made


def requests(scene: Scene, *, every: bool) -> list[int]:
    """Those that change a repository; or all, of the first way."""
    if every and scene.how is WAYS["one branch"]:
        return list(range(len(scene.log)))
    return [number for number, line in enumerate(scene.log) if CHANGES.match(line)]


def hidden_until_done(scene: Scene, hub: HubServer, when: str) -> None:
    """What a push leaves behind, wherever it ends: no card of what is not there, and nobody sees it half."""
    for revision in ("main", "next", "gguf-q4_k_m", "refs/pr/1"):
        nothing_false(hub, REPO, revision)
    if hub.has(REPO) and not hub.repo(REPO).private:
        assert picture(hub, REPO) == scene.end, when


def killed(push: Pusher, number: int) -> BaseProcess:
    """A push that got so far."""
    began = threading.Event()

    def end() -> None:
        began.wait()
        kill(process)

    before(push.hub, number, end)
    process = begin(push)
    began.set()
    process.join()
    return process


def test_killed_at_each_request(scene: Scene) -> None:
    for number in requests(scene, every=True):
        when = f"killed at request {number}: {scene.log[number]}"
        with HubServer() as hub:
            push = scene.push(hub, f"killed-{number}")
            assert killed(push, number).exitcode == -signal.SIGKILL, when
            hidden_until_done(scene, hub, when)
            push()
            scene.finished(hub, push, when)


@pytest.mark.parametrize("action", ["status", "drop_after"])
def test_a_fault_at_each_request(scene: Scene, action: Action) -> None:
    for number in requests(scene, every=action == "drop_after"):
        when = f"{action} at request {number}: {scene.log[number]}"
        with HubServer() as hub:
            push = scene.push(hub, f"{action}-{number}")
            hub.faults = [Fault("", action, status=500, skip=number)]
            try:
                push()
            except QuantkitError as error:
                assert error.remedy, when
                hidden_until_done(scene, hub, when)
                push()
            assert hub.faults[0].times == 0, when
            scene.finished(hub, push, when)
