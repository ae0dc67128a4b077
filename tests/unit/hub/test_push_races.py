"""Two pushes to one repository at once: each ends well, or stops in words and ends well when given again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.hub.push.record import RECORD, Entry, Record
from quantkit.progress import SILENT
from quantkit.recipe.spec import Publish
from tests.elsewhere import STOPPED, before, begin, hurry, picture, turning_points
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES
from tests.pushing import Pusher, Targets, nothing_false, sound
from tests.targets import gguf

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
THEN_PUBLIC = Publish(REPO, visibility="private-then-public")
REQUEST = Publish(REPO, create_pr=True)
STEPS = ("POST .*/commit/", "POST .*/commit/", "PUT .*/settings")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    folder = tmp_path_factory.mktemp("made")
    return [gguf(folder / "out", "q4_k_m"), gguf(folder / "out", "q8_0")]


@pytest.fixture(scope="module")
def seams(made: Targets, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The requests of a push before which what it knows may be true no longer."""
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        hurry(patch)
        Pusher(hub, made[:1], THEN_PUBLIC, tmp_path_factory.mktemp("seams") / RECORD)()
        return turning_points(hub.log)


def attempt(push: Pusher) -> bool:
    """Whether it ended well; if not, it said what to do."""
    try:
        push()
    except QuantkitError as error:
        assert error.remedy
        return False
    return True


def together(hub: HubServer, made: Targets) -> None:
    """The repository holds and describes both."""
    repo = hub.repo(REPO)
    sound(hub, REPO, made)
    document = json.loads(repo.read("quantkit.json"))
    names = {manifest.name for _, manifest in made}
    assert set(document["targets"]) == set(document["placed"]) == set(document["checks"]) == names
    assert set(document["files"]) == {"LICENSE", *(f"Tiny-{name[5:].upper()}.gguf" for name in names)}
    assert {line.split("  ")[1] for line in repo.read("SHA256SUMS").decode().splitlines()} == set(
        document["files"]
    )
    assert {path for path in repo.files() if path.startswith("recipes/")} == {
        f"recipes/{name}.yaml" for name in names
    }
    assert all(f"- {name}\n".encode() in repo.read("README.md") for name in names)
    assert not repo.private


def test_one_push_within_another(made: Targets, seams: list[int], tmp_path: Path) -> None:
    """Of another target, and of the same one: the whole of it, before one request of the first."""
    for number in seams:
        for inner in (made[1:], made[:1]):
            with HubServer() as hub:
                record = tmp_path / f"{number}-{inner[0][1].name}.json"
                first = Pusher(hub, made[:1], THEN_PUBLIC, record)
                second = Pusher(hub, inner, THEN_PUBLIC, record)
                ended: list[bool] = []
                before(hub, number, lambda push=second, to=ended: to.append(attempt(push)))  # type: ignore[misc]
                ended.append(attempt(first))
                assert len(ended) == 2 and any(ended), number
                nothing_false(hub, REPO)
                for push, well in zip((second, first), ended, strict=True):
                    if not well:
                        push()
                together(hub, [*made[:1], *inner[:1]] if inner != made[:1] else made[:1])
                (told,) = json.loads(record.read_text())["publications"]
                assert (told["step"], told["visibility"]) == ("done", "public")


@pytest.mark.parametrize("number", range(3))
def test_one_push_between_the_commits_of_another(
    hub: HubServer, made: Targets, tmp_path: Path, number: int
) -> None:
    """Of the same account: both end well at once."""
    first = Pusher(hub, made[:1], Publish(REPO, visibility="public"), tmp_path / "first.json")
    second = Pusher(hub, made[1:], first.how, tmp_path / "second.json")
    if number:
        at(hub, number - 1, second)
    else:
        hub.when("PUT /lfs/", second)
    first()
    together(hub, made)


@pytest.mark.parametrize("there", range(3))
@pytest.mark.parametrize("here", range(3))
def test_two_pushes_that_wait_for_each_other(
    hub: HubServer, made: Targets, tmp_path: Path, here: int, there: int
) -> None:
    """Each in its process; one stands at a commit, or is about to show it, until the other is done."""
    first = Pusher(hub, made[:1], THEN_PUBLIC, tmp_path / RECORD)
    second = Pusher(hub, made[1:], THEN_PUBLIC, tmp_path / RECORD)
    arrived, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        arrived.set()
        assert go_on.wait(60)

    def start() -> None:
        at(hub, there, stand)
        processes.append(begin(second))
        while not arrived.wait(0.01):
            if wait([processes[0].sentinel], 0):
                return go_on.set()

    processes: list[BaseProcess] = []
    at(hub, here, start)
    well = attempt(first)
    go_on.set()
    (process,) = processes
    process.join()
    nothing_false(hub, REPO)
    assert process.exitcode in (0, STOPPED)
    assert well or process.exitcode == 0
    if not well or process.exitcode != 0:
        attempt(first)  # it may have to wait for what the other one has not described
        second()
        first()
    together(hub, made)


