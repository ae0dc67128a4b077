"""llama.cpp opens what the container writes, whole and in shards."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.gguf.container import (
    Stored,
    Value,
    file_bytes,
    open_file,
    plan_shards,
    write,
    write_shards,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama_cpp"),
]

WIDTH, WORDS = 256, 32
METADATA: dict[str, Value] = {
    "general.name": "",
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.block_count": 1,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": WORDS,
    "tokenizer.ggml.model": "no_vocab",
}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TENSORS = [
    Stored("token_embd.weight", (WORDS, WIDTH), "q8_0"),
    Stored("output_norm.weight", (WIDTH,), "f32"),
    *(Stored(f"blk.0.{name}.weight", (WIDTH,), "f32") for name in ("attn_norm", "ffn_norm")),
    *(Stored(f"blk.0.{name}.weight", (WIDTH, WIDTH), "q4_k") for name in MATRICES),
]


def contents() -> list[Tensor]:
    return [torch.zeros(tensor.byte_shape, dtype=torch.uint8) for tensor in TENSORS]


def loads(path: Path) -> bool:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        return False
    size = llama_cpp.llama_model_size(model)
    llama_cpp.llama_model_free(model)
    return bool(size == sum(tensor.nbytes for tensor in TENSORS))


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "llama", METADATA, TENSORS, contents())
    assert path.stat().st_size == file_bytes("llama", METADATA, TENSORS)
    assert loads(path)


def test_shards_load_through_the_first(tmp_path: Path) -> None:
    shards = plan_shards(TENSORS, 100_000)
    paths = write_shards(tmp_path, "tiny", "llama", METADATA, shards, contents())
    assert len(paths) > 2 and len(open_file(paths[1]).tensors) == len(TENSORS)
    assert loads(paths[0])
    paths[-1].unlink()
    assert not loads(paths[0])
