"""`push`: everything is planned and checked before anything is sent; then one publication after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from quantkit.errors import HubError, QuantkitError, UsageError
from quantkit.hub.push import access, preflight
from quantkit.hub.push.difference import Sums, counted
from quantkit.hub.push.patience import Patience
from quantkit.hub.push.preflight import Plan
from quantkit.hub.push.publication import Publication
from quantkit.hub.push.record import Record
from quantkit.hub.push.refusals import Place, distinct, in_one_line
from quantkit.hub.push.remote import RemoteState, ensure, is_private, look, read_tag
from quantkit.hub.push.session import Card, Options, Session
from quantkit.hub.push.upload import Done, Upload
from quantkit.progress import SILENT, Progress
from quantkit.table import Table


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was planned and, but for a dry run, done."""

    plans: tuple[Plan, ...]
    done: tuple[Done, ...]
    dry_run: bool

    @property
    def problems(self) -> tuple[QuantkitError, ...]:
        """What stands in the way of a dry run's plans, each once."""
        return distinct(problem for plan in self.plans for problem in plan.problems)

    def tables(self) -> list[Table]:
        """The plans of a dry run, which say once what they have in common; else what is where."""
        if self.dry_run:
            said: set[str] = set()
            tables = []
            for plan in self.plans:
                tables.append(plan.table(said))
                said |= {*plan.warnings, *plan.notes, *map(in_one_line, plan.problems)}
            return tables
        tagged = any(each.tag for each in self.done)
        rows = tuple(
            (
                each.repo,
                each.branch if each.pull_request is None else f"pull request {each.pull_request}",
                each.commit[:7],
                "nothing to do" if each.unchanged else counted(len(each.sent)),
                *((each.tag or "",) if tagged else ()),
                each.url,
            )
            for each in self.done
        )
        columns = ("repository", "branch", "commit", "sent", *(("tag",) if tagged else ()), "at")
        return [Table("Published", columns, rows)]

    def to_json(self) -> dict[str, object]:
        return {
            "status": "blocked" if self.problems else "ok",
            "dry_run": self.dry_run,
            "problems": [in_one_line(problem) for problem in self.problems],
            "plans": [plan.to_json() for plan in self.plans],
            "published": [done.to_json() for done in self.done],
        }


def push(
    publications: Sequence[Publication],
    api: HfApi,
    *,
    card: Card,
    options: Options | None = None,
    progress: Progress = SILENT,
    record: Path | None = None,
) -> Pushed:
    """Publish, in order. A push that failed continues when it is called again.

    `card` gives README.md and the files it shows; it is asked before anything is sent, and again once the
    weights are verified. `record` is written after each step. A dry run only reads, and reports what is
    wrong instead of raising it: UsageError for what was asked, VerifyError for files that are not what
    was made, HubError when the Hub refuses or does not answer.
    """
    options = options or Options()
    with _quietly():
        patience = Patience(options.sleep, progress)
        place = Place(api, publications[0].repo, options.resume or "the same command again")
        account = access.find_account(place, patience)
        kept = Record(None if options.dry_run else record, progress)
        session = Session(api, card, options, progress, patience, Sums(progress), kept, account)
        plans = tuple(_plan(session, publication) for publication in publications)
        if options.dry_run:
            return Pushed(plans, (), True)
        _refuse(distinct(problem for plan in plans for problem in plan.problems))
        _tell(progress, plans)
        done: list[Done] = []
        for i, plan in enumerate(plans):
            repo = plan.publication.repo
            upload = Upload(session, plan, is_prepared=any(each.repo == repo for each in done))
            made = upload.run()
            finished = all(later.publication.repo != repo for later in plans[i + 1 :])
            here = [plan for plan in plans[: i + 1] if plan.publication.repo == repo]
            done.append(_finish(session, upload, made, here, last=finished))
        return Pushed(plans, tuple(done), False)


def _plan(session: Session, publication: Publication) -> Plan:
    session.progress.step("plan", publication.name)
    return preflight.with_card_checked(session, preflight.plan(session, publication))


