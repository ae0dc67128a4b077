"""Whether the tokenizer beside the weights is that of the source, and its chat template renders."""

from __future__ import annotations

from typing import Any

from quantkit.calibrate.chat import render
from quantkit.calibrate.tokenizer import Tokenizer, load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, SourceError, UnsupportedError
from quantkit.gguf.vocabulary.identity import same_ids
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.verification import Verification

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello. What can I do?"},
    {"role": "user", "content": "Count to three."},
]


def check_tokenizer(report: Verification, own: Checkpoint, source: Checkpoint | None, *, ours: bool) -> None:
    """Of a folder: the tokens, special tokens and chat template of the source, where there is one.

    ours  quantkit wrote it: other tools may have meant to change special tokens and templates
    """
    tokenizer, why = _load(own)
    expected, why_not = (None, None) if source is None else _load(source)
    if tokenizer is not None:
        check_template(report, tokenizer, ours=ours)
    if tokenizer is None or expected is None:
        if source is None and why is not None:
            report.notes.append(f"tokens were not looked at: {why}")
        elif (tokenizer is None) != (expected is None) and source is not None:
            report.notes.append(f"tokens were not compared: {why or why_not}")
        return
    _compare(report, tokenizer, expected, report.problems if ours else report.notes)


def _load(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer, or why there is none."""
    try:
        return load_tokenizer(tokenizer_folder(checkpoint)), None
    except (SourceError, UnsupportedError) as error:
        return None, error.message


def _compare(report: Verification, tokenizer: Tokenizer, expected: Tokenizer, said: list[str]) -> None:
    """Other ids are a problem; `said` takes what else differs."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    others = same_ids(expected, encode)
    report.problems += [f"its tokenizer makes other tokens: {other}" for other in others]
    for name in _SPECIAL:
        found, wanted = (_special(t, name) for t in (tokenizer, expected))
        if found != wanted:
            said.append(f"its {name} is {found!r}, that of the source {wanted!r}")
    if (tokenizer.chat_template or None) != (expected.chat_template or None):
        said.append("its chat template is not that of the source")
    report.checks["tokens"] = f"{len(others):,} texts get others" if others else "those of the source"


def check_template(report: Verification, tokenizer: Tokenizer, *, ours: bool) -> None:
    """A chat template gives a text for a short talk; nothing is said where there is none."""
    if not tokenizer.chat_template:
        return
    try:
        render(_TALK, tokenizer, answer=True)
    except SourceError as error:
        said = report.problems if ours else report.notes
        said.append(f"its chat template does not render: {error.message}")
    except RunError as error:
        report.notes.append(f"its chat template was not looked at: {error.message}")
    else:
        report.checks["chat template"] = "renders"


def _special(tokenizer: Tokenizer, name: str) -> Any:
    return getattr(tokenizer, name, None)  # a foreign class, which may not have it
