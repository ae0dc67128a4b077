"""Names of files, and what they say of where a model comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.gguf.container import Typed
from quantkit.gguf.naming import Size, file_stem, general

gguf = pytest.importorskip("gguf")

EIGHT_B = Size(8_190_735_360)


@pytest.mark.parametrize(
    "model, expected",
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B-Q4_K_M"),
        ("Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.2-Q4_K_M"),
        ("out/my model (v2)/", "my-model-v2-Q4_K_M"),
        ("Qwen3-8B-F16", "Qwen3-8B-Q4_K_M"),
        ("Qwen3-8B-IQ2_XXS.gguf", "Qwen3-8B-Q4_K_M"),
        ("Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M"),
        ("model-q4", "model-q4-Q4_K_M"),
        ("日本語", "model-Q4_K_M"),
        ("", "model-Q4_K_M"),
    ],
)
def test_file_stems(model: str, expected: str) -> None:
    assert file_stem(model, "q4_k_m") == expected


@pytest.mark.parametrize(
    "model, expected",
    [
        ("foo-mtp-1B", "foo-mtp.1B-Q8_0"),
        ("foo-MTP", "foo-MTP.Q8_0"),
        ("eagle3-8b", "eagle3.8b-Q8_0"),
        ("an-imatrix-model", "an-i-matrix-model-Q8_0"),
        ("mmproj-test", "mm-proj-test-Q8_0"),
    ],
)
def test_no_model_is_called_like_a_side_file(model: str, expected: str) -> None:
    assert file_stem(model, "q8_0") == expected


@pytest.mark.parametrize(
    "size, expected",
    [
        (EIGHT_B, "8.2B"),
        (Size(134_515_008), "135M"),
        (Size(596_049_920), "596M"),
        (Size(46_702_792_704, 45_097_156_608, 8), "8x7.2B"),
        (Size(30_532_122_624, 28_991_029_248, 128), "128x1.8B"),
    ],
)
def test_size_labels(size: Size, expected: str) -> None:
    assert size.label == expected


def write(folder: Path, card: str = "", generation: Any = None) -> Path:
    if card:
        (folder / "README.md").write_text(card, "utf-8")
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text, "utf-8")
    return folder


def read(folder: Path, model: str = "model", size: Size = EIGHT_B, **more: Any) -> dict[str, Any]:
    path = folder / "README.md"
    found = general(model, size, 15, folder, card=path if path.is_file() else None, **more)
    return {key.removeprefix("general."): value for key, value in found.items()}


BARE = {"type": "model", "name": "Model", "size_label": "8.2B", "file_type": 15, "quantization_version": 2}


def test_a_model_of_which_little_is_known(tmp_path: Path) -> None:
    assert read(tmp_path) == BARE


def test_parts_of_a_name(tmp_path: Path) -> None:
    found = read(tmp_path, "Llama-3.1-8B-Instruct-v2")
    assert found["name"] == "Llama 3.1 8B Instruct v2"
    assert (found["basename"], found["size_label"]) == ("Llama-3.1", "8B")
    assert (found["finetune"], found["version"]) == ("Instruct", "v2")


def test_a_size_in_a_name_that_cannot_be_is_not_taken(tmp_path: Path) -> None:
    found = read(tmp_path, "Llama-3-8B", Size(3_000_000))
    assert found["size_label"] == "3.0M"


def test_a_repository_is_the_origin(tmp_path: Path) -> None:
    found = read(tmp_path, "a-local-folder", repository="Qwen/Qwen3-8B")
    assert found["name"] == "Qwen3 8B" and found["organization"] == "Qwen"
    assert found["source.repo_url"] == "https://huggingface.co/Qwen/Qwen3-8B"
    assert {key: found[key] for key in found if key.startswith("base_model")} == {
        "base_model.count": 1,
        "base_model.0.name": "Qwen3 8B",
        "base_model.0.organization": "Qwen",
        "base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-8B",
    }


CARD = """---
license: other
license_name: llama3.1
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags: [chat, text-generation, 2024-01-01]
base_model:
- meta-llama/Llama-3.1-8B
- https://huggingface.co/org/other
---
# A model
"""


def test_the_card(tmp_path: Path) -> None:
    found = read(write(tmp_path, CARD))
    assert {key: found[key] for key in ("license", "license.name", "license.link")} == {
        "license": "other",
        "license.name": "llama3.1",
        "license.link": "LICENSE",
    }
    assert found["languages"] == ["en", "no"] and found["tags"] == ["chat", "text-generation", "2024-01-01"]
    # what the source was made from is not what the file was made from
    assert not [key for key in found if "base_model" in key or "source" in key]
    of_hub = read(tmp_path, repository="org/model")
    assert of_hub["base_model.count"] == 1 and of_hub["base_model.0.name"] == "Model"
    assert found.keys() < of_hub.keys()


def test_values_that_are_not_valid_stay_there(tmp_path: Path) -> None:
    card = (
        '---\npipeline_tag: <script>\nlanguage: [<b>, en]\ntags: &t ["a\\0b", ok]\nlicense: mit\nx: *t\n---\n'
    )
    assert read(write(tmp_path, card)) == {**BARE, "license": "mit", "languages": ["en"], "tags": ["ok"]}


@pytest.mark.parametrize(
    "path",
    ["/home/someone/models/x", "~/models", "./checkpoints/last", "..\\x", "C:\\models\\x", "file:///x"],
)
def test_paths_in_a_card_stay_there(path: str, tmp_path: Path) -> None:
    tags = f"tags: ['base_model:{path}', '{path}', ok]"
    card = f"---\nbase_model: {path}\n{tags}\nlicense_link: '../{path}'\n---\n"
    assert read(write(tmp_path, card)) == {**BARE, "tags": ["ok"]}


@pytest.mark.parametrize(
    "card",
    [
        "# no front matter\n---\nlicense: mit\n---\n",
        "---\nlicense: [mit\n---\n",
        "---\n- mit\n---\n",
        "---\nlicense: {a: b}\ntags: [[x]]\n---\n",
        "---\nlicense: mit\n",
        f"---\nlicense: {'[' * 5000}\n---\n",
    ],
)
def test_cards_that_say_nothing(card: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, card)) == BARE


def test_settings_for_sampling(tmp_path: Path) -> None:
    settings = {
        "do_sample": True,
        "temperature": 1,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": None,
        "eos_token_id": 2,
    }
    assert read(write(tmp_path, generation=settings)) == {
        **BARE,
        "sampling.temp": 1.0,
        "sampling.top_k": Typed(20, "int32"),
        "sampling.top_p": 0.95,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6},
        {"temperature": "hot", "top_k": True},
        '{"top_k": NaN, "top_p": Infinity}',
        {"top_k": 1 << 40},
        "{",
        "[]",
    ],
)
def test_settings_that_say_nothing(settings: Any, tmp_path: Path) -> None:
    assert read(write(tmp_path, generation=settings)) == BARE
