"""A user of the loopback Hub: a folder, a login, and the commands given there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from quantkit.cli.main import run
from quantkit.hub import problems
from tests.hubserver import HubServer
from tests.hubserver.client import ALICE, tame

ROOT = Path(__file__).parents[1]
CARD = b"---\nlicense: apache-2.0\nlanguage: [en]\ntags: [tiny]\n---\n# Tiny\n\nA person's words.\n"
LICENSE = b"Do as you like."


@dataclass(frozen=True)
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str


class Workplace:
    """A folder in which a user of the Hub gives commands: alice, unless `env` says otherwise."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        folder.mkdir()

    def run(self, *arguments: str, **env: str) -> Ran:
        """One command line in a process of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_TOKEN": ALICE,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-m", "quantkit", *arguments],
            cwd=self.folder,
            env=kept | settings | env,
            capture_output=True,
            text=True,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def call(self, *arguments: str, **env: str) -> Ran:
        """The same in this process, without the seconds that imports take, and without waits."""
        out, err = io.StringIO(), io.StringIO()
        with self._settings({"HF_TOKEN": ALICE} | env), redirect_stdout(out), redirect_stderr(err):
            code = run(list(arguments))
        return Ran(code, out.getvalue(), err.getvalue())

    def fetch(self, repo: str, cache: Path) -> Path:
        """A repository as the client alone downloads it for somebody without a login."""
        return Path(snapshot_download(repo, endpoint=self.hub.url, cache_dir=cache, token=False))

    def published(self, repos: Sequence[str]) -> dict[str, bytes]:
        """Everything that lies in `repos`, by ``repository/path``."""
        return {f"{id}/{p}": self.hub.repo(id).read(p) for id in repos for p in self.hub.repo(id).files()}

    def traces(self) -> dict[str, bytes]:
        """Everything that commands left in the folder or sent to the Hub, by where it is."""
        found = {
            str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()
        }
        return found | {f"{r.method} {r.path}": r.body for r in self.hub.requests}

    @contextmanager
    def _settings(self, env: dict[str, str]) -> Iterator[None]:
        """What the environment says, also to the client, which reads it once."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(problems, "time", tame(patch))
            patch.setattr(problems, "WAITS", (0.0,) * len(problems.WAITS))
            for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE"))]:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
            patch.setattr(constants, "ENDPOINT", self.hub.url)
            address = f"{self.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
            patch.setattr(constants, "HF_HUB_CACHE", str(self.folder / "hf" / "hub"))
            patch.setattr(constants, "HF_TOKEN_PATH", str(self.folder / "hf" / "token"))
            patch.chdir(self.folder)
            yield


def nothing_private(place: Workplace, done: Ran, repos: Sequence[str]) -> None:
    """The token is used, and stands nowhere; nothing published tells of the machine."""
    assert any(request.headers.get("authorization") == f"Bearer {ALICE}" for request in place.hub.requests)
    published = place.published(repos)
    shown = {"stdout": done.out.encode(), "stderr": done.err.encode()}
    for name, content in {**place.traces(), **published, **shown}.items():
        assert ALICE.encode() not in content, name
    places = [place.folder, ROOT, Path(sys.prefix), Path.home()]
    told = ["/tmp/", *(str(path) for path in places if path != Path("/"))]
    for name, content in published.items():
        assert not [text for text in told if text.encode() in content], name
