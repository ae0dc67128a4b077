"""A pull request that a push works on: opened as a draft, found again, shown when it is complete."""

from __future__ import annotations

from functools import partial

from huggingface_hub.community import Discussion

from quantkit.hub.push import description, refusals
from quantkit.hub.push.patience import TRIES
from quantkit.hub.push.publication import MAIN, Publication
from quantkit.hub.push.refusals import FAILURES
from quantkit.hub.push.session import Session

_OPEN = ("draft", "open")


def revision(number: int) -> str:
    """What commits to it name."""
    return f"refs/pr/{number}"


def find(session: Session, publication: Publication) -> int | None:
    """The pull request of an earlier push that is still open: by the record, else by its title and author."""
    place = session.place(publication)
    number = session.record.pull_request(place.api.endpoint, publication.repo, MAIN)
    found = _open(session, publication)
    if number is not None and number in (each.num for each in found):
        return number
    title = description.weights_title(publication)
    return next((each.num for each in found if each.title == title), None)


def open_draft(session: Session, publication: Publication) -> int:
    """A new one, unless another push opened it since; after a lost answer it is looked for, too."""
    place = session.place(publication)
    doing = "opening a pull request"
    if (number := find(session, publication)) is not None:
        return number
    for failed in range(1, TRIES + 1):
        try:
            made = place.api.create_pull_request(
                publication.repo,
                description.weights_title(publication),
                description=description.text(publication, {}),
            )
            return made.num
        except FAILURES as error:
            if (number := find(session, publication)) is not None:
                session.progress.note(f"pull request {number} was opened, though the answer was lost")
                return number
            if failed == TRIES or refusals.hopeless(error):
                raise refusals.explain(error, place, doing) from error
            session.patience.wait(failed, error, place, doing)
    raise RuntimeError("not reached")


def show(session: Session, publication: Publication, number: int) -> None:
    """No draft any more."""
    place = session.place(publication)

    def ask() -> None:
        found = place.api.get_discussion_details(publication.repo, number)
        if found.status == "draft":
            place.api.change_discussion_status(publication.repo, number, "open")

    session.patience.ask(ask, place, "opening the pull request for review")


def _open(session: Session, publication: Publication) -> list[Discussion]:
    """The open ones of this account."""
    place = session.place(publication)
    author = None if session.account is None else session.account.name
    if author is None:
        return []

    def ask() -> list[Discussion]:
        listed = place.api.get_repo_discussions(
            publication.repo, author=author, discussion_type="pull_request"
        )
        return [each for each in listed if each.is_pull_request and each.status in _OPEN]

    return session.patience.ask(partial(ask), place, "listing its pull requests")
