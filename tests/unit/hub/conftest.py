"""What tests of downloads share: a repository, an empty cache, nobody logged in, and no waits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.hubserver import HubServer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Nobody is logged in, nobody waits; the waits that were asked for are recorded."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    recorded: list[float] = []
    sleep = time.sleep

    def recording_sleep(seconds: float) -> None:
        if seconds >= 0.5:  # shorter ones poll a lock
            recorded.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", recording_sleep)
    return recorded


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with two indexed shards and much that must stay where it is."""
    path = tmp_path / "repo"
    (path / "original").mkdir(parents=True)
    for i, name in enumerate("ab", start=1):
        save_file({name: torch.full((9,), float(i))}, path / f"model-0000{i}-of-00002.safetensors")
    weight_map = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", start=1)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "quantize_config.json", "tokenizer.json", "LICENSE", "README.md"):
        (path / name).write_text(json.dumps({"file": name}))  # equal files are fetched once
    for name in (
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/model.safetensors",
    ):
        (path / name).write_bytes(b"x" * 100)
    return path


@pytest.fixture
def hub(repo: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", repo)
        yield server
