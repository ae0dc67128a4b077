"""Which engines load a file, and why the others do not.

transformers 5.23 with gptqmodel 7.6 was run; for vLLM 0.33 and SGLang 0.5 this follows what their loaders
accept.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.formats.awq.activations import divisors
from quantkit.model.fused import fusing_problem
from quantkit.model.graph import Weight
from quantkit.model.parallel import cutting_notes
from quantkit.protocols import FormatFacts
from quantkit.schemes import Scheme


def engines_of(facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(engines, notes)."""
    both = _fusing_problem(facts) or _divisors_problem(facts)
    problems = {
        "transformers+gptqmodel": _transformers_problem(facts),
        "vLLM": both or _vllm_problem(facts),
        "SGLang": both,
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
    return None


def _divisors_problem(facts: FormatFacts) -> str | None:
    name = next(iter(divisors(facts)), None)
    if name is None:
        return None
    return (
        f"vLLM and SGLang have no place for `{name}`, by which transformers divides activations of "
        f"{facts.model_type}; use compressed_tensors there"
    )


def _fusing_problem(facts: FormatFacts) -> str | None:
    """What keeps vLLM and SGLang from putting weights side by side."""
    if (problem := fusing_problem((a.weight, a.scheme) for a in facts.assigned)) is not None:
        return problem
    if any(map(_experts, _quantized(facts))) and scheme_of(facts).group_size in (16, None):
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
        yield "readers of AWQ want zero points, so 8 is stored for each: asymmetric codes take no more space"
    if "SGLang" not in loads:
        return
    if scheme.group_size == 16:
        yield "SGLang runs groups of 16 in float16 without Marlin, the faster kernel of larger groups"
    narrow = next((w for w in weights if w.shape[1] % 32), None)
    if "vLLM" in loads and narrow is not None:
        yield f"vLLM on a CPU takes inputs in multiples of 32, and `{narrow.module}` has {narrow.shape[1]:,}"
    # here engines cut no whole row either, which is one group
    yield from cutting_notes(loads, ((w, scheme.group_size or w.shape[1]) for w in weights))
