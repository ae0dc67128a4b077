"""A repository that was private shows all when it is made public: nobody is to learn that afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from quantkit.errors import HubError, UsageError
from quantkit.hub.manifest import Manifest
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.remote import RemoteState
from quantkit.recipe.spec import Publish
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES, tame
from tests.pushing import Pusher, card
from tests.targets import changed, gguf, target

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
PRIVATE, OPENED = Publish(REPO), Publish(REPO, visibility="private-then-public")


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pusher]:
    tame(monkeypatch)
    with HubServer() as hub:
        yield Pusher(hub, [gguf(tmp_path / "out", "q4_k_m")], OPENED, tmp_path / "publish.json")


def stopped(push: Pusher, how: Publish = OPENED, **options: bool) -> str:
    """What a push says that sends nothing and leaves the repository private."""
    before = len(push.hub.log)
    with pytest.raises(UsageError, match="would become public") as caught:
        push(how=how, **options)
    assert not any(line.startswith(("POST", "PUT")) for line in push.hub.log[before:])
    assert push.hub.repo(how.repo).private
    assert caught.value.remedy and "--yes" in caught.value.remedy
    planned = push(how=how, dry_run=True, **options)
    assert [problem.message for problem in planned.problems] == [caught.value.message]
    assert any(caught.value.message in text for table in planned.tables() for text in table.blockers)
    return caught.value.message.partition(": ")[2]


def test_a_branch_of_a_person(push: Pusher) -> None:
    push.hub.add(REPO, {"draft.md": b"secret", "a/b.safetensors": b"\0" * 94}, revision="draft", private=True)
    assert stopped(push) == "2 files on draft (100 B, first: 'a/b.safetensors')"
    push.said.lines.clear()
    push(confirmed=True)
    told = next(n for n, line in enumerate(push.said.lines) if "does not verify becomes public" in line)
    assert push.said.lines[told].endswith("too: 2 files on draft (100 B, first: 'a/b.safetensors')")
    assert told < next(n for n, line in enumerate(push.said.lines) if line.startswith("upload "))
    assert not push.hub.repo(REPO).private
    assert "becomes public" not in str(push(confirmed=True).plans[0].notes)


def test_a_dry_run_says_what_was_agreed_to(push: Pusher) -> None:
    push.hub.add(REPO, {"draft.md": b"secret"}, revision="draft", private=True)
    (plan,) = push(dry_run=True, confirmed=True).plans
    assert plan.problems == ()
    assert "what this push does not verify becomes public, too: 1 file on draft (6 B, first: 'draft.md')" in (
        plan.notes
    )


def test_many_branches(push: Pusher) -> None:
    push.hub.add(REPO, {"x": b"x"}, private=True)
    for n in range(5):
        push.hub.add(REPO, {f"f{n}": b"12"}, revision=f"b{n}")
    shown = ", ".join(f"1 file on b{n} (2 B, first: 'f{n}')" for n in (0, 1))
    assert stopped(push) == f"1 file on main (1 B, first: 'x'), {shown} and files on 3 more branches"


def test_what_a_push_left_that_failed(push: Pusher) -> None:
    made = gguf(push.targets[0][0].parent, "q8_0")
    push(how=PRIVATE)
    push.hub.add(REPO, {"Tiny-Q8_0.gguf": (made[0] / "Tiny-Q8_0.gguf").read_bytes()})
    assert "1 file on main" in stopped(push) and "'Tiny-Q8_0.gguf'" in stopped(push)
    push.targets = [*push.targets, made]  # now it is a file of this push
    push()
    assert not push.hub.repo(REPO).private


def test_what_earlier_pushes_published_needs_no_word(push: Pusher) -> None:
    push(how=PRIVATE)
    push.targets = [gguf(push.targets[0][0].parent, "q8_0")]
    push()
    assert not push.hub.repo(REPO).private


def test_a_file_of_an_earlier_push_that_is_another_by_now(push: Pusher) -> None:
    push(how=PRIVATE)
    push.hub.add(REPO, {"Tiny-Q4_K_M.gguf": b"GGUF of somebody else"})
    push.targets = [gguf(push.targets[0][0].parent, "q8_0")]
    # `recipes/` describes what is not described any more, by its name
    assert stopped(push) == "1 file on main (21 B, first: 'Tiny-Q4_K_M.gguf')"


def test_what_earlier_pushes_left(push: Pusher) -> None:
    both = [*push.targets, gguf(push.targets[0][0].parent, "q8_0")]
    push.targets = both
    push(how=PRIVATE)
    push.targets = both[:1]
    push(how=PRIVATE)
    push.hub.add(REPO, {"Tiny-Q8_0.gguf": b"GGUF of somebody else"})
    push(how=PRIVATE)
    assert "'Tiny-Q8_0.gguf'" in stopped(push)
    push(prune=True)
    assert not push.hub.repo(REPO).private and "Tiny-Q8_0.gguf" not in push.hub.repo(REPO).files()


def test_pull_requests_are_not_branches(push: Pusher) -> None:
    push.hub.add(REPO, {".gitattributes": b"x"}, private=True)
    repo = push.hub.repo(REPO)
    repo.open_pull_request("mine", "", "bob", status="open")
    repo.commit("refs/pr/1", "more", {"x": repo.store.regular("x", b"x")}, author="bob")
    push()
    assert not repo.private


def test_a_branch_beside_main(push: Pusher) -> None:
    push.hub.add(REPO, {"secret": b"x"}, private=True)
    how = Publish(REPO, branch="next", visibility="private-then-public")
    assert stopped(push, how) == "1 file on main (1 B, first: 'secret')"
    push(how=how, confirmed=True)
    push.hub.repo(REPO).private = True
    assert stopped(push, how) == (
        "1 file on next (1 B, first: 'secret'), 1 file on main (1 B, first: 'secret')"
    )


def exl3(root: Path, bits: float) -> tuple[Path, Manifest]:
    files = {"model.safetensors": b"\0x%d" % bits, "config.json": b"{}"}
    return target(root, f"exl3-{bits}", "exl3", "w4", files, bits=bits)


def test_the_layout_of_branches(push: Pusher, tmp_path: Path) -> None:
    how = Publish("alice/Tiny-EXL3", visibility="private-then-public")
    four, five, six = (exl3(tmp_path, bits) for bits in (4.0, 5.0, 6.0))
    push.targets = [four, five]
    push(how=Publish(how.repo))
    repo = push.hub.repo(how.repo)
    push.targets = [six]
    push(how=how)  # beside two others that are as they were published
    assert not repo.private
    repo.private = True
    push.hub.add(how.repo, {"model.safetensors": b"\0another", "draft": b"x"}, revision="5.0bpw")
    assert stopped(push, how, replace=True) == "2 files on 5.0bpw (9 B, first: 'draft')"
    push.targets = [five, six]  # its own branches are those of this push
    assert stopped(push, how, replace=True) == "1 file on 5.0bpw (1 B, first: 'draft')"
    folder, made = five
    push.targets = [(folder, changed(folder, made, "draft", b"x")), six]
    push(how=how, replace=True)
    assert not repo.private


@pytest.mark.parametrize("exists", [True, False])
def test_a_branch_that_appears_meanwhile(push: Pusher, exists: bool) -> None:
    if exists:
        push(how=PRIVATE)
        folder, made = push.targets[0]
        push.targets = [(folder, changed(folder, made, "LICENSE", b"Other"))]

    def late(publication: Publication, remote: RemoteState) -> Mapping[str, bytes]:
        if remote.head is not None and not push.hub.repo(REPO).refs.keys() & {"refs/heads/draft"}:
            push.hub.add(REPO, {"secret": b"x"}, revision="draft")
        return card(publication, remote)

    with pytest.raises(HubError, match="is complete and stays private: 1 file appeared") as caught:
        push(card=late, replace=True)
    assert push.hub.repo(REPO).private and "with --yes" in str(caught.value)
    assert "'secret' on draft" in caught.value.message
    push(confirmed=True)
    assert not push.hub.repo(REPO).private


def test_a_repository_of_this_very_push_has_nothing_else(push: Pusher) -> None:
    push(how=Publish(REPO, branch="next", visibility="private-then-public"))
    assert not push.hub.repo(REPO).private
