"""GGUF files read as the checkpoints they were made from: names, values, configuration, tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf import container
from quantkit.gguf.architectures import Model
from quantkit.gguf.container import library, open_file
from quantkit.gguf.vocabulary.identity import same_ids
from quantkit.model.build import build_graph
from quantkit.run.gguf_source import find_gguf, open_gguf, tokenizer_folder
from quantkit.run.gguf_source.keys import Keys
from quantkit.run.gguf_source.opening import described
from quantkit.run.gguf_source.rope import llama3_divisors, rope_parameters
from tests.gguf_files import LLAMA3, byte_tokenizer, piece_tokenizer, rewrite, write_gguf
from tests.models import FAMILIES, save_tiny, tiny_tokens

pytest.importorskip("gguf")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {"query_pre_attn_scalar": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [2 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 64,
}
FALCON = {
    **{key: value for key, value in FAMILIES["llama"].items() if key != "num_key_value_heads"},
    **{"alibi": False, "bias": False, "parallel_attn": True, "ffn_hidden_size": 96},
}
# family, changes to its tiny model
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, llama3": ("llama", {"head_dim": 128, "rope_parameters": LLAMA_3_1}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {}),
    "phi3, longrope": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
EXTRA = {"smollm3": FAMILIES["llama"], "granite": FAMILIES["llama"], "falcon": FALCON}


def saved(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family, changes = CASES[name]
    monkeypatch.setattr("tests.models.FAMILIES", {**FAMILIES, **EXTRA})
    return save_tiny(family, folder, **changes)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_comes_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(name, tmp_path / "source", monkeypatch)
    original = Checkpoint.open(source)
    view = open_gguf(write_gguf(source, tmp_path / "x.gguf"))
    missing = original.tensors.keys() - view.tensors.keys()
    assert view.tensors.keys() <= original.tensors.keys() and missing <= {"lm_head.weight"}
    # 1 + w is what the file holds of Gemma's norms
    close = {"atol": 1e-7, "rtol": 0} if "gemma" in name else {"atol": 0, "rtol": 0}
    for tensor in view.tensors:
        torch.testing.assert_close(view.read(tensor), original.read(tensor), **close)
    assert len(build_graph(view).blocks) == len(build_graph(original).blocks)
    assert Model.of(view.config).context == Model.of(original.config).context
    auto: Any = AutoModelForCausalLM
    reference = auto.from_pretrained(source).eval()
    config = CONFIG_MAPPING[str(view.config["model_type"])].from_dict(dict(view.config))
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_tokens()).logits, reference(tiny_tokens()).logits)


def test_values_are_those_of_the_gguf_package_in_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    path = write_gguf(source, tmp_path / "x.gguf", "q4_1")
    view, gguf = open_gguf(path), library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    name = "model.layers.1.self_attn.k_proj.weight"
    stored = tensors["blk.1.attn_k.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    # heads of 16: neighbours there are halves here
    expected = values.view(2, 8, 2, 64).transpose(1, 2).reshape(32, 64)
    assert torch.equal(view.read(name), expected) and view.tensors[name].dtype == "F32"
    assert torch.equal(view.read(name, rows=slice(3, 9)), expected[3:9])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(view.read(down, rows=slice(5, 7)), view.read(down)[5:7])
    assert view.types == ("Q4_1",) and view.dtype == "float16"
    assert view.size_bytes == sum(t.nbytes for t in container.open_file(path).tensors.values())


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", norm_topk_prob=True)
    view = open_gguf(write_gguf(source, tmp_path / "x.gguf", "q8_0"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    original = Checkpoint.open(source).read(name)
    assert 0 < float((view.read(name) - original).abs().max()) < 0.01
    assert torch.equal(view.read(name, rows=slice(1, 3)), view.read(name)[1:3])


def test_with_the_names_of_a_source(tmp_path: Path) -> None:
    """A source may be named otherwise than what Transformers saves: one tensor for all experts."""
    from safetensors.torch import save_file

    from tests.models import tiny_model

    model = tiny_model("qwen3_moe", norm_topk_prob=True)
    model.save_pretrained(tmp_path / "source")
    path = write_gguf(tmp_path / "source", tmp_path / "x.gguf")
    save_file(model.state_dict(), tmp_path / "source" / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(tmp_path / "source")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    view = open_gguf(path, like=source)
    assert torch.equal(view.read(name), source.read(name)) and view.tensors[name].shape == (4, 64, 64)


def test_floats_keep_their_dtype(tmp_path: Path) -> None:
    source = save_tiny("qwen2", tmp_path / "source")
    view = open_gguf(write_gguf(source, tmp_path / "x.gguf", "bf16"))
    assert view.dtype == "bfloat16" and view.config["dtype"] == "bfloat16" and view.types == ()
    assert view.read("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    assert view.read("model.norm.weight").dtype == torch.float32


def test_biases_that_a_file_leaves_out_are_zero(tmp_path: Path) -> None:
    source = save_tiny("qwen2", tmp_path / "source")
    path = write_gguf(source, tmp_path / "x.gguf")
    without = rewrite(path, tmp_path / "y.gguf", drop=("blk.0.attn_q.bias",))
    bias = open_gguf(without).read("model.layers.0.self_attn.q_proj.bias")
    assert bias.shape == (64,) and not bias.any()


def test_tensors_that_nothing_uses_are_an_error(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", attention_bias=True)
    path = write_gguf(source, tmp_path / "x.gguf")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(SourceError, match=r"nothing uses 8 of its tensors: blk\.0\.attn_k\.bias, "):
        open_gguf(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tokenizer, of a model in the folder `source` beside it."""
    folder = tmp_path_factory.mktemp("llama")
    source = save_tiny("llama", folder / "source", vocab_size=420)
    byte_tokenizer(source)
    return write_gguf(source, folder / "x.gguf", "q8_0")


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"general.architecture": "mamba"}, UnsupportedError, "architecture 'mamba', which quantkit cannot"),
        ({"llama.attention.clamp": 8.0}, UnsupportedError, r"does not know: llama.attention.clamp = 8.0"),
        ({"llama.attention.head_count": [4, 2]}, UnsupportedError, r"differs between blocks: \[4, 2\]"),
        ({"llama.block_count": None}, SourceError, "does not say llama.block_count"),
        ({"llama.block_count": "two"}, SourceError, "llama.block_count is 'two', not a count"),
        ({"llama.block_count": 3}, SourceError, "it lacks 9 tensors: `blk.2"),
        ({"llama.feed_forward_length": 64}, SourceError, r"`blk.0.ffn_gate.weight` is \(96, 64\), not"),
        ({"llama.rope.scaling.type": "spiral"}, UnsupportedError, "scaled by 'spiral'"),
        ({"llama.rope.dimension_count": 8}, UnsupportedError, "this model rotates all of them"),
    ],
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], error: type[Exception], why: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=why):
        open_gguf(rewrite(llama, tmp_path / "y.gguf", changes))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_no_model(tmp_path: Path) -> None:
    container.write(tmp_path / "x.gguf", "", {"general.type": "imatrix"}, [], [])
    with pytest.raises(SourceError, match="does not say its architecture"):
        open_gguf(tmp_path / "x.gguf")


