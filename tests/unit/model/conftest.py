"""Tiny models are saved once per session; a test that edits files saves its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import save_tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → folder with its tiny checkpoint, not to be changed."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return folder
