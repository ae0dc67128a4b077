"""Which files of which targets go into which repository and branch.

files            one repository; GGUF files lie in its root, the shards of one in a folder
branches         one repository; one branch each, `main` describes them and holds no weights
repo-per-target  a repository each, which engines load without naming a branch
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from quantkit.errors import UsageError
from quantkit.gguf.files import SHARD
from quantkit.hub.manifest import CHECKS, MANIFEST, Check, FileSum, Manifest, read_checks
from quantkit.recipe.spec import Publish

README = "README.md"
MAIN = "main"
Visibility = Literal["private", "public", "private-then-public"]
_LAYOUTS = {"exl2": "branches", "exl3": "branches", "gguf": "files"}
_NEVER = frozenset({README, MANIFEST, CHECKS, ".gitattributes"})
_WEIGHTS = (".gguf", ".safetensors")
# The Hub takes more, but slashes in names of branches are misread by many tools.
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Item:
    """A file to publish; `expected` is what the manifest says of it."""

    path_in_repo: str
    source: Path | bytes
    expected: FileSum | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return str(self.source) if isinstance(self.source, Path) else self.path_in_repo


@dataclass(frozen=True, slots=True)
class Placed:
    """A target where it is, or will be, published.

    files   paths of its weights and side files in the repository
    branch  that holds them; None: the branch that is looked at
    checks  what engines made of it; None: nobody looked
    """

    manifest: Manifest
    files: tuple[str, ...]
    branch: str | None = None
    checks: tuple[Check, ...] | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """What is committed to one branch of one repository.

    branch           None: main
    fork_from_first  the branch starts with the first commit of the repository, else with `main`
    placed           its targets; of `main` in the layout of branches, those of all branches
    several          the repository may hold further targets, now or later
    visibility       None: private when it is made, and one that is there stays as it is
    folders          where the targets lie on this machine; never published
    """

    repo: str
    branch: str | None
    fork_from_first: bool
    weights: tuple[Item, ...]
    placed: tuple[Placed, ...]
    several: bool
    visibility: Visibility | None = None
    create_pr: bool = False
    tag: str | None = None
    folders: tuple[Path, ...] = ()

    @property
    def targets(self) -> tuple[Manifest, ...]:
        return tuple(placed.manifest for placed in self.placed)

    @property
    def revision(self) -> str:
        return self.branch or MAIN

    @property
    def name(self) -> str:
        """For messages: ``alice/tiny`` or ``alice/tiny, branch 4.0bpw``."""
        return self.repo if self.branch is None else f"{self.repo}, branch {self.branch}"


@dataclass(frozen=True, slots=True)
class _Target:
    folder: Path
    manifest: Manifest
    checks: tuple[Check, ...] | None

    @property
    def name(self) -> str:
        return self.manifest.name

    def placed(self, files: Iterable[str], branch: str | None = None) -> Placed:
        return Placed(self.manifest, tuple(files), branch, self.checks)


@dataclass(frozen=True, slots=True)
class _Group:
    """The targets of one repository."""

    layout: str
    label: str
    targets: tuple[_Target, ...]


def publications(targets: Sequence[tuple[Path, Manifest]], how: Publish) -> tuple[Publication, ...]:
    """In the order in which they are to be published; a `main` that describes branches follows them.

    UsageError for names that are not possible or taken twice, and for files of one name.
    """
    known = tuple(_Target(folder, m, read_checks(folder, m.files_key)) for folder, m in targets)
    if not known:
        raise UsageError("there is nothing to publish", remedy="give a folder that quantkit convert wrote")
    _distinct(((t.name, t.folder.name) for t in known), "the targets `{0}` and `{1}` are both named {2}")
    groups = tuple(_groups(known, how.layout))
    repos = {group.label: _repo(how.repo, group, alone=len(groups) == 1) for group in groups}
    _distinct(
        ((repo, label) for label, repo in repos.items()),
        "`{0}` and `{1}` would be published to one repository, {2}",
        remedy="put {target} into its name: --repo (publish.repo)",
    )
    return tuple(made for group in groups for made in _of_group(group, repos[group.label], how))


def is_weights(path: str) -> bool:
    """Whether a file of a target holds tensors, not settings, a tokenizer or a licence."""
    return path.endswith(_WEIGHTS)


def label(manifest: Manifest) -> str:
    """How people call a target: ``Q4_K_M`` of GGUF, else its name."""
    return manifest.scheme.upper() if manifest.format == "gguf" else manifest.name


def _groups(targets: Sequence[_Target], layout: str) -> Iterator[_Group]:
    if layout in ("files", "branches"):
        formats = sorted({target.manifest.format.upper() for target in targets})
        yield _Group(layout, "-".join(formats), tuple(targets))
        return
    together: dict[str, list[_Target]] = {}
    for target in targets:
        usual = _LAYOUTS.get(target.manifest.format) if layout == "auto" else None
        if usual is None:
            yield _Group("repo-per-target", target.name, (target,))
        else:
            together.setdefault(target.manifest.format, []).append(target)
    for format, members in together.items():
        yield _Group(_LAYOUTS[format], format.upper(), tuple(members))


def _repo(template: str, group: _Group, *, alone: bool) -> str:
    if "{target}" in template:
        repo = template.replace("{target}", group.label)
    else:
        repo = template if alone else f"{template}-{group.label}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"'{repo}' cannot be a repository of the Hub: {error}",
            remedy="give another name with --repo (publish.repo), or the target another `name`",
        ) from error
    return repo


def _of_group(group: _Group, repo: str, how: Publish) -> Iterator[Publication]:
    if group.layout == "branches":
        yield from _branches(group, repo, how)
        return
    several = group.layout == "files"
    paths = {t.name: {name: _path(t.manifest, name, several) for name in _names(t)} for t in group.targets}
    yield Publication(
        repo=repo,
        branch=_branch(how.branch, group),
        fork_from_first=False,
        weights=tuple(_items(group.targets, paths)),
        placed=tuple(target.placed(paths[target.name].values()) for target in group.targets),
        several=several,
        visibility=how.visibility,
        create_pr=how.create_pr,
        tag=how.tag,
        folders=tuple(target.folder for target in group.targets),
    )


def _branches(group: _Group, repo: str, how: Publish) -> Iterator[Publication]:
    """One publication per target, then that of `main`, which describes what is there by then."""
    branches = {target.name: _own_branch(how.branch, target.manifest) for target in group.targets}
    _distinct(
        ((branch, name) for name, branch in branches.items()),
        "the targets `{0}` and `{1}` would both be published to branch {2}",
        remedy="put {target} into --branch (publish.branch)",
    )
    for target in group.targets:
        paths = {target.name: {name: name for name in _names(target)}}
        yield Publication(
            repo=repo,
            branch=branches[target.name],
            fork_from_first=True,
            weights=tuple(_items((target,), paths)),
            placed=(target.placed(_names(target)),),
            several=False,
            visibility=how.visibility,
            folders=(target.folder,),
        )
    yield Publication(
        repo=repo,
        branch=None,
        fork_from_first=False,
        weights=(),
        placed=tuple(target.placed(_names(target), branches[target.name]) for target in group.targets),
        several=True,
        visibility=how.visibility,
        tag=how.tag,
        folders=tuple(target.folder for target in group.targets),
    )


def _own_branch(template: str | None, manifest: Manifest) -> str:
    if template is None:
        template = "{bpw}bpw" if _LAYOUTS.get(manifest.format) == "branches" else "{target}"
    return _valid(_filled(template, manifest.name, manifest.bits_per_weight), of_its_own=True)


def _branch(template: str | None, group: _Group) -> str | None:
    """The branch that a repository of the layouts without branches is published to."""
    if template is None:
        return None
    first = group.targets[0].manifest
    if len(group.targets) > 1 and "{bpw}" in template:
        raise UsageError(
            f"branch {template!r}: {group.label} has {len(group.targets)} targets and no one {{bpw}}",
            remedy="give a plain name to --branch (publish.branch), or --layout branches (publish.layout)",
        )
    name = _valid(_filled(template, group.label, first.bits_per_weight), of_its_own=False)
    return None if name == MAIN else name


def _filled(template: str, target: str, bits_per_weight: float) -> str:
    return template.replace("{target}", target).replace("{bpw}", f"{bits_per_weight:.1f}")


def _valid(branch: str, *, of_its_own: bool) -> str:
    odd = ".." in branch or branch.endswith((".", ".lock"))
    if odd or not _BRANCH.fullmatch(branch) or (of_its_own and branch == MAIN):
        raise UsageError(
            f"'{branch}' cannot be the branch of a target",
            remedy="give another to --branch (publish.branch), of letters, digits, dot, dash, {target} and "
            "{bpw}",
        )
    return branch


def _names(target: _Target) -> tuple[str, ...]:
    """The files that are published: those that the manifest lists, and nothing else that lies there."""
    return tuple(sorted(name for name in target.manifest.files if name not in _NEVER))


def _path(manifest: Manifest, name: str, several: bool) -> str:
    """Shards of a GGUF file lie in a folder of a repository that has several files."""
    shard = SHARD.fullmatch(name)
    if not several or shard is None:
        return name
    stem, kind = shard["stem"], label(manifest)
    return f"{kind if stem.upper().endswith(kind) else stem}/{name}"


def _items(targets: Sequence[_Target], paths: Mapping[str, Mapping[str, str]]) -> Iterator[Item]:
    """Every file once; side files that are alike in several targets are one file."""
    taken: dict[str, tuple[str, FileSum]] = {}
    for target in targets:
        for name, path in paths[target.name].items():
            expected = target.manifest.files[name]
            if path.lower() not in taken:
                taken[path.lower()] = (target.name, expected)
                yield Item(path, target.folder / name, expected)
                continue
            other, known = taken[path.lower()]
            if known != expected or is_weights(path):
                raise UsageError(
                    f"the targets `{other}` and `{target.name}` both have a file '{path}'",
                    remedy="publish them with --layout repo-per-target or --layout branches (publish.layout)",
                )


def _distinct(pairs: Iterable[tuple[str, str]], message: str, *, remedy: str | None = None) -> None:
    """UsageError when two of (key, owner) have one key, where case does not count."""
    owners: dict[str, str] = {}
    for key, owner in pairs:
        if (other := owners.get(key.lower())) is not None:
            raise UsageError(
                message.format(other, owner, key), remedy=remedy or "publish one of them, or rename it"
            )
        owners[key.lower()] = owner
