"""Which files of a repository make up the model that was asked for, decided from its listing alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from quantkit.checkpoint import folder
from quantkit.errors import SourceError
from quantkit.gguf.files import NO_MODEL, PASSED_OVER, SHARD
from quantkit.hub.manifest import MANIFEST

_CARD = "README.md"
# What lies in the root of a repository and holds for all in it, of each kind what begins so
_OF_ALL = ("LICENSE", "NOTICE", "USE_POLICY", _CARD)
_GGUF = ".gguf"
_SHARD = re.compile(SHARD.pattern, re.IGNORECASE)
_TAG = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4|BF16|F16|F32))$", re.IGNORECASE
)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """A model within a repository.

    folder  where it lies: empty, or with a slash at its end
    gguf    its GGUF files in order, with their folder; none for a folder of safetensors
    """

    folder: str
    gguf: tuple[str, ...] = ()

    def beside(self, names: Collection[str]) -> set[str]:
        """Names of the files in the model's own folder, without it."""
        inside = {name.removeprefix(self.folder) for name in names if name.startswith(self.folder)}
        return {name for name in inside if "/" not in name}

    def small(self, names: Collection[str]) -> list[str]:
        """What belongs to the model beside its weights: configuration, tokenizer, licence, card.

        A sub-folder without a licence or card of its own has those of the root.
        """
        beside = self.beside(names)
        own = [self.folder + name for name in beside if _is_small(name)]
        return sorted([*own, *(of_root(beside, Choice("").beside(names)) if self.folder else ())])


def choose(repo: str, names: Collection[str], which: str | None) -> Choice:
    """The model of `repo` that `which` picks: a GGUF file or its tag, or a sub-folder; None: the only one.

    SourceError, with what there is, when nothing or more than one is meant.
    """
    if which is None:
        return _only(repo, names)
    models = _models(names)
    for choice in models:
        if which in choice.gguf:
            return choice
    inside = f"{which.strip('/')}/"
    if within := [name for name in names if name.startswith(inside)]:
        return _only(repo, within, inside)
    if which in names:
        raise SourceError(f"'{which}' of {repo} is not a model", remedy=_remedy(repo, names))
    found = [choice for choice in models if _is_tagged(choice, rf"(?<![A-Za-z0-9]){re.escape(which)}[.-]")]
    found = found or [choice for choice in models if _is_tagged(choice, rf"{re.escape(which)}[.-]")]
    if not found:
        plain = folder.CONFIG in Choice("").beside(names) and not models
        remedy = (
            f"it holds one model, in safetensors: leave out `:{which}`" if plain else _remedy(repo, names)
        )
        raise SourceError(f"{repo} has no model '{which}'", remedy=remedy)
    if len(found) > 1:
        listed = ", ".join(choice.gguf[0] for choice in found[:_SHOWN])
        raise SourceError(
            f"'{which}' means {len(found)} models of {repo}: {listed}",
            remedy=f"name the file, as {repo}:{found[0].gguf[0]}",
        )
    return found[0]


def of_root(beside: Collection[str], root: Collection[str]) -> list[str]:
    """Those of the names in the `root` of a repository that hold for a sub-folder with the names `beside`.

    Licence, notice, use policy and card: each kind of which the sub-folder has none.
    """
    lacking = [kind for kind in _OF_ALL if not any(_is_of(name, kind) for name in beside)]
    return sorted(name for name in root if any(_is_of(name, kind) for kind in lacking))


def _is_of(name: str, kind: str) -> bool:
    return name == kind or (folder.is_terms(name) and name.startswith(kind))


def _only(repo: str, names: Collection[str], inside: str = "") -> Choice:
    """The only model in a folder of the repository; safetensors with a config go before GGUF."""
    plain = Choice(inside)
    here = plain.beside(names)
    if folder.CONFIG in here and any(name.endswith(".safetensors") for name in here):
        return plain
    models = [choice for choice in _models(names) if not _has(choice.gguf[0], PASSED_OVER)]
    if len(models) == 1:
        return models[0]
    if models:
        raise SourceError(
            f"{repo} has {len(models):,} GGUF models: {', '.join(_names(models))}",
            remedy=f"give one, as {repo}:{_names(models)[0]}",
        )
    if folder.CONFIG in here:  # with pickles alone, say: what weights it lacks is said of them
        return plain
    raise SourceError(f"{repo} has no {inside}{folder.CONFIG}", remedy=_remedy(repo, names))


def _remedy(repo: str, names: Collection[str]) -> str:
    """What could have been asked for."""
    models = [choice for choice in _models(names) if not _has(choice.gguf[0], PASSED_OVER)]
    offers = _folders(names) + (_names(models) if models else [])
    if not offers:
        return "name a repository with a model"
    return f"it has {', '.join(offers[:_SHOWN])}; give one, as {repo}:{offers[0]}"


def _folders(names: Collection[str]) -> list[str]:
    """Sub-folders that hold a checkpoint."""
    found = (name.removesuffix(f"/{folder.CONFIG}") for name in names if name.endswith(f"/{folder.CONFIG}"))
    return sorted(f for f in found if any(n.endswith(".safetensors") for n in Choice(f"{f}/").beside(names)))


def _models(names: Collection[str]) -> list[Choice]:
    """The GGUF models, in the order of their names, of any name that may be one."""
    stems: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(_GGUF) and not _has(name, NO_MODEL):
            shard = _SHARD.fullmatch(name)
            stems.setdefault(f"{shard['stem']}-of-{shard['count']}" if shard else name, []).append(name)
    return [Choice(_folder(files[0]), tuple(files)) for files in stems.values()]


def check_shards(repo: str, choice: Choice) -> None:
    """SourceError unless all files of a GGUF model are there."""
    shard = _SHARD.fullmatch(choice.gguf[0])
    if shard is not None and len(choice.gguf) != int(shard["count"]):
        raise SourceError(
            f"{repo} has {len(choice.gguf)} of {int(shard['count'])} files of {shard['stem']}{_GGUF}",
            remedy="another tag or revision may be complete",
        )


def _names(models: Collection[Choice]) -> list[str]:
    """What to call each: by its tag where that says which, else by its file."""
    tags = [_tag(choice.gguf[0]) for choice in models]
    named = [
        tag if tag and tags.count(tag) == 1 else choice.gguf[0]
        for tag, choice in zip(tags, models, strict=True)
    ]
    return named[:_SHOWN]


def _tag(name: str) -> str | None:
    shard = _SHARD.fullmatch(name)
    stem = shard["stem"] if shard else name[: -len(_GGUF)]
    found = _TAG.search(stem)
    return found[1] if found else None


def _is_tagged(choice: Choice, pattern: str) -> bool:
    name = PurePosixPath(choice.gguf[0]).name
    return not _has(name, PASSED_OVER) and re.search(pattern, name, re.IGNORECASE) is not None


def _has(name: str, words: Collection[str]) -> bool:
    return any(word in PurePosixPath(name).name.lower() for word in words)


def _folder(name: str) -> str:
    head, slash, _ = name.rpartition("/")
    return head + slash


def _is_small(name: str) -> bool:
    named = name in (folder.CONFIG, _CARD, MANIFEST, *folder.QUANTIZATION_FILES)
    return named or name.endswith(folder.INDEX_SUFFIX) or folder.is_extra(name)