def _refuse(problems: Sequence[QuantkitError]) -> None:
    """Raise what was found wrong, all of it at once, each with what to do about it."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    if len({problem.remedy for problem in problems}) == 1:
        raise type(first)("\n  ".join(problem.message for problem in problems), remedy=first.remedy)
    raise type(first)("\n  ".join(in_one_line(problem) for problem in problems))


def _tell(progress: Progress, plans: Sequence[Plan]) -> None:
    """What is worth knowing before anything is sent, each once."""
    for warning in dict.fromkeys(text for plan in plans for text in plan.warnings):
        progress.warn(warning)
    for note in dict.fromkeys(text for plan in plans for text in plan.notes):
        progress.note(note)
    for plan in plans:
        progress.note(f"{plan.publication.name}: {plan.total}")


def _finish(session: Session, upload: Upload, done: Done, here: Sequence[Plan], *, last: bool) -> Done:
    """The tag; and, once everything in the repository is verified, who may see it.

    `here` are the plans of the repository so far.
    """
    plan = here[-1]
    publication, place = plan.publication, session.place(plan.publication)
    entry = upload.entry
    if publication.tag is not None and not publication.create_pr:
        if publication.tag not in plan.remote.tags:
            session.progress.step("push", f"setting tag {publication.tag} of {publication.repo}")
        _tag(session, place, publication.tag, done.commit)
        entry.tag = publication.tag
        done = replace(done, tag=publication.tag)
    if plan.remote.private is not None:
        entry.visibility = "private" if plan.remote.private else "public"
    if last and publication.visibility == "private-then-public" and not publication.create_pr:
        if plan.remote.private is not False:
            _show(session, place, here)
        entry.visibility = "public"
    entry.step = "done"
    session.record.keep(entry)
    return done


def _show(session: Session, place: Place, plans: Sequence[Plan]) -> None:
    """Let everybody see the repository, unless another push did so in the meantime."""
    if not session.patience.ask(partial(is_private, place), place, "looking at it"):
        return
    session.progress.step("push", f"making {place.repo} public")
    for plan in plans:
        _require_agreed(session, plan, look(plan.publication, place, session.patience))
    show = partial(session.api.update_repo_settings, place.repo, visibility="public")
    ensure(place, session.patience, show, lambda: not is_private(place), "making the repository public")


def _require_agreed(session: Session, plan: Plan, remote: RemoteState) -> None:
    """HubError when what is to become public is not what was verified, or not all that was agreed to."""
    publication, place = plan.publication, session.place(plan.publication)
    for item in publication.weights:
        if not session.sums.match(item.source, remote.files.get(item.path_in_repo)):
            raise HubError(
                f"{publication.name} stays private: '{item.path_in_repo}' was changed or deleted there while "
                "it was published to.",
                remedy=f"look at {place.url}/commits/{publication.revision}, then: {place.resume}",
            )
    rows = preflight.rows_of(session, publication, remote, plan.last)
    if session.options.confirmed or not (others := access.unseen(session, publication, remote, rows)):
        return
    count, first = sum(each.files for each in others), others[0]
    raise HubError(
        f"{publication.name} is complete and stays private: {counted(count)} appeared while it was published "
        f"to (first: '{first.first}' on {first.branch}).",
        remedy=f"if all may see that: {place.resume}, with --yes",
    )


def _tag(session: Session, place: Place, tag: str, commit: str) -> None:
    """Name the commit; a tag that is there already must name it too."""

    name = partial(session.api.create_tag, place.repo, tag=tag, revision=commit, exist_ok=True)
    made = partial(read_tag, place, tag)
    ensure(place, session.patience, name, lambda: made() is not None, f"making tag {tag}")
    found = session.patience.ask(made, place, "reading its tags")
    if found != commit:
        raise UsageError(
            f"{place.repo} has a tag '{tag}' at {str(found)[:7]}, this is {commit[:7]}",
            remedy="give another --tag (publish.tag), or delete the tag there",
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the client's own bars; and what is learned of this endpoint's Xet is forgotten with it."""
    bars, xet = are_progress_bars_disabled(), constants.HF_HUB_DISABLE_XET
    disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = xet
        if not bars:
            enable_progress_bars()
