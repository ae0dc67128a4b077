"""`verify`: whether the files of a checkpoint are whole, and mean what their config says.

One tensor is in memory at a time. What is wrong becomes a problem with the name of the tensor; what only
limits the look that was taken becomes a note.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.build import build_graph
from quantkit.run.export import MANIFEST
from quantkit.run.gguf_source import find_gguf
from quantkit.run.gguf_source.verify import check_gguf
from quantkit.run.plan import locate
from quantkit.run.progress import SILENT, Progress
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, dequantized, open_quantized, open_source
from quantkit.run.streams import sha256_file
from quantkit.run.verification import Verification, compare, compare_rest, floats_of, nonfinite
from quantkit.tensors import dequantize


def verify(
    path: Path,
    *,
    against: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Look at every byte of a checkpoint folder or GGUF file; `against` is the source it was made from.

    A damaged checkpoint is no error here: see `Verification.problems`. SourceError when `path` is neither, or
    the source cannot be opened.
    """
    file = find_gguf(path)
    if file is None:
        folder.check_folder(path)
    source = None
    if against is not None:
        progress.step("open", against)
        source = open_source(locate(against, offline=offline, cache_dir=cache_dir).path)
    report = Verification(path)
    progress.step("verify", "sums of the files")
    _check_sums(report)
    if file is not None:
        check_gguf(report, file, source, progress)
    else:
        _check_folder(report, source, progress)
    progress.finish()
    return report


def _check_folder(report: Verification, source: Checkpoint | None, progress: Progress) -> None:
    """A folder of safetensors: headers, names, values, and what the source has."""
    path = report.path
    try:
        checkpoint = Checkpoint.open(path)
        quantized = open_quantized(checkpoint)
        view = checkpoint if quantized is None else dequantized(quantized)
    except SourceError as error:
        report.problems.append(error.message)
        return
    report.checks["headers"] = f"{len(checkpoint.tensors):,} tensors, {checkpoint.size_bytes:,} bytes"
    if isinstance(view, Dequantized):
        counts = Counter(view.dropped.values())
        report.notes += [f"{count:,} tensors left out: {why}" for why, count in counts.items()]
    _check_names(report, view)
    progress.step("verify", f"{len(checkpoint.tensors):,} tensors")
    _check_values(report, checkpoint, quantized, source)
    if source is not None:
        compare_rest(report, view, source, quantized.parts if quantized is not None else {})


def _check_sums(report: Verification) -> None:
    """Sizes and sha256 of the files that quantkit.json lists."""
    folder = report.path if report.path.is_dir() else report.path.parent
    manifest = folder / MANIFEST
    if not manifest.is_file():
        report.notes.append("no quantkit.json: the sums of the files are not known")
        return
    try:
        files = json.loads(manifest.read_text("utf-8"))["files"]
        listed = {str(name): (int(sums["bytes"]), str(sums["sha256"])) for name, sums in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.problems.append(f"`{manifest}` is not what quantkit writes: {error!r}")
        return
    for name, (size, digest) in listed.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            report.problems.append(f"`{name}` is missing")
        elif file.stat().st_size != size:
            report.problems.append(f"`{name}` has {file.stat().st_size:,} bytes; {size:,} were written")
        elif sha256_file(file) != digest:
            report.problems.append(f"`{name}` changed since it was written: its sha256 is another")
    report.checks["sums"] = f"{len(listed):,} files of quantkit.json"


def _check_names(report: Verification, view: Checkpoint) -> None:
    """Every parameter of the architecture is filled, in its shape, and nothing is left over."""
    try:
        graph = build_graph(view)
    except SourceError as error:
        report.problems.append(error.message)
    except UnsupportedError as error:
        report.notes.append(f"names and shapes were not compared with the architecture: {error.message}")
    else:
        report.checks["architecture"] = f"{len(graph.blocks):,} blocks, every parameter filled"


def _check_values(
    report: Verification,
    checkpoint: Checkpoint,
    quantized: QuantizedCheckpoint | None,
    source: Checkpoint | None,
) -> None:
    """Every quantized weight decodes, and every float is finite."""
    parts = {} if quantized is None else quantized.parts
    inside = {part for found in parts.values() for part in found}
    floats = 0
    for name, info in checkpoint.tensors.items():
        if name not in inside and info.torch_dtype.is_floating_point:
            report.problems += nonfinite(name, checkpoint.read(name))
            floats += 1
    report.checks["floats"] = f"{floats:,} tensors, all read"
    if quantized is None:
        return
    for name in parts:
        try:
            linear = quantized.linear(name)
        except (SourceError, UnsupportedError) as error:
            report.problems.append(error.message)
            continue
        bad = [problem for what, tensor in floats_of(linear) for problem in nonfinite(what, tensor)]
        report.problems += bad
        if source is not None and not bad:
            report.problems += compare(report, name, dequantize(linear.weight), source)
    report.checks["weights"] = f"{len(parts):,} quantized ({quantized.format_name}), all decoded"
