"""GGUF files of a run: planned from a target, filled from its results; or from codes that exist already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CoverageError, UnsupportedError, VerifyError
from quantkit.gguf import container, naming
from quantkit.gguf.architectures import Model
from quantkit.gguf.blocks import TYPES, BlockType, pack
from quantkit.gguf.mixes import MIXES, Mix
from quantkit.gguf.vocabulary import reference, vocabulary
from quantkit.hub.manifest import Kept
from quantkit.hub.side_files import card_file, terms
from quantkit.model.graph import ModelGraph, Weight
from quantkit.recipe.plan import TargetPlan
from quantkit.recipe.spec import Output
from quantkit.run.ends import EMBED
from quantkit.run.files import parameters
from quantkit.run.gguf_file import GgufFile, Origin
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.llama_tokens import llama_differences
from quantkit.run.manifest import kept_inside
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.run.regrid import regrid
from quantkit.run.results import BlockResult, Results
from quantkit.run.survey import ROUND, refuse
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear

_SCALES = "float16"
# types whose codes are those of plain grids
_PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@dataclass(frozen=True, slots=True)
class Title:
    """What the model is called, and the Hub id of the source if it has one."""

    name: str
    repository: str | None = None


def plan_target(
    target: TargetPlan, checkpoint: Checkpoint, graph: ModelGraph, title: Title, shard_bytes: int
) -> GgufFile:
    """The file of a target. UnsupportedError with what stands in the way."""
    return _planned(checkpoint, graph, target.scheme_of, MIXES[target.default.mix], title, shard_bytes)


def _planned(
    view: Checkpoint,
    graph: ModelGraph,
    scheme_of: Callable[[Weight], Scheme | None],
    mix: Mix,
    title: Title,
    shard_bytes: int,
) -> GgufFile:
    rows = next(w.shape[0] for w in graph.outer if w.role == "embed")
    size = _size(view, graph)
    folder = view.path if view.path.is_dir() else view.path.parent
    card = card_file(view.path)
    general = naming.general(title.name, size, mix.file_type, folder, title.repository, card)
    metadata = {**general, **vocabulary(tokenizer_folder(view), rows)}
    stem = naming.file_stem(title.name, mix.name)
    return GgufFile.plan(view, graph, scheme_of, metadata, stem, shard_bytes)


def _size(view: Checkpoint, graph: ModelGraph) -> naming.Size:
    inside = sum(w.parameters for b in graph.blocks for s in b.sites if s.experts for w in s.weights)
    return naming.Size(parameters(view, graph), inside, Model.of(view.config).experts)


def write(file: GgufFile, folder: Path, origin: Origin) -> None:
    """Write `file` into `folder`, read it back, and, where llama.cpp is installed, let it read texts.

    The terms under which the source may be used lie beside it.

    VerifyError when llama.cpp makes other tokens of them than the source's tokenizer does.
    """
    file.write(folder, origin)
    for found in terms(file.view.path):
        shutil.copyfile(found, folder / found.name)
    tokenizer = reference(tokenizer_folder(file.view))
    differences, refused = llama_differences(folder / file.names[0], tokenizer)
    if refused is not None:
        raise VerifyError(
            refused,
            remedy="the installed llama-cpp-python may be older than the file's tokenizer: upgrade it",
        )
    wrong = [str(difference) for difference in differences or () if not difference.edge]
    if wrong:
        raise VerifyError(
            "\n".join((f"llama.cpp reads {len(wrong)} texts otherwise than the tokenizer does:", *wrong[:3])),
            remedy="export to a format that keeps the tokenizer files, and report it",
        )


class StoreOrigin:
    """Values of one target from the run store; one block is held at a time."""

    def __init__(self, store: Results, key: str, checkpoint: Checkpoint, graph: ModelGraph) -> None:
        self._store, self._key, self._checkpoint = store, key, checkpoint
        self._stage: dict[str, int] = {}
        for weight in graph.outer:
            self._stage[weight.key] = EMBED if weight.role == "embed" else len(graph.blocks)
        for block in graph.blocks:
            self._stage |= {w.key: block.index for w in block.weights()}
            self._stage |= {name: block.index for name in block.kept}
            self._stage |= {w.name: block.index for w in block.weights()}
        self._held: tuple[int, BlockResult, dict[str, QuantizedLinear]] | None = None

    def packed(self, key: str, kind: BlockType) -> Tensor:
        linear = self._load(self._stage[key])[1].get(key)
        if linear is None:
            raise CoverageError(
                f"`{key}` was to be quantized and is not in the store",
                remedy="run again with --restart, and report it if it happens again",
            )
        return pack(linear.weight, kind)

    def plain(self, name: str) -> Tensor:
        stage = self._stage.get(name)
        # a transform may have rewritten what it folded into
        made = None if stage is None or stage < 0 else self._load(stage)[0].tensors.get(name)
        return self._checkpoint.read(name) if made is None else made

    def _load(self, stage: int) -> tuple[BlockResult, dict[str, QuantizedLinear]]:
        if self._held is None or self._held[0] != stage:
            self._held = None
            result = self._store.load(self._key, stage)
            self._held = stage, result, result.by_name()
        return self._held[1], self._held[2]


def block_type(text: str) -> BlockType:
    """The type that a target names; UnsupportedError for one whose codes are not those of a plain grid."""
    if text.lower() not in _PLAIN:
        raise UnsupportedError(
            f"codes cannot be moved to the GGUF type {text!r} without rounding anew",
            remedy=f"types that hold them as they are: {', '.join(_PLAIN)}",
        )
    return TYPES[text.lower()]


def on_blocks(linear: QuantizedLinear, kind: BlockType) -> Affine:
    """`linear` on the grid of `kind`, equal in every value; UnsupportedError when that cannot be."""
    scheme = Scheme(kind.bits, 32, sym=not kind.minimum, scale_dtype=_SCALES)
    q = regrid(linear, scheme).weight
    if not isinstance(q, Affine) or not isinstance(q.scale, Tensor):
        raise TypeError(f"`{linear.name}` is no plain grid")
    if not kind.minimum or q.zero_point is None:
        return q
    exact = -q.scale.to(torch.float64) * q.zero_point.to(torch.float64)
    minimum = exact.to(torch.float16)
    if wrong := int((minimum.to(torch.float64) != exact).sum()):
        raise UnsupportedError(
            f"{wrong:,} of {exact.numel():,} minima (−scale · zero point) of `{linear.name}` are not exact "
            f"in {_SCALES}"
        )
    return replace(q, zero_point=None, offset=minimum)


@dataclass(frozen=True)
class Moved:
    """The codes of a checkpoint that was quantized before, moved into one type; everything else is copied."""

    source: QuantizedCheckpoint
    view: Checkpoint
    kind: BlockType
    planned: GgufFile

    @classmethod
    def plan(
        cls, source: QuantizedCheckpoint, view: Checkpoint, graph: ModelGraph, kind: BlockType, title: str
    ) -> Moved:
        """`title` names the model. UnsupportedError with what stands in the way."""
        problems = {name: why for name in source.parts if (why := _obstacle(source, name, kind)) is not None}
        wide = TYPES["q8_0"]
        wider = problems and all(_obstacle(source, name, wide) is None for name in problems)
        refuse(list(problems.values()), "gguf:q8_0 holds them, in 8.5 bits per weight" if wider else ROUND)
        scheme = parse_scheme(kind.name)

        def scheme_of(weight: Weight) -> Scheme | None:
            return scheme if weight.key in source.parts else None

        file = _planned(view, graph, scheme_of, MIXES[kind.name], Title(title), Output().shard_bytes("gguf"))
        return cls(source, view, kind, file)

    @property
    def name(self) -> str:
        return f"gguf-{self.kind.name}"

    @property
    def file(self) -> str:
        """The file to load."""
        return self.planned.names[0]

    @property
    def size_bytes(self) -> int:
        return self.planned.total_bytes

    def scheme_name(self, key: str) -> str:
        return self.kind.ggml

    def engines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("llama.cpp", "transformers"), self.planned.model.notes()

    def kept(self) -> tuple[Kept, ...]:
        return kept_inside(self.planned)

    def write(self, folder: Path) -> None:
        write(self.planned, folder, self)

    def packed(self, key: str, kind: BlockType) -> Tensor:
        return pack(on_blocks(self.source.linear(key), kind), kind)

    def plain(self, name: str) -> Tensor:
        return self.view.read(name)

    @cached_property
    def _places(self) -> dict[str, tuple[str, Tensor | None, float]]:
        """Checkpoint name → name in the file, rows and what was added."""
        return {s.key: (p.name, s.rows, p.add) for p in self.planned.placed for s in p.sources}

    def values(self, folder: Path) -> Callable[[str], Tensor]:
        """What the file says of a weight: read, and multiplied out by the `gguf` package."""
        gguf = container.library()
        opened = container.open_file(folder / self.file)

        def value(name: str) -> Tensor:
            there, rows, add = self._places[name]
            kind = gguf.GGMLQuantizationType[opened.tensors[there].type.ggml]
            found = gguf.quants.dequantize(opened.read_bytes(there).numpy(), kind)
            data = torch.from_numpy(found.copy()) - add
            return data if rows is None else data[rows.argsort()]

        return value


def _obstacle(source: QuantizedCheckpoint, name: str, kind: BlockType) -> str | None:
    try:
        on_blocks(source.linear(name), kind)
    except UnsupportedError as error:
        return error.message
    return None
