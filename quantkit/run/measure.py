"""Evaluation at the end of the sweep: what the streams behind the last block predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantkit.calibrate.tokens import EvalSet
from quantkit.evaluate.scores import Quality, TokenScores, beside_source, quality, source_nll
from quantkit.model.runtime import Runtime
from quantkit.run.advance import Streams
from quantkit.run.streams import REFERENCE, RowSet

# Logits are fp32 over the whole vocabulary: so many of them at once, for the source and one target each.
LOGITS = 1 << 23


def measure(
    runtime: Runtime,
    streams: Streams,
    blocks: int,
    sets: Sequence[tuple[EvalSet, RowSet]],
    keys: Sequence[str],
) -> dict[str, list[Quality]]:
    """Quality of every target (by its stream's name) on every evaluation set, in the order of `sets`."""
    found: dict[str, list[Quality]] = {key: [] for key in keys}
    for evaluated, rows in sets:
        source: list[Tensor] = []
        scores: dict[str, list[TokenScores]] = {key: [] for key in keys}
        for part in rows.batches(streams.batch_tokens):
            tokens = rows.tokens[part]
            states = {
                key: streams.file(blocks, key, rows).read(part, runtime.device) for key in (REFERENCE, *keys)
            }
            nll, by_key = _score(runtime, states, tokens, evaluated.score_from)
            source.append(nll)
            for key, values in by_key.items():
                scores[key].append(values)
        for key in keys:
            whole = TokenScores(
                *(torch.cat(p) for p in zip(*((s.nll, s.kl, s.agrees) for s in scores[key]), strict=True))
            )
            found[key].append(quality(evaluated.convention, torch.cat(source), whole))
    runtime.release_head()
    return found


def _score(
    runtime: Runtime, states: Mapping[str, Tensor], tokens: Tensor, score_from: int
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
            logits = runtime.logits(scored[key][part]).flatten(0, 1)
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
