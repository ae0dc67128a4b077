"""What a push will meet, told before the run whose results it is to publish.

A plan knows the names and the sizes of weight files to the byte, and where they will go. So most of what
would stop a push once the night is over can be said before it begins.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from quantkit import __version__
from quantkit.errors import QuantkitError, SourceError, UsageError
from quantkit.gguf import container
from quantkit.hub.card.own_text import marked, merge
from quantkit.hub.licences import Licence
from quantkit.hub.listing import Listed
from quantkit.hub.manifest import FileSum, Manifest, Origin, find_manifest
from quantkit.hub.push import access, pull_request
from quantkit.hub.push.difference import Row
from quantkit.hub.push.publication import Publication, publications
from quantkit.hub.push.remote import RemoteState, look
from quantkit.hub.push.session import Session
from quantkit.recipe.plan import TargetPlan
from quantkit.recipe.spec import Publish
from quantkit.run.gguf_file import GgufFile
from quantkit.run.manifest import recipe_text, settings, versions
from quantkit.run.plan import Plan

Verdict = Literal["same", "differs", "unknown"]
_UNKNOWN = ""  # sum of a file that is not there yet
_DECISIVE = ("options", "feedback", "transforms", "kv_cache", "mix")
_A_CARD = f"---\ntags: [quantkit]\n---\n{marked('')}"


def expected(made: Plan, source: Origin, how: Publish) -> tuple[Publication, ...]:
    """What will be published, with weight files alone; UsageError for names that are not possible.

    The sum of a file is that of one which an earlier run left and this one will keep, else empty.
    """
    out = Path(made.recipe.output.dir)
    targets = [(out / target.name, _manifest(made, target, source)) for target in made.targets]
    return publications(targets, how)


def problems(
    session: Session, publication: Publication, licence: Licence, *, replace_card: bool
) -> Iterator[QuantkitError]:
    """Why the push of `publication` will stop, as far as it can be told; what it may stop for is a warning.

    HubError when the Hub does not tell what is there.
    """
    place = session.place(publication)
    remote = look(publication, place, session.patience)
    if publication.create_pr and remote.exists:
        number = pull_request.find(session, publication)
        if number is not None:
            revision = pull_request.revision(number)
            remote = look(publication, place, session.patience, revision=revision)
    verdicts = _verdicts(publication, remote)
    changing = tuple(Row(path, "replace", 0) for path, verdict in verdicts.items() if verdict == "differs")
    yield from access.allowed(session, place, publication, remote)
    yield from access.tagged(publication, remote, changing)
    yield from access.visible(session, publication, remote, ())
    if remote.exists and not remote.private:
        yield from (UsageError(text) for text in licence.blockers_if_public)
    yield from _card(publication, remote, replace_card)
    if not session.options.replace:
        yield from _replaced(session, publication, verdicts)


def _replaced(
    session: Session, publication: Publication, verdicts: Mapping[str, Verdict]
) -> Iterator[UsageError]:
    """Weight files that the push may not put others in the place of."""
    changed = [path for path, verdict in verdicts.items() if verdict == "differs"]
    if changed:
        yield UsageError(
            f"{publication.name}: {_named(changed)} there with another content than this run will give",
            remedy="give --replace to put the new one in its place",
        )
    unsure = [path for path, verdict in verdicts.items() if verdict == "unknown"]
    if unsure:
        session.progress.warn(
            f"{publication.name}: {_named(unsure)} there; unless this run gives the very same, the push will "
            "stop and ask for --replace"
        )


def _manifest(made: Plan, target: TargetPlan, source: Origin) -> Manifest:
    """Of a target that is not made yet: what is known of it, and its weight files."""
    asked = target.target
    return Manifest(
        key="",
        quantkit=__version__,
        name=target.name,
        format=asked.format,
        scheme=target.default.name,
        method=asked.method,
        size_bytes=made.files[target.name].total_bytes,
        bits_per_weight=made.bits_per_weight(target),
        fallbacks=0,
        source=source,
        quality=(),
        calibration=None,
        made=settings(asked),
        kept=(),
        engines=(),
        notes=(),
        recipe=recipe_text(made.recipe, asked, made.source),
        versions=versions(),
        files=_weights(made, target),
    )


def _weights(made: Plan, target: TargetPlan) -> Mapping[str, FileSum]:
    """The weight files by name."""
    files = made.files[target.name]
    if isinstance(files, GgufFile):
        names, sizes = files.names, [files.total_bytes]
        if len(names) > 1:
            sizes = container.shard_bytes(files.model.architecture, files.metadata, files.shards)
        planned = {name: FileSum(size, _UNKNOWN) for name, size in zip(names, sizes, strict=True)}
    else:
        planned = {file.name: FileSum(file.bytes, _UNKNOWN) for file in files.files}
    here = _kept(made, target)
    alike = all(name in here and here[name].bytes == told.bytes for name, told in planned.items())
    return {name: here[name] for name in planned} if alike else planned


def _kept(made: Plan, target: TargetPlan) -> Mapping[str, FileSum]:
    """Files that lie in the output already: the run keeps them, or refuses to go on."""
    if made.recipe.output.on_exists != "resume":
        return {}
    with contextlib.suppress(SourceError):
        known = find_manifest(Path(made.recipe.output.dir) / target.name)
        return {} if known is None else known.files
    return {}


def _verdicts(publication: Publication, remote: RemoteState) -> dict[str, Verdict]:
    """What this run will make of each weight file that is there, by path."""
    ours = {path: placed.manifest for placed in publication.placed for path in placed.files}
    theirs = {path: placed.manifest for placed in remote.known.targets for path in placed.files}
    found: dict[str, Verdict] = {}
    for item in publication.weights:
        path, there = item.path_in_repo, remote.files.get(item.path_in_repo)
        if there is not None and item.expected is not None:
            found[path] = _verdict(item.expected, there, ours[path], theirs.get(path))
    return found


def _verdict(here: FileSum, there: Listed, ours: Manifest, theirs: Manifest | None) -> Verdict:
    """Whether the file that is there is the one that will be here."""
    if here.bytes != there.size:
        return "differs"
    if here.sha256 != _UNKNOWN and there.large:
        return "same" if here.sha256 == there.sum else "differs"
    if theirs is None:
        return "unknown"
    if _settings(theirs) != _settings(ours):
        return "differs"
    made_alike = [(m.recipe, m.quantkit, dict(m.versions)) for m in (ours, theirs)]
    return "same" if made_alike[0] == made_alike[1] else "unknown"


def _settings(manifest: Manifest) -> Any:
    """What two results can hardly differ in and be the same, as JSON gives it back."""
    decisive = {key: manifest.made.get(key) for key in _DECISIVE}
    return json.loads(json.dumps([manifest.format, manifest.scheme, manifest.method, decisive]))


def _card(publication: Publication, remote: RemoteState, replace: bool) -> Iterator[UsageError]:
    """A card that the push could not write into, whatever stands on the new one."""
    try:
        merge(_A_CARD, remote.readme, replace=replace)
    except UsageError as error:
        yield UsageError(f"{publication.name}: {error.message}", remedy=error.remedy)


def _named(paths: Sequence[str]) -> str:
    """``'a' is`` or ``3 weight files (first: 'a') are``."""
    first = sorted(paths)[0]
    return f"'{first}' is" if len(paths) == 1 else f"{len(paths):,} weight files (first: '{first}') are"
