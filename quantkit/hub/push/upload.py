"""One publication: repository, branch, weights, verified, then what describes them.

A card and what goes with it follow the weights in a second commit, whose parent is the commit that was
verified, so that nothing is described that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from quantkit.hub.listing import Listed
from quantkit.hub.push import access, description, preflight, pull_request
from quantkit.hub.push.branch import Branch, Onto, Overtaken
from quantkit.hub.push.difference import nothing_to_do
from quantkit.hub.push.patience import TRIES
from quantkit.hub.push.preflight import Plan
from quantkit.hub.push.publication import Item
from quantkit.hub.push.record import Entry
from quantkit.hub.push.remote import (
    RemoteState,
    ensure,
    first_commit,
    has_branch,
    is_gated,
)
from quantkit.hub.push.session import Session


@dataclass(frozen=True, slots=True)
class Done:
    """A publication that is there. `sent` are the files that were not there before."""

    repo: str
    branch: str
    url: str
    commit: str
    pull_request: int | None
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    tag: str | None = None

    @property
    def unchanged(self) -> bool:
        return not self.sent and not self.deleted

    def to_json(self) -> dict[str, object]:
        return {
            "repo": self.repo,
            "branch": self.branch,
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "sent": list(self.sent),
            "deleted": list(self.deleted),
            "tag": self.tag,
        }


class Upload:
    """Carries out one plan; `is_prepared`: one of the same repository was carried out before."""

    def __init__(self, session: Session, plan: Plan, *, is_prepared: bool = False) -> None:
        self._session = session
        self._plan = plan
        self._is_prepared = is_prepared
        self._publication = plan.publication
        self._place = session.place(plan.publication)
        self._ensure = partial(ensure, self._place, session.patience)
        self._number = plan.pull_request
        self._branch = self._where()
        self._new: list[str] = []
        self._entry = Entry(self._place.api.endpoint, plan.publication.repo, plan.publication.revision)

    def run(self) -> Done:
        """Everything but what is done once per repository; HubError when it fails for good."""
        self._prepare()
        remote = self._look()
        self._require_as_planned(remote)
        weights = self._weights(remote)
        self._keep("weights", weights_commit=weights)
        commit, deleted = self._described(weights)
        if self._number is not None:
            pull_request.show(self._session, self._publication, self._number)
        url = f"{self._place.url}/tree/{self._publication.revision}"
        if self._number is not None:
            url = f"{self._place.url}/discussions/{self._number}"
        self._keep("described", commit=commit, url=url)
        sent = tuple(self._new)
        return Done(
            self._publication.repo, self._publication.revision, url, commit, self._number, sent, deleted
        )

    def _require_as_planned(self, remote: RemoteState) -> None:
        """UsageError when somebody else made it, or lets others see it, since it was planned."""
        planned, asked = self._plan.remote, self._publication.visibility
        if planned.exists and asked == "private-then-public":
            return
        promised = replace(
            self._publication, visibility=asked or ("public" if planned.private is False else "private")
        )
        for problem in access.visible(self._session, promised, remote, ()):
            raise problem

    def _described(self, weights: str) -> tuple[str, tuple[str, ...]]:
        """The last commit, and what it deleted; made anew when another push of this account was faster."""
        for _ in range(TRIES):
            remote = self._look()
            if remote.head != weights and self._branch.missing(self._publication.weights, remote.files):
                break
            with suppress(Overtaken):
                return self._card(remote)
        raise self._branch.changed(weights)

    @property
    def entry(self) -> Entry:
        """What the record says of this publication."""
        return self._entry

    def _where(self) -> Branch:
        number = self._number
        revision = self._publication.revision if number is None else pull_request.revision(number)
        return Branch(self._session, self._publication, revision)

    def _look(self) -> RemoteState:
        return preflight.as_left(self._session, self._publication, self._branch.look())

    # -- where it goes

    def _prepare(self) -> None:
        """The repository with its access, the branch or the pull request."""
        publication, place = self._publication, self._place
        api = place.api
        remote = self._plan.remote
        if not remote.exists:
            private = publication.visibility != "public"
            shown = "private" if private else "public"
            if not self._is_prepared:
                make = partial(api.create_repo, publication.repo, private=private, exist_ok=True)
                self._session.progress.step("push", f"making {publication.repo}, {shown}")
                self._session.patience.ask(make, self._place, "making the repository")
            self._keep("made", visibility=shown)
        if publication.create_pr:
            self._prepare_pull_request()
            return
        if self._plan.gated and not remote.gated and not self._is_prepared:
            self._session.progress.step("push", f"gating access to {publication.repo}")
            gate = partial(api.update_repo_settings, publication.repo, gated="auto")
            self._ensure(gate, partial(is_gated, place), "gating the access")
        if publication.branch is not None and publication.branch not in remote.branches:
            start = first_commit(place, self._session.patience) if publication.fork_from_first else None
            name = publication.branch
            fork = partial(api.create_branch, publication.repo, branch=name, revision=start, exist_ok=True)
            self._session.progress.step("push", f"making branch {name} of {publication.repo}")
            self._ensure(fork, partial(has_branch, place, name), f"making branch {name}")

    def _prepare_pull_request(self) -> None:
        """None is opened when there is nothing to propose."""
        if self._number is None and not nothing_to_do(self._plan.rows):
            self._session.progress.step("push", f"opening a pull request at {self._publication.repo}")
            self._number = pull_request.open_draft(self._session, self._publication)
            self._branch = self._where()
        self._keep("pull request")

    # -- weights

    def _weights(self, remote: RemoteState) -> str:
        """The commit at which all weights are verified."""
        weights = self._publication.weights
        head, files = str(remote.head), remote.files
        missing = self._branch.missing(weights, files)
        if missing:
            rows = preflight.rows_of(self._session, self._publication, remote, ())
            for problem in preflight.foreign(self._session, self._publication, remote, rows):
                raise problem
            head, files = self._sent(missing, head, files)
            missing = self._branch.missing(weights, files)
        if missing:
            name = missing[0].path_in_repo
            self._session.progress.warn(
                f"{self._publication.name}: '{name}' is listed with another content; sending it again"
            )
            head, files = self._sent(missing, head, files)
            missing = self._branch.missing(weights, files)
        if missing:
            raise self._branch.damaged(missing[0], files.get(missing[0].path_in_repo))
        self._session.progress.note(f"{self._publication.name}: all weights verified at {head[:7]}")
        return head

    def _sent(
        self, items: Sequence[Item], head: str, files: Mapping[str, Listed]
    ) -> tuple[str, Mapping[str, Listed]]:
        """Upload `items`, then commit them onto `head`, which holds `files`; the commit, and all it holds."""
        operations = self._branch.send(items)
        self._session.progress.step("commit", self._publication.name)
        title = description.weights_title(self._publication)
        commit = self._branch.commit(items, operations, title, Onto(head, files))
        self._new += [item.path_in_repo for item in items]
        return commit, self._branch.files(commit)

    # -- what describes them

    def _card(self, remote: RemoteState) -> tuple[str, tuple[str, ...]]:
        """The last commit, and what it deleted; none is made when nothing differs."""
        session, publication = self._session, self._publication
        last = description.last(publication, remote, session.card(publication, remote))
        rows = preflight.rows_of(session, publication, remote, last)
        for problem in (
            *preflight.foreign(session, publication, remote, rows),
            *preflight.scrubbed(session, last),
        ):
            raise problem
        changed = self._branch.missing(last, remote.files)
        deleted = tuple(row.path for row in rows if row.change == "delete")
        if not changed and not deleted:
            return str(remote.head), ()
        session.progress.step("commit", f"{publication.name}: card and reports")
        operations = self._branch.operations(changed, deleted)
        title = description.card_title(publication)
        commit = self._branch.commit(changed, operations, title, Onto(str(remote.head)), deleted)
        files = self._branch.files(commit)
        for item in self._branch.missing(changed, files):
            raise self._branch.damaged(item, files.get(item.path_in_repo))
        self._new += [item.path_in_repo for item in changed]
        return commit, deleted

    def _keep(self, step: str, **known: str) -> None:
        """Note in the record how far it got."""
        entry = self._entry
        entry.step = step
        entry.pull_request = self._number
        entry.weights_commit = known.get("weights_commit", entry.weights_commit)
        entry.commit = known.get("commit", entry.commit)
        entry.url = known.get("url", entry.url)
        entry.visibility = known.get("visibility", entry.visibility)
        if step in ("weights", "described"):
            entry.files = {
                item.path_in_repo: {"bytes": sums.bytes, "sha256": sums.sha256}
                for item in self._publication.weights
                for sums in (self._session.sums.of(item.source),)
            }
        self._session.record.keep(entry)
