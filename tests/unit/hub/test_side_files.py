"""Whose licence and card hold for a model: its own, else those of its repository; never a stranger's."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.hub.side_files import card_file, card_of, terms

COMMIT = "0123456789abcdef" * 2 + "01234567"
CARD = "---\nlicense: other\nlicense_name: {0}\nlicense_link: LICENSE\n---\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository in the client's cache, with a sub-folder."""
    path = tmp_path / "models--org--m" / "snapshots" / COMMIT
    (path / "fp8" / "deep").mkdir(parents=True)
    for name in ("LICENSE", "NOTICE.md", "config.json"):
        (path / name).write_text(name)
    (path / "README.md").write_text(CARD.format("top"))
    return path


def names(model: Path) -> list[str]:
    return sorted("/".join(path.parts[path.parts.index(COMMIT) + 1 :]) for path in terms(model))


@pytest.mark.parametrize("folder", ["fp8", "fp8/deep"])
def test_those_of_the_root(root: Path, folder: str) -> None:
    assert names(root / folder) == names(root) == ["LICENSE", "NOTICE.md"]
    assert (
        card_of(root / folder)
        == card_of(root)
        == {"license": "other", "license_name": "top", "license_link": "LICENSE"}
    )


def test_its_own(root: Path) -> None:
    (root / "fp8" / "LICENSE.txt").write_text("own")
    (root / "fp8" / "README.md").write_text(CARD.format("own"))
    assert names(root / "fp8") == ["NOTICE.md", "fp8/LICENSE.txt"]
    assert card_of(root / "fp8")["license_name"] == "own"
    assert card_of(root / "fp8")["license_link"] == "LICENSE"  # which is that of the root
    (root / "fp8" / "LICENSE").write_text("own")
    assert card_of(root / "fp8")["license_link"] == "fp8/LICENSE"


def test_beside_a_gguf_file(root: Path, tmp_path: Path) -> None:
    for path in (root / "m.gguf", root / "fp8" / "m.gguf", tmp_path / "m.gguf"):
        path.write_bytes(b"GGUF")
    assert names(root / "m.gguf") == names(root / "fp8" / "m.gguf") == ["LICENSE", "NOTICE.md"]
    assert card_of(root / "fp8" / "m.gguf")["license_name"] == "top"
    assert card_file(root / "fp8" / "m.gguf") == root / "README.md"
    (tmp_path / "LICENSE").write_text("of something else that was downloaded")
    assert terms(tmp_path / "m.gguf") == []


def test_a_folder_of_the_user_has_what_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "LICENSE").write_text("of the folder around it")
    (tmp_path / "README.md").write_text(CARD.format("around"))
    assert terms(tmp_path / "model") == [] and card_of(tmp_path / "model") == {}
    assert card_file(tmp_path / "model") is None and card_file(tmp_path) == tmp_path / "README.md"
    (tmp_path / "model" / "LICENSE").write_text("own")
    assert terms(tmp_path / "model") == [tmp_path / "model" / "LICENSE"]
