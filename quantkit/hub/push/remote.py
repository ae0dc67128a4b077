"""What a repository holds now, at the revision that is published to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import GitCommitInfo, ModelInfo, RepoFile

from quantkit.errors import HubError, UsageError
from quantkit.hub.listing import Listed
from quantkit.hub.manifest import MANIFEST
from quantkit.hub.push import published
from quantkit.hub.push.difference import Sums
from quantkit.hub.push.patience import Patience
from quantkit.hub.push.publication import MAIN, README, Placed, Publication
from quantkit.hub.push.published import Published
from quantkit.hub.push.refusals import Place

_TIMEOUT = 30.0  # the client asks for what a repository is without any
_MAX_TEXT = 64_000_000


@dataclass(frozen=True, slots=True)
class RemoteState:
    """A repository as it is before something is published, or (`exists` False) is not there.

    head     commit that `files` are of; None: there is no such branch
    readme   the card that is there, with whatever a person wrote into it
    known    what its `quantkit.json` says
    earlier  targets of earlier pushes that stay
    changes  lines about replaced files, newest first; those of this push are among them
    prunes   what earlier pushes left is deleted
    """

    exists: bool = False
    private: bool | None = None
    gated: bool = False
    head: str | None = None
    files: Mapping[str, Listed] = field(default_factory=dict)
    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    readme: str | None = None
    known: Published = field(default_factory=Published)
    earlier: tuple[Placed, ...] = ()
    changes: tuple[str, ...] = ()
    prunes: bool = False


def look(
    publication: Publication, place: Place, patience: Patience, *, revision: str | None = None
) -> RemoteState:
    """The repository at `revision` (default: the branch of the publication); only reads.

    A branch that is not there yet is shown as what it will start from. UsageError when the repository has
    another name by now; HubError when the Hub does not tell.
    """
    info = _info(place, patience)
    if info is None:
        return RemoteState()
    refs = patience.ask(partial(place.api.list_repo_refs, place.repo), place, "reading its branches")
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    revision = revision or publication.revision
    head = branches.get(revision) if not revision.startswith("refs/") else head_of(place, patience, revision)
    start = head
    if head is None:
        start = first_commit(place, patience) if publication.fork_from_first else branches.get(MAIN)
    files = {} if start is None else listing(place, patience, start)
    readme = _text(place, patience, start, files.get(README))
    known = published.parse(_text(place, patience, start, files.get(MANIFEST)) or b"")

    @cache
    def of_branch(name: str) -> Mapping[str, Listed]:
        return listing(place, patience, branches[name]) if name in branches else {}

    return RemoteState(
        exists=True,
        private=bool(info.private),
        gated=bool(info.gated),
        head=head,
        files=files,
        branches=branches,
        tags=tags,
        readme=None if readme is None else readme.decode("utf-8", "replace"),
        known=known,
        earlier=published.still_there(known, publication, files, of_branch),
        changes=known.changes,
    )


def listing(place: Place, patience: Patience, commit: str) -> dict[str, Listed]:
    """All files of a commit."""
    return patience.ask(partial(list_tree, place, commit), place, "listing its files")


def list_tree(place: Place, commit: str) -> dict[str, Listed]:
    """As `listing`, asked once, with the errors of the client."""
    return {
        file.path: Listed(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id, bool(file.lfs))
        for file in place.api.list_repo_tree(place.repo, revision=commit, recursive=True)
        if isinstance(file, RepoFile)
    }


def head_of(place: Place, patience: Patience, revision: str) -> str | None:
    """The commit of a branch or pull request; None where there is none."""

    def ask() -> str | None:
        try:
            return read_head(place, revision)
        except RevisionNotFoundError:
            return None

    return patience.ask(ask, place, "reading its head")


def read_head(place: Place, revision: str) -> str:
    """The commit of a branch or pull request, asked once, with the errors of the client."""
    info = place.api.model_info(place.repo, revision=revision, timeout=_TIMEOUT, expand=["sha"])
    if info.sha is None:
        raise KeyError("sha")
    return info.sha


def ensure(
    place: Place, patience: Patience, change: Callable[[], object], made: Callable[[], bool], doing: str
) -> None:
    """Do `change` until `made`: an answer alone is no proof, nor is a lost one that nothing was done."""

    def ask() -> None:
        if not made():
            change()
            if not made():
                raise RuntimeError("the Hub agreed, and did nothing")

    patience.ask(ask, place, doing)


def is_private(place: Place) -> bool:
    """Who may see it, asked once."""
    return bool(place.api.model_info(place.repo, timeout=_TIMEOUT, expand=["private"]).private)


def is_gated(place: Place) -> bool:
    """Whether access must be asked for, asked once."""
    return bool(place.api.model_info(place.repo, timeout=_TIMEOUT, expand=["gated"]).gated)


def read_tag(place: Place, tag: str) -> str | None:
    """The commit that a tag names, None where there is none; asked once."""
    refs = place.api.list_repo_refs(place.repo)
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def has_branch(place: Place, branch: str) -> bool:
    """Asked once."""
    return any(ref.name == branch for ref in place.api.list_repo_refs(place.repo).branches)


def history(place: Place, patience: Patience, revision: str) -> list[GitCommitInfo]:
    """The commits of a branch, newest first."""
    ask = partial(place.api.list_repo_commits, place.repo, revision=revision)
    return patience.ask(ask, place, "reading its history")


def first_commit(place: Place, patience: Patience) -> str:
    """What the Hub made the repository with: it holds no weights and no card."""
    commits = history(place, patience, MAIN)
    if not commits:
        raise HubError(f"{place.repo} has no history.", remedy=f"look at {place.url}/commits/main")
    return commits[-1].commit_id


def _info(place: Place, patience: Patience) -> ModelInfo | None:
    """None when there is no such repository, or it is not shown to this account."""

    def ask() -> ModelInfo | None:
        try:
            # not the card, which the client may stumble over
            return place.api.model_info(place.repo, timeout=_TIMEOUT, expand=["private", "gated"])
        except GatedRepoError:  # is a kind of the next one, and says that there is a repository
            raise
        except RepositoryNotFoundError:
            return None

    info = patience.ask(ask, place, "looking at it")
    if info is not None and info.id.lower() != place.repo.lower():
        raise UsageError(
            f"{place.repo} is called {info.id} by now", remedy=f"give --repo {info.id} (publish.repo)"
        )
    return info


def _text(place: Place, patience: Patience, commit: str | None, listed: Listed | None) -> bytes | None:
    """The content of a small file, if it is there; fetched again when it arrives damaged."""
    if listed is None or commit is None or listed.size > _MAX_TEXT:
        return None

    def fetch() -> bytes:
        with tempfile.TemporaryDirectory() as cache:
            path = Path(place.api.hf_hub_download(place.repo, listed.path, revision=commit, cache_dir=cache))
            if not Sums().match(path, listed):
                raise ConnectionError(f"'{listed.path}' arrived damaged")
            return path.read_bytes()

    return patience.ask(fetch, place, f"reading its {listed.path}")
