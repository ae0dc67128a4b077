"""A card beside a person's own text: our part stands between two marks, all else is theirs.

Within our part are notes, also theirs, between two marks of their own: they come from a file that a push was
given, or from whoever edited them since.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.hub.card import front_matter
from quantkit.hub.card.front_matter import DIGEST, Written

MARK = "<!-- quantkit:"
_ORDER = "\ufeff"  # byte order mark
_BEGIN = re.compile(r"^<!-- quantkit:begin\b[^\r\n]*?-->[ \t]*(?=\r?$)", re.MULTILINE)
_END = re.compile(r"^<!-- quantkit:end -->[ \t]*(?=\r?$)", re.MULTILINE)
_SUM = re.compile(r"<!-- quantkit:begin sha256=([0-9a-f]{64})(?![^ ])")
_NOTES = re.compile(
    r"^<!-- quantkit:notes:begin\b(?P<said>[^\r\n]*?)-->[ \t]*\r?\n"
    r"(?P<text>.*?)^<!-- quantkit:notes:end -->[ \t]*(?=\r?$)",
    re.MULTILINE | re.DOTALL,
)
_NOTES_SUM = re.compile(r" sha256=([0-9a-f]{64}) ")
# what of the metadata we wrote: `front=license:1a2b3c,tags:1a2b3c4d5e6f`, one digest behind another
_FRONT = re.compile(r" front=([\w:,]*)")
_DIGESTS = re.compile(rf"(?:[0-9a-f]{{{DIGEST}}})+")


@dataclass(frozen=True, slots=True)
class Notes:
    """Markdown of the publisher's own within our part.

    written  sha256 of what a push was given last; not that of `text`: a person edited it since
    """

    text: str
    written: str

    @property
    def edited(self) -> bool:
        return _sha256(self.text) != self.written

    @property
    def marked(self) -> str:
        return (
            f"<!-- quantkit:notes:begin sha256={self.written} -->\n{self.text}\n<!-- quantkit:notes:end -->"
        )


@dataclass(frozen=True, slots=True)
class _Block:
    """Where our part stands in a text, marks included without the last line's end."""

    start: int
    end: int
    unchanged: bool
    written: Written


def notes(given: str | None, existing: str | None, *, replace: bool = False) -> Notes | None:
    """The notes that go into the card: those `given`; where that is None, or was written before, those there.

    An empty text removes them. UsageError when others were written there and a person edited them since,
    unless `replace`.
    """
    there = None if existing is None else _notes_of(existing)
    if given is None:
        return there
    text = _plain(given)
    new = Notes(text, _sha256(text))
    if there is not None and there.edited and there.text != text and not replace:
        if there.written == new.written:
            return there
        raise UsageError(
            "README.md: the notes were edited there since quantkit wrote them, and would be lost",
            remedy="copy them into the file of --notes (publish.card.notes), or leave it out and they stay, "
            "or give --replace-card",
        )
    return new if text else None


def marked(body: str, notes: Notes | None = None) -> str:
    """`body`, which shows `notes`, between our marks; UsageError when it holds a mark itself."""
    own = "" if notes is None else notes.text
    if MARK in own or MARK in (body if notes is None else body.replace(notes.marked, "", 1)):
        raise UsageError(
            f"the card would hold `{MARK}…`, by which quantkit finds its own part again",
            remedy="take it out of the notes, the recipe or the chat template",
        )
    # as it will be read again, whatever line ends an editor or a checkout gives it
    inner = body.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"
    return f"<!-- quantkit:begin sha256={_sum(inner)} -->\n{inner}<!-- quantkit:end -->\n"


def merge(generated: str, existing: str | None, *, replace: bool = False) -> str:
    """The README that has our card and keeps what is there.

    Our part takes the place of an earlier one of ours, or stands at the end. UsageError when a person edited
    that earlier part, or left metadata that cannot be read, unless `replace`.
    """
    ours = front_matter.find(generated)
    if ours is None:
        raise ValueError("a generated card has metadata")
    if existing is None or not existing.removeprefix(_ORDER).strip():
        alone = front_matter.merged(ours.yaml, "", made_before=False)
        return f"---\n{ours.yaml}---\n{_stamped(ours.rest, alone.written)}"
    newline = "\r\n" if re.search(r"\A[^\n]*\r\n", existing) else "\n"
    theirs = _front_matter(existing, replace)
    text = existing.removeprefix(_ORDER) if theirs is None else theirs.rest
    blocks = _blocks(text, replace)
    front = front_matter.merged(
        ours.yaml,
        "" if theirs is None else theirs.yaml,
        made_before=bool(blocks),
        before=blocks[0].written if blocks else front_matter.NOTHING,
    )
    head = f"---\n{front.yaml}---\n".replace("\n", newline)
    if existing.startswith(_ORDER):
        head = _ORDER + head
    if theirs is None:
        # a paragraph that begins right behind the metadata reads as before
        head += newline
    block = _stamped(ours.rest, front.written).strip("\n").replace("\n", newline)
    return head + _placed(text, block, blocks, newline)


def _stamped(rest: str, written: Written) -> str:
    """`rest` of a generated card, whose mark says what of the metadata is ours."""
    front = ",".join(f"{key}:{''.join(sorted(digests))}" for key, digests in sorted(written.items()))
    said = f" front={front} -->" if front else " -->"
    return _BEGIN.sub(lambda mark: (_SUM.match(mark[0]) or mark)[0] + said, rest, count=1)


def _stamp(mark: str) -> Written:
    """What the mark of an earlier card says; what of it cannot be read says nothing."""
    front = _FRONT.search(mark)
    pairs = [part.partition(":") for part in front[1].split(",")] if front else []
    return {
        key: frozenset(re.findall(f".{{{DIGEST}}}", digests))
        for key, _, digests in pairs
        if _DIGESTS.fullmatch(digests)
    }


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
            found.append(_Block(begin.start(), begin.end(), False, _stamp(begin[0])))
            position = begin.end()
            continue
        inner = text[begin.end() : end.start()].replace("\r\n", "\n").removeprefix("\n")
        said = _SUM.match(begin[0])
        unchanged = said is not None and said[1] == _sum(inner)
        found.append(_Block(begin.start(), end.end(), unchanged, _stamp(begin[0])))
        position = end.end()
    stray = not found and _END.search(text) is not None
    if not replace and (stray or len(found) > 1 or any(not block.unchanged for block in found)):
        raise UsageError(
            "README.md: the part that quantkit wrote was edited since, and would be lost",
            remedy="move your text outside of its two `<!-- quantkit:… -->` lines, or give --replace-card",
        )
    return found


def _notes_of(existing: str) -> Notes | None:
    """What stands between the marks of the notes in our part; None without them."""
    found = front_matter.find(existing)
    text = existing if found is None else found.rest
    for block in _blocks(text, replace=True):
        if (inside := _NOTES.search(text, block.start, block.end)) is not None:
            written = _NOTES_SUM.match(inside["said"])
            return Notes(_plain(inside["text"]), "" if written is None else written[1])
    return None


def _plain(text: str) -> str:
    """Notes without what an editor or a checkout may do to them."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return lines.strip("\n") if lines.strip() else ""


def _sum(inner: str) -> str:
    """Of our part, whatever stands in the notes."""
    return _sha256(_NOTES.sub("<!-- quantkit:notes -->", inner, count=1))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
