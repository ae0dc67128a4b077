"""`push` to a repository that is renamed, deleted, rewritten or closed to the account while it is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from quantkit.errors import HubError, QuantkitError, UsageError
from quantkit.hub.push.record import RECORD
from quantkit.recipe.spec import Publish
from tests.elsewhere import before, hurry, turning_points
from tests.hubserver import HubServer, User
from tests.hubserver.client import ALICE, SENDS_FILES
from tests.pushing import Pusher, Targets, no_token, nothing_false, sound
from tests.targets import gguf

pytestmark = SENDS_FILES
REPO, NEW = "alice/Tiny-GGUF", "acme/Small-GGUF"
THEN_PUBLIC = Publish(REPO, visibility="private-then-public")
Happens = Callable[[HubServer], object]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return [gguf(tmp_path_factory.mktemp("made") / "out", "q4_k_m")]


@pytest.fixture(scope="module")
def seams(made: Targets, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Requests after the one that makes the repository."""
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        hurry(patch)
        Pusher(hub, made, THEN_PUBLIC, tmp_path_factory.mktemp("seams") / RECORD)()
        return turning_points(hub.log)[1:]


def disturbed(
    push: Pusher, number: int, happens: Happens, expected: type[QuantkitError] = HubError
) -> str | None:
    """What a push says that something happens to before one of its requests; None where it ends well."""
    before(push.hub, number, lambda: happens(push.hub))
    try:
        push()
    except expected as error:
        assert error.remedy
        no_token(push.hub, push, str(error), repr(error.__cause__))
        return str(error)
    return None


def moved(hub: HubServer) -> None:
    hub.rename(REPO, NEW)


def test_renamed(made: Targets, seams: list[int], tmp_path: Path) -> None:
    """Whatever is sent to the old name goes to the new one, with its body and the token; the push asks for
    the new name as soon as it looks at it."""
    well = []
    for number in seams:
        with HubServer() as hub:
            push = Pusher(hub, made, THEN_PUBLIC, tmp_path / f"{number}.json")
            said = disturbed(push, number, moved, UsageError)
            assert not hub.has(REPO)
            nothing_false(hub, NEW)
            if said is None:
                well.append(number)
                assert not hub.repo(NEW).private
            else:
                assert f"{REPO} is called {NEW} by now" in said and f"give --repo {NEW}" in said
                assert hub.repo(NEW).private
                assert disturbed(push, 10_000, moved, UsageError) == said
            push(how=Publish(NEW, visibility="private-then-public"))
            sound(hub, NEW, made)
            assert not hub.repo(NEW).private and not hub.has(REPO)
    assert well and well != seams


def test_the_old_name_is_somebody_elses_by_now(hub: HubServer, made: Targets, tmp_path: Path) -> None:
    push = Pusher(hub, made, Publish(REPO, visibility="private"), tmp_path / RECORD)
    push()
    hub.rename(REPO, NEW)
    hub.add(REPO, {"theirs.txt": b"x"}, private=False)
    before_it = hub.repo(REPO).files()
    assert "is public, private was asked for" in str(disturbed(push, 10_000, moved, UsageError))
    assert hub.repo(REPO).files() == before_it


def test_deleted(made: Targets, seams: list[int], tmp_path: Path) -> None:
    for number in seams:
        with HubServer() as hub:
            push = Pusher(hub, made, THEN_PUBLIC, tmp_path / f"{number}.json")
            said = disturbed(push, number, lambda hub: hub.remove(REPO))
            assert said is not None and ("gone" in said or "not there" in said), number
            assert "quantkit push" in said and not hub.has(REPO)
            push()
            sound(hub, REPO, made)
            assert not hub.repo(REPO).private


def rewritten(hub: HubServer) -> None:
    """What was there is on no branch any more, and other files are."""
    repo = hub.repo(REPO)
    del repo.refs["refs/heads/main"]
    repo.commit(
        "refs/heads/main", "Begin anew", {"mine.txt": repo.store.regular("mine.txt", b"mine")}, author="bob"
    )


