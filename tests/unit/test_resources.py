from __future__ import annotations

from pathlib import Path

import pytest

from quantkit import resources
from quantkit.errors import UsageError


def test_an_editable_install_finds_the_folder_of_the_repository() -> None:
    assert (resources.folder("calibration") / "embedded-calib.txt").is_file()


def test_the_package_comes_before_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quantkit"
    monkeypatch.setattr(resources, "_PACKAGE", package)
    (tmp_path / "recipes").mkdir()
    assert resources.folder("recipes") == tmp_path / "recipes"
    (package / "data" / "recipes").mkdir(parents=True)
    assert resources.folder("recipes") == package / "data" / "recipes"


def test_a_missing_folder_says_what_to_reinstall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    with pytest.raises(UsageError) as caught:
        resources.folder("demo-llama")
    assert caught.value.remedy is not None
    assert "quantkit" in caught.value.remedy
