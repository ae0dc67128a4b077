"""One branch, or pull request, while a push works on it: contents are sent, committed and looked for.

Weight files are sent one by one with `preupload_lfs_files`, what lies beside them at once, and all are
committed together with `create_commit`, not with `upload_folder`: they lie in several folders and
nothing is to be copied; each is tried again by us and told of by itself; content that arrived is never
sent twice; and the branch changes in one step, in which `upload_folder` may make several.

After any failure the listing of the repository decides what is true, not the answer that was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import GitCommitInfo

from quantkit.errors import HubError, QuantkitError, VerifyError
from quantkit.hub.listing import Listed
from quantkit.hub.push import description, refusals
from quantkit.hub.push.difference import MAKE_ANEW
from quantkit.hub.push.patience import TRIES, failed_for_good
from quantkit.hub.push.publication import Item, Publication, is_weights
from quantkit.hub.push.refusals import FAILURES, STALE
from quantkit.hub.push.remote import RemoteState, history, list_tree, listing, look, read_head
from quantkit.hub.push.sent import Sending
from quantkit.hub.push.session import Session
from quantkit.recipe.sizes import format_size

_INVALID = 400
Operation = CommitOperationAdd | CommitOperationDelete


class Overtaken(Exception):
    """Another push of this account described the repository first."""


@dataclass(frozen=True, slots=True)
class Onto:
    """What a commit goes on top of; `files`: what that holds, where more may have come since."""

    parent: str
    files: Mapping[str, Listed] | None = None


class Branch:
    """Where `publication` goes, by its `revision`."""

    def __init__(self, session: Session, publication: Publication, revision: str) -> None:
        self._session = session
        self._publication = publication
        self._place = session.place(publication)
        self._revision = revision
        self._sending = Sending(session.progress, 0)
        self._uploaded: set[str] = set()

    def look(self) -> RemoteState:
        """What is there; HubError when that is nothing any more."""
        remote = look(self._publication, self._place, self._session.patience, revision=self._revision)
        if remote.head is None:
            raise HubError(
                f"{self._publication.name} is not there any more.",
                remedy=f"look at {self._place.url}, then: {self._place.resume}",
            )
        return remote

    def files(self, commit: str) -> Mapping[str, Listed]:
        """What a commit holds."""
        return listing(self._place, self._session.patience, commit)

    def missing(self, items: Sequence[Item], files: Mapping[str, Listed]) -> tuple[Item, ...]:
        """Those of `items` that are not among `files` as they are here."""
        return tuple(i for i in items if not self._session.sums.match(i.source, files.get(i.path_in_repo)))

    # -- contents

    def send(self, items: Sequence[Item]) -> list[Operation]:
        """Put the contents of `items` at the Hub, in no commit yet; those of a few kB go along with it."""
        self._begin(items)
        operations: list[Operation] = []
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
        return operations

    def operations(self, items: Sequence[Item], deleted: Sequence[str] = ()) -> list[Operation]:
        """For contents that are sent with the commit, or once more."""
        self._begin(items)
        return [*map(self._operation, items), *map(CommitOperationDelete, deleted)]

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

    def _state(self) -> list[str]:
        """What became of each file so far."""
        return [
            f"{item.path_in_repo}: {'uploaded' if item.path_in_repo in self._uploaded else 'not uploaded'}"
            for item in self._publication.weights
        ]

    def damaged(self, item: Item, listed: Listed | None) -> HubError:
        """What to say of a file that is not there as it was sent."""
        mine = self._session.sums.of(item.source)
        found = "it is not there" if listed is None else f"{listed.size:,} bytes, {listed.sum}"
        return HubError(
            f"{self._publication.name}: '{item.path_in_repo}' is not what was sent, twice: "
            f"{mine.bytes:,} bytes, {mine.sha256} here, {found} there.",
            remedy=f"look for a .gitignore there and at {self._place.url}, then: {self._place.resume}",
        )

    # -- commits

    def commit(
        self,
        items: Sequence[Item],
        operations: list[Operation],
        title: str,
        onto: Onto,
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
                    operations = self.operations(items, deleted)
                session.patience.wait(failed, error, self._place, doing)

    def _landed(self, items: Sequence[Item], deleted: Sequence[str]) -> str | None:
        """The head, if it holds all of `items` and none of `deleted`; None also when nobody answers."""
        try:
            head = read_head(self._place, self._revision)
            files = list_tree(self._place, head)
        except FAILURES:
            return None
        done = not self.missing(items, files) and not any(path in files for path in deleted)
        return head if done else None

    def _moved(self, onto: Onto, items: Sequence[Item]) -> Onto:
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
            raise self.changed(onto.parent)
        files = self.files(since[0].commit_id)
        if onto.files is not None:
            others = [i.path_in_repo for i in self.missing(items, files) if i.path_in_repo in files]
            if all(files[path] == onto.files.get(path) for path in others):
                return Onto(since[0].commit_id, files)
        elif not self.missing(self._publication.weights, files) and all(map(self._is_of_a_push, since)):
            raise Overtaken
        raise self.changed(onto.parent, since)

    def _is_of_a_push(self, commit: GitCommitInfo) -> bool:
        return self._place.account in commit.authors and description.is_title(commit.title)

    def changed(self, parent: str, since: Sequence[GitCommitInfo] = ()) -> QuantkitError:
        """What to say of commits of somebody else after `parent`."""
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
