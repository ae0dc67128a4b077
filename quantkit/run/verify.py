"""`verify`: whether the files of a checkpoint are whole, mean what their config says, and run.

One tensor is in memory at a time, but for the engine, which has a process of its own. What is wrong becomes a
problem with the name of the tensor; what only limits the look that was taken becomes a note.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.hub.manifest import MANIFEST
from quantkit.model.build import build_graph
from quantkit.run.coverage_check import check_folder_coverage
from quantkit.run.engine_check import check_engine
from quantkit.run.file_sums import check_sums
from quantkit.run.gguf_source import find_gguf
from quantkit.run.gguf_source.verify import check_gguf
from quantkit.run.plan import locate
from quantkit.run.progress import SILENT, Progress
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, dequantized, open_quantized, open_source
from quantkit.run.tokenizer_check import check_tokenizer
from quantkit.run.verification import Verification, compare, compare_rest, floats_of, nonfinite
from quantkit.tensors import dequantize


def verify(
    path: Path,
    *,
    against: str | None = None,
    engine: bool = True,
    device: str = "cpu",
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Look at every byte of a checkpoint folder or GGUF file, then load and run it in the engine it is for.

    against  the source it was made from, to compare with
    engine   False: only the files are looked at; damaged ones are given to no engine either
    device   where the engine runs, but for llama.cpp, which always runs on the CPU

    A damaged checkpoint is no error here: see `Verification.problems`. SourceError when `path` is neither, or
    the source cannot be opened.
    """
    if find_gguf(path) is None:
        folder.check_folder(path)
    source = None
    if against is not None:
        progress.step("open", against)
        source = open_source(locate(against, offline=offline, cache_dir=cache_dir, progress=progress).path)
    report = verify_files(path, source, progress=progress)
    if engine and report.sound:
        _check_engine(report, device, progress)
    elif engine:
        report.notes.append("no engine was run: it is not for damaged files")
    progress.finish()
    return report


def verify_files(
    path: Path,
    source: Checkpoint | None = None,
    *,
    tokens_of: Checkpoint | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """The part that needs no engine: every byte of a folder or GGUF file, names, values, tokenizer.

    source     what it was made from, to compare weights and tokens with
    tokens_of  as `source`, for tokens alone
    """
    file = find_gguf(path)
    report = Verification(path)
    progress.step("verify", "sums of the files")
    check_sums(report, file)
    if file is not None:
        check_gguf(report, file, source, tokens_of or source, progress)
    else:
        _check_folder(report, source, tokens_of or source, progress)
    return report


def _check_engine(report: Verification, device: str, progress: Progress) -> None:
    """The engine computes what quantkit reads in the files."""
    looked = check_engine(report.path, device=device, progress=progress)
    report.engines += looked.checks
    report.notes += looked.notes
    report.problems += [
        f"{c.engine} {c.version}: {c.problem}" for c in looked.checks if c.problem is not None
    ]


def _check_folder(
    report: Verification, source: Checkpoint | None, tokens_of: Checkpoint | None, progress: Progress
) -> None:
    """A folder of safetensors: headers, names, values, tokens, and what the source has."""
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
    parts = quantized.parts if quantized is not None else {}
    check_folder_coverage(report, checkpoint.tensors, parts)
    if source is not None:
        compare_rest(report, view, source, parts)
    check_tokenizer(report, view, tokens_of, ours=(path / MANIFEST).is_file())


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
