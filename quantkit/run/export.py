"""From the run store to files: codes move, nothing is computed anew.

A target's folder is built beside its final place, read back and compared with the store, and only
then renamed. `quantkit.json` is written last: a folder without it is incomplete by definition.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import PARTIAL, replace_dir, write_error, write_text
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardedWriter, ShardPlan
from quantkit.errors import CoverageError, SourceError, UsageError, VerifyError
from quantkit.hub.manifest import MANIFEST, FileSum, Manifest, read_manifest
from quantkit.hub.side_files import cleaned, scrubbed_config, terms
from quantkit.model.graph import ModelGraph
from quantkit.protocols import Assigned
from quantkit.run import gguf
from quantkit.run.files import Entry, Packing, entries
from quantkit.run.gguf import StoreOrigin
from quantkit.run.gguf_file import GgufFile
from quantkit.run.results import BlockResult, Results
from quantkit.run.streams import sha256_file
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the folders of one run."""

    checkpoint: Checkpoint
    graph: ModelGraph
    store: Results

    def export(
        self,
        target: Packing,
        key: str,
        files: ShardPlan | GgufFile,
        folder: Path,
        manifest: Manifest,
        check: Callable[[Path], None],
    ) -> None:
        """Write `folder` for one target whose blocks are all committed; the manifest lacks the sums of files.

        `check` looks at the folder once all is written, and raises to keep it from getting its name.

        Raises VerifyError when a file does not
        read back as the store's codes, CoverageError when a weight that should be quantized is not.
        """
        with building(folder, files.total_bytes) as partial:
            if isinstance(files, GgufFile):
                gguf.write(files, partial, StoreOrigin(self.store, key, self.checkpoint, self.graph))
            else:
                config = self.write(target, key, files, partial)
                self._read_back(target, key, partial, config)
            write_manifest(partial, manifest)
            check(partial)

    def write(self, target: Packing, key: str, shards: ShardPlan, folder: Path) -> Mapping[str, Any]:
        """Write weights, configuration and side files into `folder`; the quantization config."""
        config = target.format.config(target.facts)
        with ShardedWriter(folder, shards) as writer:
            for name, tensor in self._tensors(target, key):
                writer.write(name, tensor)
        self._side_files(target, folder, config)
        return config

    def _tensors(self, target: Packing, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything the files hold, block by block."""
        for block, group in _by_block(entries(target, self.checkpoint, self.graph)):
            result = self._result(target, key, block)
            linears = result.by_name()
            for entry in group:
                if entry.assigned is not None:
                    tensors = _encode(target, entry.assigned, linears, self.checkpoint.dtype)
                    for spec in entry.specs:
                        yield spec.name, tensors[spec.name]
                    continue
                for spec in entry.specs:
                    made = result.tensors.get(spec.name)
                    yield spec.name, self.checkpoint.read(spec.name) if made is None else made

    def _result(self, target: Packing, key: str, block: int | None) -> BlockResult:
        """What was made of a block; outside the blocks, what the format adds."""
        if block is None:
            return BlockResult((), target.format.companions(target.facts))
        return self.store.load(key, block)

    def _side_files(self, target: Packing, folder: Path, config: Mapping[str, Any]) -> None:
        model = scrubbed_config(self.checkpoint.config)
        write_text(folder / "config.json", to_json_text({**model, "quantization_config": dict(config)}))
        for name, content in target.format.side_files(config).items():
            write_text(folder / name, to_json_text(content))
        try:
            beside = (*self.checkpoint.extras(), *terms(self.checkpoint.path))
            for file in {file.name: file for file in beside}.values():
                (folder / file.name).write_bytes(cleaned(file.name, file.read_bytes()))
        except OSError as error:
            raise write_error(error, folder, needed=0) from error

    def _read_back(self, target: Packing, key: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Every weight, read from the files by the format's own reader, must equal the store's."""
        written = Checkpoint.open(folder)
        for block, group in _by_block(entries(target, self.checkpoint, self.graph)):
            result = self._result(target, key, block)
            linears = result.by_name()
            for entry in group:
                if entry.assigned is not None:
                    name = entry.assigned.weight.key
                    tensors = {spec.name: written.read(spec.name) for spec in entry.specs}
                    same = _same(target.format.decode(name, tensors, config), linears[name])
                else:
                    name = entry.specs[0].name
                    made = {s.name: t for s in entry.specs if (t := result.tensors.get(s.name)) is not None}
                    same = all(_same(written.read(n), tensor) for n, tensor in made.items())
                if not same:
                    raise VerifyError(
                        f"`{name}` in `{folder}` does not read back as what was stored",
                        remedy="this is a fault of the format's writer: please report it",
                    )


@contextmanager
def building(folder: Path, needed: int) -> Iterator[Path]:
    """A new sibling of `folder` to write into, which takes its name when nothing was raised.

    needed: bytes that will be written, for the message when the disk refuses.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise write_error(error, partial, needed=needed) from error
    yield partial
    replace_dir(partial, folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `quantkit.json`, last: the manifest with the sum of every file."""
    files = {p.name: FileSum(p.stat().st_size, sha256_file(p)) for p in sorted(folder.iterdir())}
    write_text(folder / MANIFEST, to_json_text(replace(manifest, files=files).to_json()))


def free_or_ours(folder: Path, on_exists: str, key: str) -> bool:
    """True when `folder` already holds this very result; False when it may be written.

    UsageError when it holds something else: a person's files are never replaced, an earlier result
    only with ``on_exists: replace``.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UsageError(
            f"`{folder}` exists and was not written by quantkit",
            remedy="give another --output, or move it away",
        )
    if on_exists == "replace":
        return False
    try:
        known = read_manifest(folder)
    except SourceError:
        known = None
    if on_exists == "resume" and known is not None and known.key == key:
        return all(
            (folder / n).is_file() and (folder / n).stat().st_size == told.bytes
            for n, told in known.files.items()
        )
    raise UsageError(
        f"`{folder}` holds the result of another plan" if on_exists == "resume" else f"`{folder}` exists",
        remedy="give another --output, or --on-exists replace",
    )


def _encode(
    target: Packing, assigned: Assigned, linears: Mapping[str, QuantizedLinear], dtype: str
) -> dict[str, Tensor]:
    linear = linears.get(assigned.weight.key)
    if linear is None or assigned.scheme is None:
        raise CoverageError(
            f"`{assigned.weight.key}` was to be quantized for {target.name} and is not in the store",
            remedy="run again with --restart, and report it if it happens again",
        )
    return target.format.encode(linear, assigned.scheme, dtype)


def _by_block(found: Iterator[Entry]) -> Iterator[tuple[int | None, list[Entry]]]:
    """Consecutive entries of one block together."""
    group: list[Entry] = []
    for entry in found:
        if group and entry.block != group[0].block:
            yield group[0].block, group
            group = []
        group.append(entry)
    if group:
        yield group[0].block, group


def _same(a: Any, b: Any) -> bool:
    """Equal in meaning and in every stored number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # bytes: some floats of 8 bits cannot be compared, and −0 is not 0
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(_bytes(a), _bytes(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, QuantizedLinear | Affine | Codebook | Float):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def to_json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
