"""Whether what a folder keeps as floats is what its `quantkit.json` says is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import SourceError
from quantkit.gguf.container import Opened
from quantkit.hub.manifest import Kept, Manifest, find_manifest, pattern_of
from quantkit.run.gguf_source.view import FLOATS
from quantkit.run.verification import Verification

_Floats = Iterable[tuple[str, tuple[int, ...]]]


def check_folder_coverage(
    report: Verification, tensors: Mapping[str, TensorInfo], parts: Mapping[str, tuple[str, ...]]
) -> None:
    """Of a folder of safetensors; `parts` are the tensors that quantized weights are made of."""
    inside = {part for found in parts.values() for part in found}
    floats = ((name, info.shape) for name, info in tensors.items() if name not in inside)
    _compare(report, _manifest(report.path, None), floats)


def check_gguf_coverage(report: Verification, opened: Opened) -> None:
    """Of a GGUF file."""
    first = opened.paths[0]
    floats = ((name, t.shape) for name, t in opened.tensors.items() if t.kind in FLOATS)
    _compare(report, _manifest(first.parent, first.name), floats)


def _manifest(folder: Path, file: str | None) -> Manifest | None:
    """What quantkit wrote; None where it did not, or an earlier version that did not say what it kept."""
    try:
        return find_manifest(folder, file)
    except SourceError:
        return None


def _compare(report: Verification, manifest: Manifest | None, floats: _Floats) -> None:
    if manifest is None:
        return
    found: dict[str, tuple[int, int, bool]] = {}
    for name, shape in floats:
        pattern = pattern_of(name)
        count, size, matrix = found.get(pattern, (0, 0, False))
        found[pattern] = count + 1, size + math.prod(shape), matrix or len(shape) > 1
    told = _together(manifest.kept)
    for pattern, expected in told.items():
        there = found.get(pattern, (0, 0, False))[:2]
        if there != expected:
            report.problems.append(
                f"`{pattern}`: quantkit.json says that {expected[0]:,} tensors of {expected[1]:,} parameters "
                f"are kept as floats; the files have {there[0]:,} of {there[1]:,}"
            )
    beyond = [pattern for pattern, (_, _, matrix) in found.items() if matrix and pattern not in told]
    report.problems += [f"`{p}` is kept as floats, which quantkit.json does not say" for p in beyond]
    total = sum(size for _, size in told.values())
    report.checks["coverage"] = f"kept as floats as quantkit.json says: {total:,} parameters"


def _together(kept: tuple[Kept, ...]) -> dict[str, tuple[int, int]]:
    """Of whatever dtype."""
    found: dict[str, tuple[int, int]] = {}
    for entry in kept:
        count, size = found.get(entry.pattern, (0, 0))
        found[entry.pattern] = count + entry.count, size + entry.parameters
    return found
