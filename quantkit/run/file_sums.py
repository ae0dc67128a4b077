"""Whether the files of a folder are those that its `quantkit.json` lists: sizes and sha256."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint.folder import QUANTIZATION_FILES, is_extra, is_terms
from quantkit.hub.manifest import CHECKS, MANIFEST, REPO_SCHEMA
from quantkit.run.streams import sha256_file
from quantkit.run.verification import Verification

# written later, or by a person
_APART = frozenset({MANIFEST, CHECKS, "README.md", ".gitattributes"})
_TEMPLATES = "additional_chat_templates"
# weights, what changes them or tells of them, and code; beside the files of tokenizers
_LOADED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "adapter_*", "config.json", *QUANTIZATION_FILES, "*.py"),
    *("params.json", "tekken.json"),
)


def check_sums(report: Verification, file: Path | None) -> None:
    """Look at every byte of what is listed.

    file  the GGUF file that is verified, None: the whole folder is. Of a repository of several targets only
          what belongs to it counts, and what was not downloaded is no problem.
    """
    folder = report.path if report.path.is_dir() else report.path.parent
    manifest = folder / MANIFEST
    if not manifest.is_file():
        report.notes.append("no quantkit.json: the sums of the files are not known")
        return
    try:
        found = json.loads(manifest.read_text("utf-8"))
        listed = {str(n): (int(s["bytes"]), str(s["sha256"])) for n, s in found["files"].items()}
        several = found.get("schema") == REPO_SCHEMA
        asked = _belonging(found, file.name) if several and file is not None else listed.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        report.problems.append(f"`{manifest}` is not what quantkit writes: {error!r}")
        return
    absent, looked = [], 0
    for name in (n for n in listed if n in asked and n not in _APART):
        if not _inside(name, several) or not (folder / name).is_file():
            absent.append(name)
            continue
        looked += 1
        report.problems += _wrong(folder / name, name, *listed[name])
    if several and absent:
        report.notes.append(
            f"{len(absent):,} of {len(absent) + looked:,} files of quantkit.json are not here"
        )
    elif absent:
        report.problems += [f"`{name}` is missing" for name in absent]
    if file is None and not several:
        report.problems += [
            f"`{name}` is not in quantkit.json, and what loads the folder would use it"
            for name in _loaded(folder)
            if name not in listed and name not in _APART
        ]
    report.checks["sums"] = f"{looked:,} files of quantkit.json"


def _loaded(folder: Path) -> list[str]:
    """Files that loaders take up by their names, without being told of them."""
    inside = (f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja"))
    found = (path.name for path in folder.iterdir() if path.is_file() and _is_loaded(path.name))
    return sorted([*inside, *found])


def _is_loaded(name: str) -> bool:
    settings = is_extra(name) and not is_terms(name)
    return settings or any(fnmatchcase(name, pattern) for pattern in _LOADED)


def _belonging(found: Any, name: str) -> set[str]:
    """The files of the targets that a GGUF file is one of; itself where it is in none."""
    groups = [set(map(str, placed["files"])) for placed in found.get("placed", {}).values()]
    groups += [set(map(str, target["files"])) for target in found["targets"].values()]
    return {name}.union(*(group for group in groups if name in group))


def _inside(name: str, nested: bool) -> bool:
    """Whether it can only be a file of the folder, whoever wrote the manifest."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and (nested or path.name == name)


def _wrong(file: Path, name: str, size: int, digest: str) -> list[str]:
    there = file.stat().st_size
    if there != size:
        return [f"`{name}` has {there:,} bytes; {size:,} were written"]
    return (
        []
        if sha256_file(file) == digest
        else [f"`{name}` changed since it was written: its sha256 is another"]
    )
