"""What `verify` makes of configurations that are not the source's, of heads, of tokens, of names of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantkit import Eval, Output, Recipe, parse_targets
from quantkit.gguf.container import Value
from quantkit.run import verify as whole
from quantkit.run.config_check import differences
from quantkit.run.convert import convert
from tests.gguf_files import byte_tokenizer, write_gguf
from tests.models import save_tiny

verify = partial(whole.verify, engine=False)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("source"), vocab_size=420))


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(source, tmp_path_factory.mktemp("out"))


def make(source: Path, out: Path) -> Path:
    targets = parse_targets("gptq:w4g32@method=rtn,name=made")
    asked = Recipe(str(source), targets, output=Output(dir=str(out)), eval=Eval(enabled=False))
    convert(replace(asked, engine_check=False))
    return out / "made"


@pytest.fixture
def changed(original: Path, tmp_path: Path) -> Change:
    """A copy with other entries in its config.json, None: without them; a stranger's unless `ours`."""

    def change(ours: bool = False, file: str = "config.json", **entries: Any) -> Path:
        folder = shutil.copytree(original, tmp_path / "made", dirs_exist_ok=True)
        content = json.loads((folder / file).read_text()) | entries
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        if not ours:
            (folder / "quantkit.json").unlink()
        return folder

    return change


def told(lines: list[str]) -> list[str]:
    return [line for line in lines if "sha256" not in line and "bytes; " not in line]


# ------------------------------------------------------------------------------------------------ config.json
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "`rope_parameters.rope_theta` is 1000000.0, that of the source 10000.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
            "`rope_parameters.rope_type` is linear, that of the source default",
        ),
        ({"rms_norm_eps": 0.01}, "`rms_norm_eps` is 0.01, that of the source 1e-06"),
        ({"hidden_act": "gelu"}, "`hidden_act` is gelu, that of the source silu"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, "`head_dim` is 32, that of"),
        ({"max_position_embeddings": 8}, "`max_position_embeddings` is 8, that of the source 128"),
        (
            {"model_type": "mistral", "architectures": None},
            "`model_type` is mistral, that of the source llama",
        ),
    ],
)
def test_what_is_computed(
    ours: bool, entries: dict[str, Any], problem: str, changed: Change, source: Path
) -> None:
    found = verify(changed(ours, **entries), against=str(source))
    assert any(p.startswith(f"config.json: {problem}") for p in found.problems)


@pytest.mark.parametrize(
    "entries",
    [
        {"transformers_version": "4.51.3", "use_cache": False, "_name_or_path": "a/b", "architectures": None},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        {"head_dim": None, "attention_bias": None, "attention_dropout": 0.1, "unsloth_fixed": True},
        {"initializer_range": 0.5, "pretraining_tp": 2, "output_attentions": True},
    ],
)
def test_what_changes_nothing(entries: dict[str, Any], changed: Change, source: Path) -> None:
    found = verify(changed(**entries), against=str(source))
    assert found.sound and found.notes == ["no quantkit.json: the sums of the files are not known"]
    assert found.checks["configuration"] == "compared with the source's"


def test_a_dtype_is_noted(changed: Change, source: Path) -> None:
    found = verify(changed(dtype="float16"), against=str(source))
    assert found.sound and "config.json says float16, that of the source float32" in found.notes


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_another_token_ends_a_text(file: str, changed: Change, source: Path) -> None:
    line = (
        f"{file}: {'`eos_token_id`' if file == 'config.json' else 'eos_token_id'} is 5, that of the source 2"
    )
    assert line in verify(changed(True, file, eos_token_id=5), against=str(source)).problems
    found = verify(changed(False, file, eos_token_id=5), against=str(source))
    assert found.sound and line in found.notes, "other tools may have meant to"
    assert not told(verify(changed(False, file, eos_token_id=[2]), against=str(source)).problems)


def test_lists_and_objects_that_are_nothing() -> None:
    assert not list(differences({"a": [], "b": {}, "c": (1,)}, {"c": 1}))
    assert list(differences({"a": [1, 2]}, {"a": [1, 3]})) == [
        ("`a` is [1, 2], that of the source [1, 3]", False)
    ]
    assert not list(differences({"a": 1.00001}, {"a": 1}, 1e-4))


