"""A card beside a person's own text: our part stands between two marks, all else is theirs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.hub.card import front_matter

MARK = "<!-- quantkit:"
_BEGIN = re.compile(r"^<!-- quantkit:begin\b[^\r\n]*?-->[ \t]*(?=\r?$)", re.MULTILINE)
_END = re.compile(r"^<!-- quantkit:end -->[ \t]*(?=\r?$)", re.MULTILINE)
_SUM = re.compile(r"<!-- quantkit:begin sha256=([0-9a-f]{64}) -->")


@dataclass(frozen=True, slots=True)
class _Block:
    """Where our part stands in a text, marks included without the last line's end."""

    start: int
    end: int
    unchanged: bool


def marked(body: str) -> str:
    """`body` between our marks; UsageError when it holds one itself."""
    if MARK in body:
        raise UsageError(
            f"the card would hold `{MARK}…`, by which quantkit finds its own part again",
            remedy="take it out of the notes, the recipe or the chat template",
        )
    # as it will be read again, whatever line ends an editor or a checkout gives it
    inner = body.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"
    return f"<!-- quantkit:begin sha256={_sha256(inner)} -->\n{inner}<!-- quantkit:end -->\n"


def merge(generated: str, existing: str | None, *, replace: bool = False) -> str:
    """The README that has our card and keeps what is there.

    Our part takes the place of an earlier one of ours, or stands at the end. UsageError when a person edited
    that earlier part, or left metadata that cannot be read, unless `replace`.
    """
    if existing is None or not existing.removeprefix("\ufeff").strip():
        return generated
    newline = "\r\n" if re.search(r"\A[^\n]*\r\n", existing) else "\n"
    ours = front_matter.find(generated)
    if ours is None:
        raise ValueError("a generated card has metadata")
    block = ours.rest.strip("\n").replace("\n", newline)
    theirs = _front_matter(existing, replace)
    text = existing.removeprefix("\ufeff") if theirs is None else theirs.rest
    blocks = _blocks(text, replace)
    before = front_matter.merged(ours.yaml, theirs.yaml, made_before=bool(blocks)) if theirs else ours.yaml
    head = f"---\n{before}---\n".replace("\n", newline)
    if theirs is None:
        # a paragraph that begins right behind the metadata reads as before
        head += newline
    return head + _placed(text, block, blocks, newline)


def _front_matter(existing: str, replace: bool) -> front_matter.FrontMatter | None:
    """Theirs, None: there is none, or none that can be kept."""
    found = front_matter.find(existing)
    if found is None:
        return None
    try:
        front_matter.merged("", found.yaml, made_before=False)
    except UsageError:
        if replace:
            return front_matter.FrontMatter("", found.rest, found.first_line)
        raise
    return found


def _placed(text: str, block: str, blocks: list[_Block], newline: str) -> str:
    """`text` with `block` instead of the first of ours, or at the end."""
    if not blocks:
        if not text.strip():
            return newline + block + newline
        gap = newline if text.endswith(newline) else newline * 2
        return text + gap + block + newline
    first, *more = blocks
    out, position = text[: first.start] + block, first.end
    for further in more:
        out += text[position : further.start]
        position = further.end
    return out + text[position:]


def _blocks(text: str, replace: bool) -> list[_Block]:
    """Our parts; UsageError when a person changed them, unless `replace`."""
    found, position = [], 0
    while (begin := _BEGIN.search(text, position)) is not None:
        end = _END.search(text, begin.end())
        following = _BEGIN.search(text, begin.end())
        if end is None or (following is not None and following.start() < end.start()):
            # without an end nobody knows what is theirs: only the mark itself is ours
            found.append(_Block(begin.start(), begin.end(), False))
            position = begin.end()
            continue
        inner = text[begin.end() : end.start()].replace("\r\n", "\n").removeprefix("\n")
        said = _SUM.match(begin[0])
        found.append(_Block(begin.start(), end.end(), said is not None and said[1] == _sha256(inner)))
        position = end.end()
    stray = not found and _END.search(text) is not None
    if not replace and (stray or len(found) > 1 or any(not block.unchanged for block in found)):
        raise UsageError(
            "README.md: the part that quantkit wrote was edited since, and would be lost",
            remedy="move your text outside of its two `<!-- quantkit:… -->` lines, or give --replace-card",
        )
    return found


def _sha256(inner: str) -> str:
    return hashlib.sha256(inner.encode()).hexdigest()
