"""How a message looks to the model: its chat template, filled in."""

from __future__ import annotations

from pathlib import Path

from quantkit.calibrate.chat import render
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.errors import QuantkitError
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.quantized import open_source

_MESSAGE = "{prompt}"
_MOST = 20_000  # characters; an example is to be read


def prompt_example(path: Path) -> str | None:
    """What a user's message ``{prompt}`` becomes for the model in `path`, a folder or a GGUF file.

    None where it has no chat template, or one that makes a text too long to read. SourceError where the
    template does not render, RunError where that cannot be tried.
    """
    try:
        model = open_source(path)  # of a GGUF file, the tokenizer's folder goes with it
        tokenizer = load_tokenizer(tokenizer_folder(model))
    except QuantkitError:
        return None
    if not tokenizer.chat_template:
        return None
    found = render([{"role": "user", "content": _MESSAGE}], tokenizer, answer=True)
    # half a character cannot be written to a file
    found = found.encode("utf-8", "replace").decode("utf-8")
    return found if _MESSAGE in found and len(found) <= _MOST else None
