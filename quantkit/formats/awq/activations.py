"""Divisors of activations, which transformers wants in the AWQ files of eight kinds of models.

It divides what follows a GELU by `<mlp>.act.scales` whatever the file says, and by whatever the memory held
where the file has none. quantkit scales nothing there: they are all 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.protocols import FormatFacts

# model_type → the linear before the activation, the activation
DIVIDED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "bloom": ("dense_h_to_4h", "gelu_impl"),
        "falcon": ("dense_h_to_4h", "act"),
        "gpt_bigcode": ("c_fc", "act"),
        "gpt_neox": ("dense_h_to_4h", "act"),
        "gptj": ("fc_in", "act"),
        "mpt": ("up_proj", "act"),
        "RefinedWebModel": ("dense_h_to_4h", "act"),
        "starcoder2": ("c_fc", "act"),
    }
)
ACTIVATIONS = frozenset(activation for _, activation in DIVIDED.values())


def divisors(facts: FormatFacts) -> dict[str, Tensor]:
    """`<mlp>.act.scales` → (out,) fp32 ones, for kept weights too; empty for models that have none."""
    before, activation = DIVIDED.get(facts.model_type, ("", ""))
    places = ((*a.weight.module.rpartition("."), a.weight.shape[0]) for a in facts.assigned)
    return {f"{mlp}.{activation}.scales": torch.ones(out) for mlp, _, own, out in places if own == before}
