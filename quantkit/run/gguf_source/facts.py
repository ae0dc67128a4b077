"""What a GGUF file says about itself, and whether that is so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.gguf.container import Opened
from quantkit.gguf.mixes import MIXES
from quantkit.gguf.types import TYPES
from quantkit.run.gguf_source.opening import model_config

_IMATRIX = "quantize.imatrix."


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """Beside its tensors.

    architecture  llama.cpp's name of it
    label         the file type that it claims to be, as Q4_K_M; None where it claims none that is known
    bits          per weight, everything counted
    context       tokens; None where it does not say
    tokenizer     kind, tokens, how texts are split; None without one
    imatrix       what it says of the importance matrix that was used
    shards        files that it consists of
    model         class in Transformers; None where it cannot be read as a checkpoint
    notes         what is odd
    """

    architecture: str
    label: str | None
    bits: float
    context: int | None
    tokenizer: str | None
    imatrix: dict[str, Any]
    shards: int
    model: str | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, opened: Opened) -> GgufFacts:
        context = opened.metadata.get(f"{opened.architecture}.context_length")
        weights = sum(math.prod(tensor.shape) for tensor in opened.tensors.values())
        stored = sum(tensor.nbytes for tensor in opened.tensors.values())
        model, unread = _model(opened)
        return cls(
            architecture=opened.architecture,
            label=_label(opened),
            bits=stored * 8 / max(weights, 1),
            context=context if isinstance(context, int) else None,
            tokenizer=_tokenizer(opened),
            imatrix={
                key.removeprefix(_IMATRIX): value
                for key, value in opened.metadata.items()
                if key.startswith(_IMATRIX)
            },
            shards=len(opened.paths),
            model=model,
            notes=(*_odd_types(opened), *unread),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "file_type": self.label,
            "bits_per_weight": self.bits,
            "context": self.context,
            "tokenizer": self.tokenizer,
            "imatrix": self.imatrix,
            "shards": self.shards,
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """What is worth telling, for people."""
        context = f", context {self.context:,}" if self.context is not None else ""
        shards = f", {self.shards} shards" if self.shards > 1 else ""
        yield f"llama.cpp architecture {self.architecture or 'not named'}{context}{shards}"
        yield f"{self.bits:.2f} bits per weight; tokenizer: {self.tokenizer or 'none'}"
        if self.imatrix:
            file, data = (self.imatrix.get(key) for key in ("file", "dataset"))
            chunks = self.imatrix.get("chunks_count")
            seen = f", {chunks:,} chunks" if isinstance(chunks, int) else ""
            yield f"quantized with the importance matrix {file or '?'} of {data or 'an unnamed text'}{seen}"
        yield from self.notes


def _label(opened: Opened) -> str | None:
    number = opened.metadata.get("general.file_type")
    return next((mix.label for mix in MIXES.values() if mix.file_type == number), None)


def _tokenizer(opened: Opened) -> str | None:
    kind, tokens = (opened.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if not isinstance(tokens, tuple):
        return None
    names = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "bert": "WordPiece", "t5": "Unigram"}
    split = opened.metadata.get("tokenizer.ggml.pre")
    how = f", split as {split}" if kind == "gpt2" else ""
    return f"{names.get(str(kind), str(kind))}, {len(tokens):,} tokens{how}"


def _model(opened: Opened) -> tuple[str | None, list[str]]:
    """(class in Transformers, nothing) or (None, why it cannot be read)."""
    try:
        return str(model_config(opened)["architectures"][0]), []
    except QuantkitError as error:
        return None, [f"cannot be evaluated or converted: {error.message}"]
    except (KeyError, IndexError, TypeError):
        return None, []  # a config.json beside it that names no class


def _odd_types(opened: Opened) -> Iterator[str]:
    """Types that quantkit cannot decode, and a label that does not fit what is inside."""
    elements: Counter[str] = Counter()
    for tensor in opened.tensors.values():
        elements[tensor.kind] += math.prod(tensor.shape) * (len(tensor.shape) > 1)
    if unknown := [kind.upper() for kind in elements if kind not in TYPES]:
        yield f"quantkit does not decode the types {', '.join(unknown)}"
    label = _label(opened)
    if label is None or not elements:
        return
    promised, most = MIXES[label.lower()].default, elements.most_common(1)[0][0]
    if promised not in elements:
        yield f"labelled {label}, and no weight in it is {promised.upper()}: most are {most.upper()}"
    elif elements[promised] < elements[most]:
        yield f"labelled {label}, and most weights are {most.upper()}, not {promised.upper()}"
