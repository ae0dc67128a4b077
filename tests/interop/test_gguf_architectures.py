"""Every architecture in llama.cpp: its logits from our placements and metadata are those of Transformers.

Random models, all parameters fp32 in the file. What is compared are log-probabilities of 24 fixed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.gguf.architectures import Model, Placed
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph, Weight
from quantkit.run.gguf_source import open_gguf
from tests.e2e.test_export import BYTE_VOCABULARY, write_byte_tokenizer
from tests.interop import llama

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.interop

# Both multiply in fp32, in another order: 5e-6 was seen, and a wrong frequency or row is far above.
SILU = 1e-4
# llama.cpp looks GELU up in a table of fp16 inputs and outputs, 11 bits: 2e-3 was seen.
GELU = 5e-3

VOCAB, LENGTH = 160, 24
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + i / 10 for i in range(8)],
    "long_factor": [2 + i / 3 for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {**DENSE, "alibi": False, "bias": False, "parallel_attn": True}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
LOCAL = {"rope_type": "default", "rope_theta": 1000.0}
SLIDING = ["sliding_attention", "full_attention"]

# name → model_type, its config, tolerance
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("llama", {**DENSE, **UNTIED}, SILU),
    "llama, tied, biases, llama3": (
        "llama",
        {**DENSE, **TIED, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        SILU,
    ),
    "llama, longrope": (
        "llama",
        {**DENSE, "rope_parameters": {**LONG, "original_max_position_embeddings": 256, "factor": 4.0}},
        SILU,
    ),
    "llama, linear": (
        "llama",
        {**DENSE, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        SILU,
    ),
    "mistral, wide heads": ("mistral", {**DENSE, "head_dim": 32, "sliding_window": None}, SILU),
    "mixtral": ("mixtral", {**DENSE, **MIXTURE, **UNTIED}, SILU),
    "qwen2": ("qwen2", {**DENSE, **TIED}, SILU),
    "qwen2, yarn": ("qwen2", {**DENSE, **UNTIED, "rope_parameters": YARN}, SILU),
    "qwen2, yarn with scales": (
        "qwen2",
        {**DENSE, **UNTIED, "rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}},
        SILU,
    ),
    "qwen3": ("qwen3", {**DENSE, "head_dim": 32}, SILU),
    "qwen3_moe": (
        "qwen3_moe",
        {**DENSE, "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"norm_topk_prob": True},
        SILU,
    ),
    "gemma2": ("gemma2", {**DENSE, **GEMMA}, GELU),
    "gemma3_text": (
        "gemma3_text",
        {**DENSE, **GEMMA, "layer_types": SLIDING}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
                "sliding_attention": LOCAL,
            }
        },
        GELU,
    ),
    "phi3": ("phi3", {**DENSE, **UNTIED, "original_max_position_embeddings": 128}, SILU),
    "phi3, part of a head": (
        "phi3",
        {**DENSE, **UNTIED, "original_max_position_embeddings": 128, "hidden_size": 128}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        SILU,
    ),
    # llama.cpp makes its context at least 256 long, and more than the original takes the long factors
    "phi3, longrope": (
        "phi3",
        {**DENSE, "max_position_embeddings": 1024, "original_max_position_embeddings": 256}
        | {"rope_parameters": {**LONG, "original_max_position_embeddings": 256}},
        SILU,
    ),
    "phi3, longrope, long": (
        "phi3",
        {**DENSE, "max_position_embeddings": 128, "original_max_position_embeddings": 16}
        | {"rope_parameters": {**LONG, "original_max_position_embeddings": 16}},
        SILU,
    ),
    "olmo2": ("olmo2", {**DENSE, **UNTIED}, SILU),
    "olmo2, tied": ("olmo2", {**DENSE, **TIED}, SILU),
    "olmo3": ("olmo3", {**DENSE, "layer_types": SLIDING, "sliding_window": 8}, SILU),
    "gpt2": ("gpt2", GPT2, GELU),
    "gpt2, narrow": ("gpt2", {**GPT2, "n_inner": 96}, GELU),
    "smollm3": ("smollm3", {**DENSE, "num_hidden_layers": 4}, SILU),
    "starcoder2": ("starcoder2", {**DENSE, "sliding_window": None}, GELU),
    "granite": ("granite", {**DENSE, **GRANITE, "logits_scaling": 2.0}, SILU),
    "falcon, multi-query": ("falcon", {**FALCON, "multi_query": True}, GELU),
    "falcon, multi-head": ("falcon", {**FALCON, "multi_query": False}, GELU),
    "falcon, groups": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, GELU),
    "falcon, one norm": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        GELU,
    ),
}


def save_random(kind: str, config: Mapping[str, Any], folder: Path) -> torch.nn.Module:
    """A model all of whose parameters are random, norms and biases included, saved into `folder`."""
    generator = torch.Generator().manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[kind](**config), dtype=torch.float32).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        parameter.data = centre + noise * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    assert isinstance(model, torch.nn.Module)
    return model


def value(checkpoint: Checkpoint, weights: Mapping[str, Weight], placed: Placed) -> Tensor:
    """What the placement says is in the file."""
    pieces = []
    for source in placed.sources:
        if placed.matrix:
            weight = weights[source.key]
            piece = checkpoint.read(weight.name)
            if weight.part is not None:
                piece = piece if weight.part.expert is None else piece[weight.part.expert]
                piece = piece.T if weight.part.transposed else piece
        else:
            piece = checkpoint.read(source.key)
        pieces.append(piece if source.rows is None else piece[source.rows])
    whole = torch.stack(pieces) if len(placed.shape) == 3 else pieces[0]
    assert tuple(whole.shape) == placed.shape
    return whole.float() + placed.add


def write(path: Path, model: Model, checkpoint: Checkpoint, graph: ModelGraph) -> None:
    """A file without a vocabulary: llama.cpp then knows how many tokens there are, and no more."""
    weights = {weight.key: weight for weight in (*graph.weights(), *graph.outer)}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, entry in model.metadata().items():
        match entry:
            case bool():
                writer.add_bool(key, entry)
            case str():
                writer.add_string(key, entry)
            case int():
                writer.add_uint32(key, entry)
            case float():
                writer.add_float32(key, entry)
            case list():
                writer.add_array(key, entry)
            case _:
                raise TypeError(f"{key}: {entry!r}")
    tensors = model.generated()
    tensors |= {p.name: value(checkpoint, weights, p) for p in model.placements(graph, shapes)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def farthest(folder: Path, reference: torch.nn.Module) -> float:
    """Largest difference of log-probabilities between llama.cpp's reading of our file and `reference`."""
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.gguf"
    write(path, Model.of(checkpoint.config), checkpoint, build_graph(checkpoint))
    ids = torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    assert float(expected.std()) > 0.05  # else anything would be close
    return float((llama.logits(path, ids).log_softmax(-1) - expected.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    kind, config, tolerance = CASES[name]
    assert farthest(tmp_path, save_random(kind, config, tmp_path)) < tolerance


def test_experts_that_lie_stacked_on_disk(tmp_path: Path) -> None:
    """Names as the model has them at run time: one tensor for all experts, gate and up in one."""
    kind, config, tolerance = CASES["qwen3_moe"]
    model = save_random(kind, config, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint.open(tmp_path).tensors
    assert farthest(tmp_path, model) < tolerance


def test_language_part_of_a_model_that_sees(tmp_path: Path) -> None:
    _, text, tolerance = CASES["gemma3_text"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = {"text_config": text, "vision_config": {**vision, **sizes}, "mm_tokens_per_image": 4}
    assert farthest(tmp_path, save_random("gemma3", config, tmp_path)) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_converted(name: str, tmp_path: Path) -> None:
    """The whole way, as a user goes it: a folder in, a file out, tokenizer included."""
    kind, config, tolerance = CASES[name]
    reference = save_random(kind, {**config, "vocab_size": BYTE_VOCABULARY}, tmp_path / "source")
    write_byte_tokenizer(tmp_path / "source")
    targets = quantkit.parse_targets("gguf:f32")
    silent = quantkit.Eval(enabled=False)
    output = quantkit.Output(dir=str(tmp_path / "out"))
    source = str(tmp_path / "source")
    quantkit.convert(quantkit.Recipe(source, targets, output=output, eval=silent, engine_check=False))
    (file,) = (tmp_path / "out" / "gguf-f32").glob("*.gguf")
    ids = list(range(3, 3 + LENGTH))
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert float((llama.logits(file, ids).log_softmax(-1) - wanted).abs().max()) < tolerance


# 256 channels, so that super-blocks fit
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256},
    "phi3": {"hidden_size": 256, "intermediate_size": 512},
    "gemma2": {"hidden_size": 256, "intermediate_size": 512},
    "falcon, groups": {"hidden_size": 256},
    "gpt2": {"n_embd": 256},
}
# llama.cpp rounds what enters a matrix of k-quants to 8 bits, which moves log-probabilities by a tenth to a
# sixth of what rounding the weights to 4 does; a row in the wrong place would move them by more than that
ROUNDED = 0.25


@pytest.mark.parametrize("name", WIDE)
def test_quantized(name: str, tmp_path: Path) -> None:
    """Error feedback on matrices that are permuted, regrouped, stacked or transposed on their way: llama.cpp
    computes what Transformers computes with the weights that we read back."""
    kind, config, _ = CASES[name]
    source = save_random(kind, {**config, **WIDE[name], "vocab_size": BYTE_VOCABULARY}, tmp_path / "source")
    write_byte_tokenizer(tmp_path / "source")
    recipe = quantkit.Recipe(
        str(tmp_path / "source"),
        quantkit.parse_targets("gguf:q4_k_m"),
        output=quantkit.Output(dir=str(tmp_path / "out")),
        calibration=quantkit.Calibration(set="embedded", rows=8, length=64),
        eval=quantkit.Eval(enabled=False),
        engine_check=False,
    )
    quantkit.convert(recipe)
    (file,) = (tmp_path / "out" / "gguf-q4_k_m").glob("*.gguf")
    read = open_gguf(file)
    (tmp_path / "read").mkdir()
    tensors = {n: read.read(n).to(torch.float32).contiguous() for n in read.tensors}
    save_file(tensors, tmp_path / "read" / "model.safetensors", {"format": "pt"})
    source.config.save_pretrained(tmp_path / "read")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "read", dtype=torch.float32)
    ids = torch.randint(3, 259, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        wanted = [m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (ours, source)]
    found = llama.logits(file, ids).log_softmax(-1)
    apart, moved = (float((found - other).abs().mean()) for other in wanted)
    assert apart < ROUNDED * moved
