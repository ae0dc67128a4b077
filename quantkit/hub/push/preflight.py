"""Everything that can be found wrong before the first byte is sent; only reads."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from quantkit.errors import QuantkitError, UsageError, VerifyError
from quantkit.hub.card import validation
from quantkit.hub.manifest import FileSum
from quantkit.hub.push import access, advice, description, published, pull_request
from quantkit.hub.push.difference import MAKE_ANEW, Row, Sums, difference
from quantkit.hub.push.publication import README, Item, Publication
from quantkit.hub.push.refusals import in_one_line
from quantkit.hub.push.remote import RemoteState, look
from quantkit.hub.push.session import Session
from quantkit.recipe.sizes import format_size
from quantkit.table import Table

_TOO_LARGE = 500 * 10**9
_PER_FOLDER = 10_000
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@ -]*", re.ASCII)
_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Plan:
    """What pushing one publication would do.

    rows          files, by what becomes of them
    last          what describes the weights, as far as it is known before they are there
    pull_request  number of the one that is open for it
    warnings      what its licence asks for, and what is unusual about that
    total         how much is to be sent; empty where it is not known
    problems      why it cannot be done
    """

    publication: Publication
    remote: RemoteState
    rows: tuple[Row, ...]
    last: tuple[Item, ...]
    gated: bool
    pull_request: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    total: str
    problems: tuple[QuantkitError, ...]

    def table(self, said: Collection[str] = ()) -> Table:
        """For people, without what was `said` to them already."""
        where = f" (pull request {self.pull_request})" if self.pull_request is not None else ""
        rows = tuple((row.change, row.path, format_size(row.bytes)) for row in self.rows)
        return Table(
            f"{self.publication.name}{where}",
            ("", "file", "size"),
            rows,
            notes=(*(n for n in (*self.warnings, *self.notes) if n not in said), *filter(None, [self.total])),
            blockers=tuple(text for text in map(in_one_line, self.problems) if text not in said),
        )

    def to_json(self) -> dict[str, object]:
        return {
            "repo": self.publication.repo,
            "branch": self.publication.revision,
            "exists": self.remote.exists,
            "private": self.remote.private,
            "head": self.remote.head,
            "pull_request": self.pull_request,
            "files": [{"path": row.path, "change": row.change, "bytes": row.bytes} for row in self.rows],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "total": self.total,
            "problems": [in_one_line(problem) for problem in self.problems],
        }


def plan(session: Session, publication: Publication) -> Plan:
    """What would be done, and what stands in the way."""
    place = session.place(publication)
    problems: list[QuantkitError] = [*_local(publication, session.sums)]
    remote = look(publication, place, session.patience)
    number = None
    if publication.create_pr and remote.exists:
        number = pull_request.find(session, publication)
        if number is not None:
            revision = pull_request.revision(number)
            remote = look(publication, place, session.patience, revision=revision)
    remote = as_left(session, publication, remote)
    last: tuple[Item, ...] = ()
    rows: tuple[Row, ...] = ()
    if not any(isinstance(problem, VerifyError) for problem in problems):
        last, refused = _described(session, publication, remote)
        problems += [] if refused is None else [refused]
        rows = rows_of(session, publication, remote, last)
        problems += [*unfit(publication, last, remote), *foreign(session, publication, remote, rows)]
        problems += [*scrubbed(session, (*publication.weights, *last))]
    problems += [
        *access.allowed(session, place, publication, remote),
        *access.tagged(publication, remote, rows),
        *access.visible(session, publication, remote, rows),
    ]
    gated, warnings = False, tuple[str, ...]()
    if session.options.licence is not None:
        licence = session.options.licence(publication)
        gated, warnings = licence.gated, (*licence.warnings, *licence.reminders)
        problems += [UsageError(text) for text in licence.blockers]
        if remote.exists and not remote.private:
            problems += [UsageError(text) for text in licence.blockers_if_public]
    told = advice.notes(publication, remote, rows, gated)
    notes = tuple(dict.fromkeys((*told, *_with_it(session, publication, remote, rows), *_of_card(last))))
    total = advice.total(publication, remote, rows)
    warnings = tuple(dict.fromkeys(warnings))
    return Plan(publication, remote, rows, last, gated, number, warnings, notes, total, tuple(problems))


def _with_it(
    session: Session, publication: Publication, remote: RemoteState, rows: tuple[Row, ...]
) -> Iterator[str]:
    """What becomes public beside this publication, where a person agreed to it; else it stops the push."""
    if session.options.confirmed and (others := access.unseen(session, publication, remote, rows)):
        yield f"what this push does not verify becomes public, too: {access.shown(others)}"


def _described(
    session: Session, publication: Publication, remote: RemoteState
) -> tuple[tuple[Item, ...], UsageError | None]:
    """What is committed last, without a card where none can be made, and why."""
    try:
        return description.last(publication, remote, session.card(publication, remote)), None
    except UsageError as error:
        with contextlib.suppress(UsageError):
            return description.last(publication, remote, {}), error
        return (), error


def _of_card(last: tuple[Item, ...]) -> Iterator[str]:
    """What is odd about the front matter: much of it a person may have written, and the Hub takes it."""
    for item in last:
        if item.path_in_repo == README and isinstance(item.source, bytes):
            yield from validation.problems(item.source.decode("utf-8", "replace"))


def with_card_checked(session: Session, plan: Plan) -> Plan:
    """The plan once the Hub judged the front matter: now, not when gigabytes are sent."""
    if plan.problems:
        return plan  # maybe that the card holds what must not leave this machine
    try:
        _check_card(session, plan)
    except UsageError as error:
        return replace(plan, problems=(error,))
    return plan


def _check_card(session: Session, plan: Plan) -> None:
    place = session.place(plan.publication)
    there = {row.path for row in plan.rows if row.change == "same"}
    for item in plan.last:
        if item.path_in_repo == README and README not in there and isinstance(item.source, bytes):
            judge = partial(place.api._validate_yaml, item.source.decode("utf-8"))
            with session.patience.heard():
                session.patience.ask(judge, place, "having the card checked")


def as_left(session: Session, publication: Publication, remote: RemoteState) -> RemoteState:
    """`remote` with the targets of earlier pushes that this one leaves, and a line about what it replaces."""
    if session.options.prune:
        earlier = tuple(p for p in remote.earlier if p.branch is not None)
        remote = replace(remote, earlier=earlier, prunes=True)
    paths = published.replaced(publication, remote.known)
    if not paths:
        return remote
    shown = ", ".join(f"`{path}`" for path in paths)
    line = f"{session.options.today}: replaced {shown}"
    return replace(remote, changes=(line, *(known for known in remote.changes if known != line)))


def rows_of(
    session: Session, publication: Publication, remote: RemoteState, last: tuple[Item, ...]
) -> tuple[Row, ...]:
    """The difference, with what is to be pruned."""
    rows = difference((*publication.weights, *last), remote.files, session.sums)
    now = {row.path for row in rows if row.change != "untouched"}
    gone = published.left(remote.known, remote.earlier, now, remote.files) if remote.prunes else ()
    return tuple(replace(row, change="delete") if row.path in gone else row for row in rows)


def foreign(
    session: Session, publication: Publication, remote: RemoteState, rows: tuple[Row, ...]
) -> Iterator[QuantkitError]:
    """Files that would be replaced though nobody said so: weights, and whatever quantkit did not write."""
    if session.options.replace:
        return
    weights = {item.path_in_repo for item in publication.weights}
    for row in rows:
        if row.change != "replace" or row.path == README or (row.path not in weights and remote.known.ours):
            continue
        what = "differs from the file here" if row.path in weights else "was not written by quantkit push"
        yield UsageError(
            f"{publication.name}: '{row.path}' is there and {what}",
            remedy="give --replace to put this one in its place",
        )


def _local(publication: Publication, sums: Sums) -> Iterator[QuantkitError]:
    """The files are those that were made and checked."""
    for placed in publication.placed:
        for check in placed.checks or ():
            if check.problem is not None:
                yield VerifyError(
                    f"`{placed.manifest.name}` is not sound in {check.engine}: {check.problem}",
                    remedy="do not publish it; run quantkit verify to see more",
                )
    for item in publication.weights:
        try:
            found = sums.of(item.source)
        except VerifyError as error:
            yield error
            continue
        if item.expected is not None and found != item.expected:
            yield VerifyError(
                f"`{item.place}` is not the file that was made: {_told(found)} instead of "
                f"{_told(item.expected)}",
                remedy=MAKE_ANEW,
            )


def unfit(publication: Publication, last: tuple[Item, ...], remote: RemoteState) -> Iterator[QuantkitError]:
    """Sizes and names that the Hub, or what reads from it, does not take."""
    items = (*publication.weights, *last)
    for item in items:
        parts = PurePosixPath(item.path_in_repo).parts
        safe = all(_SAFE.fullmatch(part) and len(part) <= _NAME_BYTES for part in parts)
        if not safe or not parts:
            yield UsageError(
                f"'{item.path_in_repo}' is no name for a file of a repository",
                remedy="use letters, digits, dot, dash and underscore",
            )
        if item.expected is not None and item.expected.bytes > _TOO_LARGE:
            yield UsageError(
                f"'{item.path_in_repo}' has {format_size(item.expected.bytes)}, the Hub takes "
                f"{format_size(_TOO_LARGE)}",
                remedy="convert again with --shard-size (output.shard_size) and --on-exists replace",
            )
    paths = {item.path_in_repo for item in items} | set(remote.files)
    for folder, count in Counter(str(PurePosixPath(path).parent) for path in paths).items():
        if count > _PER_FOLDER:
            yield UsageError(
                f"'{folder}' would hold {count:,} files, the Hub takes {_PER_FOLDER:,} per folder",
                remedy="convert again with a larger --shard-size (output.shard_size) and --on-exists replace",
            )


def scrubbed(session: Session, items: tuple[Item, ...]) -> Iterator[QuantkitError]:
    """What must not leave this machine."""
    if session.options.scrub is None:
        return
    for found in session.options.scrub({item.path_in_repo: item.source for item in items}):
        yield UsageError(f"must not be published: {found}", remedy=_without(found, items))


def _without(found: str, items: tuple[Item, ...]) -> str:
    """How to get rid of what was found, as ``file:line what``."""
    name = next((i.path_in_repo for i in items if found.startswith(f"{i.path_in_repo}:")), "")
    if name == README:
        return "remove it from README.md or from the notes that go into it (publish.card.notes)"
    if any(item.path_in_repo == name and item.expected is not None for item in items):
        return f"remove it from this file of the source, then {MAKE_ANEW}"
    return f"remove it from the recipe or from the source that it is about, then {MAKE_ANEW}"


def _told(sums: FileSum) -> str:
    return f"{sums.bytes:,} bytes, sha256 {sums.sha256[:12]}…"
