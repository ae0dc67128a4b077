"""`push` as tests call it: a stub for a card, a log of all that is said, no waits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.hub.client import connect
from quantkit.hub.manifest import Manifest
from quantkit.hub.push.publication import Publication, publications
from quantkit.hub.push.published import PICTURE
from quantkit.hub.push.push import Pushed, push
from quantkit.hub.push.remote import RemoteState
from quantkit.hub.push.session import Options
from quantkit.progress import Silent
from quantkit.recipe.spec import Publish
from tests.hubserver import HubServer
from tests.hubserver.client import ALICE

FRONT = "license: apache-2.0\nlibrary_name: gguf\ntags: [gguf]\nquantkit: {version: 1}\n"
Targets = Sequence[tuple[Path, Manifest]]


def card(publication: Publication, remote: RemoteState) -> Mapping[str, bytes]:
    """Names what is there, and keeps what a person wrote below a line."""
    names = [each.manifest.name for each in (*publication.placed, *remote.earlier)]
    own = (remote.readme or "").partition("<!-- own -->\n")[2]
    lines = [f"- {name}" for name in sorted(names)] + list(remote.changes)
    text = f"---\n{FRONT}---\n{publication.name}\n" + "\n".join(lines) + "\n<!-- own -->\n" + own
    return {"README.md": text.encode(), PICTURE: b"\x89PNG\0" + ",".join(sorted(names)).encode()}


@dataclass
class Said(Silent):
    """Everything that was told."""

    lines: list[str] = field(default_factory=list)

    def step(self, name: str, detail: str = "") -> None:
        self.lines.append(f"{name} {detail}")

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


@dataclass
class Pusher:
    """Pushes `targets` to a server, again and again."""

    hub: HubServer
    targets: Targets
    how: Publish
    record: Path
    said: Said = field(default_factory=Said)
    slept: list[float] = field(default_factory=list)

    def __call__(self, *, token: str | None = ALICE, how: Publish | None = None, **options: Any) -> Pushed:
        made = publications(self.targets, how or self.how)
        return push(
            made,
            connect(self.hub.url, token),
            card=options.pop("card", card),
            options=Options(sleep=self.slept.append, today="2026-01-02", **options),
            progress=self.said,
            record=self.record,
        )


def sound(hub: HubServer, repo: str, targets: Targets, revision: str = "main") -> None:
    """Every file of `targets` is there, byte for byte, and what describes them is too."""
    found = hub.repo(repo).files(revision)
    for _, made in targets:
        for name, told in made.files.items():
            path = next(path for path in found if path == name or path.endswith(f"/{name}"))
            assert hashlib.sha256(hub.repo(repo).read(path, revision)).hexdigest() == told.sha256
    for path in ("README.md", "quantkit.json", "SHA256SUMS", PICTURE):
        assert path in found
    for line in hub.repo(repo).read("SHA256SUMS", revision).decode().splitlines():
        digest, _, path = line.partition("  ")
        assert hashlib.sha256(hub.repo(repo).read(path, revision)).hexdigest() == digest


def nothing_false(hub: HubServer, repo: str, revision: str = "main") -> None:
    """No card describes what is not there; what is not done is not public."""
    if not hub.has(repo):
        return
    found = hub.repo(repo)
    if revision not in found.refs and f"refs/heads/{revision}" not in found.refs:
        return
    files = found.files(revision)
    if "README.md" not in files:
        assert found.private
        return
    if "quantkit.json" not in files:
        assert b"- gguf-" not in found.read("README.md", revision)
        return
    for told in json.loads(found.read("quantkit.json", revision)).get("placed", {}).values():
        there = files if told["branch"] is None else found.files(told["branch"])
        assert set(told["files"]) <= set(there)
    if "SHA256SUMS" not in files:
        assert not any(path.endswith(".gguf") for path in files)
        return
    for line in found.read("SHA256SUMS", revision).decode().splitlines():
        digest, _, path = line.partition("  ")
        assert files[path].sha256 in (None, digest)
        assert hashlib.sha256(found.read(path, revision)).hexdigest() == digest


def no_token(hub: HubServer, pusher: Pusher, *texts: str) -> None:
    """The token is in the header that it belongs to, and nowhere else."""
    record = pusher.record.read_text() if pusher.record.exists() else ""
    for text in (*texts, *pusher.said.lines, record, *hub.log):
        assert "hf_alice" not in text
    assert not any(b"hf_alice" in request.body for request in hub.requests)
    places = {name for r in hub.requests for name, value in r.headers.items() if "hf_alice" in value}
    assert places <= {"authorization"}
