"""GGUF files of tiny models for tests that read them; the package `gguf` rounds, not quantkit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quantkit.checkpoint.reader import Checkpoint
from quantkit.gguf import container
from quantkit.gguf.architectures import Model, Placed
from quantkit.gguf.container import Stored, Typed, Value
from quantkit.gguf.vocabulary import vocabulary
from quantkit.model.build import build_graph
from quantkit.model.graph import Weight

TEXT = [
    "the quick brown fox jumps over the lazy dog, isn't it? 12345 67 def f(x):\n\treturn x  # naïve",
    "pack my box with five dozen liquor jugs; WE'LL see -- 3.14159 Привет мир 漢字 café\r\n\r\n  end",
] * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def write_gguf(source: Path, path: Path, kind: str = "f32", keys: Mapping[str, Value] | None = None) -> Path:
    """The checkpoint in `source` as a file whose matrices have the type `kind`, where rows allow.

    A vocabulary is in it if the folder has a tokenizer.
    """
    checkpoint = Checkpoint.open(source)
    graph = build_graph(checkpoint)
    weights = {weight.key: weight for weight in (*graph.weights(), *graph.outer)}
    model = Model.of(checkpoint.config)
    placements = model.placements(graph, {name: info.shape for name, info in checkpoint.tensors.items()})
    tensors = [(Stored.plain(n, tuple(t.shape), t.dtype), as_bytes(t)) for n, t in model.generated().items()]
    for placed in placements:
        values = _values(checkpoint, weights, placed)
        own = (
            kind
            if placed.matrix and values.shape[-1] % Stored("", (256,), kind).type.elements == 0
            else "f32"
        )
        tensors.append((Stored(placed.name, placed.shape, own), _packed(values, own)))
    rows = next(w.shape[0] for w in graph.outer if w.role == "embed")
    words = vocabulary(source, rows) if (source / "tokenizer.json").is_file() else {}
    metadata = {"general.type": "model", **model.metadata(), **words, **(keys or {})}
    container.write(
        path, model.architecture, metadata, [t for t, _ in tensors], [data for _, data in tensors]
    )
    return path


def rewrite(
    path: Path, target: Path, changes: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()
) -> Path:
    """A file with other metadata (None takes a key away) and without some tensors."""
    opened = container.open_file(path)
    changes = changes or {}
    kept: dict[str, Any] = {
        key: Typed(value, opened.widths[key])  # type: ignore[arg-type]
        for key, value in opened.metadata.items()
        if key not in changes
    }
    kept |= {key: value for key, value in changes.items() if value is not None}
    architecture = kept.pop("general.architecture")
    name = architecture.value if isinstance(architecture, Typed) else architecture
    tensors = [tensor for tensor in opened.tensors.values() if tensor.name not in drop]
    container.write(target, str(name), kept, tensors, (opened.read_bytes(t.name) for t in tensors))
    return target


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def byte_tokenizer(folder: Path, pattern: str = LLAMA3, size: int = 400, **options: Any) -> Path:
    """A byte-level BPE trained on TEXT, special tokens first."""
    tokenizer = Tokenizer(models.BPE(**options))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, BYTES]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return _save(tokenizer, folder)


def piece_tokenizer(folder: Path, size: int = 400) -> Path:
    """A BPE of SentencePiece's shape, as Llama 2's: a space before the text, bytes for unknown letters."""
    pieces = [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.pre_tokenizer = None
    for piece in pieces:
        assert tokenizer.token_to_id(piece) is not None
    return _save(tokenizer, folder)


def _save(tokenizer: Tokenizer, folder: Path) -> Path:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrap: Any = PreTrainedTokenizerFast
    fast = wrap(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def _values(checkpoint: Checkpoint, weights: dict[str, Weight], placed: Placed) -> Tensor:
    parts = []
    for source in placed.sources:
        weight = weights[source.key] if placed.matrix else None
        part = checkpoint.read(source.key if weight is None else weight.name)
        if weight is not None and weight.part is not None:
            part = part if weight.part.expert is None else part[weight.part.expert]
            part = part.T if weight.part.transposed else part
        parts.append(part if source.rows is None else part[source.rows])
    return (torch.stack(parts) if len(placed.shape) == 3 else parts[0]).float() + placed.add


def _packed(values: Tensor, kind: str) -> Tensor:
    gguf = container.library()
    data = gguf.quants.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
