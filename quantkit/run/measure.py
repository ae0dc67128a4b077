"""Evaluation at the end of the sweep: what the streams behind the last block predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.tokens import EvalSet
from quantkit.evaluate.quality import Quality
from quantkit.evaluate.scores import TokenScores, beside_source, quality, source_nll
from quantkit.model.runtime import Runtime
from quantkit.run.advance import Streams
from quantkit.run.ends import Ends
from quantkit.run.streams import REFERENCE, RowSet

# Logits are fp32 over the whole vocabulary: so many of them at once, for the source and one target each.
LOGITS = 1 << 23


def measure(
    runtime: Runtime,
    streams: Streams,
    blocks: int,
    sets: Sequence[tuple[EvalSet, RowSet]],
    keys: Sequence[str],
    ends: Ends,
) -> dict[str, list[Quality]]:
    """Quality of every target (by its stream's name) on every evaluation set, in the order of `sets`.

    Targets that keep the source's head are measured together; others one by one, each with its own.
    """
    apart = [key for key in keys if ends.has_own_head(key)]
    shared = [key for key in keys if key not in apart]
    found: dict[str, list[Quality]] = {key: [] for key in keys}
    for group in [*([shared] if shared else []), *([key] for key in apart)]:
        together = _Group(group, ends.head_of(group[0]))
        for evaluated, rows in sets:
            for key, measured in _measured(runtime, streams, blocks, evaluated, rows, together).items():
                found[key].append(measured)
    runtime.release_head()
    return found


@dataclass(frozen=True, slots=True)
class _Group:
    """Targets (by stream) whose states meet one head, None: the source's."""

    keys: Sequence[str]
    head: Tensor | None


def _measured(
    runtime: Runtime, streams: Streams, blocks: int, evaluated: EvalSet, rows: RowSet, group: _Group
) -> dict[str, Quality]:
    source: list[Tensor] = []
    scores: dict[str, list[TokenScores]] = {key: [] for key in group.keys}
    for part in rows.batches(streams.batch_tokens):
        tokens = rows.tokens[part]
        states = {
            key: streams.file(blocks, key, rows).read(part, runtime.device)
            for key in (REFERENCE, *group.keys)
        }
        nll, by_key = _score(runtime, states, tokens, evaluated.score_from, group.head)
        source.append(nll)
        for key, values in by_key.items():
            scores[key].append(values)
    whole = {
        key: TokenScores(*(torch.cat(p) for p in zip(*((s.nll, s.kl, s.agrees) for s in found), strict=True)))
        for key, found in scores.items()
    }
    return {key: quality(evaluated.convention, torch.cat(source), found) for key, found in whole.items()}


def _score(
    runtime: Runtime, states: Mapping[str, Tensor], tokens: Tensor, score_from: int, head: Tensor | None
) -> tuple[Tensor, dict[str, TokenScores]]:
    """Scores of one micro-batch: NLL of the source (rows, positions) and TokenScores of each target."""
    scored = {key: s[:, score_from : tokens.shape[1] - 1] for key, s in states.items()}
    following = tokens[:, score_from + 1 :]
    vocabulary = runtime.logits(scored[REFERENCE][:1, :1]).shape[-1]
    nll = torch.empty(following.shape)
    found = {
        key: TokenScores(*(torch.empty(following.shape) for _ in range(3)))
        for key in states
        if key != REFERENCE
    }
    for part in _pieces(following.shape[0], following.shape[1], vocabulary):
        after = following[part].to(runtime.device).flatten()
        reference = runtime.logits(scored[REFERENCE][part]).flatten(0, 1)
        shape = following[part].shape
        nll[part] = source_nll(reference, after).view(shape).cpu()
        for key, scores in found.items():
            logits = runtime.logits(scored[key][part], head).flatten(0, 1)
            values = beside_source(reference, logits, after)
            for kept, value in zip((scores.nll, scores.kl, scores.agrees), values, strict=True):
                kept[part] = value.view(shape).cpu()
    return nll, found


def _pieces(rows: int, positions: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """(rows, positions) cut so that the logits of a piece stay below LOGITS values."""
    allowed = max(1, LOGITS // vocabulary)
    row_step, position_step = max(1, allowed // positions), min(positions, allowed)
    for row in range(0, rows, row_step):
        for position in range(0, positions, position_step):
            yield (
                slice(row, min(row + row_step, rows)),
                slice(position, min(position + position_step, positions)),
            )
