"""A GGUF file, verified: its header, names, values and tokens, and what the source has."""

from __future__ import annotations

from pathlib import Path

from quantkit.calibrate.tokenizer import Tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.blocks import unpack
from quantkit.gguf.container import Opened, open_file
from quantkit.gguf.types import TYPES
from quantkit.gguf.vocabulary import reference
from quantkit.hub.manifest import MANIFEST
from quantkit.progress import Progress
from quantkit.run.coverage_check import check_gguf_coverage
from quantkit.run.gguf_source.metadata_check import check_counts, check_metadata
from quantkit.run.gguf_source.opening import open_gguf, tokenizer_folder
from quantkit.run.gguf_source.view import FLOATS, GgufCheckpoint
from quantkit.run.llama_tokens import llama_differences
from quantkit.run.source_check import Rules, SourceCheck, told_manifest
from quantkit.run.tokenizer_check import check_template
from quantkit.run.verification import Verification, floats_of, nonfinite
from quantkit.tensors import QuantizedLinear


def check_gguf(
    report: Verification,
    file: Path,
    source: Checkpoint | None,
    tokens_of: Checkpoint | None,
    progress: Progress,
) -> None:
    """A GGUF file: its header, names, values and tokens, and what the source has."""
    try:
        opened = open_file(file)
    except SourceError as error:
        report.problems.append(error.message)
        return
    size = sum(tensor.nbytes for tensor in opened.tensors.values())
    report.checks["headers"] = f"{len(opened.tensors):,} tensors, {size:,} bytes"
    progress.step("verify", f"{len(opened.tensors):,} tensors")
    finite = _check_stored(report, opened)
    check_gguf_coverage(report, opened)
    check_counts(report, opened)
    ours = (file.parent / MANIFEST).is_file()
    view = _opened(report, file, source)
    if source is not None:
        check_metadata(report, opened, source, ours=ours)
    if view is None:
        return
    report.checks["architecture"] = f"{len(view.tensors):,} tensors of the model, all there"
    if source is not None:
        quantized = [name for name in view.tensors if view.kind(name) not in FLOATS]
        rules = Rules.of(told_manifest(file.parent, file.name), ours=ours)
        beside = SourceCheck(report, view, source, quantized, rules)
        for name in quantized if finite else ():
            beside.weight(name, view.read(name))
        beside.finish()
    _check_tokens(report, view, tokens_of)


def _opened(report: Verification, file: Path, source: Checkpoint | None) -> GgufCheckpoint | None:
    """The file as a checkpoint, with the names of the source where there is one; None when that fails."""
    found = None
    for like in (None,) if source is None else (None, source):
        try:
            found = open_gguf(file, like=like)
        except SourceError as error:
            report.problems.append(error.message)
            return None
        except UnsupportedError as error:
            note = f"names and shapes were not compared with the architecture: {error.message}"
            report.notes += [] if note in report.notes else [note]
            found = None
    return found


def _check_stored(report: Verification, opened: Opened) -> bool:
    """Every tensor of a GGUF file decodes, and every float in it is finite; whether that is so."""
    bad: list[str] = []
    undecoded = {tensor.kind.upper() for tensor in opened.tensors.values() if tensor.kind not in TYPES}
    if undecoded:
        report.notes.append(f"types that quantkit does not decode: {', '.join(sorted(undecoded))}")
    for name, stored in opened.tensors.items():
        if stored.kind in TYPES:
            rows = opened.read_bytes(name).view(-1, stored.byte_shape[-1])
            linear = QuantizedLinear(name, unpack(rows, stored.type))
            bad += [problem for what, tensor in floats_of(linear) for problem in nonfinite(what, tensor)]
    report.problems += bad
    quantized = sum(stored.kind not in FLOATS for stored in opened.tensors.values())
    report.checks["weights"] = f"{quantized:,} quantized (gguf), {len(opened.tensors) - quantized:,} floats"
    return not bad


def _check_tokens(report: Verification, view: GgufCheckpoint, source: Checkpoint | None) -> None:
    """llama.cpp, where it is there, gives texts the tokens of the source, without one those that are read."""
    try:
        tokenizer = reference(tokenizer_folder(view if source is None else source))
    except (SourceError, UnsupportedError) as error:
        report.notes.append(f"tokens were not compared: {error.message}")
        return
    _check_template(report, view, tokenizer)
    other, refused = llama_differences(view.path, tokenizer)
    if refused is not None:
        report.problems.append(refused)
        return
    if other is None:
        report.notes.append("tokens were not compared: llama-cpp-python is not installed")
        return
    report.problems += [f"llama.cpp makes other tokens: {found}" for found in other if not found.edge]
    edges = sum(found.edge for found in other)
    what = "the source" if source is not None else "its tokens as Transformers reads them"
    apart = f"; {edges} texts around special tokens differ" if edges else ""
    report.checks["tokens"] = f"llama.cpp against {what}{apart}"


def _check_template(report: Verification, view: GgufCheckpoint, tokenizer: Tokenizer) -> None:
    """The chat template renders, and is that of the tokenizer: of the source, or of the file itself."""
    ours = (view.path.parent / MANIFEST).is_file()
    check_template(report, tokenizer, ours=ours)
    template = view.opened.metadata.get("tokenizer.chat_template")
    if isinstance(tokenizer.chat_template, str) and template != tokenizer.chat_template:
        (report.problems if ours else report.notes).append("its chat template is not that of the source")
