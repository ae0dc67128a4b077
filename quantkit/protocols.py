"""The seams for plugins: what a method in ``methods/`` and a format in ``formats/`` must offer.

A *scheme* says which numbers can be represented, a *method* how codes are chosen, a *format* how
bytes are laid out. The three never mix: methods and formats each answer for themselves which
schemes they accept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.schemes import CacheDtype, Convention, Scheme
from quantkit.tensors import QuantizedLinear, QuantizedTensor

P = TypeVar("P")
Container = Literal["safetensors", "gguf"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method made of one matrix.

    note   reports a fallback or a raised damping, else None
    facts  other numbers for the report, by name (`outlier_columns`)
    """

    weight: QuantizedTensor
    note: str | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class Quantizer(Protocol[P]):
    """Chooses codes. Unless the scheme or the method ties the rows of a weight, the sweep stacks the weights
    of a site and calls `quantize` once."""

    @property
    def needs(self) -> Need: ...

    @property
    def ties_rows(self) -> bool:
        """True when other rows beside it may change what becomes of a row."""
        ...

    @property
    def regroups_columns(self) -> bool:
        """True when results carry a `column_group`, which only some formats can hold."""
        ...

    def accepts(self, scheme: Scheme) -> str | None:
        """None, or the reason why this scheme is not possible."""
        ...

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> P:
        """What all weights of a site share, once per site and scheme (a factorisation, an order)."""
        ...

    def quantize(self, weight: Tensor, prepared: P, scheme: Scheme) -> Outcome:
        """Codes for weight (out, in) fp32, which is not modified."""
        ...


@dataclass(frozen=True, slots=True)
class Assigned:
    """One weight with the scheme it got, or None when it is kept in its source dtype."""

    weight: Weight
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """All that a format needs for its configuration files.

    linears     module paths of linear layers outside `assigned`, which stay float, see ModelGraph
    kv_cache    dtype of the key-value cache that scales are stored for, or None
    dtype       dtype of the source: what is not quantized has it in the file
    model_type  the kind of model, as config.json names it
    """

    assigned: Sequence[Assigned]
    default: Scheme
    outer: Sequence[Weight]
    act_order: bool
    method: str
    version: str
    linears: Sequence[str] = ()
    kv_cache: CacheDtype | None = None
    dtype: str = "bfloat16"
    model_type: str = ""


class Transform(Protocol):
    """Rescales the inputs of a site: x is divided, the columns of its weights are multiplied, so that the
    model computes the same and rounds better. The sweep folds the division into what produced x and
    proves on real activations that nothing changed."""

    @property
    def needs(self) -> Need: ...

    def accepts(self, scheme: Scheme) -> str | None:
        """None, or the reason why this scheme gains nothing from it."""
        ...

    def factors(
        self,
        weight: Tensor,
        stats: Statistics,
        scheme: Scheme,
        quantizer: Quantizer[Any],
        ties: Tensor | None,
    ) -> Tensor | None:
        """(in,) fp32 positive factors for weight (out, in) fp32, all that read one input; None: leave it.

        quantizer  what rounds the weights afterwards, by which a choice is to be judged
        ties       (in,) int64: inputs of equal number must get the same factor, because what makes them is
                   one channel (values that query heads share); None: every input may have its own
        """
        ...


class Format(Protocol):
    """Lays out bytes and reads them back; never changes a code."""

    @property
    def container(self) -> Container:
        """What the files are: safetensors beside a config.json, or GGUF, where a file is a whole model with
        names of its own and embedding and head are quantized as everything else."""
        ...

    def scale_dtype(self, source_dtype: str) -> str:
        """dtype in which this format stores scales for a source of `source_dtype`."""
        ...

    def convention(self, scheme: Scheme) -> Convention:
        """The symmetric scale that this format's own tools choose, which `scales: container` stands for."""
        ...

    def holds_column_groups(self) -> bool: ...

    def cache_scales(self, attention: str, dtype: CacheDtype) -> tuple[str, str] | None:
        """Names of the key and value scales, each (1,) in `scale_dtype`, of an attention module; None: the
        format has no place for them."""
        ...

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        """None, or the reason why this weight cannot be stored."""
        ...

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the file tensors that replace the weight, in file order."""
        ...

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        """The file tensors of `layout`, with contents; dtype is the source's, which readers compute in."""
        ...

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        """Small whole tensors, by name, that readers want in the file beside those of the model."""
        ...

    def base_name(self, tensor: str) -> str | None:
        """Checkpoint name of the weight that a file tensor belongs to, or None for a plain tensor."""
        ...

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        """((out, in), bits) of one weight from the headers of its file tensors."""
        ...

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        """Inverse of `encode`, from the file tensors of one weight and the quantization config."""
        ...

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        """Where a config, which need not be the one that weights were decoded by, says something else than
        the files hold: one sentence each, with the key and the engines that would misread it. Only what is
        certain; none for what this format writes."""
        ...

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        """The `quantization_config` of config.json."""
        ...

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Further JSON files beside config.json, by name."""
        ...

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(engines that load the result, notes on those that will not, with the reason)."""
        ...


class TunedBlock(Protocol):
    """A decoder block that can be run with other weights, through which gradients flow back to them."""

    def differentiable(self, hidden: Tensor, new: Mapping[str, Tensor]) -> Tensor:
        """(rows, length, hidden) states after the block, from those before it; `new` holds (out, in) weights
        by `Weight.key`, what it leaves out is what the block has."""
        ...


class Pairs(Protocol):
    """Calibration rows as they enter a block on a target's own stream, and what shall come out of it."""

    @property
    def rows(self) -> int: ...

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """(input, goal) of one row, both (1, length, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuner made of the weights of a block.

    linears  by `Weight.key`, laid out like the start: types, shapes and dtypes are equal
    facts    numbers about the block for the report, by name
    note     why the start was kept, or None
    """

    linears: Mapping[str, QuantizedLinear]
    facts: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


class Tuner(Protocol):
    """Improves the codes of a whole block, by what comes out of it. A method that does offers it as its
    attribute `tuner`; its `quantize` makes the start."""

    def tune(
        self,
        block: TunedBlock,
        sources: Mapping[str, Tensor],
        start: Mapping[str, QuantizedLinear],
        schemes: Mapping[str, Scheme],
        pairs: Pairs,
    ) -> Tuned:
        """All tensors lie on one device.

        sources  (out, in) fp32 weights that the start stands for, after transforms, by `Weight.key`
        start    what `quantize` made of them; schemes  of which scheme each is
        """
        ...


@runtime_checkable
class Tunable(Protocol):
    """A quantizer that has a tuner."""

    @property
    def tuner(self) -> Tuner: ...