def test_a_config_beside_the_file_wins_but_the_tensors_say_whether_the_head_is_tied(
    llama: Path, tmp_path: Path
) -> None:
    config = json.loads((llama.parent / "source" / "config.json").read_text())
    shutil.copy(llama, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "mark": 7}))
    view = open_gguf(tmp_path / "x.gguf")
    assert view.config["mark"] == 7 and view.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in view.tensors


def test_divisors_of_rotary_frequencies_are_recognised() -> None:
    keys = Keys("x", "llama", {"llama.rope.freq_base": 500000.0})
    odd = {**LLAMA_3_1, "factor": 32.0, "original_max_position_embeddings": 5000, "high_freq_factor": 3.0}
    for scaling in (LLAMA_3_1, odd):
        divisors = llama3_divisors(500000.0, 64, scaling).float()
        assert rope_parameters(keys, {"rope_freqs.weight": divisors}) == pytest.approx(scaling)
    assert float(divisors[0]) == 1 and float(divisors[-1]) == 32
    assert rope_parameters(keys, {"rope_freqs.weight": torch.ones(64)})["rope_type"] == "default"
    with pytest.raises(UnsupportedError, match="which no known scaling does"):
        rope_parameters(keys, {"rope_freqs.weight": torch.linspace(1, 9, 64)})


def test_floats_of_32_bits_read_as_they_were_written() -> None:
    stored = torch.tensor([1e-5, 1e-6, 0.1, 1 / 3]).tolist()
    keys = Keys("x", "a", {f"a.{n}": value for n, value in enumerate(stored)})
    assert [keys.number(str(n)) for n in range(3)] == [1e-5, 1e-6, 0.1]
    assert torch.tensor(keys.number("3")) == torch.tensor(1 / 3)


@pytest.mark.parametrize(
    ("pattern", "options"), [(LLAMA3, {}), (LLAMA3, {"ignore_merges": True}), (GPT2, {})], ids=str
)
def test_byte_level_tokens_are_those_of_the_source(
    pattern: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "source", vocab_size=420)
    byte_tokenizer(source, pattern, **options)
    _compare_tokens(source, tmp_path)


