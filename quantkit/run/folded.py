"""What folds do to a block: to its matrices, to codes that were chosen, to tensors that the file keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.model.graph import Block, Weight
from quantkit.model.runtime import Runtime
from quantkit.recipe.plan import TargetPlan
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Float, QuantizedLinear, QuantizedTensor, values


@dataclass(frozen=True, slots=True)
class Fold:
    """What becomes of a block when the input of a site is divided by factors.

    factors  (in,) fp32 what columns are multiplied by
    columns  whose: keys of weights, and checkpoint names of other matrices (…, in)
    tensors  new values of vectors by checkpoint name, as the file will hold them
    rows     Weight.key → (out,) fp32 what the rows of that weight are divided by
    """

    factors: Tensor
    columns: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, key: str, matrix: Tensor) -> Tensor:
        """What becomes of a matrix (…, in): the weight of this key, or another matrix of this name."""
        if key in self.columns:
            matrix = matrix * self.factors.to(matrix.device)
        if key in self.rows:
            matrix = matrix / self.rows[key].to(matrix.device)[:, None]
        return matrix


class Moved(Mapping[str, Tensor]):
    """Key or name → fp32 values of the matrices that folds change, made when asked for: never more than one
    at a time in memory."""

    def __init__(self, folds: Sequence[Fold], block: Block, runtime: Runtime) -> None:
        self._weights = {weight.key: weight for weight in block.weights()}
        self._folds, self._runtime = folds, runtime
        self._keys = dict.fromkeys(key for fold in folds for key in (*fold.columns, *fold.rows))

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        weight = self._weights.get(key)
        held = self._runtime.read_tensor(key).float() if weight is None else self._runtime.read(weight)
        return _through(self._folds, key, held)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def rewritten(folds: Sequence[Fold], block: Block, target: TargetPlan, runtime: Runtime) -> dict[str, Tensor]:
    """Tensors of the source that folds change and the target does not quantize, by name, as the file will
    hold them: vectors, routers, weights that a rule keeps."""
    found = {name: tensor for fold in folds for name, tensor in fold.tensors.items()}
    weights = {weight.key: weight for weight in block.weights()}
    for key in dict.fromkeys(key for fold in folds for key in (*fold.columns, *fold.rows)):
        weight = weights.get(key)
        if weight is not None and target.scheme_of(weight) is not None:
            continue
        name = key if weight is None else weight.name
        if name not in found:
            found[name] = runtime.read_tensor(name).cpu()
        part = found[name] if weight is None else matrix_of(weight, found[name])
        part.copy_(_through(folds, key, part.float()))
    return found


def matrix_of(weight: Weight, tensor: Tensor) -> Tensor:
    """The (out, in) view of a weight in the file tensor that holds it."""
    if weight.part is None:
        return tensor
    whole = tensor if weight.part.expert is None else tensor[weight.part.expert]
    return whole.mT if weight.part.transposed else whole


def row_scalable(scheme: Scheme) -> str | None:
    """None when the scales of a row can be divided, by powers of two at least (see `power_of_two`); else what
    stands in the way."""
    if scheme.nested:
        return "scales that are quantized themselves"
    if scheme.numbers == "nvfp4":
        return "scales of 8 bits"
    if scheme.per_tensor or scheme.tile is not None or scheme.axis == 0:
        return "scales that rows share"
    return None


def power_of_two(scheme: Scheme) -> bool:
    """Whether the scales are powers of two, and only such quotients of them are exact."""
    return scheme.numbers == "mxfp4"


def divide_rows(linear: QuantizedLinear, divisors: Tensor) -> QuantizedLinear:
    """The same codes with rows divided by (out,) fp32: scales and offsets, rounded to their dtype again.

    ValueError where rows share scales or scales are quantized.
    """
    q = linear.weight
    if q.group[0] != 1 or (isinstance(q, Affine) and q.row_group is not None):
        raise ValueError(f"rows of `{linear.name}` share scales")
    by = divisors.cpu()[:, None]
    divided: QuantizedTensor = replace(q, scale=_quotient(q.scale, by))
    if isinstance(divided, Affine) and divided.offset is not None:
        divided = replace(divided, offset=_quotient(divided.offset, by))
    return replace(linear, weight=divided)


def rounding(linear: QuantizedLinear, divisors: Tensor) -> float:
    """Largest relative change of a scale of `divide_rows` by rounding it to its dtype again."""
    exact = values(linear.weight.scale) / divisors.cpu()[:, None]
    stored = values(divide_rows(linear, divisors).weight.scale)
    alive = exact != 0
    return float((stored[alive] / exact[alive] - 1).abs().max()) if bool(alive.any()) else 0.0


def _quotient(scale: Tensor | QuantizedTensor, by: Tensor) -> Tensor | QuantizedTensor:
    match scale:
        case Tensor():
            return (scale.float() / by).to(scale.dtype)
        case Float() if scale.values.dtype == torch.float32:
            # LLM.int8: largest magnitudes of rows, of which the scale is a 127th
            return replace(scale, values=scale.values / by)
        case _:
            raise ValueError("these scales are quantized themselves")


def _through(folds: Iterable[Fold], key: str, matrix: Tensor) -> Tensor:
    for fold in folds:
        matrix = fold.of(key, matrix)
    return matrix
