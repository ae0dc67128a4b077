"""`push`: targets that were checked go to the Hub with the card that their measurements make."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from quantkit.checkpoint import card
from quantkit.checkpoint.atomic import PARTIAL
from quantkit.errors import HubError, QuantkitError, UsageError, VerifyError
from quantkit.hub import problems, scrub
from quantkit.hub.client import connect, repository
from quantkit.hub.licences import Licence, judge
from quantkit.hub.manifest import MANIFEST, Check, Manifest, Origin, read_manifest
from quantkit.hub.push import access, refusals
from quantkit.hub.push.difference import Sums
from quantkit.hub.push.patience import Patience
from quantkit.hub.push.publication import README, Publication, publications
from quantkit.hub.push.push import Pushed, push
from quantkit.hub.push.record import RECORD, Record
from quantkit.hub.push.refusals import Place, distinct, in_one_line
from quantkit.hub.push.session import Options, Session
from quantkit.progress import SILENT, Progress
from quantkit.recipe.spec import Publish
from quantkit.run import ahead
from quantkit.run.cards import Cards
from quantkit.run.engine_check import check_target
from quantkit.run.manifest import origin
from quantkit.run.plan import Plan

_TIMEOUT = 30.0  # seconds; the client has none for this question


@dataclass(frozen=True, slots=True)
class Pushing:
    """What a push may do.

    replace       files of the same name that differ
    replace_card  what a person changed inside quantkit's part of a card
    prune         delete what an earlier push made and this one does not
    confirmed     go on where the repository has another visibility than was asked for
    engines       load targets that no engine has loaded yet
    """

    dry_run: bool = False
    replace: bool = False
    replace_card: bool = False
    prune: bool = False
    confirmed: bool = False
    engines: bool = True


def publish(
    paths: Sequence[Path],
    how: Publish,
    *,
    only: Sequence[str] = (),
    token: str | None = None,
    endpoint: str | None = None,
    pushing: Pushing = Pushing(),
    progress: Progress = SILENT,
) -> Pushed:
    """Publish targets: folders of a conversion, or of one target each; `only` picks by name.

    Nothing is sent before everything is planned and checked: sums, engines, licence, names, what may not be
    seen by others. A push that was stopped continues when it is called again. UsageError, VerifyError or
    HubError say what stands in the way; a dry run lists it instead.
    """
    targets = _targets(paths, only)
    for folder, manifest in targets:
        for gate in _broken_gates(folder, manifest.name):
            progress.warn(f"a gate of the recipe failed: {gate}")
        if pushing.engines:
            progress.step("verify", manifest.name)
            checks = check_target(folder, manifest.files_key, progress=progress)
            _require_sound(manifest.name, checks)
            if not checks:
                progress.warn(f"{manifest.name}: no engine has loaded it, and the card will say so")
    api = connect(endpoint, token)
    planned = publications(targets, how)
    licences = _licences([manifest.source for _, manifest in targets], how, api)
    secret = token or get_token()

    def found(files: Mapping[str, Path | bytes]) -> list[str]:
        return scrub.findings(files, secrets=(secret,) if secret else (), home=Path.home())

    def licence(publication: Publication) -> Licence:
        return licences[publication.targets[0].source.fingerprint]

    options = Options(
        dry_run=pushing.dry_run,
        replace=pushing.replace,
        prune=pushing.prune,
        confirmed=pushing.confirmed,
        licence=licence,
        scrub=found,
    )
    cards = Cards(how, api.endpoint, planned, licences, pushing.replace_card, progress)
    return push(planned, api, card=cards, options=options, progress=progress, record=_record(paths))


def check_ready(
    how: Publish,
    made: Plan,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    pushing: Pushing = Pushing(),
    progress: Progress = SILENT,
) -> None:
    """Before a long run: whether its results could be published. HubError or UsageError if not.

    Whose token it is, where it may write, what the licence of the source says, and what lies there that the
    push would stop at; the rest is known once there are files.
    """
    api = connect(endpoint, token)
    patience = Patience(time.sleep, progress)
    account = access.find_account(Place(api, how.repo, "the same command again"), patience)
    if account is None:
        raise refusals.no_token(api.endpoint)
    source = origin(made.source, made.checkpoint, made.graph, "")
    options = Options(replace=pushing.replace, confirmed=pushing.confirmed, resume="the same command again")
    record = Record(Path(made.recipe.output.dir) / RECORD, progress)
    session = Session(api, lambda *_: {}, options, progress, patience, Sums(), record, account)
    with disable_progress_bars():
        licence = _licences([source], how, api)[source.fingerprint]
        found: list[QuantkitError] = [UsageError(text) for text in licence.blockers]
        for publication in ahead.expected(made, source, how):
            progress.step("plan", publication.name)
            found += ahead.problems(session, publication, licence, replace_card=pushing.replace_card)
    match distinct(found):
        case ():
            return
        case (problem,):
            raise problem
        case several:
            raise type(several[0])("\n  ".join(map(in_one_line, several)))


def _targets(paths: Sequence[Path], only: Sequence[str]) -> list[tuple[Path, Manifest]]:
    """(folder, manifest) of everything in `paths` that is chosen."""
    found = [(folder, read_manifest(folder)) for path in paths for folder in _folders(path)]
    names = [manifest.name for _, manifest in found]
    for name in only:
        if name not in names:
            raise UsageError(f"there is no target '{name}'", remedy=f"there are {', '.join(names)}")
    return [(folder, manifest) for folder, manifest in found if not only or manifest.name in only]


def _folders(path: Path) -> Iterator[Path]:
    """The targets' folders in `path`, or itself; none that was not finished, or did not verify."""
    single = (path / MANIFEST).is_file()
    found = [path] if single else sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
    whole = [folder for folder in found if not folder.resolve().name.endswith(PARTIAL)]
    if not found:
        raise UsageError(
            f"`{path}` holds nothing that quantkit made: no {MANIFEST} there or in its folders",
            remedy="give the folder that quantkit convert wrote",
        )
    if not whole:
        raise UsageError(
            f"`{found[0]}` was not finished, or what was written did not verify",
            remedy="run quantkit convert again: it says what is wrong, or goes on",
        )
    yield from whole


