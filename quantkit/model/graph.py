"""`ModelGraph`: what the model multiplies, and what feeds what. Frozen data, no tensors."""

from __future__ import annotations

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
class Site:
    """Weights fed by one and the same activation. `id` is unique within the model.

    producer   checkpoint name of the vector (a norm's weight) that scales the activation, (in,); None when
               there is none, or when anything but the weights of this site would notice a change of it
    producer_bias     checkpoint name of the vector added afterwards, None without
    producer_offset   what is added to the vector before it scales: 1 where a norm multiplies by 1 + w
    """

    id: str
    weights: tuple[Weight, ...]
    producer: str | None = None
    producer_bias: str | None = None
    producer_offset: float = 0.0

    @property
    def width(self) -> int:
        """in_features shared by the weights of the site."""
        return self.weights[0].shape[1]


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
