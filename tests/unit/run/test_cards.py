"""What is told about a card that lacks something."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.calibrate import chat
from quantkit.hub.push.publication import publications
from quantkit.hub.push.remote import RemoteState
from quantkit.progress import Silent
from quantkit.recipe.spec import Publish
from quantkit.run.cards import Cards, _own_card
from tests.cards import LICENCE
from tests.gguf_files import byte_tokenizer
from tests.models import save_tiny
from tests.targets import gptq

HOW = Publish("alice/model", visibility="public")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class Noted(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("process", [True, False])
def test_a_card_without_its_prompt(process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    if not process:
        monkeypatch.setattr(chat, "_command", lambda: ["/no/such/program"])
    folder, made = gptq(tmp_path)
    byte_tokenizer(save_tiny("llama", folder, vocab_size=420))
    (folder / "chat_template.jinja").write_text(ENDLESS)
    (publication,) = publications([(folder, made)], HOW)
    told = Noted()
    cards = Cards(HOW, "https://huggingface.co", (publication,), {"f" * 16: LICENCE}, False, told)
    assert "apply_chat_template" not in cards(publication, RemoteState())["README.md"].decode()
    (note,) = told.notes
    why = "it takes more than 0.2 s" if process else "no process can be started for the chat template: "
    assert note.startswith(f"{publication.name}: the card shows no prompt, for ") and why in note


def test_a_card_in_the_folder_keeps_its_ends_of_lines(tmp_path: Path) -> None:
    folder, made = gptq(tmp_path)
    (folder / "README.md").write_bytes("\ufeffmine\r\nand mine\n".encode())
    (publication,) = publications([(folder, made)], HOW)
    assert _own_card(publication) == "\ufeffmine\r\nand mine\n"
