"""`Page`: everything that the card of one branch of a repository is written from."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from quantkit.errors import UsageError
from quantkit.gguf.files import SHARD
from quantkit.hub.card.own_text import Notes
from quantkit.hub.manifest import Check, FileSum, Manifest, Origin

if TYPE_CHECKING:
    from quantkit.hub.licences import Licence

MAIN = "main"
PUBLIC = "https://huggingface.co"
# An importance matrix and the projector of an image model are GGUF files beside the weights.
_WEIGHTS = re.compile(r"(^|/)(?!mmproj)(?![^/]*imatrix)[^/]*\.(gguf|safetensors)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variant:
    """One target in the repository.

    files   paths in the repository of its weights, the one to load first; side files are left out
    branch  where it lies, None: in main
    """

    manifest: Manifest
    checks: tuple[Check, ...]
    files: tuple[str, ...]
    branch: str | None = None

    def __post_init__(self) -> None:
        weights = tuple(sorted(path for path in self.files if _WEIGHTS.search(path)))
        object.__setattr__(self, "files", weights)

    @property
    def gguf(self) -> bool:
        return self.manifest.format == "gguf"

    @property
    def tag(self) -> str | None:
        """``Q4_K_M``, by which llama.cpp finds the file in a repository; None: it is not called so."""
        tag = self.manifest.scheme.upper()
        named = re.search(rf"(^|[-.]){re.escape(tag)}[-.]", self.file_name, re.IGNORECASE)
        return tag if self.gguf and named else None

    @property
    def file_name(self) -> str:
        return self.files[0].rpartition("/")[2] if self.files else ""

    @property
    def stem(self) -> str:
        """The file's name without its ending and without ``-00001-of-00003``."""
        shard = SHARD.fullmatch(self.file_name)
        return self.file_name.rpartition(".")[0] if shard is None else shard["stem"]

    def sums(self) -> tuple[tuple[str, FileSum], ...]:
        """(path in the repository, sum) of the weights; the manifest knows them by name."""
        known = self.manifest.files
        named = ((path, path.rpartition("/")[2]) for path in self.files)
        return tuple((path, known[name]) for path, name in named if name in known)


@dataclass(frozen=True, slots=True)
class Page:
    """The card of one branch.

    repo       ``name/model``
    variants   what lies in this branch; none in the main branch of a repository of branches
    notes      Markdown of the publisher's own; an empty text shows nothing, and the place stays
    changes    lines of the history, newest first
    branch     the branch that this card is for, None: main
    siblings   what lies in other branches; main lists it, the card of a branch points to main
    template   an example that went through the chat template
    """

    repo: str
    endpoint: str
    variants: tuple[Variant, ...]
    publisher: str | None
    licence: Licence
    notes: Notes | None = None
    changes: tuple[str, ...] = ()
    branch: str | None = None
    siblings: tuple[Variant, ...] = ()
    template: str | None = None

    def __post_init__(self) -> None:
        if self.branch == MAIN:
            object.__setattr__(self, "branch", None)
        here = tuple(v if v.branch is not None else replace(v, branch=self.branch) for v in self.variants)
        object.__setattr__(self, "variants", here)
        if not self.listed:
            raise UsageError(
                f"the card of {self.repo} has nothing to describe", remedy="give it at least one target"
            )
        sources = {v.manifest.source.fingerprint: _called(v.manifest.source) for v in self.listed}
        if len(sources) > 1:
            raise UsageError(
                f"{self.repo} would hold quantizations of {len(sources)} sources "
                f"({', '.join(sorted(sources.values()))}), and a card describes one",
                remedy="publish them to a repository each, or all of one source",
            )

    @property
    def of_branch(self) -> bool:
        """True for the short card of one branch among others."""
        return self.branch is not None and bool(self.siblings)

    @property
    def listed(self) -> tuple[Variant, ...]:
        """What the card describes, the smallest first: of main everything, of a branch what lies there."""
        all_of_them = self.variants if self.of_branch else (*self.variants, *self.siblings)
        return tuple(sorted(all_of_them, key=lambda v: (v.manifest.size_bytes, v.manifest.name)))

    @property
    def source(self) -> Origin:
        return self.listed[0].manifest.source

    @property
    def public(self) -> bool:
        """True when it is for the Hub itself, which Ollama and LM Studio ask and no other."""
        return self.endpoint.rstrip("/") == PUBLIC

    def labels(self) -> tuple[str, ...]:
        """What each of `listed` is called in tables: short, and no two alike."""
        shortest = [_names(v)[0] for v in self.listed]
        count = Counter(shortest)
        return tuple(
            name if count[name] == 1 else _names(v)[-1] for v, name in zip(self.listed, shortest, strict=True)
        )

    def url(self, *parts: str) -> str:
        """Address under the endpoint; `parts` are paths or names."""
        return "/".join([self.endpoint.rstrip("/"), *(quote(part, safe="/") for part in parts)])

    def address(self, variant: Variant) -> str:
        """Where a reader finds it: a file, a folder of parts, or a branch."""
        branch = variant.branch or MAIN
        if variant.gguf and len(variant.files) == 1:
            return self.url(self.repo, "blob", branch, variant.files[0])
        folder = variant.files[0].rpartition("/")[0] if variant.gguf and variant.files else ""
        return self.url(self.repo, "tree", branch, *([folder] if folder else []))


def _called(origin: Origin) -> str:
    return origin.id if origin.revision is None else f"{origin.id}@{origin.revision[:8]}"


def _names(variant: Variant) -> tuple[str, ...]:
    """From the shortest to the one that differs from all others."""
    if variant.branch is not None and not variant.gguf:
        return (variant.branch,)
    if variant.gguf:
        return (variant.tag or variant.stem, variant.stem if variant.branch is None else variant.branch)
    return (variant.manifest.scheme, variant.manifest.name)
