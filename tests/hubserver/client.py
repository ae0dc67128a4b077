"""The real client, as tests use it: without waits, without anybody's token, without a shared cache."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, file_download, snapshot_download
from huggingface_hub.utils import _http

ALICE, BOB, READER = "hf_alicealicealice", "hf_bobbobbobbob", "hf_readonlyreadonly"

# The client's own way to send large files is one that its transport would rather not see.
SENDS_FILES = pytest.mark.filterwarnings("ignore:Use 'content=<.*>' to upload:DeprecationWarning")


class Clock:
    """The module `time`, with sleeps that are only noted."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def tame(monkeypatch: pytest.MonkeyPatch, *, xet: bool = False) -> Clock:
    """The client never waits, uses no token that was not given, and sends large files through Xet or not."""
    clock = Clock()
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return clock


def upload(
    api: HfApi, repo: str, files: Mapping[str, bytes], *, message: str = "Add", **options: Any
) -> CommitInfo:
    """One commit that adds files."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    made: CommitInfo = api.create_commit(repo, operations, commit_message=message, **options)
    return made


def download(endpoint: str, repo: str, cache: Path, **options: Any) -> dict[str, bytes]:
    """All files of a repository but .gitattributes."""
    path = Path(snapshot_download(repo, endpoint=endpoint, cache_dir=cache, **options))
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    found.pop(".gitattributes", None)
    return found
