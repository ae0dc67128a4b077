"""What a push is asked for, and what its parts share."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi

from quantkit.hub.push.difference import Sums
from quantkit.hub.push.patience import Patience
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.record import Record
from quantkit.hub.push.refusals import Place
from quantkit.hub.push.remote import RemoteState
from quantkit.progress import Progress

# README.md and the files it shows, by path in the repository
Card = Callable[[Publication, RemoteState], Mapping[str, bytes]]


class Licence(Protocol):
    """What the licence of the source means for publishing; `hub.licences.Licence` is one."""

    @property
    def gated(self) -> bool: ...

    @property
    def reminders(self) -> tuple[str, ...]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    @property
    def blockers(self) -> tuple[str, ...]: ...

    @property
    def blockers_if_public(self) -> tuple[str, ...]: ...


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@dataclass(frozen=True, slots=True)
class Options:
    """How to push.

    replace    weights of the same name and another content may be replaced
    prune      files that an earlier push put there and this one does not have are deleted
    confirmed  the repository may have another visibility than was asked for, or become public with files that
               quantkit did not put there
    licence    what the licence of a publication means; None: nobody looked
    scrub      what must not be published in these files, empty when clean
    resume     the command that goes on
    sleep      waits between tries
    """

    dry_run: bool = False
    replace: bool = False
    prune: bool = False
    confirmed: bool = False
    licence: Callable[[Publication], Licence] | None = None
    scrub: Callable[[Mapping[str, Path | bytes]], Sequence[str]] | None = None
    resume: str = ""
    sleep: Callable[[float], None] = time.sleep
    today: str = field(default_factory=_today)


@dataclass(frozen=True, slots=True)
class Account:
    """Whose token it is; `namespaces` are those that it may make repositories in."""

    name: str
    namespaces: tuple[str, ...]
    read_only: bool


@dataclass(frozen=True, slots=True)
class Session:
    """One push."""

    api: HfApi
    card: Card
    options: Options
    progress: Progress
    patience: Patience
    sums: Sums
    record: Record
    account: Account | None

    def place(self, publication: Publication) -> Place:
        """Where a publication goes, for questions and for messages."""
        resume = self.options.resume or _again(publication, self.options)
        name = None if self.account is None else self.account.name
        namespaces = () if self.account is None or self.account.read_only else self.account.namespaces
        return Place(self.api, publication.repo, resume, name, namespaces)


def _again(publication: Publication, options: Options) -> str:
    """A command that goes on with this publication, and may do what this push may."""
    format = publication.targets[0].format
    layout = "files" if publication.several else "repo-per-target"
    if publication.fork_from_first or any(placed.branch for placed in publication.placed):
        layout = "branches"
    usual = "files" if format == "gguf" else "repo-per-target"
    words = ["quantkit", "push", *map(str, publication.folders), "--repo", publication.repo]
    words += [] if publication.visibility is None else ["--visibility", publication.visibility]
    words += [] if layout == usual else ["--layout", layout]
    words += [] if publication.branch is None else ["--branch", publication.branch]
    words += ["--create-pr"] if publication.create_pr else []
    words += [] if publication.tag is None else ["--tag", publication.tag]
    words += ["--replace"] if options.replace else []
    words += ["--prune"] if options.prune else []
    words += ["--yes"] if options.confirmed else []
    return shlex.join(words)
