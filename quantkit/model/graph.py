"""`ModelGraph`: what the model multiplies, and what feeds what. Frozen data, no tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "embed", "head", "other"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which piece of a stacked tensor a weight is, and how it lies in the file.

    expert      index along the first axis of a (experts, …) tensor on disk, or None
    transposed  True when the file stores (in, out), as GPT-2's Conv1D and gpt-oss do
    """

    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix of the checkpoint. `name` is its tensor name on disk: the identifier used everywhere.

    shape is (out_features, in_features), always this way round whatever the file does.
    """

    name: str
    shape: tuple[int, int]
    role: Role = "other"
    part: Part | None = None

    @property
    def key(self) -> str:
        """Unique id: the name, with the expert index when the tensor on disk is stacked."""
        if self.part is None or self.part.expert is None:
            return self.name
        return f"{self.name}[{self.part.expert}]"

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def module(self) -> str:
        """The module path that rules match against: the name without ``.weight``."""
        return self.key.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector (a norm's weight) that scales an activation: ``x = (vector + offset) · normed + bias``.

    name, bias   checkpoint names; both (in,)
    offset       1 where a norm multiplies by 1 + w (Gemma), else 0
    """

    name: str
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of another weight of the block that an activation's channels are made from, one each.

    Proposed from names and shapes: true only where dividing a row divides its channel and nothing else,
    which has to be proven on real activations. Runs of `span` channels (a head) come `repeat` times, next to
    each other, where query heads share values.

    weight  its `Weight.key`
    start   the first of the rows
    bias    checkpoint name of the vector, (out,), that is added to what the weight returns, None without
    """

    weight: str
    start: int = 0
    bias: str | None = None
    repeat: int = 1
    span: int = 1

    def sources(self, width: int) -> list[int]:
        """For each of `width` channels the row it comes from, counted from `start`."""
        return [c // (self.span * self.repeat) * self.span + c % self.span for c in range(width)]


@dataclass(frozen=True, slots=True)
class Site:
    """Weights fed by one and the same activation. `id` is unique within the model.

    producer  what a factor of the activation can be put into. All sites of a block with the same vector are
              scaled by it at once, see `Block.together`. None when there is nothing, or when anything but
              these weights and `readers` would notice
    readers   checkpoint names of further matrices (…, in) that see what the vector scales and are in no
              site (a router); their columns follow the factors
    """

    id: str
    weights: tuple[Weight, ...]
    producer: Vector | Rows | None = None
    readers: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """in_features shared by the weights of the site."""
        return self.weights[0].shape[1]

    @property
    def experts(self) -> bool:
        """Whether it belongs to an expert of a mixture, which sees the tokens that are routed to it."""
        return ".experts." in self.weights[0].name or (
            self.weights[0].part is not None and self.weights[0].part.expert is not None
        )

    @property
    def kin(self) -> str | None:
        """What the same site of all experts of a layer is called; None outside mixtures."""
        return re.sub(r"\d+", "#", self.id) if self.experts else None

    @property
    def shares_input(self) -> bool:
        """Whether experts read one and the same activation here, each its own tokens of it; what their last
        matrices read, each has made itself."""
        return all(weight.role != "down" for weight in self.weights)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block: its sites in order of use, and the checkpoint tensors that are only copied.

    attentions   calls of scaled dot-product attention in one run; 0 where attention is computed otherwise,
                 and keys and values cannot be seen
    """

    index: int
    sites: tuple[Site, ...]
    kept: tuple[str, ...]
    attentions: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of its matrices."""
        return sum(weight.parameters for weight in self.weights())

    def weights(self) -> Iterator[Weight]:
        for site in self.sites:
            yield from site.weights

    def together(self, site: Site) -> tuple[Site, ...]:
        """The sites that one vector scales (the experts behind a norm), in order: factors hold for them all.
        Only `site` where no vector does."""
        if not isinstance(site.producer, Vector):
            return (site,)
        return tuple(other for other in self.sites if other.producer == site.producer)


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """The whole model. Every checkpoint tensor is in exactly one of blocks, outer, copied, dropped.

    outer    embeddings and head (matrices outside the blocks)
    tied     checkpoint or runtime name → the checkpoint name it shares storage with
    copied   other tensors outside the blocks (final norm, position tables, …)
    dropped  checkpoint name → the named rule by which it is not carried over
    reasons  checkpoint name of a tensor with two or more dimensions that a block keeps → why it is in
             no site: "router", "bias", "convolution kernel", "not a matrix product"
    linears  module paths of linear layers in no site (a head, tied or not, projections outside the
             blocks, routers): engines that quantize by class must be told to leave them alone
    """

    blocks: tuple[Block, ...]
    outer: tuple[Weight, ...]
    tied: Mapping[str, str]
    copied: tuple[str, ...]
    dropped: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    linears: tuple[str, ...] = ()

    def weights(self) -> Iterator[Weight]:
        """Every matrix inside the blocks, in model order."""
        for block in self.blocks:
            yield from block.weights()
