"""What is found before anything is sent says what helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.hub.push.preflight import Plan
from quantkit.recipe.spec import Publish
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES, tame
from tests.pushing import FRONT, Pusher
from tests.targets import gguf

pytestmark = SENDS_FILES
ANEW = "run quantkit convert again with --on-exists replace"


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pusher]:
    tame(monkeypatch)
    with HubServer() as hub:
        yield Pusher(hub, [gguf(tmp_path, "q4_k_m")], Publish("alice/T"), tmp_path / "publish.json")


@pytest.mark.parametrize(
    ("file", "helps"),
    [
        ("README.md", "remove it from README.md or from the notes that go into it (publish.card.notes)"),
        ("LICENSE", f"remove it from this file of the source, then {ANEW}"),
        (
            "recipes/gguf-q4_k_m.yaml",
            f"remove it from the recipe or from the source that it is about, then {ANEW}",
        ),
    ],
)
def test_what_must_not_be_published_can_be_removed(push: Pusher, file: str, helps: str) -> None:
    with pytest.raises(UsageError, match="must not be published") as caught:
        push(scrub=lambda files: [f"{name}:1 a token" for name in files if name == file])
    assert caught.value.remedy == helps


def test_what_is_odd_about_a_front_matter_is_noted(push: Pusher) -> None:
    def planned(text: str) -> Plan:
        found = push(dry_run=True, card=lambda publication, remote: {"README.md": text.encode()})
        return found.plans[0]

    odd = planned(f"---\n{FRONT}base_model: org/tiny\n---\n")
    said = "base_model_relation: is missing beside base_model; the Hub would guess it"
    assert f"README.md:2 {said}" in odd.notes and odd.problems == ()
    refused = planned(f"---\n{FRONT}language: [no, en]\n---\n")  # the Hub tells no line
    assert "README.md:6 language: False is a truth value to YAML: put it in quotes" in refused.notes
    assert len(refused.problems) == 1
    missing = planned("no front matter\n").notes
    assert any(note.startswith("README.md:1 front matter: is missing") for note in missing)
    assert not any("README.md" in note for note in push(dry_run=True).plans[0].notes)
