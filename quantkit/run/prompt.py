"""How a message looks to the model: its chat template, filled in."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError

from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.errors import QuantkitError
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.quantized import open_source

_MESSAGE = "{prompt}"


def prompt_example(path: Path) -> str | None:
    """What a user's message ``{prompt}`` becomes for the model in `path`, a folder or a GGUF file.

    None where it has no chat template, or one that does not render: nothing is raised for an example.
    """
    try:
        tokenizer = load_tokenizer(tokenizer_folder(open_source(path)))
    except QuantkitError:
        return None
    if not tokenizer.chat_template:
        return None
    try:
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MESSAGE}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, str) and _MESSAGE in found else None
