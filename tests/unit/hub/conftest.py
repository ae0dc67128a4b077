"""What tests of downloads share: an empty cache, nobody logged in, and no waits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants


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
