"""`collect_imatrix`: what reaches every weight of a model, as llama.cpp's importance matrix.

The model goes through the machine one block at a time. Each block's sums are committed to a store beside the
output, with the hidden states behind it, so a killed run continues; the store goes when the file is there.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.calibrate.tokens import build
from quantkit.errors import NumericsError, UnsupportedError
from quantkit.gguf import imatrix as files
from quantkit.gguf.architectures import Model
from quantkit.gguf.imatrix import CHUNK_SIZE, Entry, Imatrix
from quantkit.hub.fetch import Source
from quantkit.model.build import build_graph
from quantkit.model.graph import Block
from quantkit.model.runtime import Runtime
from quantkit.progress import SILENT, BlockInfo, Progress
from quantkit.recipe.plan import key_of
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import DEFAULT_LENGTH, Calibration, Device
from quantkit.run import budget
from quantkit.run.advance import Streams
from quantkit.run.estimate import BASE_BYTES, context
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.plan import check_floats, locate
from quantkit.run.quantized import open_source
from quantkit.run.results import BlockResult
from quantkit.run.rows import mixture
from quantkit.run.store import RunStore
from quantkit.run.streams import REFERENCE, RowSet
from quantkit.table import Table

_STORE = ".quantkit"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Collected:
    """An imatrix that was written to `path`; of several merged files, `unshared` names what some lacked."""

    path: Path
    source: str
    imatrix: Imatrix
    unshared: tuple[str, ...] = ()

    def unreached(self) -> dict[str, list[int]]:
        """The experts that no token reached, by the tensor they are in."""
        found = {n: (e.counts == 0).nonzero().flatten().tolist() for n, e in self.imatrix.entries.items()}
        return {name: experts for name, experts in found.items() if experts}

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "source": self.source,
            "datasets": list(self.imatrix.datasets),
            "chunks": self.imatrix.chunks,
            "chunk_size": self.imatrix.chunk_size,
            "tensors": {
                name: {
                    "experts": entry.sums.shape[0],
                    "inputs": entry.sums.shape[1],
                    "tokens_min": int(entry.counts.min()),
                    "tokens_max": int(entry.counts.max()),
                }
                for name, entry in self.imatrix.entries.items()
            },
            "unreached": self.unreached(),
            "unshared": list(self.unshared),
        }

    def table(self) -> Table:
        """One row for all blocks together, per kind of tensor."""
        kinds: dict[str, list[Entry]] = {}
        for name, entry in self.imatrix.entries.items():
            kinds.setdefault(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight"), []).append(entry)
        rows = tuple(_row(kind, entries) for kind, entries in kinds.items())
        columns = ("tensor", "blocks", "experts", "inputs", "tokens", "reached")
        text = ", ".join(self.imatrix.datasets) or "unknown text"
        title = (
            f"{self.source} → {self.path}: {len(self.imatrix.entries):,} tensors, "
            f"{self.imatrix.chunks:,} × {self.imatrix.chunk_size:,} tokens of {text}"
        )
        return Table(title, columns, rows, tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        unreached = self.unreached()
        for name, experts in list(unreached.items())[:_SHOWN]:
            of = self.imatrix.entries[name].counts.numel()
            yield f"{name}: no token reached {len(experts):,} of {of:,} experts ({_shortened(experts)})"
        if len(unreached) > _SHOWN:
            yield f"and {len(unreached) - _SHOWN:,} more tensors with such experts; --json has them all"
        if self.unshared:
            yield f"in some of the files only: {_shortened(self.unshared)}"


def collect_imatrix(
    source: str,
    output: Path,
    *,
    calibration: Calibration = Calibration(),  # noqa: B008 (a frozen value)
    device: Device = Device(),  # noqa: B008
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Collected:
    """Σ x² of every input of every weight in the blocks of a model, written to `output`.

    `source` is a folder, a GGUF file, a Hub id or `demo`; `output` is GGUF, or legacy when its name ends in
    ``.dat``, and is replaced. Called again after it was killed, it continues with the next block.
    UnsupportedError when llama.cpp cannot run the model, NumericsError when an activation is not finite.
    """
    progress.step("plan", source)
    found = locate(source, offline=offline, cache_dir=cache_dir, progress=progress)
    work = _Pass(found, calibration, device)
    progress.step("calibrate", work.detail)
    with closing(RunStore.open(store_of(output))) as store:
        collected = work.carry_out(store, progress)
    _write(output, collected)
    shutil.rmtree(store_of(output), ignore_errors=True)
    progress.finish()
    return Collected(output, work.name, collected)


def merge_imatrix(paths: Sequence[Path], output: Path, *, chunk_size: int = CHUNK_SIZE) -> Collected:
    """The sums of several imatrix files of one model, of either format, written to `output`.

    One file alone is converted. `chunk_size`: tokens that one call of a legacy file counts as. SourceError
    when a file is not sound, or they are of different models.
    """
    several = [files.read(path, chunk_size=chunk_size) for path in paths]
    merged = files.merge(several)
    _write(output, merged)
    return Collected(output, ", ".join(path.name for path in paths), merged, files.unshared(several))


def store_of(output: Path) -> Path:
    """The folder in which a run keeps what it has done, until `output` is there."""
    return output.with_name(output.name + _STORE)


class _Sums:
    """Σ x² (in,) fp64 and tokens of the sites of one block, fed by its forward pass."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.squares = {
            site.id: torch.zeros(site.width, dtype=torch.float64, device=device) for site in block.sites
        }
        self.tokens = dict.fromkeys(self.squares, 0)

    def __call__(self, site: str, x: Tensor) -> None:
        """x (…, in)."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.squares[site] += x.square().sum(0, dtype=torch.float64)
        self.tokens[site] += x.shape[0]

    def check(self) -> None:
        """NumericsError when anything was not finite."""
        for site, squares in self.squares.items():
            if not bool(torch.isfinite(squares).all()):
                raise NumericsError(
                    f"activations entering `{site}` are not finite",
                    remedy="run the forward pass in float32: --dtype float32; if it is, check the source",
                )


class _Pass:
    """One pass of calibration rows through the blocks of a model."""

    def __init__(self, found: Source, calibration: Calibration, device: Device) -> None:
        self.name = found.name
        self._checkpoint = open_source(found.path)
        self._graph = build_graph(self._checkpoint)
        check_floats(found, self._checkpoint, self._graph)
        shapes = {name: info.shape for name, info in self._checkpoint.tensors.items()}
        # before any work: this fails for models that the file has no names for
        self._placements = Model.of(self._checkpoint.config).placements(self._graph, shapes)
        self._device, self._on = device, budget.device(device.map)
        self._dtype = budget.compute_dtype(device.dtype, self._on)
        self._check_memory()
        length = calibration.length or min(DEFAULT_LENGTH, context(self._checkpoint))
        self._set = build(
            mixture(calibration),
            load_tokenizer(tokenizer_folder(self._checkpoint)),
            rows=calibration.rows,
            length=length,
            seed=calibration.seed,
            template=None if calibration.template == "raw" else calibration.template,
        )
        self._rows = RowSet("calibration", self._set.tokens, True)
        self.detail = f"{calibration.rows:,} × {length:,} tokens of {calibration.source}"

    def carry_out(self, store: RunStore, progress: Progress) -> Imatrix:
        """What is not in the store yet is collected, then everything is put under its GGUF name."""
        blocks = self._graph.blocks
        key = key_of(
            {
                "imatrix": 1,
                "source": self._checkpoint.fingerprint(),
                "dtype": str(self._dtype),
                "device": self._on.type,
                "batch_tokens": self._device.batch_tokens,
                "calibration": self._set.sha256,
            }
        )
        if store.done(key, len(blocks)) < len(blocks):
            self._collect(store, key, progress)
        seen: dict[str, tuple[Tensor, int]] = {}
        for block in blocks:
            squares, tokens = store.load(key, block.index).tensors, store.metrics(key, block.index)["tokens"]
            for site in block.sites:
                seen |= {w.key: (squares[site.id], tokens[site.id]) for w in site.weights}
        entries = files.entries_of(self._placements, seen)
        datasets = tuple(dict.fromkeys(share.name for share in self._set.sources))
        return Imatrix(entries, datasets, self._rows.rows, self._rows.length)

    def _collect(self, store: RunStore, key: str, progress: Progress) -> None:
        blocks, rows = self._graph.blocks, self._rows
        runtime = Runtime(self._checkpoint, self._graph, dtype=self._dtype, device=self._on)
        hidden = blocks[0].sites[0].width
        streams = Streams(store, hidden, self._dtype, self._on, self._device.batch_tokens)
        done = store.done(key, len(blocks))
        generation = store.generation(key, [Streams.name(REFERENCE, rows)])
        start = generation if generation <= done else 0
        progress.start(sum(block.parameters for block in blocks), len(blocks))
        for block in blocks[:start]:
            progress.block(block.index, BlockInfo(0.0, block.parameters))
        if start:
            progress.note(f"continuing at block {start} of {len(blocks)}: everything before it is committed")
        else:
            batches = (rows.tokens[part] for part in rows.batches(streams.batch_tokens))
            streams.write(0, REFERENCE, rows, (runtime.embed(tokens) for tokens in batches))
            runtime.release_embed()
            streams.take_written()
        for block in blocks[start:]:
            began = time.monotonic()
            sums = self._block(runtime, block, streams)
            facts: Mapping[str, Any] = {"tokens": sums.tokens}
            written = streams.take_written()
            store.commit(block.index, {key: (BlockResult((), sums.squares), facts)}, key, written)
            budget.release_memory()
            progress.block(block.index, BlockInfo(time.monotonic() - began, block.parameters))

    def _block(self, runtime: Runtime, block: Block, streams: Streams) -> _Sums:
        """The rows through one block, and what went on inside."""
        loaded, sums = runtime.load(block.index), _Sums(block, self._on)
        batches = streams.batches(block.index, REFERENCE, self._rows)
        outputs = (loaded.run(states, sums) for _, states in batches)
        if block is self._graph.blocks[-1]:
            for _ in outputs:  # nobody reads what comes out of the last one
                pass
        else:
            streams.write(block.index + 1, REFERENCE, self._rows, outputs)
        sums.check()
        return sums

    def _check_memory(self) -> None:
        """UnsupportedError when more is needed than `max_memory` allows."""
        size, allowed = self._dtype.itemsize, self._device.max_bytes
        sites = [site for block in self._graph.blocks for site in block.sites]
        outer = max((w.parameters for w in self._graph.outer), default=0) * size
        weights = max((block.parameters for block in self._graph.blocks), default=0) * size
        active = 12 * self._device.batch_tokens * max((site.width for site in sites), default=0) * size
        # the sums of all blocks: as they are kept, and as they are written
        needed = BASE_BYTES + max(2 * outer, weights + active, 16 * sum(site.width for site in sites))
        if allowed is not None and needed > allowed:
            raise UnsupportedError(
                f"memory: up to {format_size(needed)} needed; --max-memory allows {format_size(allowed)}",
                remedy="allow more",
            )


def _write(output: Path, imatrix: Imatrix) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write(output, imatrix)


def _row(kind: str, entries: Sequence[Entry]) -> tuple[str, ...]:
    counts = torch.cat([entry.counts for entry in entries])
    widths = sorted({entry.sums.shape[1] for entry in entries})
    experts = sorted({entry.counts.numel() for entry in entries})
    least, most = int(counts.min()), int(counts.max())
    return (
        kind,
        f"{len(entries):,}",
        "" if experts == [1] else ", ".join(f"{n:,}" for n in experts),
        ", ".join(f"{n:,}" for n in widths),
        f"{most:,}" if least == most else f"{least:,} to {most:,}",
        f"{100 * float((counts > 0).double().mean()):.4g} %",
    )


def _shortened(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(str(item) for item in items[:_SHOWN]) + more