# -------------------------------------------------------------------------------------------- no source
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_tokens_that_there_are_not(file: str, changed: Change) -> None:
    assert verify(changed(file=file, eos_token_id=[2, 99999])).problems == [
        f"{file}: eos_token_id is 99,999, and there are 420 tokens"
    ]
    assert verify(changed(file=file, pad_token_id=-1)).sound, "older files mean none by it"


def test_a_source_that_names_such_tokens_is_converted(source: Path, tmp_path: Path) -> None:
    like = shutil.copytree(source, tmp_path / "source")
    file = like / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 500}))
    found = verify(make(like, tmp_path / "out"), against=str(like))
    assert (
        found.sound and "generation_config.json: eos_token_id is 500, and there are 420 tokens" in found.notes
    )


def test_a_head_that_is_missing(changed: Change, source: Path, tmp_path: Path) -> None:
    folder = changed()
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = f"`{HEAD}` is missing, and config.json says that nothing stands in for it (tie_word_embeddings)"
    assert verify(folder).problems == [line]
    assert verify(folder, against=str(source)).problems == [line, f"`{HEAD}` of the source is missing"]
    like = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(like / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, like / "model.safetensors", {"format": "pt"})
    found = verify(make(like, tmp_path / "out"), against=str(like))
    assert found.sound and line in found.notes, "as its source, which is converted"


def test_a_head_that_is_not_the_embedding_it_is_said_to_be(changed: Change, source: Path) -> None:
    folder = changed(tie_word_embeddings=True)
    line = f"config.json says that `{HEAD}` is `{EMBED}` (tie_word_embeddings), and the two differ: engines "
    assert verify(folder).problems == [f"{line}that believe it drop one"]
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBED].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify(folder).sound


@pytest.mark.parametrize(
    ("name", "sound"),
    [("weights", False), ("model-00001-of-00001", False), ("gptq_model-4bit-32g", True)],
)
def test_names_that_transformers_does_not_look_for(name: str, sound: bool, changed: Change) -> None:
    folder = changed()
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    found = verify(folder)
    assert found.sound is sound
    line = (
        f"Transformers does not find `{name}.safetensors`: it looks for `model.safetensors` or "
        "`model.safetensors.index.json`"
    )
    assert line in (found.notes if sound else found.problems)
    stated = json.loads((folder / "config.json").read_text()) | {
        "transformers_weights": f"{name}.safetensors"
    }
    (folder / "config.json").write_text(json.dumps(stated))
    assert verify(folder).sound


# ------------------------------------------------------------------------------------------------------- GGUF
@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"llama.rope.freq_base": 1e6},
            "`rope_parameters.rope_theta` is 1000000.0, that of the source 10000.0",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": 0.01},
            "`rms_norm_eps` is 0.01, that of the source 1e-06",
        ),
        ({"llama.context_length": 8}, "`max_position_embeddings` is 8, that of the source 128"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "`rope_parameters.rope_type` is linear, that of the source default",
        ),
        ({"llama.rope.dimension_count": 8}, "`llama.rope.dimension_count` is 8, that of the source 16"),
    ],
)
def test_metadata_of_a_file(keys: dict[str, Value], problem: str, source: Path, tmp_path: Path) -> None:
    assert verify(write_gguf(source, tmp_path / "plain.gguf", "q8_0"), against=str(source)).sound
    found = verify(write_gguf(source, tmp_path / "one.gguf", "q8_0", keys), against=str(source))
    assert f"metadata: {problem}" in found.problems


def test_tokens_of_a_file(source: Path, tmp_path: Path) -> None:
    eos = "tokenizer.ggml.eos_token_id"
    file = write_gguf(source, tmp_path / "one.gguf", "q8_0", {eos: 5})
    assert f"metadata: {eos} is 5, and would be 1 for the source" in verify(file, against=str(source)).notes
    other = write_gguf(source, tmp_path / "two.gguf", "q8_0", {eos: 500, "llama.vocab_size": 99})
    found = verify(other)
    assert f"{eos} is 500, and there are 420 tokens" in found.problems
    assert "llama.vocab_size is 99, and `token_embd.weight` has 420 rows" in found.problems