def at(hub: HubServer, step: int, do: Callable[[], object]) -> None:
    """Call `do` at a step of the next push: its first or second commit, or when it becomes public."""
    if step == 1:
        hub.when(STEPS[0], lambda: hub.when(STEPS[1], do))
    else:
        hub.when(STEPS[step], do)


def test_two_processes_at_once(hub: HubServer, tmp_path: Path) -> None:
    """Nobody waits for anybody; each to two repositories, and with one record."""
    out = [[gguf(tmp_path / name, kind) for kind in ("q4_k_m", "q8_0")] for name in "ab"]
    pushes = [
        Pusher(hub, targets, Publish(f"alice/{name}-{{target}}", layout="repo-per-target"), tmp_path / RECORD)
        for name, targets in zip("ab", out, strict=True)
    ]
    processes = [begin(push) for push in pushes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    told = json.loads((tmp_path / RECORD).read_text())["publications"]
    repos = {f"alice/{name}-gguf-{kind}" for name in "ab" for kind in ("q4_k_m", "q8_0")}
    assert {entry["repo"] for entry in told} == repos
    assert {entry["step"] for entry in told} == {"done"}
    for repo in repos:
        nothing_false(hub, repo)
        assert "README.md" in hub.repo(repo).files()


def test_pushes_that_note_at_once(tmp_path: Path) -> None:
    """A record holds what each of many wrote, in whatever order they did."""
    start = threading.Barrier(8)

    def note(name: str) -> None:
        record = Record(tmp_path / RECORD, SILENT)
        start.wait()
        for branch in ("main", "next", "last"):
            record.keep(Entry("https://hub", f"alice/{name}", branch))

    threads = [threading.Thread(target=note, args=(f"T{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = json.loads((tmp_path / RECORD).read_text())["publications"]
    assert len(told) == 24 and [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_who_may_see_it_is_noted_of_every_branch(hub: HubServer, made: Targets, tmp_path: Path) -> None:
    how = Publish(REPO, visibility="private-then-public", layout="branches")
    push = Pusher(hub, made, how, tmp_path / RECORD)
    for _ in range(2):
        push()
        told = json.loads((tmp_path / RECORD).read_text())["publications"]
        assert [entry["visibility"] for entry in told] == ["public"] * 3


def test_one_pull_request_for_two_pushes(hub: HubServer, made: Targets, tmp_path: Path) -> None:
    """The second opens one while the first still looks at its files."""
    hub.add(REPO, {"x": b"x"}, private=True)
    first = Pusher(hub, made[:1], REQUEST, tmp_path / "first.json")
    second = Pusher(hub, made[:1], REQUEST, tmp_path / "second.json")
    hub.when("POST /api/validate-yaml", second)
    first()
    (request,) = hub.repo(REPO).pull_requests
    assert request.status == "open"
    sound(hub, REPO, made[:1], request.ref)


def test_what_another_push_is_not_done_with_is_not_shown(
    hub: HubServer, made: Targets, tmp_path: Path
) -> None:
    first = Pusher(hub, made[:1], THEN_PUBLIC, tmp_path / RECORD)
    second = Pusher(hub, made[1:], Publish(REPO), tmp_path / RECORD)

    def half() -> None:
        hub.when("POST .*/commit/", lambda: hub.when("POST .*/commit/", lambda: hub.tokens.clear()))
        assert not attempt(second)
        hub.tokens.update(tokens)

    tokens = dict(hub.tokens)
    hub.when("POST .*/commit/", half)
    with pytest.raises(QuantkitError, match=r"complete and stays private: 1 file appeared .*Tiny-Q8_0.gguf"):
        first()
    assert hub.repo(REPO).private
    second()
    first()
    together(hub, made)


def test_weights_that_change_after_they_were_verified_are_not_shown(
    hub: HubServer, made: Targets, tmp_path: Path
) -> None:
    push = Pusher(hub, made[:1], THEN_PUBLIC, tmp_path / RECORD)

    def change() -> None:
        hub.when("GET .*/tree/", lambda: hub.add(REPO, {"Tiny-Q4_K_M.gguf": b"GGUF of somebody else"}))

    at(hub, 1, change)
    with pytest.raises(
        QuantkitError, match=r"stays private: 'Tiny-Q4_K_M.gguf' was changed or deleted there"
    ):
        push(confirmed=True)
    assert hub.repo(REPO).private
    seen = picture(hub, REPO)
    assert not attempt(push)
    assert picture(hub, REPO) == seen
    push(replace=True)
    together(hub, made[:1])
