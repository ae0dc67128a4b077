"""Who may publish where, and who may see it then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

from quantkit.errors import QuantkitError, UsageError
from quantkit.hub.push import published, refusals
from quantkit.hub.push.difference import OF_THE_HUB, Row, counted, nothing_to_do
from quantkit.hub.push.patience import Patience
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.refusals import FAILURES, Place
from quantkit.hub.push.remote import RemoteState, look
from quantkit.hub.push.session import Account, Session
from quantkit.recipe.sizes import format_size

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Unseen:
    """Files of a branch that nobody looked at, and that all will see once the repository is public."""

    branch: str
    files: int
    bytes: int
    first: str

    def __str__(self) -> str:
        return f"{counted(self.files)} on {self.branch} ({format_size(self.bytes)}, first: '{self.first}')"


def find_account(place: Place, patience: Patience) -> Account | None:
    """Whose token it is, None without a token; HubError when the Hub does not know it."""
    token = place.api.token
    if token is False or (not isinstance(token, str) and get_token() is None):
        return None
    told = patience.ask(partial(place.api.whoami, cache=True), place, "asking whose token it is")
    orgs = [o["name"] for o in told.get("orgs", ()) if o.get("roleInOrg") != "read"]
    role = told.get("auth", {}).get("accessToken", {}).get("role")
    return Account(told["name"], (told["name"], *orgs), role == "read")


def allowed(
    session: Session, place: Place, publication: Publication, remote: RemoteState
) -> Iterator[QuantkitError]:
    """Whether this account may do it; asked of the Hub where the repository is there already."""
    account = session.account
    namespace = publication.repo.partition("/")[0]
    if account is None:
        yield refusals.no_token(place.api.endpoint)
        return
    if account.read_only:
        yield refusals.may_not_write(place)
    elif not remote.exists:
        if publication.create_pr:
            yield UsageError(
                f"{publication.repo} is not there, or not for {account.name}: no pull request can be opened",
                remedy="leave out --create-pr (publish.create_pr) to make it, or check the name",
            )
        elif namespace.lower() not in {name.lower() for name in account.namespaces}:
            yield refusals.may_not_write(place)
    elif not publication.create_pr:
        yield from _may_write(session, place)
    if publication.branch is not None and publication.branch in remote.tags:
        yield UsageError(
            f"{publication.repo} has a tag '{publication.branch}'",
            remedy="give another name to --branch (publish.branch)",
        )


def tagged(publication: Publication, remote: RemoteState, rows: tuple[Row, ...]) -> Iterator[QuantkitError]:
    """A tag that is there already can only name what is there already."""
    tag = publication.tag
    if tag is None or publication.create_pr:
        return
    if tag in remote.branches:
        yield UsageError(
            f"{publication.repo} has a branch '{tag}'", remedy="give another name to --tag (publish.tag)"
        )
    known = remote.tags.get(tag)
    if known is not None and (known != remote.head or not nothing_to_do(rows)):
        yield UsageError(
            f"{publication.repo} has a tag '{tag}' at {known[:7]}, which is not what is to be published",
            remedy="give another --tag (publish.tag), or delete the tag there",
        )


def opens(publication: Publication, remote: RemoteState) -> bool:
    """Whether all will see it at the end who do not now."""
    asked = publication.visibility == "private-then-public" and not publication.create_pr
    return asked and remote.private is not False


def unseen(
    session: Session, publication: Publication, remote: RemoteState, rows: tuple[Row, ...]
) -> tuple[Unseen, ...]:
    """What becomes public with a publication though neither it nor an earlier one put it there as it is.

    Of a repository of branches it is told with the last publication, which knows those of the others.
    """
    if not remote.exists or not opens(publication, remote):
        return ()
    known = {OF_THE_HUB, *published.accounted(remote.known, remote.files)}
    # a branch that is yet to be made from main has what main has
    here = rows if remote.head is not None or publication.fork_from_first else ()
    own = {row.path: row.bytes for row in here if row.change == "untouched" and row.path not in known}
    found = [(publication.revision, own)]
    if not publication.fork_from_first:
        ours = {publication.revision, *(placed.branch for placed in publication.placed)}
        for branch in sorted(remote.branches.keys() - ours):
            there = look(publication, session.place(publication), session.patience, revision=branch)
            known = {OF_THE_HUB, *published.accounted(there.known, there.files)}
            found.append((branch, {p: file.size for p, file in there.files.items() if p not in known}))
    return tuple(
        Unseen(branch, len(files), sum(files.values()), min(files)) for branch, files in found if files
    )


def shown(found: Sequence[Unseen]) -> str:
    """In words, the first of many."""
    more = len(found) - _SHOWN
    others = f" and files on {more} more {'branch' if more == 1 else 'branches'}" if more > 0 else ""
    return ", ".join(map(str, found[:_SHOWN])) + others


def visible(
    session: Session, publication: Publication, remote: RemoteState, rows: tuple[Row, ...]
) -> Iterator[QuantkitError]:
    """An existing repository stays as visible as it is, unless that was asked for and shows nothing else."""
    if not remote.exists or publication.create_pr or session.options.confirmed:
        return
    is_now = "private" if remote.private else "public"
    wanted = publication.visibility
    if wanted not in (None, "private-then-public", is_now):
        yield UsageError(
            f"{publication.repo} is {is_now}, {wanted} was asked for",
            remedy=f"to publish to it as it is, give --visibility {is_now} (publish.visibility) or --yes",
        )
    if others := unseen(session, publication, remote, rows):
        yield UsageError(
            f"{publication.repo} would become public with what this push does not verify: {shown(others)}",
            remedy="give --yes if all may see that, or --visibility private (publish.visibility)",
        )


def _may_write(session: Session, place: Place) -> Iterator[QuantkitError]:
    ask = partial(place.api.auth_check, place.repo, write=True)
    try:
        session.patience.attempt(ask, place, "asking whether it may be written to")
    except HfHubHTTPError as error:
        status = refusals.status_of(error)
        if status == 403:
            yield refusals.may_not_write(place)
        elif status != 404:  # a server of an older kind cannot tell, and the repository was just seen
            raise refusals.explain(error, place, "asking whether it may be written to") from error
    except FAILURES as error:
        raise refusals.explain(error, place, "asking whether it may be written to") from error
