"""One publication: repository, branch, weights, verified, then what describes them.

Weight files are sent one by one with `preupload_lfs_files`, what lies beside them at once, and all are
committed together with `create_commit`, not with `upload_folder`: they lie in several folders and
nothing is to be copied; each is tried again by us and told of by itself; content that arrived is never
sent twice; and the branch changes in one step, in which `upload_folder` may make several. A card and
what goes with it follow in a second commit, whose parent is the commit that was verified, so that
nothing is described that is not there.

After any failure the listing of the repository decides what is true, not the answer that was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import GitCommitInfo

from quantkit.errors import HubError, QuantkitError, VerifyError
from quantkit.hub.listing import Listed
from quantkit.hub.push import access, description, preflight, pull_request, refusals
from quantkit.hub.push.difference import MAKE_ANEW, nothing_to_do
from quantkit.hub.push.patience import TRIES, failed_for_good
from quantkit.hub.push.preflight import Plan
from quantkit.hub.push.publication import Item, is_weights
from quantkit.hub.push.record import Entry
from quantkit.hub.push.refusals import FAILURES, STALE
from quantkit.hub.push.remote import (
    RemoteState,
    ensure,
    first_commit,
    has_branch,
    history,
    is_gated,
    list_tree,
    listing,
    look,
    read_head,
)
from quantkit.hub.push.sent import Sending
from quantkit.hub.push.session import Session
from quantkit.recipe.sizes import format_size

_INVALID = 400
Operation = CommitOperationAdd | CommitOperationDelete


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


class _Overtaken(Exception):
    """Another push of this account described the repository first."""


@dataclass(frozen=True, slots=True)
class _Onto:
    """What a commit goes on top of; `files`: what that holds, where more may have come since."""

    parent: str
    files: Mapping[str, Listed] | None = None


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
        self._sending = Sending(session.progress, 0)
        self._uploaded: set[str] = set()
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
            if remote.head != weights and not self._all_there(self._publication.weights, remote.files):
                break
            with suppress(_Overtaken):
                return self._card(remote)
        raise self._changed(weights)

    @property
    def entry(self) -> Entry:
        """What the record says of this publication."""
        return self._entry

    @property
    def _revision(self) -> str:
        if self._number is not None:
            return pull_request.revision(self._number)
        return self._publication.revision

    def _look(self) -> RemoteState:
        remote = look(self._publication, self._place, self._session.patience, revision=self._revision)
        if remote.head is None:
            raise HubError(
                f"{self._publication.name} is not there any more.",
                remedy=f"look at {self._place.url}, then: {self._place.resume}",
            )
        return preflight.as_left(self._session, self._publication, remote)

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
        self._keep("pull request")

    # -- weights

    def _weights(self, remote: RemoteState) -> str:
        """The commit at which all weights are verified."""
        weights = self._publication.weights
        head, files = str(remote.head), remote.files
        missing = self._missing(weights, files)
        if missing:
            rows = preflight.rows_of(self._session, self._publication, remote, ())
            for problem in preflight.foreign(self._session, self._publication, remote, rows):
                raise problem
            head, files = self._sent(missing, head, files)
            missing = self._missing(weights, files)
        if missing:
            name = missing[0].path_in_repo
            self._session.progress.warn(
                f"{self._publication.name}: '{name}' is listed with another content; sending it again"
            )
            head, files = self._sent(missing, head, files)
            missing = self._missing(weights, files)
        if missing:
            raise self._damaged(missing[0], files.get(missing[0].path_in_repo))
        self._session.progress.note(f"{self._publication.name}: all weights verified at {head[:7]}")
        return head

    def _sent(
        self, items: Sequence[Item], head: str, files: Mapping[str, Listed]
    ) -> tuple[str, Mapping[str, Listed]]:
        """Upload `items`, then commit them onto `head`, which holds `files`; the commit, and all it holds."""
        operations: list[Operation] = []
        self._begin(items)
        weights = [item for item in items if is_weights(item.path_in_repo)]
        beside = [item for item in items if item not in weights]
        if beside:
            what = f"{len(beside)} files beside the weights" if len(beside) > 1 else beside[0].path_in_repo
            size = format_size(sum(map(self._size, beside)))
            self._session.progress.step("upload", f"{what} ({size})")
            operations += self._upload(beside, what)
        for n, item in enumerate(weights, 1):
            what = f"{item.path_in_repo} ({format_size(self._size(item))}, {n} of {len(weights)})"
            self._session.progress.step("upload", what)
            operations += self._upload([item], f"'{item.path_in_repo}'")
        self._session.progress.step("commit", self._publication.name)
        title = description.weights_title(self._publication)
        commit = self._commit(items, operations, title, _Onto(head, files))
        self._new += [item.path_in_repo for item in items]
        return commit, listing(self._place, self._session.patience, commit)

    def _begin(self, items: Sequence[Item]) -> None:
        """Count anew: `items` are what is sent from here on."""
        self._sending = Sending(self._session.progress, sum(map(self._size, items)))

    def _size(self, item: Item) -> int:
        return self._session.sums.of(item.source).bytes

    def _upload(self, items: Sequence[Item], what: str) -> list[CommitOperationAdd]:
        """The contents are at the Hub, in no commit yet; those of a few kB go along with the commit."""
        operations = [self._operation(item) for item in items]

        def send() -> None:
            with self._sending.trying():
                self._place.api.preupload_lfs_files(
                    self._publication.repo, additions=operations, revision=self._revision, num_threads=1
                )

        doing = f"uploading {what}"
        try:
            self._session.patience.attempt(send, self._place, doing)
        except FAILURES as error:
            raise failed_for_good(error, self._place, doing, self._state()) from error
        for item in items:
            if not self._session.sums.unchanged(item.source):
                raise VerifyError(
                    f"`{item.place}` was written to while it was uploaded",
                    remedy=f"{MAKE_ANEW}, and let nothing else write to it",
                )
            self._uploaded.add(item.path_in_repo)
        self._sending.arrived(sum(map(self._size, items)))
        return operations

    def _operation(self, item: Item) -> CommitOperationAdd:
        operation = self._sending.operation(item.path_in_repo, item.source)
        # known already: the client reads a file once less
        operation.upload_info.sha256 = bytes.fromhex(self._session.sums.of(item.source).sha256)
        return operation

    def _missing(self, items: Sequence[Item], files: Mapping[str, Listed]) -> tuple[Item, ...]:
        return tuple(i for i in items if not self._session.sums.match(i.source, files.get(i.path_in_repo)))

    def _all_there(self, items: Sequence[Item], files: Mapping[str, Listed]) -> bool:
        return not self._missing(items, files)

    def _state(self) -> list[str]:
        """What became of each file so far."""
        return [
            f"{item.path_in_repo}: {'uploaded' if item.path_in_repo in self._uploaded else 'not uploaded'}"
            for item in self._publication.weights
        ]

    def _damaged(self, item: Item, listed: Listed | None) -> HubError:
        mine = self._session.sums.of(item.source)
        found = "it is not there" if listed is None else f"{listed.size:,} bytes, {listed.sum}"
        return HubError(
            f"{self._publication.name}: '{item.path_in_repo}' is not what was sent, twice: "
            f"{mine.bytes:,} bytes, {mine.sha256} here, {found} there.",
            remedy=f"look for a .gitignore there and at {self._place.url}, then: {self._place.resume}",
        )

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
        changed = [i for i in last if not session.sums.match(i.source, remote.files.get(i.path_in_repo))]
        deleted = tuple(row.path for row in rows if row.change == "delete")
        if not changed and not deleted:
            return str(remote.head), ()
        session.progress.step("commit", f"{publication.name}: card and reports")
        self._begin(changed)
        operations: list[Operation] = [self._operation(item) for item in changed]
        operations += [CommitOperationDelete(path) for path in deleted]
        title = description.card_title(publication)
        commit = self._commit(changed, operations, title, _Onto(str(remote.head)), deleted)
        files = listing(self._place, session.patience, commit)
        for item in self._missing(changed, files):
            raise self._damaged(item, files.get(item.path_in_repo))
        self._new += [item.path_in_repo for item in changed]
        return commit, deleted

    # -- commits

    def _commit(
        self,
        items: Sequence[Item],
        operations: list[Operation],
        title: str,
        onto: _Onto,
        deleted: Sequence[str] = (),
    ) -> str:
        """Commit, and after a failure look whether it is there all the same."""
        session = self._session
        sums = {i.path_in_repo: session.sums.of(i.source) for i in items}
        told = description.text(
            self._publication, {path: (each.bytes, each.sha256) for path, each in sums.items()}
        )
        doing = f"committing to {self._publication.name}"
        failed = 0
        while True:
            try:
                with session.patience.heard(), self._sending.trying():
                    made = self._place.api.create_commit(
                        self._publication.repo,
                        operations,
                        commit_message=title,
                        commit_description=told,
                        revision=self._revision,
                        parent_commit=onto.parent,
                    )
                return made.oid
            except FAILURES as error:
                if session.patience.without_xet(error, self._place):
                    continue
                if (head := self._landed(items, deleted)) is not None:
                    session.progress.note(
                        f"{self._publication.name}: the commit is there, its answer was lost"
                    )
                    return head
                failed += 1
                if refusals.status_of(error) == STALE and failed < TRIES:
                    onto = self._moved(onto, items)
                    continue
                if failed == TRIES or refusals.hopeless(error):
                    raise failed_for_good(error, self._place, doing, self._state()) from error
                if refusals.status_of(error) == _INVALID:  # it lost an object: send all again
                    self._begin(items)
                    operations = [
                        *(self._operation(item) for item in items),
                        *(CommitOperationDelete(path) for path in deleted),
                    ]
                session.patience.wait(failed, error, self._place, doing)

    def _landed(self, items: Sequence[Item], deleted: Sequence[str]) -> str | None:
        """The head, if it holds all of `items` and none of `deleted`; None also when nobody answers."""
        try:
            head = read_head(self._place, self._revision)
            files = list_tree(self._place, head)
        except FAILURES:
            return None
        done = self._all_there(items, files) and not any(path in files for path in deleted)
        return head if done else None

    def _moved(self, onto: _Onto, items: Sequence[Item]) -> _Onto:
        """Where to commit now that somebody else did since; HubError where that has to be looked at.

        Weights go onto everything that left their names alone. What describes them is made anew after another
        push of this account.
        """
        since: list[GitCommitInfo] = []
        for commit in history(self._place, self._session.patience, self._revision):
            if commit.commit_id == onto.parent:
                break
            since.append(commit)
        if not since:
            raise self._changed(onto.parent)
        files = listing(self._place, self._session.patience, since[0].commit_id)
        if onto.files is not None:
            others = [i.path_in_repo for i in self._missing(items, files) if i.path_in_repo in files]
            if all(files[path] == onto.files.get(path) for path in others):
                return _Onto(since[0].commit_id, files)
        elif self._all_there(self._publication.weights, files) and all(map(self._is_of_a_push, since)):
            raise _Overtaken
        raise self._changed(onto.parent, since)

    def _is_of_a_push(self, commit: GitCommitInfo) -> bool:
        return self._place.account in commit.authors and description.is_title(commit.title)

    def _changed(self, parent: str, since: Sequence[GitCommitInfo] = ()) -> QuantkitError:
        who = ""
        if since:
            first = since[0]
            when = first.created_at.strftime("%Y-%m-%d %H:%M UTC")
            who = f" by {', '.join(first.authors) or 'somebody'} at {when}: {first.title}"
        return HubError(
            f"{self._publication.name} was changed since {parent[:7]}, while it was published to{who}.",
            remedy=f"look at {self._place.url}/commits/{self._publication.revision}, "
            f"then: {self._place.resume}",
        )

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
