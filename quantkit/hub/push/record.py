"""`publish.json` beside the targets: what was published where, as far as a push got.

It is written after each step. Only the number of a pull request is read from it: what is there, the
repository itself says.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.atomic import write_text
from quantkit.errors import UsageError

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
    """The file, or (path None) nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[tuple[str, str, str], dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text("utf-8"))
            if found["schema"] != SCHEMA:
                raise ValueError(found["schema"])
            for told in found["publications"]:
                self._entries[told["endpoint"], told["repo"], told["branch"]] = told
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"`{path}` is not what quantkit push writes", remedy="move it away, it is not needed"
            ) from error

    def pull_request(self, endpoint: str, repo: str, branch: str) -> int | None:
        """The number of the pull request that an earlier push opened."""
        number = self._entries.get((endpoint, repo, branch), {}).get("pull_request")
        return number if isinstance(number, int) else None

    def keep(self, entry: Entry) -> None:
        """Write how far a publication got."""
        self._entries[entry.endpoint, entry.repo, entry.branch] = asdict(entry)
        if self._path is None:
            return
        document = {
            "schema": SCHEMA,
            "versions": {"quantkit": __version__, **_versions()},
            "publications": list(self._entries.values()),
        }
        write_text(self._path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in _CLIENTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
