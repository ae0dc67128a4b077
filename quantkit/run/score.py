"""`score`: perplexity of saved checkpoints, quantized by any tool or not, and the distance to a baseline.

Each model runs once over the windows of every text, one block in memory at a time. Its states behind the last
block stay in a file; logits are made from them a few positions at a time, beside the baseline's.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.tokenizer import Tokenizer, load_tokenizer
from quantkit.calibrate.tokens import EvalSet
from quantkit.errors import SourceError, UnsupportedError, UsageError
from quantkit.evaluate.quality import Perplexity, Quality
from quantkit.evaluate.scores import TokenScores, beside_source, perplexity, quality, source_nll
from quantkit.hub.fetch import Source
from quantkit.model.build import build_graph
from quantkit.model.runtime import Runtime
from quantkit.progress import SILENT, BlockInfo, Progress
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import Device, Eval, EvalText
from quantkit.run import budget
from quantkit.run.advance import Streams
from quantkit.run.files import parameters
from quantkit.run.gguf_source import GgufCheckpoint, tokenizer_folder
from quantkit.run.inputs import Runs, runs_of
from quantkit.run.measure import LOGITS
from quantkit.run.plan import locate
from quantkit.run.quantized import Dequantized, open_source
from quantkit.run.rows import Windows, evaluation_rows
from quantkit.run.store import RunStore
from quantkit.run.streams import REFERENCE, RowSet
from quantkit.table import Table


@dataclass(frozen=True, slots=True)
class Score:
    """What one checkpoint scores on one text; `beside` when there is a baseline."""

    convention: str
    windows: int
    tokens: int
    perplexity: Perplexity
    beside: Quality | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "convention": self.convention,
            "windows": self.windows,
            "tokens": self.tokens,
            "perplexity": {"value": self.perplexity.value, "error": self.perplexity.error},
        }
        if self.beside is not None:
            compared = self.beside.to_json()
            found |= {k: v for k, v in compared.items() if k not in found and k not in ("source", "target")}
        return found


@dataclass(frozen=True, slots=True)
class Scored:
    """One checkpoint: what it is, how large, how good."""

    name: str
    format: str
    size_bytes: int
    bits_per_weight: float
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "format": self.format,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "scores": [score.to_json() for score in self.scores],
        }


@dataclass(frozen=True, slots=True)
class Scores:
    """All of them, in the order they were given."""

    baseline: Scored | None
    models: tuple[Scored, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/eval/1",
            "status": "ok",
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "models": [model.to_json() for model in self.models],
        }

    def table(self) -> Table:
        every = [*([] if self.baseline is None else [self.baseline]), *self.models]
        rows = tuple(_row(model, score) for model in every for score in model.scores)
        columns = ("model", "format", "size", "bpw", "perplexity", "vs baseline", "mean KL", "same top-1")
        conventions = dict.fromkeys(score.convention for model in every for score in model.scores)
        notes = [f"perplexity: {', '.join(conventions)}; ± is one standard error; KL in nats per token"]
        if self.baseline is None:
            notes.append("without --baseline nothing says what quantization cost")
        return Table("evaluation", columns, rows, tuple(notes))


def score(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    texts: Sequence[EvalText] = Eval().perplexity,
    device: Device = Device(),  # noqa: B008 (a frozen value)
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """Measure saved checkpoints, each a folder, a GGUF file, a Hub id or `demo`.

    `baseline` is what they were made from.

    Raises UsageError when a model and the baseline do not share their tokens, UnsupportedError when a model
    runs in a way that cannot be emulated.
    """
    where = partial(locate, offline=offline, cache_dir=cache_dir, progress=progress)
    with ExitStack() as opened:
        work = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-eval-")))
        first = None
        if baseline is not None:
            first = _Model(where(baseline), device, work / "baseline")
            opened.enter_context(closing(first))
            first.run(evaluation_rows(texts, first.tokenizer), progress)
        measured = []
        for number, name in enumerate(models):
            with closing(_Model(where(name), device, work / str(number))) as model:
                model.run(_shared_windows(model, first, texts), progress)
                measured.append(model.scored(first, progress))
        found = Scores(None if first is None else first.scored(None, progress), tuple(measured))
    progress.finish()
    return found


class _Model:
    """A checkpoint that is run over windows of text; what it says is in `root` until it is closed."""

    def __init__(self, source: Source, device: Device, root: Path) -> None:
        self.name = source.label
        self.checkpoint = checkpoint = open_source(source.path)
        self._format, self._runs, self._size = "float", Runs(), checkpoint.size_bytes
        match checkpoint:
            case Dequantized(quantized=quantized):
                self._format, self._runs = quantized.format_name, runs_of(quantized)
            case GgufCheckpoint():
                self._format = "gguf"
        self._graph = build_graph(checkpoint)
        self._parameters = parameters(checkpoint, self._graph)
        on = budget.device(device.map)
        dtype = budget.compute_dtype(device.dtype, on)
        self.runtime = Runtime(checkpoint, self._graph, dtype=dtype, device=on)
        self._store = RunStore.open(root)
        hidden = self._graph.blocks[0].sites[0].width
        self._streams = Streams(self._store, hidden, dtype, on, device.batch_tokens)
        self.windows: Windows = ()

    @property
    def tokenizer(self) -> Tokenizer:
        """SourceError or UnsupportedError when it has none that can be used."""
        return load_tokenizer(tokenizer_folder(self.checkpoint))

    def close(self) -> None:
        """Give up its files."""
        self._store.drop_streams()
        self._store.close()

    def run(self, windows: Windows, progress: Progress) -> None:
        """Every window through all blocks; only the states behind the last one are kept."""
        self.windows = windows
        progress.step("evaluate", f"{self.name} ({self._format})")
        blocks = self._graph.blocks
        progress.start(sum(block.parameters for block in blocks), len(blocks))
        for _, rows in windows:
            batches = (rows.tokens[part] for part in rows.batches(self._streams.batch_tokens))
            self._streams.write(0, REFERENCE, rows, (self.runtime.embed(tokens) for tokens in batches))
        self.runtime.release_embed()
        for block in blocks:
            began = time.monotonic()
            loaded = self.runtime.load(block.index)
            forward = partial(
                loaded.run, rounding=self._runs.roundings_of(block), cache=self._runs.cache_of(block)
            )
            for _, rows in windows:
                self._streams.advance(block.index, REFERENCE, rows, forward)
            shutil.rmtree(self._store.stream_path(block.index, REFERENCE).parent)
            progress.block(block.index, BlockInfo(time.monotonic() - began, block.parameters))

    def states(self, rows: RowSet, part: slice) -> Tensor:
        """(rows, length, hidden) behind the last block."""
        file = self._streams.file(len(self._graph.blocks), REFERENCE, rows)
        return file.read(part, self.runtime.device)

    def scored(self, first: _Model | None, progress: Progress) -> Scored:
        """Its scores, beside those of `first`."""
        progress.step("score", self.name)
        scores = tuple(_score(self, first, number) for number in range(len(self.windows)))
        self.runtime.release_head()
        bits = self._size * 8 / self._parameters
        return Scored(self.name, self._format, self._size, bits, scores)


def _score(model: _Model, first: _Model | None, number: int) -> Score:
    """Scores on one text, window by window, a few positions at a time."""
    evaluated, rows = model.windows[number]
    found: list[list[Tensor]] = []
    for window in range(rows.rows):
        pieces = list(_positions(model, first, evaluated, rows, window))
        found.append([torch.cat(values) for values in zip(*pieces, strict=True)])
    nll, *beside = (torch.stack(values) for values in zip(*found, strict=True))
    compared = None
    if first is not None:
        source, kl, agrees = beside
        compared = quality(evaluated.convention, source, TokenScores(nll, kl, agrees))
    return Score(evaluated.convention, nll.shape[0], nll.numel(), perplexity(nll), compared)


def _positions(
    model: _Model, first: _Model | None, evaluated: EvalSet, rows: RowSet, window: int
) -> Iterator[tuple[Tensor, ...]]:
    """(nll,) of some positions of one window, beside a baseline (nll, its nll, kl, agrees)."""
    part, begin = slice(window, window + 1), evaluated.score_from
    states = [m.states(rows, part)[:, begin:-1] for m in ([model] if first is None else [model, first])]
    following = rows.tokens[window, begin + 1 :].to(model.runtime.device)
    vocabulary = model.runtime.logits(states[0][:, :1]).shape[-1]
    step = max(1, LOGITS // vocabulary)
    for start in range(0, following.shape[0], step):
        after = following[start : start + step]
        logits = model.runtime.logits(states[0][:, start : start + step])[0]
        if first is None:
            yield (source_nll(logits, after).cpu(),)
            continue
        reference = first.runtime.logits(states[1][:, start : start + step])[0]
        if reference.shape != logits.shape:
            raise UsageError(
                f"{model.name} predicts {logits.shape[-1]:,} tokens and the baseline {reference.shape[-1]:,}",
                remedy="give the model it was made from as --baseline",
            )
        nll, kl, agrees = beside_source(reference, logits, after)
        yield nll.cpu(), source_nll(reference, after).cpu(), kl.cpu(), agrees.cpu()


def _shared_windows(model: _Model, first: _Model | None, texts: Sequence[EvalText]) -> Windows:
    """The baseline's windows; UsageError when the model's own tokenizer makes other tokens of the texts."""
    if first is None:
        return evaluation_rows(texts, model.tokenizer)
    try:
        own = evaluation_rows(texts, model.tokenizer)
    except (SourceError, UnsupportedError):  # many quantized folders come without a tokenizer
        return first.windows
    for (evaluated, rows), (_, other) in zip(own, first.windows, strict=True):
        if not torch.equal(rows.tokens, other.tokens):
            raise UsageError(
                f"{model.name} and the baseline make different tokens of {evaluated.name}",
                remedy="give the model it was made from as --baseline",
            )
    return first.windows


def _row(model: Scored, score: Score) -> tuple[str, ...]:
    head = (model.name, model.format, format_size(model.size_bytes), f"{model.bits_per_weight:.2f}")
    value = f"{score.perplexity.value:.3f} ± {score.perplexity.error:.3f}"
    q = score.beside
    if q is None:
        return (*head, value, "", "", "")
    ratio = f"{100 * (q.ratio.value - 1):+.2f} ± {100 * q.ratio.error:.2f} %"
    return (*head, value, ratio, f"{q.kl_mean:.5f}", f"{100 * q.top1_agreement:.2f} %")
