"""Quantized weights as a GGUF file: codes are repacked into blocks of 32, everything else is copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.gguf import container
from quantkit.gguf.blocks import Q8_0, TYPES, BlockType, pack
from quantkit.gguf.container import Stored, Value
from quantkit.gguf.models import Model
from quantkit.gguf.vocabulary import vocabulary
from quantkit.model.graph import ModelGraph
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.run.regrid import regrid
from quantkit.run.survey import ROUND, refuse
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear

_SCALES = "float16"


def block_type(text: str) -> BlockType:
    """The type that a target names; UnsupportedError for one whose codes are not those of a plain grid."""
    kind = TYPES.get(text.upper())
    if kind is None:
        raise UnsupportedError(
            f"codes cannot be moved to the GGUF type {text!r} without rounding anew",
            remedy=f"types that hold them as they are: {', '.join(name.lower() for name in TYPES)}",
        )
    return kind


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


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One planned file. `names` maps checkpoint names to those in the file, in file order."""

    source: QuantizedCheckpoint
    view: Checkpoint
    model: Model
    kind: BlockType
    file: str
    metadata: dict[str, Value]
    names: dict[str, str]

    @classmethod
    def plan(
        cls, source: QuantizedCheckpoint, view: Checkpoint, graph: ModelGraph, kind: BlockType, title: str
    ) -> GgufFile:
        """`title` names the model. UnsupportedError with what stands in the way."""
        model = Model.of(view.config)
        problems = {name: why for name in source.parts if (why := _obstacle(source, name, kind)) is not None}
        wider = problems and all(_obstacle(source, name, Q8_0) is None for name in problems)
        refuse(list(problems.values()), "gguf:q8_0 holds them, in 8.5 bits per weight" if wider else ROUND)
        order = dict.fromkeys(_order(graph))
        rows = next(view.tensors[w.name].shape[0] for w in graph.outer if w.role == "embed")
        metadata: dict[str, Value] = {
            "general.type": "model",
            "general.name": title,
            "general.file_type": kind.file_type,
            "general.quantization_version": 2,
            **model.metadata(),
            **vocabulary(view.path, rows),
        }
        file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}-{kind.name}.gguf"
        return cls(source, view, model, kind, file, metadata, model.names(order))

    @property
    def name(self) -> str:
        return f"gguf-{self.kind.name.lower()}"

    def scheme_name(self, key: str) -> str:
        return self.kind.name

    def engines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        asked, context = self.model.config["max_position_embeddings"], self.model.context
        cut = f"llama.cpp has no sliding window here: the context is cut from {asked:,} to {context:,} tokens"
        return ("llama.cpp", "transformers"), (cut,) if context < asked else ()

    @property
    def tensors(self) -> list[Stored]:
        generated = [
            Stored.plain(name, tuple(t.shape), t.dtype) for name, t in self.model.generated().items()
        ]
        return [*generated, *(self._stored(name) for name in self.names)]

    @property
    def size_bytes(self) -> int:
        """Of the tensors; metadata comes on top."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, folder: Path) -> None:
        path = folder / self.file
        container.write(path, self.model.architecture, self.metadata, self.tensors, self._contents())

    def values(self, folder: Path) -> Callable[[str], Tensor]:
        """What the file says of a weight: read, and multiplied out, by the `gguf` package, not by us."""
        gguf = container.library()
        reader = gguf.GGUFReader(folder / self.file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def value(name: str) -> Tensor:
            tensor = tensors[self.names[name]]
            data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            rows = self.model.rows(name)
            return data if rows is None else data[rows.argsort()]

        return value

    def _stored(self, name: str) -> Stored:
        info, there = self.view.tensors[name], self.names[name]
        if name in self.source.parts:
            return Stored(there, info.shape, self.kind.name)
        # llama.cpp computes with vectors and norms in fp32 and wants them so
        wide = len(info.shape) < 2 or not there.endswith(".weight")
        return Stored.plain(there, info.shape, torch.float32 if wide else info.torch_dtype)

    def _contents(self) -> Iterator[Tensor]:
        for tensor in self.model.generated().values():
            yield container.as_bytes(tensor)
        for name in self.names:
            rows = self.model.rows(name)
            if name in self.source.parts:
                data = pack(on_blocks(self.source.linear(name), self.kind), self.kind)
                yield data if rows is None else data[rows]
            else:
                tensor = self.view.read(name)
                wide = tensor.to(torch.float32) if self._stored(name).kind == "F32" else tensor
                yield container.as_bytes(wide if rows is None else wide[rows])


def _obstacle(source: QuantizedCheckpoint, name: str, kind: BlockType) -> str | None:
    try:
        on_blocks(source.linear(name), kind)
    except UnsupportedError as error:
        return error.message
    return None


def _order(graph: ModelGraph) -> Iterator[str]:
    """Checkpoint names of everything that is carried over: embedding, blocks, the rest."""
    yield from (w.name for w in graph.outer if w.role == "embed")
    for block in graph.blocks:
        yield from (w.name for w in block.weights())
        yield from block.kept
    yield from graph.copied
    yield from (w.name for w in graph.outer if w.role != "embed")
