"""`quantkit.json` of a repository: what is published there, now and by earlier pushes.

A repository of one target has the manifest of that target. One that may hold several has

    {"schema": "quantkit/repo/1", "targets": {name: manifest}, "placed": {name: {"files", "branch"}},
     "checks": {name: checks}, "files": {path: {"bytes", "sha256"}}}

Both have "changes", lines about files that were replaced, and "left", files of earlier pushes that belong to
nothing any more, where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.errors import SourceError
from quantkit.hub.listing import Listed
from quantkit.hub.manifest import MANIFEST, REPO_SCHEMA, Check, FileSum, Manifest, well_typed
from quantkit.hub.push.publication import README, Placed, Publication, is_weights

SUMS = "SHA256SUMS"
RECIPE = "recipe.yaml"
PICTURE = "report/quality.png"
_RECIPES = "recipes"
_NEVER_OLD = frozenset({".gitattributes", README, MANIFEST})
_OURS = "quantkit/"


@dataclass(frozen=True, slots=True)
class Published:
    """What a remote `quantkit.json` says.

    ours       it is one of quantkit, though maybe of a version that is not known
    files      what an earlier push put there, beside the card and what goes with it
    described  what goes with the card, by the names that quantkit gives
    left       what still earlier pushes put there
    changes    lines about files that were replaced, newest first
    """

    ours: bool = False
    targets: tuple[Placed, ...] = ()
    files: Mapping[str, FileSum] = field(default_factory=dict)
    described: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        """Everything that pushes put there, as far as it can be told."""
        return frozenset((*self.files, *self.described, *self.left)) - _NEVER_OLD


def parse(text: bytes) -> Published:
    """Whatever can be read of it: a person may have put another file in its place."""
    try:
        found = json.loads(text)
        ours = isinstance(found, dict) and str(found.get("schema")).startswith(_OURS)
    except (ValueError, RecursionError):
        return Published()
    if not ours:
        return Published()
    try:
        return _several(found) if found["schema"] == REPO_SCHEMA else _single(found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError):
        return Published(ours=True)


def _single(found: Mapping[str, Any]) -> Published:
    manifest = Manifest.from_json(found, MANIFEST)
    placed = Placed(manifest, tuple(manifest.files))
    described = (RECIPE, SUMS, PICTURE)
    return Published(True, (placed,), manifest.files, described, *_lists(found))


def _several(found: Mapping[str, Any]) -> Published:
    targets = []
    for name, told in found["targets"].items():
        placed = found["placed"][name]
        checks = found["checks"].get(name)
        made = Placed(
            Manifest.from_json(told, MANIFEST),
            _texts(placed["files"]),
            placed["branch"],
            None if checks is None else tuple(well_typed(Check(**check)) for check in checks),
        )
        targets.append(well_typed(made))
    files = {path: well_typed(FileSum(**told)) for path, told in found["files"].items()}
    described = (*recipes(found["targets"], several=True), SUMS, PICTURE)
    return Published(True, tuple(targets), files, described, *_lists(found))


def _lists(found: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is left, and changes."""
    return _texts(found.get("left", [])), _texts(found.get("changes", []))


def _texts(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError("must be a list of texts")
    return tuple(found)


def recipes(names: Iterable[str], *, several: bool) -> tuple[str, ...]:
    """Where the recipes of targets with these names lie."""
    return tuple(f"{_RECIPES}/{name}.yaml" for name in names) if several else (RECIPE,)


def left(
    known: Published, earlier: Iterable[Placed], now: Collection[str], listed: Collection[str]
) -> tuple[str, ...]:
    """Files of earlier pushes that are neither of this one (`now`) nor of a target that stays."""
    staying = tuple(earlier)
    kept = {path for placed in staying if placed.branch is None for path in placed.files}
    kept |= set(recipes((placed.manifest.name for placed in staying), several=True))
    if README not in now:
        kept.add(PICTURE)  # no card that does without it
    return tuple(sorted(known.paths.intersection(listed) - kept - set(now)))


def still_there(
    known: Published,
    publication: Publication,
    listed: Mapping[str, Listed],
    of_branch: Callable[[str], Mapping[str, Listed]],
) -> tuple[Placed, ...]:
    """Targets of earlier pushes that this one leaves alone and whose files nobody changed since.

    `of_branch` lists another branch; nothing where there is none.
    """
    if not publication.several:
        return ()
    now = {placed.manifest.name for placed in publication.placed}
    taken = {item.path_in_repo for item in publication.weights if is_weights(item.path_in_repo)}
    return tuple(
        placed
        for placed in known.targets
        if placed.manifest.name not in now
        and not taken.intersection(placed.files)
        and (
            _intact(placed, known.files, listed)
            if placed.branch is None
            else _intact(placed, placed.manifest.files, of_branch(placed.branch))
        )
    )


def accounted(known: Published, listed: Mapping[str, Listed]) -> frozenset[str]:
    """Files of earlier pushes that are what those put there, by size and, of large ones, sha256.

    What describes them goes by its name.
    """
    if not known.ours:
        return frozenset()
    same = {path for path, told in known.files.items() if path in listed and _is(listed[path], told)}
    return frozenset((*same, *known.described, README, MANIFEST))


def _intact(placed: Placed, told: Mapping[str, FileSum], listed: Mapping[str, Listed]) -> bool:
    """Side files may have come anew with another target; weights are what the numbers are about."""
    for path in placed.files:
        there, made = listed.get(path), told.get(path)
        if there is None or made is None:
            return False
        if is_weights(path) and not _is(there, made):
            return False
    return True


def _is(there: Listed, made: FileSum) -> bool:
    """Whether a file has this sum, as far as the listing tells it."""
    return there.size == made.bytes and (not there.large or there.sum == made.sha256)


def replaced(publication: Publication, known: Published) -> tuple[str, ...]:
    """Paths of weights that an earlier push published with another content."""
    return tuple(
        item.path_in_repo
        for item in publication.weights
        if item.expected is not None
        and is_weights(item.path_in_repo)
        and known.files.get(item.path_in_repo, item.expected) != item.expected
    )


def sums(publication: Publication, earlier: tuple[Placed, ...], known: Published) -> dict[str, FileSum]:
    """The weights and side files that the branch holds, of this push and of earlier ones."""
    kept = {path for placed in earlier if placed.branch is None for path in placed.files}
    found = {path: known.files[path] for path in kept if path in known.files}
    found |= {item.path_in_repo: item.expected for item in publication.weights if item.expected is not None}
    return dict(sorted(found.items()))


def compose(
    publication: Publication,
    earlier: tuple[Placed, ...],
    known: Published,
    changes: tuple[str, ...],
    left: tuple[str, ...] = (),
) -> bytes:
    """The new `quantkit.json`."""
    document: dict[str, Any]
    if not publication.several:
        document = publication.targets[0].to_json()
    else:
        placed = sorted((*publication.placed, *earlier), key=lambda each: each.manifest.name)
        document = {
            "schema": REPO_SCHEMA,
            "targets": {each.manifest.name: each.manifest.to_json() for each in placed},
            "placed": {
                each.manifest.name: {"files": list(each.files), "branch": each.branch} for each in placed
            },
            "checks": {
                each.manifest.name: [asdict(check) for check in each.checks]
                for each in placed
                if each.checks is not None
            },
            "files": {path: asdict(told) for path, told in sums(publication, earlier, known).items()},
        }
    if changes:
        document["changes"] = list(changes)
    if left:
        document["left"] = list(left)
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
