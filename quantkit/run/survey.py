"""What a quantized checkpoint holds, and the schemes under which another format stores the same values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantkit import registry
from quantkit.errors import UnsupportedError
from quantkit.model.graph import ModelGraph, Weight
from quantkit.protocols import Format
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.run.regrid import ACT_ORDER, fits_symmetric, inexact, plain, regrid
from quantkit.schemes import SCALE_DTYPES, Scheme
from quantkit.tensors import shape

# groups that are tried when a format cannot have the one that is there: repeating a scale loses nothing
_FINER = (128, 64, 32)
_SHOWN = 3
ROUND = "`quantkit convert` rounds anew: give it the original checkpoint, or this one"


@dataclass(frozen=True, slots=True)
class Found:
    """The grid of one weight.

    symmetric      without its zero points every code still fits its bits
    column_groups  columns are in groups of their own (act-order)
    inexact        dtype → how many of the scales it would round
    """

    weight: Weight
    bits: int
    group: tuple[int, int]
    symmetric: bool
    zero_points: bool
    column_groups: bool
    dtype: str
    scales: int
    inexact: Mapping[str, int]

    @property
    def name(self) -> str:
        """The scheme that the source has it in."""
        return self.scheme(sym=not self.zero_points, sizes=(self.group[1],)).name

    def scheme(self, *, sym: bool, sizes: Iterable[int]) -> Scheme:
        """Its own grid; a group as wide as the row has the size that others have, if that is in `sizes`."""
        out, width = self.weight.shape
        whole = self.group[1] >= width
        per_tensor = whole and out > 1 and self.group[0] == out
        size = None if per_tensor or (whole and width not in sizes) else self.group[1]
        return Scheme(self.bits, size, sym=sym, per_tensor=per_tensor)


def survey(source: QuantizedCheckpoint, graph: ModelGraph) -> list[Found]:
    """Every quantized weight in model order; UnsupportedError for what is no plain grid of integers."""
    found, problems = [], list(_outside(source, graph))
    for weight in graph.weights():
        if weight.key not in source.parts:
            continue
        try:
            found.append(_look(source, weight))
        except UnsupportedError as error:
            problems.append(error.message)
    refuse(problems)
    return found


def schemes_for(
    source: QuantizedCheckpoint, found: Sequence[Found], format_name: str, dtype: str, asked: Scheme | None
) -> dict[str, Scheme]:
    """Weight key → the scheme that stores it without loss: `asked`, or its own as far as possible.

    dtype is that of the model. UnsupportedError lists what cannot be.
    """
    fmt: Format = registry.load("formats", format_name).FORMAT
    sym = all(f.symmetric for f in found)
    sizes = {f.group[1] for f in found if f.group[1] < f.weight.shape[1]}
    scales, problems = _scale_dtype(found, fmt, dtype)
    chosen: dict[str, Scheme] = {}
    for f in found:
        own = replace(asked or f.scheme(sym=sym, sizes=sizes), scale_dtype=scales)
        if f.column_groups and not fmt.holds_column_groups():
            problems.append(f"`{f.weight.key}` has {ACT_ORDER}, which {format_name} does not record")
        elif (why := fmt.accepts(own, f.weight)) is None:
            chosen[f.weight.key] = replace(own, convention=fmt.convention(own))
        elif asked is None and (finer := _finer(f, own, fmt)) is not None:
            chosen[f.weight.key] = replace(finer, convention=fmt.convention(finer))
        else:
            problems.append(f"`{f.weight.key}` cannot be {own.name}: {why}")
    refuse(problems)
    if asked is not None:
        check(source, chosen)
    return chosen


def check(source: QuantizedCheckpoint, chosen: Mapping[str, Scheme]) -> None:
    """UnsupportedError unless every weight can be moved to its scheme; reads them all."""
    refuse([why for name, scheme in chosen.items() if (why := _obstacle(source, name, scheme)) is not None])


def _obstacle(source: QuantizedCheckpoint, name: str, scheme: Scheme) -> str | None:
    try:
        regrid(source.linear(name), scheme)
    except UnsupportedError as error:
        return error.message
    return None


def refuse(problems: Sequence[str], remedy: str = ROUND) -> None:
    """Raise UnsupportedError with the first few, when there are any."""
    if not problems:
        return
    more = [f"{len(problems) - _SHOWN:,} more likewise"] if len(problems) > _SHOWN + 1 else []
    listed = (*problems[:_SHOWN], *(more or problems[_SHOWN:]))
    raise UnsupportedError(
        "\n".join(("this cannot be repacked without loss:", *listed)),
        remedy=remedy,
    )


def _outside(source: QuantizedCheckpoint, graph: ModelGraph) -> Iterable[str]:
    inside = {weight.key for weight in graph.weights()}
    for name in source.parts:
        if name not in inside:
            yield f"`{name}` lies outside the blocks: most engines fill it with random values if quantized"


def _look(source: QuantizedCheckpoint, weight: Weight) -> Found:
    q, scale = plain(source.linear(weight.key))
    out, width = shape(q)
    if q.group[0] not in (1, out) or (q.group[0] != 1 and q.group[1] < width):
        raise UnsupportedError(f"`{weight.key}` shares scales within tiles of {q.group[0]} × {q.group[1]}")
    return Found(
        weight=weight,
        bits=q.bits,
        group=q.group,
        symmetric=fits_symmetric(q, q.bits),
        zero_points=q.zero_point is not None,
        column_groups=q.column_group is not None,
        dtype=str(scale.dtype).removeprefix("torch."),
        scales=scale.numel(),
        inexact={name: inexact(scale, getattr(torch, name)) for name in SCALE_DTYPES},
    )


def _scale_dtype(found: Sequence[Found], fmt: Format, dtype: str) -> tuple[str, list[str]]:
    """The first dtype that holds every scale: the one that `fmt` usually has, then the source's own."""
    usual = fmt.scale_dtype(dtype)
    own = Counter(f.dtype for f in found).most_common(1)[0][0] if found else usual
    for candidate in dict.fromkeys((usual, own)):
        if not any(f.inexact[candidate] for f in found) and all(_stores(fmt, f, candidate) for f in found):
            return candidate, []
    problems = [
        f"{f.inexact[usual]:,} of {f.scales:,} {f.dtype} scales of `{f.weight.key}` are not exact in {usual}"
        for f in found
        if f.inexact[usual]
    ]
    return usual, problems


def _stores(fmt: Format, found: Found, dtype: str) -> bool:
    """Whether `fmt` lays out scales in `dtype` when a scheme says so."""
    scheme = replace(found.scheme(sym=True, sizes=(found.group[1],)), scale_dtype=dtype)
    if fmt.accepts(scheme, found.weight) is not None:
        return True  # refused for what it is, which is said then
    return any(spec.dtype == getattr(torch, dtype) for spec in fmt.layout(found.weight, scheme))


def _finer(found: Found, own: Scheme, fmt: Format) -> Scheme | None:
    """The same values in the coarsest finer groups that `fmt` accepts."""
    if found.column_groups:
        return None
    sizes: list[int | None] = [None] if own.per_tensor else []
    sizes += [size for size in _FINER if found.group[1] % size == 0 and size < found.group[1]]
    for size in sizes:
        scheme = replace(own, group_size=size, per_tensor=False)
        if fmt.accepts(scheme, found.weight) is None:
            return scheme
    return None
