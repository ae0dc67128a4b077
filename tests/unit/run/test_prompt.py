"""The example of a prompt on a card: templates are programs of strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.run.prompt import prompt_example
from tests.gguf_files import byte_tokenizer
from tests.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=420))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<u>{{ messages[0]['content'] }}</u>", "<u>{prompt}</u>"),
        ("{% if add_generation_prompt %}{{ messages[0].content }}→{% endif %}", "{prompt}→"),
        ('{{ "\\ud800" }}{{ messages[0].content }}', "?{prompt}"),
        ("\n{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}", "\n26 Jul 2024 {prompt}"),
        ("{{ messages[0].content }}{{ 'x' * 30000 }}", None),
        ("no place for a message", None),
        ("{{ 1 / 0 }}", None),
        ("{{ 2.0 ** 100000 }}", None),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", None),
        ("{{ ''.__class__.__mro__ }}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_an_example(template: str, expected: str | None, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert prompt_example(model) == expected


def test_without_a_model(tmp_path: Path) -> None:
    assert prompt_example(tmp_path) is None
