"""Weights that engines put side by side into one matrix product."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.model.graph import Block, Weight

_SETS = (("q", "k", "v"), ("gate", "up"))


def fused_sets(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Weights of a site by what vLLM and SGLang fuse: q, k, v and gate, up of one module; others alone."""
    found: dict[tuple[str, int | str], list[Weight]] = {}
    for weight in weights:
        parent, _, own = weight.module.rpartition(".")
        part = next((n for n, roles in enumerate(_SETS) if weight.role in roles), None)
        found.setdefault((parent, own if part is None else part), []).append(weight)
    return list(found.values())


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
