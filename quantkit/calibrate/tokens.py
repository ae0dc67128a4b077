"""Rows of tokens: `CalibrationSet` to gather statistics on, `EvalSet` to measure on.

Rows are cut from the running text of a part without padding or overlap; what is left over at the
end is dropped. Documents begin with the tokenizer's BOS if it adds one by default; if it adds
nothing but knows an EOS, that separates them. A raw text file is one document.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.calibrate.chat import Chat
from quantkit.calibrate.documents import Document, Messages, documents, evaluation_text, pinned
from quantkit.calibrate.text import EvalSpec, Part, SetSpec, Style, Template, as_set
from quantkit.calibrate.tokenizer import Ids, Specials, Tokenizer, encode
from quantkit.errors import CalibrationError, SourceError

# A plain text that goes through a chat template is cut into messages of about so many characters.
PASSAGE = 2_000
_RAW = "set `template: raw`, or use another calibration set"


@dataclass(frozen=True, slots=True)
class Share:
    """Where `rows` consecutive rows of a calibration set come from, and under which licence."""

    name: str
    rows: int
    licence: str


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Rows of tokens (rows, length) int32. The rows of a source are consecutive, in the order of `sources`.

    sha256  over the shape (two little-endian int64) and the tokens (little-endian int32, row by row)
    """

    tokens: Tensor
    sources: tuple[Share, ...]
    sha256: str

    @classmethod
    def of(cls, tokens: Tensor, sources: Sequence[Share]) -> CalibrationSet:
        """The set of these rows, hashed."""
        table = tokens.to(torch.int32).contiguous()
        digest = hashlib.sha256(np.asarray(table.shape, dtype="<i8").tobytes())
        digest.update(table.numpy().astype("<i4").tobytes())
        return cls(table, tuple(sources), digest.hexdigest())

    def shard(self, rank: int, world: int) -> CalibrationSet:
        """Rows rank, rank + world, rank + 2·world, …: the shards are disjoint and together are the set."""
        shares, begin = [], 0
        for share in self.sources:
            end = begin + share.rows
            mine = len(range(begin + (rank - begin) % world, end, world))
            shares.append(replace(share, rows=mine))
            begin = end
        return CalibrationSet.of(self.tokens[rank::world], [share for share in shares if share.rows])


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Windows of tokens (windows, context) int32 to measure on.

    score_from   first position whose prediction of the next token counts; the last is context − 2
    bos          the token that begins every window (``llamacpp``) or the text (``gptq``), or None
    available    windows in the whole text
    convention   names the measurement; figures compare only if it is the same
    """

    name: str
    style: Style
    tokens: Tensor
    score_from: int
    bos: int | None
    available: int
    token_count: int
    text_sha256: str
    convention: str

    @property
    def scored(self) -> int:
        """Predictions that count in each window."""
        return self.tokens.shape[1] - 1 - self.score_from

    @property
    def partial(self) -> bool:
        """True when only the first windows of the text are used."""
        return self.tokens.shape[0] < self.available


def build(
    spec: SetSpec | Path,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int | None,
    template: Template | None = None,
) -> CalibrationSet:
    """Exactly `rows` rows of `length` tokens; CalibrationError if the text does not give them.

    seed      None or 0: the first rows of each part, in order. Otherwise the rows of each part in an
              order that depends on the seed alone, and of these the first
    template  overrides what the parts say: ``chat`` or ``raw`` for all of them
    A tokenizer's BOS, if it adds one, is written over the first token of every row: models that
    were trained with it do badly on rows without.
    """
    if rows < 1 or length < 2:
        raise CalibrationError(f"at least 1 row of 2 tokens is needed, not {rows:,} of {length:,}")
    mixture = as_set(spec)
    counts = _apportion(rows, [part.share for part in mixture.parts])
    special = Specials.of(tokenizer)
    tables, shares = [], []
    with Chat(tokenizer) as chat:
        for index, (asked, count) in enumerate(zip(mixture.parts, counts, strict=True)):
            if count:
                part = pinned(asked if template is None else replace(asked, template=template))
                order = f"{seed}:{index}" if seed else None
                stream = _stream(part, tokenizer, special, chat)
                tables.append(_rows(part, stream, special, (count, length), order))
                shares.append(Share(part.source.label, count, part.licence))
    return CalibrationSet.of(torch.from_numpy(np.concatenate(tables)), shares)


def build_eval(spec: EvalSpec, tokenizer: Tokenizer) -> EvalSet:
    """The windows that `spec` measures on; CalibrationError if the text is too short.

    Both styles tokenize the text once, with the tokenizer's default special tokens, and cut it into
    windows without overlap; the tail is dropped. ``llamacpp`` needs two windows, writes BOS over the
    first token of each if the tokenizer adds one, and scores positions context/2 … context − 2.
    ``gptq`` scores all but the first token.
    """
    text = evaluation_text(spec)
    special = Specials.of(tokenizer)
    ids = np.array([*special.prefix, *encode(text, tokenizer), *special.suffix], dtype=np.int32)
    available, needed = len(ids) // spec.context, 2 if spec.style == "llamacpp" else 1
    if available < needed:
        raise CalibrationError(
            f"evaluation text '{spec.name}' gives {len(ids):,} tokens with this tokenizer; style "
            f"'{spec.style}' needs {needed * spec.context:,} for a context of {spec.context:,}",
            remedy="use a shorter context or a longer text",
        )
    windows = available if spec.chunks is None else min(spec.chunks, available)
    tokens = ids[: windows * spec.context].reshape(windows, spec.context)
    bos = special.prefix[0] if special.prefix else None
    if spec.style == "llamacpp" and bos is not None:
        tokens[:, 0] = bos
    text_sha256 = hashlib.sha256(text.encode()).hexdigest()
    facts = (text_sha256, spec.style, spec.context, windows, len(ids), bos)
    return EvalSet(
        name=spec.name,
        style=spec.style,
        tokens=torch.from_numpy(tokens),
        score_from=spec.context // 2 if spec.style == "llamacpp" else 0,
        bos=bos,
        available=available,
        token_count=len(ids),
        text_sha256=text_sha256,
        convention=f"{spec.name}/{spec.style}-{spec.context}@{_short_hash(facts)}",
    )


def _rows(
    part: Part, stream: Iterator[Ids], special: Specials, shape: tuple[int, int], order: str | None
) -> Ids:
    """(count, length) rows of a part: the first ones, or the first in the order that `order` names.

    stream  its tokens, of which no more are made than are needed
    """
    count, length = shape
    needed = count * length
    pieces: list[Ids] = []
    found = 0
    for ids in stream:
        pieces.append(ids)
        found += len(ids)
        if order is None and found >= needed:
            break
    available = found // length
    if available < count:
        fewer = f"ask for at most {available:,} rows, " if available else ""
        raise CalibrationError(
            f"`{part.source.label}` gives {found:,} tokens with this tokenizer; {count:,} rows of "
            f"{length:,} need {needed:,}",
            remedy=f"{fewer}use shorter rows or give more text "
            f"(at most {part.max_chars:,} characters of it are read)",
        )
    table = np.concatenate(pieces)[: available * length].reshape(available, length)
    chosen = table[:count] if order is None else table[_shuffled(available, order)[:count]]
    chosen[:, : len(special.prefix)] = special.prefix
    return chosen


def _stream(part: Part, tokenizer: Tokenizer, special: Specials, chat: Chat) -> Iterator[Ids]:
    """Tokens of one document after another, with what belongs before, after and between them."""
    dressed = bool(special.prefix or special.suffix)
    eos = tokenizer.eos_token_id
    between = () if dressed or eos is None or part.template == "chat" else (eos,)
    for number, text in enumerate(_texts(part, tokenizer, chat)):
        ids = encode(text, tokenizer)
        # A chat template usually writes the special tokens itself.
        templated = part.template == "chat"
        prefix = () if templated and tuple(ids[: len(special.prefix)]) == special.prefix else special.prefix
        suffix = () if templated else special.suffix
        yield np.array([*(between if number else ()), *prefix, *ids, *suffix], dtype=np.int32)


def _texts(part: Part, tokenizer: Tokenizer, chat: Chat) -> Iterator[str]:
    if part.template == "chat" and tokenizer.chat_template is None:
        raise CalibrationError(
            f"`{part.source.label}` is to go through the chat template, but this tokenizer has none",
            remedy=_RAW,
        )
    for document in documents(part):
        if part.template == "chat":
            for conversation in _conversations(document):
                yield _filled_in(conversation, chat, part.source.label)
        elif isinstance(document, str):
            yield document
        else:
            yield "\n\n".join(str(message["content"] or "") for message in document)


def _conversations(document: Document) -> Iterator[Messages]:
    """The conversation that a document is; of a plain text, each passage as a user's message."""
    if not isinstance(document, str):
        yield document
        return
    passage = ""
    for paragraph in document.split("\n\n"):
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
        if len(passage) >= PASSAGE:
            yield [{"role": "user", "content": passage}]
            passage = ""
    if passage.strip():
        yield [{"role": "user", "content": passage}]


def _filled_in(conversation: Messages, chat: Chat, label: str) -> str:
    try:
        return chat.text(conversation)
    except SourceError as error:
        where = "" if chat.file is None else f" (`{chat.file}`)"
        raise CalibrationError(
            f"the chat template{where} makes no text of a conversation of `{label}`: {error.message}",
            remedy=_RAW,
        ) from error


def _apportion(rows: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `rows`, by largest remainder; the earlier part wins a tie."""
    exact = [rows * share / math.fsum(shares) for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: rows - sum(counts)]:
        counts[k] += 1
    return counts


def _shuffled(count: int, order: str) -> list[int]:
    """0 … count − 1 sorted by a hash: the same on every machine and with every library version."""
    return sorted(range(count), key=lambda k: hashlib.sha256(f"{order}:{k}".encode()).digest())


def _short_hash(facts: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
