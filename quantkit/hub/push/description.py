"""What goes with the weights: sums, recipes, `quantkit.json`; and what a commit says of itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

from quantkit import __version__
from quantkit.errors import UsageError
from quantkit.hub.manifest import MANIFEST, Manifest
from quantkit.hub.push import published
from quantkit.hub.push.publication import Item, Publication, label
from quantkit.hub.push.remote import RemoteState

_MAX_TITLE = 120
_TITLE = re.compile(r"(Add|Describe) .+ \(quantkit \S+\)")


def last(publication: Publication, remote: RemoteState, card: Mapping[str, bytes]) -> tuple[Item, ...]:
    """What is committed once the weights are verified: `card` and what quantkit adds to it."""
    sums = published.sums(publication, remote.earlier, remote.known)
    found = dict(card)
    added = {_recipe(publication, e): e.recipe.encode() for e in publication.targets if e.recipe}
    if sums:
        added[published.SUMS] = "".join(f"{told.sha256}  {path}\n" for path, told in sums.items()).encode()
    weights = {item.path_in_repo for item in publication.weights}
    now = {*weights, *found, *added}
    left = () if remote.prunes else published.left(remote.known, remote.earlier, now, remote.files)
    added[MANIFEST] = published.compose(publication, remote.earlier, remote.known, remote.changes, left)
    for path in sorted({*found, *added}):
        if path in weights or (path in found and path in added):
            raise UsageError(
                f"'{path}' is both a file of a target and one that describes it", remedy="rename the file"
            )
    found |= added
    return tuple(Item(path, content) for path, content in sorted(found.items()))


def weights_title(publication: Publication) -> str:
    """``Add Q4_K_M, Q5_K_M (quantkit 0.3.1)``."""
    return _title("Add", publication)


def card_title(publication: Publication) -> str:
    """``Describe Q4_K_M, Q5_K_M (quantkit 0.3.1)``."""
    return _title("Describe", publication)


def is_title(text: str) -> bool:
    """Whether a commit of some push has this title."""
    return _TITLE.fullmatch(text) is not None


def text(publication: Publication, files: Mapping[str, tuple[int, str]]) -> str:
    """The body of a commit in Markdown: how it was made, and `files` as path → (bytes, sha256)."""
    lines = [line for manifest in publication.targets for line in _made(manifest)]
    if files:
        lines += ["", "| file | bytes | sha256 |", "| --- | ---: | --- |"]
        lines += [f"| `{path}` | {size:,} | `{sha256}` |" for path, (size, sha256) in sorted(files.items())]
    return "\n".join(lines)


def _recipe(publication: Publication, manifest: Manifest) -> str:
    return published.recipes((manifest.name,), several=publication.several)[0]


def _title(verb: str, publication: Publication) -> str:
    names = [label(manifest) for manifest in publication.targets]
    title = f"{verb} {', '.join(names)} (quantkit {__version__})"
    if len(title) > _MAX_TITLE:
        title = f"{verb} {names[0]} and {len(names) - 1} more (quantkit {__version__})"
    return title


def _made(manifest: Manifest) -> Iterator[str]:
    origin = manifest.source
    source = f"`{origin.id}@{origin.revision}`" if origin.on_hub else f"`{origin.id}`"
    yield f"**{label(manifest)}**: {manifest.format} {manifest.scheme} by {manifest.method} from {source}"
    if manifest.recipe:
        yield f"- recipe sha256 `{hashlib.sha256(manifest.recipe.encode()).hexdigest()}`"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    yield f"- quantkit {manifest.quantkit}{f', {versions}' if versions else ''}"
    if manifest.calibration is not None:
        yield f"- calibration {_calibration(manifest.calibration)}"


def _calibration(told: Mapping[str, object]) -> str:
    rows, length = told.get("rows"), told.get("length")
    tokens = f"{rows * length:,} tokens, " if isinstance(rows, int) and isinstance(length, int) else ""
    return f"{tokens}sha256 `{told.get('sha256', 'unknown')}`"
