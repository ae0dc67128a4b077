"""`RunStore`: what has been done, durably.

    journal.jsonl                     one line per commit; appending it *is* the commit
    results/<target key>/0003.safetensors
    streams/0004/<stream>.<rows>.bin  hidden states entering block 4; two generations are kept

Everything is content-addressed: results by the key of their target's resolved plan, streams by the
key of the rows they carry. On open only journal lines whose files are there with the recorded sha256
are believed. Adding or changing one target leaves the finished ones alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quantkit.checkpoint.atomic import AtomicFile, fsync_dir, write_bytes, write_error
from quantkit.errors import ResumeError, UsageError
from quantkit.run import results
from quantkit.run.results import BlockResult
from quantkit.run.streams import sha256_file

JOURNAL = "journal.jsonl"
_GENERATIONS = 2


@dataclass(slots=True)
class _State:
    """What the journal says: file sums by (target key, block), streams by (streams key, generation)."""

    blocks: dict[tuple[str, int], str] = field(default_factory=dict)
    streams: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    finals: dict[tuple[str, str], Any] = field(default_factory=dict)


class RunStore:
    """Owner of one run folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._state = _State()
        self._held: IO[str] | None = None

    @classmethod
    def open(cls, root: Path, *, restart: bool = False) -> RunStore:
        """The store at `root`, made if absent; `restart` forgets everything in it."""
        root.mkdir(parents=True, exist_ok=True)
        store = cls(root)
        store._lock()
        with ExitStack() as on_failure:
            on_failure.callback(store.close)
            if restart:
                (root / JOURNAL).unlink(missing_ok=True)
            store._replay()
            on_failure.pop_all()
        return store

    def _lock(self) -> None:
        """Two runs in one folder would undo each other; the lock dies with the process that holds it."""
        held = (self.root / "lock").open("w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held.close()
            raise UsageError(
                f"another run is at work in `{self.root}`", remedy="wait for it, or give another --output"
            ) from error
        self._held = held

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._held is not None:
            self._held.close()

    def done(self, target: str, blocks: int) -> int:
        """How many leading blocks of a target key are committed, their files intact."""
        return next((block for block in range(blocks) if not self.has(target, block)), blocks)

    def has(self, target: str, stage: int) -> bool:
        """Whether what was made of a block, or of an end of the model, is committed and intact."""
        recorded = self._state.blocks.get((target, stage))
        return recorded is not None and _intact(self._result_path(target, stage), recorded)

    def generation(self, streams_key: str, needed: Sequence[str]) -> int:
        """The newest generation whose `needed` stream files are all intact, else 0."""
        for key, generation in sorted(self._state.streams, key=lambda k: -k[1]):
            files = self._state.streams[key, generation]
            if key == streams_key and all(
                name in files and _intact(self.stream_path(generation, name), files[name]) for name in needed
            ):
                return generation
        return 0

    def stream_path(self, generation: int, name: str) -> Path:
        return self.root / "streams" / f"{generation:04d}" / f"{name}.bin"

    def final(self, target: str, scores_key: str) -> Any:
        """The evaluation of a finished target, or None."""
        return self._state.finals.get((target, scores_key))

    def load(self, target: str, block: int) -> BlockResult:
        """Results of a committed block."""
        return results.decode(self._read(target, block))

    def metrics(self, target: str, block: int) -> Mapping[str, Any]:
        """The metrics stored with a committed block."""
        return results.extra(self._result_path(target, block))

    def _read(self, target: str, block: int) -> bytes:
        data = self._result_path(target, block).read_bytes()
        if hashlib.sha256(data).hexdigest() != self._state.blocks[target, block]:
            raise ResumeError(
                f"`{self._result_path(target, block)}` changed since it was committed",
                remedy="run again with --restart",
            )
        return data

    def commit(
        self,
        block: int,
        made: Mapping[str, tuple[BlockResult, Mapping[str, Any]]],
        streams_key: str,
        streams: Mapping[str, str],
    ) -> None:
        """Results of `block` by target key, and the sums of the stream files entering block + 1.

        The stream files are already in place; this makes them and the results count.
        """
        sums = {}
        for target, (result, extra) in made.items():
            path = self._result_path(target, block)
            path.parent.mkdir(parents=True, exist_ok=True)
            sums[target] = _write(path, results.Encoded(result, extra))
        self._append({"block": block, "results": sums, "streams_key": streams_key, "streams": dict(streams)})
        self._forget(block + 2 - _GENERATIONS)

    def commit_final(self, scores_key: str, metrics: Mapping[str, Any]) -> None:
        """Evaluations by target key, under the key of what was measured and how."""
        self._append({"final": dict(metrics), "scores_key": scores_key})

    def drop_streams(self) -> None:
        """Free the space of all streams, once every target is finished."""
        shutil.rmtree(self.root / "streams", ignore_errors=True)

    def _result_path(self, target: str, block: int) -> Path:
        return self.root / "results" / target / f"{block:04d}.safetensors"

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        path = self.root / JOURNAL
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fsync_dir(self.root)
        except OSError as error:
            raise write_error(error, path, needed=len(line)) from error
        self._apply(entry)

    def _replay(self) -> None:
        path = self.root / JOURNAL
        if not path.exists():
            return
        whole = path.read_bytes()
        # a kill during the append leaves an unfinished last line: it never counted
        complete = whole[: whole.rfind(b"\n") + 1]
        if complete != whole:
            write_bytes(path, complete)
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ResumeError(
                    f"`{path}:{number}` is not a commit: {error}", remedy="run again with --restart"
                ) from error

    def _apply(self, entry: Mapping[str, Any]) -> None:
        if "final" in entry:
            for target, metrics in entry["final"].items():
                self._state.finals[target, entry["scores_key"]] = metrics
            return
        for target, recorded in entry["results"].items():
            self._state.blocks[target, entry["block"]] = recorded
        self._state.streams[entry["streams_key"], entry["block"] + 1] = entry["streams"]

    def _forget(self, before: int) -> None:
        """Remove stream generations older than `before`."""
        folder = self.root / "streams"
        if not folder.exists():
            return
        for generation in folder.iterdir():
            if generation.name.isdecimal() and int(generation.name) < before:
                shutil.rmtree(generation, ignore_errors=True)


def _write(path: Path, encoded: results.Encoded) -> str:
    """Write a file piece by piece; returns the sha256 of its bytes."""
    out = AtomicFile(path, size=encoded.size)
    digest = hashlib.sha256()
    try:
        for piece in encoded:
            digest.update(piece)
            out.write(piece)
        out.commit()
    finally:
        out.discard()
    return digest.hexdigest()


def _intact(path: Path, recorded: str) -> bool:
    return path.is_file() and sha256_file(path) == recorded