def test_sentencepiece_tokens_are_those_of_the_source(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", vocab_size=420)
    piece_tokenizer(source)
    _compare_tokens(source, tmp_path)


def _compare_tokens(source: Path, tmp_path: Path) -> None:
    view = open_gguf(write_gguf(source, tmp_path / "x.gguf", keys={"tokenizer.ggml.add_bos_token": True}))
    ours, theirs = load_tokenizer(tokenizer_folder(view)), AutoTokenizer.from_pretrained(source)
    assert same_ids(theirs, lambda text: ours(text, add_special_tokens=False)["input_ids"]) == []
    assert ours("a")["input_ids"] == [
        theirs.bos_token_id,
        *theirs("a", add_special_tokens=False)["input_ids"],
    ]
    assert ours.chat_template == theirs.chat_template and ours.eos_token_id == theirs.eos_token_id
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in view.extras()}


def test_a_chat_template_keeps_its_ends_of_lines(llama: Path, tmp_path: Path) -> None:
    template = "a\r\r\nb\rc\r\n{{ messages[0].content }}\n"
    view = open_gguf(rewrite(llama, tmp_path / "y.gguf", {"tokenizer.chat_template": template}))
    assert load_tokenizer(tokenizer_folder(view)).chat_template == template


def test_the_folder_of_a_tokenizer_goes_with_the_view(llama: Path) -> None:
    view = open_gguf(llama)
    folder = tokenizer_folder(view)
    assert folder == tokenizer_folder(view) and (folder / "tokenizer.json").is_file()
    del view
    assert not folder.exists()


def test_a_tokenizer_beside_the_file_is_used_when_it_has_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path)
    byte_tokenizer(tmp_path)
    assert tokenizer_folder(open_gguf(tmp_path / "x.gguf")) == tmp_path
    byte_tokenizer(tmp_path, size=300)
    assert tokenizer_folder(open_gguf(tmp_path / "x.gguf")) != tmp_path


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"pre": "klingon"}, UnsupportedError, "by the name 'klingon'"),
        ({"pre": None}, UnsupportedError, "does not say how texts are split"),
        ({"model": "bert"}, UnsupportedError, "a tokenizer of the kind 'bert'"),
        ({"tokens": None}, SourceError, "has no tokenizer"),
        ({"token_type": [1, 1]}, SourceError, "420 tokens and 2 types"),
        ({"merges": ["x yz"]}, SourceError, "merges tokens that it does not have"),
    ],
)
def test_tokenizers_that_cannot_be_read(
    changes: dict[str, Any], error: type[Exception], why: str, llama: Path, tmp_path: Path
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    view = open_gguf(rewrite(llama, tmp_path / "y.gguf", keys))
    with pytest.raises(error, match=why):
        tokenizer_folder(view)
    assert view.extras() == []


def test_an_unused_token_that_pads_is_not_found_in_texts(llama: Path, tmp_path: Path) -> None:
    found = open_gguf(llama).opened.metadata
    tokens = found["tokenizer.ggml.tokens"]
    keys = {
        "tokenizer.ggml.tokens": [*tokens[:-1], "[PAD]"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [5],
        "tokenizer.ggml.merges": found["tokenizer.ggml.merges"][:1],
        "tokenizer.ggml.padding_token_id": len(tokens) - 1,
    }
    view = open_gguf(rewrite(llama, tmp_path / "y.gguf", keys))
    tokenizer = load_tokenizer(tokenizer_folder(view))
    assert len(tokens) - 1 not in tokenizer("[PAD]", add_special_tokens=False)["input_ids"]


def test_which_file_is_meant(llama: Path, tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "absent.gguf") is None
    shutil.copy(llama, tmp_path / "a.gguf")
    (tmp_path / "mmproj-a.gguf").touch()
    assert find_gguf(tmp_path) == tmp_path / "a.gguf" == find_gguf(tmp_path / "a.gguf")
    shutil.copy(llama, tmp_path / "b.gguf")
    with pytest.raises(SourceError, match=r"holds 2 models: a.gguf, b.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None


def test_shards(llama: Path, tmp_path: Path) -> None:
    opened = open_file(llama)
    tensors = list(opened.tensors.values())
    keys = {k: _listed(v) for k, v in opened.metadata.items() if k != "general.architecture"}
    shards = container.plan_shards(tensors, 30_000)
    contents = (opened.read_bytes(t.name) for t in tensors)
    paths = container.write_shards(tmp_path, "x", "llama", keys, shards, contents)
    assert len(paths) > 2 and find_gguf(paths[1]) == paths[0] == find_gguf(tmp_path)
    whole, cut = open_gguf(llama), open_gguf(paths[0])
    assert all(torch.equal(whole.read(name), cut.read(name)) for name in whole.tensors)
    assert whole.fingerprint() == cut.fingerprint()
    assert described(open_file(paths[0])).keys.architecture == "llama"
