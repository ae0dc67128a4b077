"""`publish.json` beside the targets: what was published where, as far as a push got.

It is written after each step, with what other pushes wrote since. Only the number of a pull request is read
from it: what is there, the repository itself says. So nothing fails for want of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.atomic import write_text
from quantkit.errors import RunError
from quantkit.progress import Progress

SCHEMA = "quantkit/publish/1"
RECORD = "publish.json"
_CLIENTS = ("huggingface_hub", "hf_xet")


@dataclass(slots=True)
class Entry:
    """One branch of one repository; `step` is the last one that was done."""

    endpoint: str
    repo: str
    branch: str
    step: str = "begun"
    pull_request: int | None = None
    weights_commit: str | None = None
    commit: str | None = None
    url: str | None = None
    tag: str | None = None
    visibility: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class Record:
    """The file, or (path None) nothing. One that is not ours is left as it is."""

    def __init__(self, path: Path | None, progress: Progress) -> None:
        self._path = path
        self._progress = progress
        self._entries: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        """What is noted there by now, in place of what was known of it."""
        if self._path is None:
            return
        try:
            self._entries = _entries(self._path)
        except OSError as error:
            self._do_without(f"`{self._path}` cannot be read: {error.strerror}")
        except (ValueError, KeyError, TypeError, RecursionError):
            self._do_without(f"`{self._path}` is not what quantkit push writes")

    def _do_without(self, why: str) -> None:
        self._path = None
        self._progress.warn(f"{why}; it is left as it is, and not needed: where this push gets is not noted")

    def pull_request(self, endpoint: str, repo: str, branch: str) -> int | None:
        """The number of the pull request that an earlier push opened."""
        number = self._entries.get((endpoint, repo, branch), {}).get("pull_request")
        return number if isinstance(number, int) else None

    def keep(self, entry: Entry) -> None:
        """Write how far a publication got; what others noted in the meantime stays."""
        if self._path is None:
            return
        with _alone_in(self._path.parent):
            self._read()
            self._entries[entry.endpoint, entry.repo, entry.branch] = asdict(entry)
            for told in self._entries.values():  # who may see it is the same for every branch
                if (told["endpoint"], told["repo"]) == (entry.endpoint, entry.repo):
                    told["visibility"] = entry.visibility or told.get("visibility")
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        document = {
            "schema": SCHEMA,
            "versions": {"quantkit": __version__, **_versions()},
            "publications": list(self._entries.values()),
        }
        try:
            write_text(self._path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        except RunError as error:
            self._do_without(error.message)
        except (OSError, RecursionError) as error:
            self._do_without(f"`{self._path}` cannot be written: {error}")


def _entries(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    if found["schema"] != SCHEMA:
        raise ValueError(found["schema"])
    return {(told["endpoint"], told["repo"], told["branch"]): told for told in found["publications"]}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other push writes there meanwhile; where a folder cannot be locked, it is done without."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _versions() -> dict[str, str]:
    found = {}
    for name in _CLIENTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
