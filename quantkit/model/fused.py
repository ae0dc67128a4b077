"""Weights that engines put side by side into one matrix product."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.model.graph import Block, Weight
from quantkit.schemes import Scheme

_SETS = (("q", "k", "v"), ("gate", "up"))


def fused_sets(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Weights of a site by what vLLM and SGLang fuse: q, k, v and gate, up of one module; others alone."""
    found: dict[tuple[str, int | str], list[Weight]] = {}
    for weight in weights:
        parent, _, own = weight.module.rpartition(".")
        part = next((n for n, roles in enumerate(_SETS) if weight.role in roles), None)
        found.setdefault((parent, own if part is None else part), []).append(weight)
    return list(found.values())


def fusing_problem(schemes: Iterable[tuple[Weight, Scheme | None]]) -> str | None:
    """Why vLLM and SGLang cannot put weights side by side: some that they fuse differ. None: they can."""
    chosen = {weight: scheme for weight, scheme in schemes}
    experts: dict[str, list[Weight]] = {}
    for weight in chosen:
        holder, inside, _ = weight.module.partition(".experts.")
        if inside:
            experts.setdefault(f"the experts of `{holder}`", []).append(weight)
    sets = ((", ".join(f"`{w.module}`" for w in members), members) for members in fused_sets(chosen))
    for names, members in (*sets, *experts.items()):
        if len({chosen[weight] for weight in members}) > 1:
            return f"vLLM and SGLang fuse {names}: give them one scheme, or keep them all"
    return None


def attention_of(block: Block) -> str | None:
    """Path of the module that a block's keys come from, as ``model.layers.0.self_attn``.

    None where no attention was seen: the block has none, or computes it step by step.
    """
    if not block.attentions:
        return None
    for weight in block.weights():
        if weight.role in ("k", "qkv"):
            return weight.module.rpartition(".")[0]
    return None
