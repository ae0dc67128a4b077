from __future__ import annotations

import pytest

from tests.fake_plugins import install


@pytest.fixture(autouse=True)
def fake_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes see the stand-ins, not the real methods and formats."""
    install(monkeypatch)
