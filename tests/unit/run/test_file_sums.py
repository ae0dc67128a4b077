"""Sums of files, and files that nobody listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.run.file_sums import check_sums
from quantkit.run.streams import sha256_file
from quantkit.run.verification import Verification


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A result of one target."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in tmp_path.iterdir()
    }
    (tmp_path / "quantkit.json").write_text(json.dumps({"schema": "quantkit/target/1", "files": files}))
    return tmp_path


def problems(folder: Path, file: Path | None = None) -> list[str]:
    report = Verification(folder)
    check_sums(report, file)
    return report.problems


@pytest.mark.parametrize(
    "name",
    [
        *("model2.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "weights.pt"),
        *("adapter_config.json", "adapter_model.safetensors", "modeling_llama.py", "quantize_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    ],
)
def test_what_loaders_take_up_is_listed(name: str, folder: Path) -> None:
    assert problems(folder) == []
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert problems(folder) == [f"`{name}` is not in quantkit.json, and what loads the folder would use it"]


def test_what_no_loader_knows_may_be_added(folder: Path) -> None:
    for name in ("README.md", ".gitattributes", "checks.json", "LICENSE", "notes.txt", "logo.png", "NOTICE"):
        (folder / name).write_text("mine")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "model.safetensors").write_text("")
    assert problems(folder) == []


def test_a_repository_of_several_targets_holds_more(folder: Path) -> None:
    manifest = json.loads((folder / "quantkit.json").read_text())
    (folder / "quantkit.json").write_text(
        json.dumps({**manifest, "schema": "quantkit/repo/1", "targets": {}})
    )
    (folder / "tokenizer.json").write_text("{}")
    assert problems(folder) == []
