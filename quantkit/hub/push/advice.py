"""What is worth knowing before something is published, though nothing stands in the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from quantkit.hub.push.difference import Row
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.remote import RemoteState
from quantkit.recipe.sizes import format_size

LARGE = 50 * 10**9
_FREE_PRIVATE = 100 * 10**9
# what llama.cpp takes for something beside a model (common/, resolving `-hf repo:TAG`)
_PASSED_OVER = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_USUAL = re.compile(r"(Q4_K_M|Q8_0)[.-]", re.IGNORECASE)


def notes(publication: Publication, remote: RemoteState, rows: tuple[Row, ...], gated: bool) -> Iterator[str]:
    wanted = publication.visibility
    if not remote.exists:
        made = "public" if wanted == "public" else "private"
        then = ", and made public once everything in it is verified" if wanted != made else ""
        yield f"{publication.repo} will be made, {made}{then}"
    else:
        is_now = "private" if remote.private else "public"
        asked = "" if wanted in (is_now, "private-then-public") else f", and stays so; {wanted} was asked for"
        if wanted == "private-then-public" and remote.private and not publication.create_pr:
            asked = ", and made public once everything in it is verified"
        yield f"{publication.repo} is {is_now}{asked}"
        if remote.head is None:
            start = "the first commit" if publication.fork_from_first else "main"
            yield f"branch {publication.revision} will be made from {start}"
    if gated and not remote.gated and not publication.create_pr:
        yield "access will be gated (auto), as that of the source is"
    if publication.create_pr and publication.tag is not None:
        yield f"tag {publication.tag} is not set: a pull request is not part of the repository yet"
    private = remote.private if remote.exists else wanted != "public"
    total = sum(row.bytes for row in rows if row.change in ("new", "changed"))
    if private and total > _FREE_PRIVATE:
        yield f"{format_size(total)} in a private repository: free accounts have {format_size(_FREE_PRIVATE)}"
    for row in rows:
        if row.change in ("new", "changed") and row.bytes > LARGE:
            size = f"'{row.path}' has {format_size(row.bytes)}"
            yield f"{size}: above {format_size(LARGE)} only clients with Xet get it"
    kept = {path for placed in remote.earlier for path in placed.files}
    left = [row.path for row in rows if row.change == "untouched" and row.path in remote.known.files]
    if stale := [path for path in left if path not in kept]:
        yield f"{len(stale):,} files of an earlier push stay (first: '{stale[0]}'); --prune deletes them"
    yield from _of_gguf(rows)


def _of_gguf(rows: tuple[Row, ...]) -> Iterator[str]:
    """What llama.cpp would not find (it goes by names)."""
    names = [PurePosixPath(row.path).name for row in rows if row.path.endswith(".gguf")]
    for name in names:
        if (odd := next((part for part in _PASSED_OVER if part in name.lower()), None)) is not None:
            yield f"'{name}' holds '{odd}': llama.cpp never takes it for a model, name it otherwise"
    if names and not any(_USUAL.search(name) for name in names):
        yield "without Q4_K_M or Q8_0, llama.cpp takes the first file when no type is named"
