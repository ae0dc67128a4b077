"""Notes that a person gave, or wrote on the Hub's page, outlive every push that does not name others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.hub.manifest import Manifest
from quantkit.hub.push.push import Pushed
from quantkit.recipe.spec import Card, Publish
from quantkit.run.publish import Pushing, publish
from tests.hubserver import HubServer
from tests.hubserver.client import ALICE, SENDS_FILES, tame
from tests.targets import gguf, gptq, target

pytestmark = SENDS_FILES
REPO = "alice/Tiny"
FIRST, SECOND = "Mind the *gap*.\n\n- one\n- two\n", "Other words.\n"


class Publisher:
    """Gives commands in a folder with targets and a file for notes."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.out, self.file = hub, folder / "out", folder / "notes.md"
        self.how = Publish(REPO, card=Card(plot=False))

    def __call__(self, notes: str | None = None, *, only: tuple[str, ...] = (), **pushing: bool) -> Pushed:
        """Push with these notes in a file; None: without --notes."""
        if notes is not None:
            self.file.write_text(notes)
        card = dataclasses.replace(self.how.card, notes=None if notes is None else str(self.file))
        return self.push(dataclasses.replace(self.how, card=card), only, **pushing)

    def push(self, how: Publish, only: tuple[str, ...] = (), **pushing: bool) -> Pushed:
        """Without the cards that lie in the targets' folders."""
        for path in self.out.glob("*/README.md"):
            path.unlink()
        asked = Pushing(engines=False, **pushing)
        return publish([self.out], how, only=only, token=ALICE, endpoint=self.hub.url, pushing=asked)

    def card(self, repo: str = REPO, branch: str = "main") -> str:
        return self.hub.repo(repo).read("README.md", branch).decode()

    def notes(self, repo: str = REPO, branch: str = "main") -> str | None:
        """What stands between the marks."""
        found = re.search(
            r"<!-- quantkit:notes:begin[^\n]*-->\r?\n(.*?)\r?\n<!-- quantkit:notes:end -->",
            self.card(repo, branch),
            re.DOTALL,
        )
        return None if found is None else found[1]

    def edit(self, old: str, new: str, repo: str = REPO, branch: str = "main") -> None:
        """As a person does on the Hub's page."""
        assert self.card(repo, branch).count(old) == 1
        text = self.card(repo, branch).replace(old, new)
        self.hub.add(repo, {"README.md": text.encode()}, revision=branch)


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    tame(monkeypatch)
    monkeypatch.setattr("quantkit.hub.scrub.findings", lambda files, **_: [])  # the files hold no tensors
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as hub:
        hub.add("org/tiny", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        gptq(tmp_path / "out")
        yield Publisher(hub, tmp_path)


def test_they_stay_when_nobody_names_them(push: Publisher) -> None:
    push(FIRST)
    assert push.notes() == FIRST.strip("\n") and "\n## Notes\n" in push.card()
    again = push()
    assert again.done[0].unchanged and push.notes() == FIRST.strip("\n")
    push(SECOND)
    assert push.notes() == SECOND.strip("\n") and "gap" not in push.card()


def test_an_edit_on_the_page_stays(push: Publisher) -> None:
    push(FIRST)
    push.edit("- two\n", "- two\n- three, says a reader\n")
    assert push().done[0].unchanged
    # also where the recipe still names the file as it was
    assert push(FIRST).done[0].unchanged
    assert push.notes() == FIRST + "- three, says a reader"


def test_an_edit_is_not_lost_to_other_notes(push: Publisher) -> None:
    push(FIRST)
    push.edit("- two", "- three")
    push()  # which does not make the edit one of ours
    for given in (SECOND, ""):
        with pytest.raises(UsageError, match=r"alice/Tiny: README.md: the notes were edited there") as caught:
            push(given)
        assert "--notes" in str(caught.value) and "--replace-card" in str(caught.value)
        assert push(given, dry_run=True).problems
    assert push.notes() == FIRST.strip("\n").replace("two", "three")
    push(FIRST.replace("two", "three"))  # copied into the file
    push(SECOND)
    assert push.notes() == SECOND.strip("\n")
    push.edit("Other", "My")
    push(FIRST, replace_card=True)
    assert push.notes() == FIRST.strip("\n")


def test_they_stay_where_the_rest_is_replaced(push: Publisher) -> None:
    push(FIRST)
    push.edit("- two", "- three")
    push.edit("## Licence", "## Licence\n\nmine")
    with pytest.raises(UsageError, match="was edited since"):
        push()
    push(replace_card=True)
    assert push.notes() == FIRST.strip("\n").replace("two", "three") and "\nmine" not in push.card()


@pytest.mark.parametrize("empty", ["", " \n\n"])
def test_an_empty_file_removes_them(push: Publisher, empty: str) -> None:
    push(FIRST)
    push(empty)
    assert push.notes() is None and "## Notes" not in push.card()
    push()
    assert push.notes() is None


def test_an_empty_name_removes_them(push: Publisher) -> None:
    push(FIRST)
    push.push(Publish(REPO, card=Card(notes="", plot=False)))
    assert push.notes() is None


def test_what_a_person_takes_out_stays_out(push: Publisher) -> None:
    push(FIRST)
    push.edit(FIRST, "")
    push()
    push(FIRST)
    assert push.notes() == "" and "## Notes" not in push.card()
    with pytest.raises(UsageError, match="notes were edited"):
        push(SECOND)
    push("")
    assert push.notes() is None


def test_a_mark_that_was_damaged_is_an_edit(push: Publisher) -> None:
    push(FIRST)
    push.edit("<!-- quantkit:notes:end -->", "")
    with pytest.raises(UsageError, match="the part that quantkit wrote was edited"):
        push()
    push(replace_card=True, notes=SECOND)
    said = re.search("notes:begin( sha256=[0-9a-f]{64})", push.card())
    assert said is not None
    push.edit(said[0], "notes:begin")
    push()
    assert push.notes() == SECOND.strip("\n")
    with pytest.raises(UsageError, match="notes were edited"):
        push(FIRST)


def test_line_ends_of_windows(push: Publisher) -> None:
    push(FIRST.replace("\n", "\r\n"))
    assert push.notes() == FIRST.strip("\n")
    push.hub.add(REPO, {"README.md": push.card().replace("\n", "\r\n").encode()})
    assert push(FIRST).done[0].unchanged
    push(SECOND)
    assert push.notes() == SECOND.strip("\n") and push.card().replace("\r\n", "").count("\n") == 0


def test_each_card_keeps_its_own(push: Publisher, tmp_path: Path) -> None:
    gptq(tmp_path / "out", "other")
    for kind in ("q4_k_m", "q8_0"):
        gguf(tmp_path / "out", kind)
    names = {"alice/Tiny-gptq-w4g128": "gptq-w4g128", "alice/Tiny-other": "other"}
    several = "alice/Tiny-GGUF"
    push.how = Publish("alice/Tiny-{target}", card=Card(plot=False))
    for repo, name in names.items():
        push(f"Of {repo}.", only=(name,))
    push("Of both.", only=("gguf-q4_k_m", "gguf-q8_0"))
    push.edit("Of both.", "Of the two.", repo=several)
    push()
    assert {repo: push.notes(repo) for repo in (*names, several)} == {
        **{repo: f"Of {repo}." for repo in names},
        several: "Of the two.",
    }


def test_branches_keep_theirs(push: Publisher, tmp_path: Path) -> None:
    def exl3(bits: float) -> Manifest:
        files = {"model.safetensors": b"\0x%d" % bits, "config.json": b"{}"}
        return target(tmp_path / "out", f"exl3-{bits}", "exl3", "w4", files, bits=bits)[1]

    names = tuple(exl3(bits).name for bits in (4.0, 5.0))
    push.how = Publish("alice/Tiny-{target}", card=Card(plot=False))
    repo = "alice/Tiny-EXL3"
    push("Of all.", only=names)
    push.edit("Of all.", "Of this one.", repo=repo, branch="4.0bpw")
    for given in (None, "Of all."):
        push(given, only=names)
        assert [push.notes(repo, b) for b in ("main", "4.0bpw", "5.0bpw")] == [
            "Of all.", "Of this one.", "Of all."
        ]  # fmt: skip
    with pytest.raises(UsageError, match=r"alice/Tiny-EXL3, branch 4.0bpw: README.md: the notes were edited"):
        push("Of none.", only=names)
    assert push.notes(repo) == "Of all."
    push.how = dataclasses.replace(push.how, repo=repo, branch="next")
    push(only=("gptq-w4g128",))
    assert push.notes(repo, "next") == "Of all."  # it starts as main
