"""Which checkpoint tensors, and which of their rows, make up each tensor of the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.architectures.families import Family
from quantkit.gguf.container import library
from quantkit.model.graph import Block, ModelGraph, Weight

Shapes = Mapping[str, tuple[int, ...]]

# what llama.cpp holds in fp32 although it has two dimensions
_TABLES = ("ffn_gate_inp.weight", "position_embd.weight")
# how names begin where the language model is a part of a larger one
_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Rows of one matrix or vector of the checkpoint.

    key   `Weight.key` of a matrix, name in the checkpoint of anything else
    rows  int64: which of its rows, in which order; None: all as they are
    """

    key: str
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One tensor of the file.

    shape    (n,), (out, in) or (experts, out, in)
    sources  one; or one per expert, stacked
    matrix   whether rows may be quantized: every source is (out, in), as `Weight.shape` says. All else is
             stored as float32
    add      added to the values
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    matrix: bool
    add: float = 0.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a model of `family` go."""

    family: Family
    heads: tuple[int, int]
    head_dim: int
    blocks: int
    experts: int

    def all_of(self, graph: ModelGraph, shapes: Shapes) -> tuple[Placed, ...]:
        """In file order; UnsupportedError for a tensor without a place, or two with the same."""
        outer = {weight.role: weight for weight in graph.outer}
        embedding, head = outer["embed"], outer.get("head")
        known = self._known()
        placed = [_matrix("token_embd.weight", embedding)]
        for block in graph.blocks:
            placed += self._block(block, shapes, known)
        rest = (name for name in graph.copied if not name.startswith(self.family.aside))
        placed += [self._plain(name, shapes, known) for name in rest]
        match self.family.head:
            case "cannot" if head is not None:
                raise UnsupportedError(
                    f"llama.cpp's `{self.family.architecture}` uses the embedding as the output matrix, and "
                    f"`{head.name}` is another one"
                )
            case "must" if head is None:
                placed.append(_matrix("output.weight", embedding))
            case _ if head is not None:
                placed.append(_matrix("output.weight", head))
        for name, count in Counter(one.name for one in placed).items():
            if count > 1:
                raise UnsupportedError(f"{count} tensors of the checkpoint claim the place `{name}`")
        return tuple(placed)

    def rows(self, name: str) -> Tensor | None:
        """For each row of `name` in the file its row in the checkpoint; None: in order."""
        (queries, keys), dim = self.heads, self.head_dim
        tensor = name.split(".")[-2]
        if self.family.rotary == "neighbours" and tensor in ("attn_q", "attn_k"):
            heads = queries if tensor == "attn_q" else keys
            return torch.arange(heads * dim).view(heads, 2, dim // 2).transpose(1, 2).reshape(-1)
        if self.family.architecture == "falcon" and tensor == "attn_qkv":
            # groups of queries, each followed by its key and value → all queries, all keys, all values
            groups = torch.arange((queries + 2 * keys) * dim).view(keys, queries // keys + 2, dim)
            return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])
        return None

    def _known(self) -> Any:
        gguf = library()
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.family.architecture.upper()], self.blocks)

    def _block(self, block: Block, shapes: Shapes, known: Any) -> Iterator[Placed]:
        stacks: dict[str, list[tuple[int, Source, tuple[int, int]]]] = {}
        for site in block.sites:
            for weight in site.weights:
                if not site.experts:
                    name = self._name(weight.name, known)
                    yield _matrix(name, weight, self.rows(name))
                    continue
                for name, source, shape in _halves(weight, f"blk.{block.index}.ffn"):
                    stacks.setdefault(name, []).append((_expert(weight), source, shape))
        for name, pieces in stacks.items():
            yield self._stack(name, pieces)
        for name in block.kept:
            yield self._plain(name, shapes, known)

    def _stack(self, name: str, pieces: list[tuple[int, Source, tuple[int, int]]]) -> Placed:
        pieces.sort(key=lambda piece: piece[0])
        if [expert for expert, _, _ in pieces] != list(range(self.experts)):
            raise UnsupportedError(
                f"`{name}` needs {self.experts} experts, the checkpoint has {len(pieces)}, beginning with "
                f"`{pieces[0][1].key}`"
            )
        sources = tuple(source for _, source, _ in pieces)
        return Placed(name, (self.experts, *pieces[0][2]), sources, matrix=True)

    def _plain(self, name: str, shapes: Shapes, known: Any) -> Placed:
        """A vector, or one of the matrices that stay fp32."""
        there, shape = self._name(name, known), shapes[name]
        if len(shape) > 1 and not there.endswith(_TABLES):
            raise UnsupportedError(
                f"`{name}` is no matrix that the model multiplies with, and llama.cpp's `{there}` is"
            )
        add = self.family.offset if there.endswith("norm.weight") else 0.0
        return Placed(there, shape, (Source(name, self.rows(there)),), matrix=False, add=add)

    def _name(self, name: str, known: Any) -> str:
        usual = _PART.sub("model.", name)
        there = known.get_name(usual, try_suffixes=(".weight", ".bias"))
        bias = there is not None and there.endswith(".bias")
        if there is None or (bias and there.split(".")[-2] not in self.family.biases):
            raise UnsupportedError(
                f"llama.cpp's `{self.family.architecture}` has no place for `{name}`",
                remedy="export to compressed_tensors or gptq, which run the model as Transformers does",
            )
        return str(there)


def _matrix(name: str, weight: Weight, rows: Tensor | None = None) -> Placed:
    return Placed(name, weight.shape, (Source(weight.key, rows),), matrix=True)


def _expert(weight: Weight) -> int:
    """Index of the expert that a weight belongs to: along the tensor, or in its name."""
    if weight.part is not None and weight.part.expert is not None:
        return weight.part.expert
    found = re.search(r"\.experts\.(\d+)\.", weight.name)
    if found is None:
        raise UnsupportedError(f"`{weight.name}` does not say which expert it belongs to")
    return int(found[1])


def _halves(weight: Weight, prefix: str) -> Iterator[tuple[str, Source, tuple[int, int]]]:
    """(name in the file, source, shape) of what an expert's matrix holds: gate and up may be one."""
    out, width = weight.shape
    if weight.role in ("gate", "up", "down"):
        yield f"{prefix}_{weight.role}_exps.weight", Source(weight.key), weight.shape
    elif weight.role == "gate_up":
        for start, name in enumerate(("gate", "up")):
            rows = torch.arange(out // 2) + start * (out // 2)
            yield f"{prefix}_{name}_exps.weight", Source(weight.key, rows), (out // 2, width)
    else:
        raise UnsupportedError(f"llama.cpp has no place for `{weight.key}` of an expert")
