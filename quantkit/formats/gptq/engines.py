"""Which engines load a file, and why the others do not.

transformers 5.23 with gptqmodel 7.6 was run; for vLLM 0.33, SGLang 0.5 and ExLlamaV2 0.3 this follows what
their loaders and kernels accept.
"""

from __future__ import annotations

from quantkit.model.fused import fusing_problem
from quantkit.model.graph import Weight
from quantkit.model.parallel import MARLIN_GROUPS, cutting_notes, marlin_problem
from quantkit.protocols import FormatFacts
from quantkit.schemes import Scheme

# group sizes; ExLlama has Marlin's
_GPTQMODEL = (16, 32, 64, 128, 256, 512, 1024, None)


def engines_of(facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(engines, notes)."""
    used = [(a.weight, a.scheme) for a in facts.assigned if a.scheme is not None]
    schemes = {scheme for _, scheme in used}
    reading = _gptqmodel_problem(schemes)
    serving = _marlin_problem(schemes) or fusing_problem((a.weight, a.scheme) for a in facts.assigned)
    problems = {
        "transformers+gptqmodel": reading or _transformers_problem([w for w, _ in used], schemes),
        "gptqmodel": reading,
        "vLLM": serving or _vllm_problem(facts),
        "SGLang": serving or marlin_problem(w for w, _ in used),
        "ExLlamaV2": _exllama_problem(schemes),
    }
    loads = tuple(engine for engine, problem in problems.items() if problem is None)
    why = dict.fromkeys(problem for problem in problems.values() if problem is not None)
    cut = ((weight, scheme.group_size) for weight, scheme in used)
    return loads, (*why, *cutting_notes(loads, cut))


def _gptqmodel_problem(schemes: set[Scheme]) -> str | None:
    if any(s.group_size not in _GPTQMODEL for s in schemes):
        return "gptqmodel reads groups of 16, 32 … 1,024 (powers of two) or a whole row"
    return None


def _transformers_problem(weights: list[Weight], schemes: set[Scheme]) -> str | None:
    if any(".experts." in w.name for w in weights):
        return "transformers 5 fills GPTQ experts with random weights; use compressed_tensors there"
    if any(w.part is not None and w.part.transposed for w in weights):
        return "transformers 5 stops at GPTQ weights in Conv1D layers (GPT-2); gptqmodel reads them"
    if len({(s.bits, s.group_size) for s in schemes}) > 1:
        return "transformers ignores per-weight bits and group sizes; gptqmodel and vLLM read them"
    return None


def _marlin_problem(schemes: set[Scheme]) -> str | None:
    """What the one kernel that vLLM and SGLang run GPTQ weights with does not take."""
    if any(not s.sym or s.bits not in (4, 8) for s in schemes):
        return "vLLM and SGLang read 4 and 8 bits, symmetric, only"
    if any(s.group_size not in MARLIN_GROUPS for s in schemes):
        return "vLLM and SGLang read groups of 32, 64, 128 or a whole row"
    return None


def _vllm_problem(facts: FormatFacts) -> str | None:
    if facts.act_order:
        return "vLLM no longer reads act_order free (desc_act with groups)"
    return None


def _exllama_problem(schemes: set[Scheme]) -> str | None:
    if any(s.bits != 4 for s in schemes):
        return "ExLlamaV2 reads 4 bits only"
    if any(s.group_size not in MARLIN_GROUPS for s in schemes):
        return "ExLlamaV2 reads groups of 32, 64, 128 or a whole row"
    return None