def _broken_gates(folder: Path, name: str) -> list[str]:
    """What the report of the conversion says of limits that this target breaks; nothing without a report."""
    try:
        found = json.loads((folder.resolve().parent / "report.json").read_text("utf-8"))
        return [str(line) for line in found["broken_gates"] if str(line).startswith(f"{name}: ")]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _record(paths: Sequence[Path]) -> Path:
    """Where it is noted what was published: in the folder of the conversion."""
    first = paths[0].resolve()
    return (first.parent if (first / MANIFEST).is_file() else first) / RECORD


def _require_sound(name: str, checks: Sequence[Check]) -> None:
    broken = [f"{check.engine} {check.version}: {check.problem}" for check in checks if check.problem]
    if broken:
        raise VerifyError(
            "\n  ".join((f"`{name}` is not sound:", *broken)),
            remedy="nothing was published; run quantkit convert again with --on-exists replace",
        )


def _licences(origins: Sequence[Origin], how: Publish, api: HfApi) -> dict[str, Licence]:
    """By fingerprint of the source."""
    found: dict[str, Licence] = {}
    for source in origins:
        if source.fingerprint not in found:
            said = source.card if "license" in source.card else {**_card(source, how, api), **source.card}
            known = dataclasses.replace(source, card=said)
            found[source.fingerprint] = judge(known, how, endpoint=api.endpoint, gated=_gated(source, api))
    return found


def _card(source: Origin, how: Publish, api: HfApi) -> Mapping[str, Any]:
    """The card of the repository: no licence was known beside the source, in a sub-folder or an older cache.

    HubError where the Hub does not tell it, and the person no licence: one that is not known is not none.
    """
    if not source.on_hub:
        return {}

    def ask() -> Mapping[str, Any]:
        try:
            return card.read(Path(api.hf_hub_download(source.id, README, revision=source.revision)))
        except RemoteEntryNotFoundError:
            return {}

    try:
        return card.inherited(problems.attempt(ask, repository(source.id, source.revision, api)))
    except HubError as error:
        if how.license is not None:
            return {}
        raise HubError(
            f"The licence of {source.id} is not known. {error.message}",
            remedy="try again later, or say it with --license ID (publish.license)",
        ) from error


def _gated(source: Origin, api: HfApi) -> bool | None:
    """Whether the Hub gives access to the source on terms; None where it does not tell."""
    if not source.on_hub:
        return False
    with contextlib.suppress(*problems.CLIENT_ERRORS):
        found = api.model_info(source.id, revision=source.revision, timeout=_TIMEOUT, expand=["gated"])
        return bool(found.gated)
    return None