def test_rewritten(made: Targets, seams: list[int], tmp_path: Path) -> None:
    private = Publish(REPO, visibility="private")
    for number in seams:
        if number > seams[-4]:  # when it becomes public; a private repository is done by then
            continue
        with HubServer() as hub:
            push = Pusher(hub, made, private, tmp_path / f"{number}.json")
            said = disturbed(push, number, rewritten)
            assert said is None or "was changed since" in said, number
            nothing_false(hub, REPO)
            assert hub.repo(REPO).read("mine.txt") == b"mine"
            push()
            sound(hub, REPO, made)
            assert hub.repo(REPO).read("mine.txt") == b"mine"


def test_rewritten_before_it_becomes_public(made: Targets, seams: list[int], tmp_path: Path) -> None:
    for number in seams[:-2]:
        with HubServer() as hub:
            push = Pusher(hub, made, THEN_PUBLIC, tmp_path / f"{number}.json")
            assert disturbed(push, number, rewritten) is not None, number
            assert hub.repo(REPO).private


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (User("alice", role="read"), ("may not write", "has no right")),
        (User("bob"), ("gone", "not there", "may not write")),
    ],
    ids=["reads only", "left"],
)
def test_the_right_to_it_is_lost(
    made: Targets, seams: list[int], tmp_path: Path, account: User, said: tuple[str, ...]
) -> None:
    for number in seams:
        with HubServer() as hub:
            alice = hub.tokens[ALICE]

            def lose(hub: HubServer) -> None:
                hub.tokens[ALICE] = account

            push = Pusher(hub, made, THEN_PUBLIC, tmp_path / f"{account.name}-{number}.json")
            found = disturbed(push, number, lose)
            if found is None:  # it only had to look by then
                assert not hub.repo(REPO).private
            else:
                assert any(text in found for text in said), found
                assert push.slept == []
            hub.tokens[ALICE] = alice
            nothing_false(hub, REPO)
            push()
            sound(hub, REPO, made)
            assert not hub.repo(REPO).private


@pytest.mark.parametrize("path", ["LICENSE", "Tiny-Q4_K_M.gguf"])
def test_a_file_of_somebody_else_is_not_replaced(
    hub: HubServer, made: Targets, tmp_path: Path, path: str
) -> None:
    """It appears while the weights are sent."""
    push = Pusher(hub, made, Publish(REPO), tmp_path / RECORD)
    hub.when("PUT /lfs/", lambda: hub.add(REPO, {path: b"theirs"}, message="My own"))
    said = disturbed(push, 10_000, moved)
    assert said is not None and "by alice at 20" in said and said.partition("\n")[0].endswith(": My own.")
    assert hub.repo(REPO).read(path) == b"theirs"
    with pytest.raises(UsageError, match=f"'{path}' is there and"):
        push()
    push(replace=True)
    sound(hub, REPO, made)


def test_files_of_somebody_else_that_are_in_nobodys_way(
    hub: HubServer, made: Targets, tmp_path: Path
) -> None:
    push = Pusher(hub, made, Publish(REPO), tmp_path / RECORD)
    hub.when("PUT /lfs/", lambda: hub.add(REPO, {"mine.txt": b"mine"}))
    push()
    sound(hub, REPO, made)
    assert hub.repo(REPO).read("mine.txt") == b"mine"


@pytest.mark.parametrize("asked", ["private", None])
def test_shown_before_anything_is_sent(
    hub: HubServer, made: Targets, tmp_path: Path, asked: Literal["private"] | None
) -> None:
    hub.add(REPO, {"x": b"x"}, private=True)

    def show() -> None:
        hub.repo(REPO).private = False

    hub.when("POST /api/validate-yaml", show)
    push = Pusher(hub, made, Publish(REPO, visibility=asked), tmp_path / RECORD)
    with pytest.raises(UsageError, match=f"{REPO} is public, private was asked for"):
        push()
    assert "Tiny-Q4_K_M.gguf" not in hub.repo(REPO).files()
