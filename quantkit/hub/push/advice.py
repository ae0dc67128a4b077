"""What is worth knowing before something is published, though nothing stands in the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from quantkit.gguf.files import PASSED_OVER
from quantkit.hub.push import published
from quantkit.hub.push.access import opens
from quantkit.hub.push.difference import SENT, Row, counted
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.remote import RemoteState
from quantkit.recipe.sizes import format_size

LARGE = 50 * 10**9
_FREE_PRIVATE = 100 * 10**9
# what llama.cpp takes when no type is named
_USUAL = re.compile(r"(Q4_K_M|Q8_0)[.-]", re.IGNORECASE)


def notes(publication: Publication, remote: RemoteState, rows: tuple[Row, ...], gated: bool) -> Iterator[str]:
    """Where it goes, who may see it there, and what is odd about it."""
    yield _of_visibility(publication, remote)
    yield from _of_the_branch(publication, remote)
    yield from _of_the_tag(publication, remote)
    yield from _of_access(publication, remote, gated)
    yield from _of_sizes(publication, remote, rows)
    now = {row.path for row in rows if row.change != "untouched"}
    stale = published.left(remote.known, remote.earlier, now, remote.files)
    if rows and stale and not remote.prunes:
        few = "stays (it is" if len(stale) == 1 else "stay (first:"
        which = f"{few} '{stale[0]}'); --prune deletes {'it' if len(stale) == 1 else 'them'}"
        yield f"{counted(len(stale))} of an earlier push {which}"
    yield from _of_gguf(rows)


def total(publication: Publication, remote: RemoteState, rows: tuple[Row, ...]) -> str:
    """``9 files, 4.60 MB to send``; empty where the files are not known."""
    if not rows:
        return ""
    sent = [row.bytes for row in rows if row.change in SENT]
    deleted = sum(row.change == "delete" for row in rows)
    parts = [f"{counted(len(sent))}, {format_size(sum(sent))} to send"] if sent else []
    parts += [f"{counted(deleted)} to delete"] if deleted else []
    if parts:
        return "; ".join(parts)
    tagged = publication.create_pr or publication.tag is None or publication.tag in remote.tags
    done = tagged and not opens(publication, remote) and remote.head is not None
    return "nothing to do" if done else "nothing to send"


def _of_visibility(publication: Publication, remote: RemoteState) -> str:
    wanted = publication.visibility
    then = ", and made public once everything in it is verified" if opens(publication, remote) else ""
    if not remote.exists:
        if publication.create_pr:
            return f"{publication.repo} is not there"
        return f"{publication.repo} will be made, {'public' if wanted == 'public' else 'private'}{then}"
    is_now = "private" if remote.private else "public"
    as_asked = then or wanted in (None, is_now, "private-then-public")
    return f"{publication.repo} is {is_now}" + (
        then if as_asked else f", and stays so; {wanted} was asked for"
    )


def _of_the_branch(publication: Publication, remote: RemoteState) -> Iterator[str]:
    if publication.branch is not None and remote.head is None:
        start = "the first commit" if publication.fork_from_first else "main"
        yield f"branch {publication.branch} will be made from {start}"


def _of_the_tag(publication: Publication, remote: RemoteState) -> Iterator[str]:
    tag = publication.tag
    if tag is None:
        return
    if publication.create_pr:
        yield f"tag {tag} is not set: a pull request is not part of the repository yet"
    elif tag not in remote.tags:
        yield f"tag {tag} will be set"


def _of_access(publication: Publication, remote: RemoteState, gated: bool) -> Iterator[str]:
    if not gated or remote.gated:
        return
    source = publication.targets[0].source.id
    if publication.create_pr:
        yield f"access to {source} is gated, that to {publication.repo} is not: its owner should know"
    else:
        yield f"access to {publication.repo} will be gated (auto), as that to {source} is"


def _of_sizes(publication: Publication, remote: RemoteState, rows: tuple[Row, ...]) -> Iterator[str]:
    private = remote.private if remote.exists else publication.visibility != "public"
    sent = [row for row in rows if row.change in SENT]
    total = sum(row.bytes for row in sent)
    if private and total > _FREE_PRIVATE:
        yield f"{format_size(total)} in a private repository: free accounts have {format_size(_FREE_PRIVATE)}"
    for row in sent:
        if row.bytes > LARGE:
            size = f"'{row.path}' has {format_size(row.bytes)}"
            yield f"{size}: above {format_size(LARGE)} only clients with Xet get it"


def _of_gguf(rows: tuple[Row, ...]) -> Iterator[str]:
    """What llama.cpp would not find (it goes by names)."""
    names = [PurePosixPath(row.path).name for row in rows if row.path.endswith(".gguf")]
    for name in names:
        if (odd := next((part for part in PASSED_OVER if part in name.lower()), None)) is not None:
            yield f"'{name}' holds '{odd}': llama.cpp never takes it for a model, name it otherwise"
    if names and not any(_USUAL.search(name) for name in names):
        yield "without Q4_K_M or Q8_0, llama.cpp takes the first file when no type is named"
