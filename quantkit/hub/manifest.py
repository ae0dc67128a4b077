"""`quantkit.json` and `checks.json`: what a target is, how it was made, and what was measured about it.

A card is written from these alone, so a folder can be published from another machine, long after. Nothing
in `quantkit.json` depends on the clock or on paths of the machine: the same plan gives the same bytes.
`checks.json` holds what an engine made of the files, which may differ from run to run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import SourceError
from quantkit.evaluate.quality import Quality
from quantkit.recipe.check import accepts, fault, hints

MANIFEST = "quantkit.json"
CHECKS = "checks.json"
SCHEMA = "quantkit/target/2"
REPO_SCHEMA = "quantkit/repo/1"
CHECKS_SCHEMA = "quantkit/checks/1"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that was quantized.

    id           repository of the Hub when `revision` is not None, else only a name
    card         of the front matter of its model card licence, tags, languages and the like, or why it cannot
                 be read: what `checkpoint.card.inherited` makes of it
    cache_bytes  bytes of a key-value cache per token of context in 16 bits; None: not known
    context      tokens it was made for, None: not known
    quantized    what it is stored in when it is not the original: ``gptq, 4 bits``; None: it is floats
    """

    id: str
    revision: str | None
    fingerprint: str
    architecture: str
    model_type: str
    parameters: int
    size_bytes: int
    bits_per_weight: float
    dtype: str
    context: int | None
    cache_bytes: int | None
    quantized: str | None
    card: Mapping[str, Any]

    @property
    def on_hub(self) -> bool:
        return self.revision is not None


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights that are not quantized: `pattern` stands for `count` tensors of `parameters` parameters."""

    pattern: str
    count: int
    parameters: int
    dtype: str


def pattern_of(name: str) -> str:
    """What stands for a tensor and its like in other blocks and experts: numbers in its name are a ``*``."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True, slots=True)
class FileSum:
    """One file of the target, beside the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Check:
    """What an engine made of the files, beside what quantkit computes from them, on `tokens` tokens.

    problem         why it is not sound, None: it is
    kl_mean         nats per token between the two, of next-token probabilities
    top1_agreement  share of positions whose most likely token is the same
    peak_bytes      memory that loading and running it took at most, on `device`
    """

    engine: str
    version: str
    device: str
    problem: str | None
    tokens: int = 0
    kl_mean: float | None = None
    top1_agreement: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One target.

    calibration  what was known of inputs; None: nothing was needed
    made         options, transforms, feedback and the like that were used
    engines      what loads the files; notes says what does not, and why
    recipe       YAML of the complete recipe with this target alone, without paths of the machine
    versions     packages that computed, by name
    files        by name, beside the manifest
    repacked     what export said of moving the codes here from another format, None when nothing was moved
    """

    key: str
    quantkit: str
    name: str
    format: str
    scheme: str
    method: str
    size_bytes: int
    bits_per_weight: float
    fallbacks: int
    source: Origin
    quality: tuple[Quality, ...]
    calibration: Mapping[str, Any] | None
    made: Mapping[str, Any]
    kept: tuple[Kept, ...]
    engines: tuple[str, ...]
    notes: tuple[str, ...]
    recipe: str
    versions: Mapping[str, str]
    files: Mapping[str, FileSum] = field(default_factory=dict)
    repacked: Mapping[str, Any] | None = None

    @property
    def files_key(self) -> str:
        """Of the plan and of every byte that was written: what is known of other files does not hold."""
        sums = {name: told.sha256 for name, told in sorted(self.files.items())}
        return hashlib.sha256(json.dumps([self.key, sums]).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, found: Any, where: str) -> Manifest:
        """Inverse of `to_json`; SourceError, naming `where`, for anything else."""
        try:
            if found["schema"] != SCHEMA:
                raise SourceError(
                    f"{where} is a manifest of another version: {found['schema']}, not {SCHEMA}",
                    remedy="run the same quantkit convert again with --on-exists replace",
                )
            known = {f.name: found[f.name] for f in fields(cls)}
            known["source"] = well_typed(Origin(**found["source"]))
            known["quality"] = tuple(well_typed(Quality.from_json(q)) for q in found["quality"])
            known["kept"] = tuple(well_typed(Kept(**k)) for k in found["kept"])
            known["files"] = {str(n): well_typed(FileSum(**s)) for n, s in found["files"].items()}
            for name in ("engines", "notes"):
                known[name] = tuple(found[name]) if isinstance(found[name], list) else found[name]
            return well_typed(cls(**known))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SourceError(f"{where} is not what quantkit writes: {error!r}") from error


def find_manifest(folder: Path, file: str | None = None) -> Manifest | None:
    """What quantkit wrote into `folder` about its target, or, in one that holds several, about the target of
    `file`; None when there is nothing. SourceError for a manifest that does not read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = _read(path)
    if not isinstance(found, dict) or found.get("schema") != REPO_SCHEMA:
        made = Manifest.from_json(found, f"`{path}`")
        return made if file is None or file in made.files else None
    targets = found.get("targets")
    for inside in targets.values() if isinstance(targets, dict) else ():
        made = Manifest.from_json(inside, f"`{path}`")
        if file in made.files:
            return made
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a target's folder; SourceError when it has none that reads."""
    return Manifest.from_json(_read(folder / MANIFEST), f"`{folder / MANIFEST}`")


def read_checks(folder: Path, key: str) -> tuple[Check, ...] | None:
    """What engines made of the files in `folder` with this `files_key`; None: nobody looked, or at others."""
    path = folder / CHECKS
    if not path.is_file():
        return None
    found = _read(path)
    try:
        if found["schema"] != CHECKS_SCHEMA or found["key"] != key:
            return None
        return tuple(well_typed(Check(**check)) for check in found["engines"])
    except (KeyError, TypeError, OverflowError) as error:
        raise SourceError(f"`{path}` is not what quantkit writes: {error!r}") from error


def checks_json(key: str, checks: tuple[Check, ...]) -> dict[str, Any]:
    """What `read_checks` reads."""
    return {"schema": CHECKS_SCHEMA, "key": key, "engines": [asdict(check) for check in checks]}


def well_typed(made: T) -> T:
    """`made`, every field of which has the type it is declared with; TypeError for what a stranger wrote,
    OverflowError where a number is beyond all floats."""
    for name, hint in hints(type(made)).items():
        value = getattr(made, name)
        # numbers of what is broken may be infinite
        number = isinstance(value, float) and accepts(hint, float)
        if not number and (wrong := fault(value, hint)) is not None:
            raise TypeError(f"{name} {wrong}")
    return made


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(
            f"`{path}` cannot be read: {error.strerror}",
            remedy="give a folder that quantkit convert wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"`{path}` is not JSON: {error}") from error
