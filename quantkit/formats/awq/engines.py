"""Which engines load a file, and why the others do not.

transformers 5.23 with gptqmodel 7.6 was run; for vLLM 0.33 and SGLang 0.5 this follows what their loaders
accept.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.model.fused import fused_sets
from quantkit.model.graph import Weight
from quantkit.model.parallel import MOST, narrowest
from quantkit.protocols import FormatFacts
from quantkit.schemes import Scheme

# what the activation follows in the GELU models where transformers divides it by `<mlp>.act.scales`
_ACTIVATED = ("c_fc", "fc_in", "dense_h_to_4h")


def engines_of(facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(engines, notes)."""
    fusing = _fusing_problem(facts)
    problems = {
        "transformers+gptqmodel": _transformers_problem(facts),
        "vLLM": fusing or _vllm_problem(facts),
        "SGLang": fusing,
    }
    loads = tuple(engine for engine, problem in problems.items() if problem is None)
    why = dict.fromkeys(problem for problem in problems.values() if problem is not None)
    return loads, (*why, *_advice(facts, loads))


def scheme_of(facts: FormatFacts) -> Scheme:
    """What the weights are quantized to, all alike; the default where rules keep them all."""
    return next((a.scheme for a in facts.assigned if a.scheme is not None), facts.default)


def kept_modules(facts: FormatFacts) -> list[str]:
    """Modules that stay float, by full name, since vLLM and SGLang skip whatever holds a name as a part.

    Experts that are all kept are listed as the module that holds them: the one that engines ask about.
    """
    heads = (w.module for w in facts.outer if w.role == "head")
    mixed = {_experts(w) for w in _quantized(facts)}
    kept = (a.weight for a in facts.assigned if a.scheme is None)
    names = (holder if (holder := _experts(w)) and holder not in mixed else w.module for w in kept)
    return list(dict.fromkeys([*heads, *facts.linears, *names]))


def _quantized(facts: FormatFacts) -> list[Weight]:
    return [a.weight for a in facts.assigned if a.scheme is not None]


def _experts(weight: Weight) -> str | None:
    """The module that holds all experts, of a weight of one of them."""
    holder, found, _ = weight.module.partition(".experts.")
    return f"{holder}.experts" if found else None


def _transformers_problem(facts: FormatFacts) -> str | None:
    weights = _quantized(facts)
    if any(_experts(w) for w in weights):
        return "transformers 5 fills AWQ experts with random weights; use compressed_tensors there"
    if any(w.part is not None and w.part.transposed for w in weights):
        return "transformers 5 looks for AWQ weights in nn.Linear only, not in Conv1D layers (GPT-2)"
    scaled = next((a.weight.module for a in facts.assigned if _activated(a.weight)), None)
    if scaled is not None:
        return (
            f"transformers divides what follows `{scaled}` by `act.scales` in AWQ files of GELU models, and "
            "this file has none; use compressed_tensors there"
        )
    return None


def _activated(weight: Weight) -> bool:
    parent, _, own = weight.module.rpartition(".")
    return own in _ACTIVATED or (own == "up_proj" and parent.endswith(".ffn"))


def _fusing_problem(facts: FormatFacts) -> str | None:
    """What keeps vLLM and SGLang from putting weights side by side."""
    chosen = {w.key for w in _quantized(facts)}
    dense = [a.weight for a in facts.assigned if _experts(a.weight) is None]
    if any(len({w.key in chosen for w in members}) > 1 for members in fused_sets(dense)):
        return "vLLM and SGLang fuse q, k, v and gate, up, which must all be quantized or all be kept"
    experts: dict[str, set[bool]] = {}
    for a in facts.assigned:
        if holder := _experts(a.weight):
            experts.setdefault(holder, set()).add(a.scheme is not None)
    if any(len(found) > 1 for found in experts.values()):
        return "vLLM and SGLang fuse experts, which must all be quantized or all be kept"
    if {True} in experts.values() and scheme_of(facts).group_size in (16, None):
        return "vLLM and SGLang run AWQ experts in groups of 32, 64 or 128 only"
    return None


def _vllm_problem(facts: FormatFacts) -> str | None:
    if scheme_of(facts).group_size == 16:
        return "vLLM runs AWQ groups of 32, 64, 128 or a whole row, not 16"
    return None


def _advice(facts: FormatFacts, loads: tuple[str, ...]) -> Iterator[str]:
    """What to know where it does load."""
    scheme, weights = scheme_of(facts), _quantized(facts)
    if scheme.sym:
        yield "readers of AWQ want zero points, so 8 is stored for each: _asym takes no more space"
    if "SGLang" not in loads:
        return
    if scheme.group_size == 16:
        yield "SGLang runs groups of 16 in float16 without Marlin, the faster kernel of larger groups"
    narrow = next((w for w in weights if w.shape[1] % 32), None)
    if "vLLM" in loads and narrow is not None:
        yield f"vLLM on a CPU takes inputs in multiples of 32, and `{narrow.module}` has {narrow.shape[1]:,}"
    most, least = narrowest((w, scheme.group_size or w.shape[1]) for w in weights)
    if least is not None:
        many = f"{most} of {MOST} GPUs" if most > 1 else "one GPU"
        yield f"vLLM and SGLang cannot cut the groups of `{least.module}` further: they run on {many} at most"
