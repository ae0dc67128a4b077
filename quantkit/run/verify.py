"""`verify`: whether the files of a checkpoint are whole, mean what their config says, and run.

One tensor is in memory at a time, but for the engine, which has a process of its own. What is wrong becomes a
problem with the name of the tensor; what only limits the look that was taken becomes a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.hub.manifest import MANIFEST
from quantkit.model.build import graph_of
from quantkit.model.skeleton import Skeleton, tied_otherwise
from quantkit.progress import SILENT, Progress
from quantkit.run.config_check import check_config, check_token_ids
from quantkit.run.coverage_check import check_folder_coverage
from quantkit.run.engine_check import check_engine
from quantkit.run.file_sums import check_sums
from quantkit.run.gguf_source import find_gguf
from quantkit.run.gguf_source.verify import check_gguf
from quantkit.run.plan import locate
from quantkit.run.quantization_check import check_plain, check_quantization, stored_weight
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, dequantized, open_quantized, open_source
from quantkit.run.source_check import Rules, SourceCheck, told_manifest
from quantkit.run.tokenizer_check import check_tokenizer
from quantkit.run.verification import Verification, floats_of, nonfinite
from quantkit.tensors import dequantize

# what AutoGPTQ calls its files, which other engines than Transformers find
_AUTOGPTQ = "gptq_model"


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
        report.notes += [f"{n:,} tensor{'' if n == 1 else 's'} left out: {why}" for why, n in counts.items()]
    ours = (path / MANIFEST).is_file()
    _check_file_names(report, checkpoint)
    _check_names(report, view, tokens_of)
    check_token_ids(report, view, tokens_of)
    progress.step("verify", f"{len(checkpoint.tensors):,} tensors")
    parts = quantized.parts if quantized is not None else {}
    beside = None
    if source is not None:
        check_config(report, view, source, ours=ours)
        beside = SourceCheck(report, view, source, parts, Rules.of(told_manifest(path), ours=ours))
    _check_values(report, checkpoint, quantized, _shown(view, beside))
    if beside is not None:
        beside.finish()
    check_folder_coverage(report, checkpoint.tensors, parts)
    check_tokenizer(report, view, tokens_of, ours=ours)


def _check_file_names(report: Verification, checkpoint: Checkpoint) -> None:
    """Transformers looks for two names alone, unless the config names another."""
    names = {info.file.name for info in checkpoint.tensors.values()}
    stated = checkpoint.config.get("transformers_weights")
    if folder.SINGLE_FILE in names or stated in names or not names:
        return
    index = folder.index_file([f.name for f in checkpoint.path.iterdir()])
    if index in (f"{folder.SINGLE_FILE}.index.json", stated) and index is not None:
        return
    found = min(names)
    said = report.notes if found.startswith(_AUTOGPTQ) else report.problems
    said.append(
        f"Transformers does not find `{found}`: it looks for `{folder.SINGLE_FILE}` or "
        f"`{folder.SINGLE_FILE}.index.json`"
    )


def _check_names(report: Verification, view: Checkpoint, like: Checkpoint | None) -> None:
    """Every parameter of the architecture is filled, in its shape, and nothing is left over."""
    try:
        skeleton = Skeleton.open(view, torch.float32)
        graph = graph_of(skeleton, view)
    except SourceError as error:
        report.problems.append(error.message)
    except UnsupportedError as error:
        report.notes.append(f"names and shapes were not compared with the architecture: {error.message}")
    else:
        odd = tied_otherwise(skeleton, view)
        if odd is None:
            report.checks["architecture"] = f"{len(graph.blocks):,} blocks, every parameter filled"
            return
        same = like is not None and _tied_otherwise(like) == odd
        (report.notes if same else report.problems).append(odd)


def _tied_otherwise(source: Checkpoint) -> str | None:
    """As `tied_otherwise`; None, too, where that is not known."""
    try:
        return tied_otherwise(Skeleton.open(source, torch.float32), source)
    except (SourceError, UnsupportedError):
        return None


def _shown(view: Checkpoint, beside: SourceCheck | None) -> Callable[[str, Tensor], None] | None:
    """What takes a decoded weight (out, in), to compare it in the order that the model keeps it in."""
    if beside is None:
        return None
    transposed = view.transposed if isinstance(view, Dequantized) else frozenset[str]()
    return lambda name, values: beside.weight(name, values.T if name in transposed else values)


def _check_values(
    report: Verification,
    checkpoint: Checkpoint,
    quantized: QuantizedCheckpoint | None,
    compare: Callable[[str, Tensor], None] | None,
) -> None:
    """Every quantized weight decodes, and every float is finite; `compare` is told those that do."""
    parts = {} if quantized is None else quantized.parts
    inside = {part for found in parts.values() for part in found}
    floats = 0
    for name, info in checkpoint.tensors.items():
        if name not in inside and info.torch_dtype.is_floating_point:
            report.problems += nonfinite(name, checkpoint.read(name))
            floats += 1
    report.checks["floats"] = f"{floats:,} tensors, all read"
    if quantized is None:
        check_plain(report, checkpoint)
        return
    weights = []
    for name in parts:
        try:
            linear = quantized.linear(name)
        except (SourceError, UnsupportedError) as error:
            report.problems.append(error.message)
            continue
        weights.append(stored_weight(quantized, linear))
        bad = [problem for what, tensor in floats_of(linear) for problem in nonfinite(what, tensor)]
        report.problems += bad
        if compare is not None and not bad:
            compare(name, dequantize(linear.weight))
    report.checks["weights"] = f"{len(parts):,} quantized ({quantized.format_name}), all decoded"
    check_quantization(report, quantized, weights)
