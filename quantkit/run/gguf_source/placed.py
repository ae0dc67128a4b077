"""Where the tensors of a checkpoint lie in a GGUF file: how one is written, read backwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from quantkit.errors import SourceError
from quantkit.gguf.architectures import Placed
from quantkit.gguf.architectures.rope import GENERATED
from quantkit.model.graph import ModelGraph

_EXPERT = re.compile(r"(?P<name>.+)\[(?P<expert>\d+)\]")
# divisors of rotary frequencies belong to the configuration; a head may be an embedding a second time
_ASIDE = frozenset((*GENERATED, "output.weight"))
# these may be left out of a file, and are zero then
_OPTIONAL = ".bias"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor of the file that is a part of a checkpoint tensor.

    stored      its name in the file
    matrix      which of the stacked matrices there it is, or lies in, None where there is one
    begin, end  rows of that matrix
    expert      which of the stacked matrices of the checkpoint tensor it belongs to, None where there is one
    rows        the row there that each of its rows is, None: all, in order
    transposed  whether the checkpoint has it as (in, out)
    add         what was added to every value
    """

    stored: str
    matrix: int | None
    begin: int
    end: int
    expert: int | None
    rows: Tensor | None
    transposed: bool
    add: float

    @property
    def in_order(self) -> bool:
        """Whether its rows are the checkpoint's rows, one by one."""
        return self.rows is None and self.expert is None and not self.transposed

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write its `values` to where they belong in the checkpoint tensor `target`."""
        inside = target if self.expert is None else target[self.expert]
        inside = inside.T if self.transposed else inside
        if self.rows is None:
            inside.copy_(values)
        else:
            inside.index_copy_(0, self.rows.long(), values)


def disk_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name → shape of what Transformers would save of a meta model; of tied weights, the first."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach()
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, state).items()}


def pieces(
    where: str,
    placements: Iterable[Placed],
    graph: ModelGraph,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[Piece, ...]]:
    """Checkpoint name → the pieces that make it up; none where it is zero.

    `shapes` are the checkpoint's, `stored` the file's. SourceError for tensors that the file lacks, has in
    another shape, or has beside them.
    """
    transposed = {w.key for w in graph.weights() if w.part is not None and w.part.transposed}
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    taken: set[tuple[str, int | None, int]] = set()
    missing, wrong = [], []
    unused = set(stored) - _ASIDE
    for placed in placements:
        unused.discard(placed.name)
        if placed.name not in stored:
            missing += [] if placed.name.endswith(_OPTIONAL) else [f"`{placed.name}`"]
        elif stored[placed.name] != placed.shape:
            wrong.append(f"`{placed.name}` is {stored[placed.name]}, not {placed.shape}")
        else:
            for name, piece in _split(placed, shapes, transposed):
                place = (name, piece.expert, 0 if piece.rows is None else int(piece.rows[0]))
                if place not in taken:  # an embedding may be there a second time, as the head
                    found[name].append(piece)
                    taken.add(place)
    faults = wrong[:3]
    if unused:
        faults.append(f"nothing uses {len(unused):,} of its tensors: {', '.join(sorted(unused)[:3])}")
    if missing:
        faults.append(f"it lacks {len(missing):,} tensors: {', '.join(missing[:3])}")
    if faults:
        raise SourceError(
            f"`{where}` does not fit its configuration: {'; '.join(faults)}",
            remedy="the file is damaged, or a config.json beside it belongs to another model",
        )
    return {name: tuple(parts) for name, parts in found.items()}


def _split(
    placed: Placed, shapes: Mapping[str, tuple[int, ...]], transposed: set[str]
) -> Iterator[tuple[str, Piece]]:
    """(checkpoint name, what it has got of it) of each source of a placement."""
    stacked = len(placed.shape) == 3
    begin = 0
    for number, source in enumerate(placed.sources):
        inside = _EXPERT.fullmatch(source.key)
        name, expert = (source.key, None) if inside is None else (inside["name"], int(inside["expert"]))
        turned = source.key in transposed
        count = source.rows.numel() if source.rows is not None else shapes[name][1 if turned else 0]
        if stacked:
            matrix, begin, count = number, 0, placed.shape[1]
        else:
            matrix = None
        yield name, Piece(placed.name, matrix, begin, begin + count, expert, source.rows, turned, placed.add)
        begin += count
