"""Folding what a transform asks for into the model, and proving that the model did not change.

A transform divides the inputs x of a site by factors s and multiplies the columns of its weights. Where
x = v ⊙ n(…) + b comes from a vector v (of a norm; some store v − 1) that nothing else uses, v/s and b/s do
the dividing. v/s is rounded to the dtype of the file first, and s becomes v / (what was stored): the columns
take up the rounding, so nothing is lost but in b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Statistics
from quantkit.model.graph import Site, Weight
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.recipe.plan import TargetPlan
from quantkit.run.quantize import naming
from quantkit.schemes import Scheme

# largest change of what the block adds to its input, relative, by computation dtype: rounding, no more
_UNCHANGED = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Fold:
    """A transform of one site.

    factors  (in,) fp32 what the columns of its weights are multiplied by
    tensors  new values of the vectors that feed it, by checkpoint name, as the file will hold them
    """

    factors: Tensor
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Proof:
    """The block that is to stay the same, and how to get real inputs of it (rows, length, hidden)."""

    load: Callable[[], LoadedBlock]
    read: Callable[[], Tensor]

    def change(self, site: Site, fold: Fold, read: Callable[[Weight], Tensor]) -> float:
        """‖f'(x) − f(x)‖ / ‖f(x) − x‖, f' the block with the fold."""
        loaded, states = self.load(), self.read()
        plain = loaded.run(states)
        scaled = {w.key: read(w) * fold.factors for w in site.weights}
        with loaded.replaced(scaled, tensors=fold.tensors):
            folded = loaded.run(states)
        added = float((plain - states).float().norm())
        return float((folded - plain).float().norm()) / max(added, torch.finfo(torch.float32).tiny)


def fold_site(
    site: Site, stats: Statistics, target: TargetPlan, runtime: Runtime, proof: Proof
) -> Fold | str | None:
    """The fold of a target's transforms at a site, why a wanted one was not made, or None: there is nothing
    to fold into, or nothing to gain. Only what leaves the block as it was is kept.
    """
    schemes = {target.scheme_of(weight) for weight in site.weights}
    if not target.transforms or schemes == {None}:
        return None
    if len(schemes) > 1:
        return "not rescaled: weights of one input differ in scheme"
    scheme = next(s for s in schemes if s is not None)
    if site.producer is None:
        return None
    wanted = _factors(site, stats, target, runtime, scheme)
    if wanted is None:
        return None
    names = [n for n in (site.producer, site.producer_bias) if n is not None]
    vectors = {name: runtime.read_tensor(name) for name in names}
    fold = _fold(wanted, site.producer, vectors, site.producer_offset)
    change = proof.change(site, fold, runtime.read)
    if change < _UNCHANGED[runtime.dtype]:
        return fold
    return f"not rescaled: the block would change by {change:.2g}"


def _factors(
    site: Site, stats: Statistics, target: TargetPlan, runtime: Runtime, scheme: Scheme
) -> Tensor | None:
    """The product of what the target's transforms ask for, each seeing what those before it did."""
    weight = torch.cat([runtime.read(w) for w in site.weights])
    product: Tensor | None = None
    for transform in target.transforms:
        with naming(site.weights):
            found = transform.factors(weight, stats, scheme)
        if found is None:
            continue
        weight, stats = weight * found, stats.through(found)
        product = found if product is None else product * found
    return product


def _fold(wanted: Tensor, producer: str, vectors: Mapping[str, Tensor], offset: float) -> Fold:
    """Divide what feeds a site by `wanted`; the factors are what the division amounts to as stored."""
    held = vectors[producer]
    before = held.to(wanted.device, torch.float32) + offset
    stored = (before / wanted - offset).to(held.dtype)
    after = stored.to(wanted.device, torch.float32) + offset
    # an input that the vector switches off stays off whatever its columns are multiplied by
    alive = (before != 0) & (after != 0)
    factors = torch.where(alive, before / torch.where(alive, after, torch.ones_like(after)), 1.0)
    tensors = {producer: torch.where(alive.cpu(), stored.cpu(), held.cpu())}
    for name, vector in vectors.items():
        if name != producer:
            tensors[name] = (vector.to(wanted.device, torch.float32) / factors).to(vector.dtype).cpu()
    return Fold(factors, tensors)
