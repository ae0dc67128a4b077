"""Whether the metadata of a GGUF file are those of its source: llama.cpp computes what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.architectures import Model
from quantkit.gguf.container import Opened
from quantkit.gguf.vocabulary import reference
from quantkit.gguf.vocabulary.rules import Rules
from quantkit.gguf.vocabulary.specials import specials
from quantkit.run.config_check import differences
from quantkit.run.gguf_source.config import Described, config_from_metadata
from quantkit.run.gguf_source.keys import Keys
from quantkit.run.gguf_source.opening import described, tokenizer_folder
from quantkit.run.verification import Verification

# numbers went through 32 bits, and divisors of rotary frequencies through a formula
_TOLERANCE = 1e-4
_EMBEDDING = "token_embd.weight"
_TOKENS = "tokenizer.ggml.tokens"
_SPECIAL = re.compile(r"tokenizer\.ggml\.(\w+_token_id|add_[be]os_token)")
_CONTEXT = "max_position_embeddings"
_NO_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def check_counts(report: Verification, opened: Opened) -> None:
    """What metadata say of the vocabulary is so in the file itself."""
    tokens = opened.metadata.get(_TOKENS)
    if isinstance(tokens, tuple):
        for key, number in opened.metadata.items():
            wrong = isinstance(number, int) and not 0 <= number < len(tokens)
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and wrong:
                report.problems.append(f"{key} is {number:,}, and there are {len(tokens):,} tokens")
    embedding = opened.tensors.get(_EMBEDDING)
    key = f"{opened.architecture}.vocab_size"
    stated = opened.metadata.get(key)
    if embedding is not None and isinstance(stated, int) and stated != embedding.shape[0]:
        report.problems.append(f"{key} is {stated:,}, and `{_EMBEDDING}` has {embedding.shape[0]:,} rows")


def check_metadata(report: Verification, opened: Opened, source: Checkpoint, *, ours: bool) -> None:
    """Hyperparameters and special tokens beside those that quantkit would write for the source.

    ours  quantkit wrote the file: other converters may name other tokens
    """
    said = report.problems if ours else report.notes
    said += _other_tokens(opened, source)
    try:
        model = Model.of(source.config)
    except (SourceError, UnsupportedError) as error:
        said.append(f"the metadata were not compared with the source's: {error.message}")
        return
    try:
        found, wanted = config_from_metadata(described(opened)), _expected(opened, model)
    except (SourceError, UnsupportedError) as error:
        unequal = list(_unequal(opened, model))
        said.append(f"the metadata were compared with the source's key by key alone: {error.message}")
        report.problems += unequal
        return
    if not ours and found.get(_CONTEXT) == model.config.max_position_embeddings:
        # quantkit cuts the context to a window that llama.cpp does not know
        wanted[_CONTEXT] = found[_CONTEXT]
    lines = differences(_without_tokens(found), _without_tokens(wanted), _TOLERANCE)
    report.problems += [f"metadata: {line}" for line, _ in lines]
    report.checks["configuration"] = "metadata compared with the source's"


def _unequal(opened: Opened, model: Model) -> Iterator[str]:
    """Keys that the file has as quantkit would, with other values."""
    wanted = model.metadata()
    shared = {key: opened.metadata[key] for key in wanted if key in opened.metadata}
    for line, _ in differences(shared, {key: wanted[key] for key in shared}, _TOLERANCE):
        yield f"metadata: {line}"


def _expected(opened: Opened, model: Model) -> dict[str, Any]:
    """The configuration of a file with the tensors of this one and the metadata of the source."""
    tokens = {key: value for key, value in opened.metadata.items() if key.startswith("tokenizer.")}
    keys = Keys("the source", model.architecture, {**tokens, **model.metadata()})
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    return config_from_metadata(Described(keys, shapes, model.generated()))


def _without_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NO_TOKENS}


def _other_tokens(opened: Opened, source: Checkpoint) -> Iterator[str]:
    """Special tokens that are not the source's; nothing where the source has no tokenizer that reads."""
    try:
        folder = tokenizer_folder(source)
        rows = opened.tensors[_EMBEDDING].shape[0]
        used = {number for number in Rules.of(reference(folder)).numbers if number < rows}
        wanted = specials(load_tokenizer(folder), used)
    except (SourceError, UnsupportedError):
        return
    for key in sorted(key for key in wanted.keys() | opened.metadata.keys() if _SPECIAL.fullmatch(key)):
        found, other = (_shown(each.get(key)) for each in (opened.metadata, wanted))
        if found != other:
            yield f"metadata: {key} is {found}, and would be {other} for the source"


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
