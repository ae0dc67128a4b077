"""The example of a prompt on a card: templates are programs of strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.calibrate import chat
from quantkit.errors import SourceError
from quantkit.run.prompt import prompt_example
from tests.gguf_files import byte_tokenizer, write_gguf
from tests.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=420))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if add_generation_prompt %}<u>{{ messages[0]['content'] }}→{% endif %}", "<u>{prompt}→"),
        ('{{ "\\ud800" }}{{ strftime_now("%Y") }} {{ messages[0].content }}', "?26 Jul 2024 {prompt}"),
        ("{{ messages[0].content }}{{ 'x' * 30000 }}", None),
        ("no place for a message", None),
        ("", None),
    ],
)
def test_an_example(template: str, expected: str | None, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert prompt_example(model) == expected


def test_an_example_of_a_gguf_file(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    assert prompt_example(write_gguf(model, tmp_path / "x.gguf")) == "<s>{prompt}"


def test_a_template_that_does_not_render(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    (model / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(SourceError, match=r"it takes more than 0\.2 s"):
        prompt_example(model)


def test_without_a_model(tmp_path: Path) -> None:
    assert prompt_example(tmp_path) is None
