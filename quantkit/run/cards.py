"""Model cards of targets: their manifests, what engines made of them, and what only their files know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quantkit.errors import RunError, SourceError, UsageError
from quantkit.hub.card import Page, Variant, render
from quantkit.hub.card.own_text import MARK, Notes, merge, notes
from quantkit.hub.card.plot import draw, problem
from quantkit.hub.licences import Licence
from quantkit.hub.push.publication import README, Placed, Publication
from quantkit.hub.push.published import PICTURE
from quantkit.hub.push.remote import RemoteState
from quantkit.progress import Progress
from quantkit.recipe.spec import Publish
from quantkit.run.gguf_source import find_gguf
from quantkit.run.prompt import prompt_example


@dataclass(frozen=True)
class Cards:
    """Writes the card of each publication of one push.

    licences  by fingerprint of the source
    replace   also what a person changed inside quantkit's part
    """

    how: Publish
    endpoint: str
    publications: Sequence[Publication]
    licences: Mapping[str, Licence]
    replace: bool
    progress: Progress

    def __call__(self, publication: Publication, remote: RemoteState) -> Mapping[str, bytes]:
        """README.md and the picture it shows, by path in the repository.

        UsageError where a person changed our part of the card that is there.
        """
        existing = remote.readme if remote.readme is not None else _own_card(publication)
        given = self._notes
        with _in_the_card_of(publication):
            own = notes(given, existing, replace=self.replace)
        page = self._page(publication, remote, own)
        picture = draw(page) if self.how.card.plot else None
        if self.how.card.plot and picture is None and len(page.listed) > 1:
            self.progress.note(f"{publication.name}: {problem(page)}")
        text = render(page, None if picture is None else PICTURE)
        with _in_the_card_of(publication):
            files = {README: merge(text, existing, replace=self.replace).encode()}
        return files if picture is None else {**files, PICTURE: picture}

    @cached_property
    def _notes(self) -> str | None:
        """What was given; empty where what is there is to go, None where nobody says."""
        if not self.how.card.notes:
            return self.how.card.notes
        path = Path(self.how.card.notes).expanduser()
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"publish.card.notes: `{path}` cannot be read: {error}",
                remedy="give a file in UTF-8",
            ) from error

    def _page(self, publication: Publication, remote: RemoteState, own: Notes | None) -> Page:
        placed = (*publication.placed, *remote.earlier)
        here = tuple(_variant(p) for p in placed if p.branch is None)
        elsewhere = tuple(_variant(p) for p in placed if p.branch is not None)
        if publication.fork_from_first:
            others = (p for p in self.publications if p.repo == publication.repo and p != publication)
            elsewhere = tuple(
                dataclasses.replace(_variant(each), branch=other.branch)
                for other in others
                for each in other.placed
                if other.branch is not None
            )
        return Page(
            repo=publication.repo,
            endpoint=self.endpoint,
            variants=here,
            publisher=publication.repo.partition("/")[0],
            licence=self.licences[publication.targets[0].source.fingerprint],
            notes=own,
            changes=remote.changes,
            branch=publication.branch,
            siblings=elsewhere,
            template=_template(publication, self.progress),
        )


@contextmanager
def _in_the_card_of(publication: Publication) -> Iterator[None]:
    """What is wrong with a card is said of where it lies."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{publication.name}: {error.message}", remedy=error.remedy) from error


def _variant(placed: Placed) -> Variant:
    return Variant(placed.manifest, placed.checks or (), placed.files, placed.branch)


def _own_card(publication: Publication) -> str | None:
    """A card that lies in the only target's folder: a person may have written into it."""
    if len(publication.folders) != 1:
        return None
    path = publication.folders[0] / README
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8")  # with its own ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"`{path}` cannot be read: {error}", remedy="store it in UTF-8, or move it away"
        ) from error


def _template(publication: Publication, progress: Progress) -> str | None:
    """All targets have the tokenizer of one source, so the first that has it tells."""
    for folder in publication.folders:
        file = find_gguf(folder)
        try:
            found = prompt_example(folder if file is None else file)
        except (SourceError, RunError) as error:
            why = f"its chat template does not render: {error.message}"
            progress.note(f"{publication.name}: the card shows no prompt, for {why}")
            return None
        # with a mark of ours in it a card could not be told from what a person adds
        if found is not None and MARK not in found:
            return found
    return None
