"""Which engines load a file, and why the others do not.

transformers 5.23 with compressed-tensors 0.20 was run; for vLLM 0.33 and SGLang 0.5 this follows what
their loaders accept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.formats.compressed_tensors.layouts import layout_of, static_inputs
from quantkit.model.fused import fusing_problem
from quantkit.model.parallel import MARLIN_GROUPS, cutting_notes, marlin_problem
from quantkit.protocols import FormatFacts
from quantkit.schemes import Scheme

_E2M1 = ("mxfp4", "nvfp4")


@dataclass(frozen=True, slots=True)
class _Schemes:
    """What the weights of a model are stored as; None: kept.

    groups   in the order of the config's groups
    dense    schemes outside experts
    experts  schemes of experts, which are linears of their own in the file and fused in engines
    """

    groups: tuple[Scheme, ...]
    dense: frozenset[Scheme | None]
    experts: frozenset[Scheme | None]

    @staticmethod
    def of(facts: FormatFacts) -> _Schemes:
        names = (a.weight.name for a in facts.assigned if a.weight.part is None)
        inside = {name for name in names if ".experts." in name}
        return _Schemes(
            tuple(dict.fromkeys(a.scheme for a in facts.assigned if a.scheme is not None)),
            frozenset(a.scheme for a in facts.assigned if a.weight.name not in inside),
            frozenset(a.scheme for a in facts.assigned if a.weight.name in inside),
        )


def engines_of(facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(engines, notes)."""
    schemes = _Schemes.of(facts)
    if len(schemes.experts) > 1:
        return (), ("transformers, vLLM and SGLang fuse experts, which must all have one scheme there",)
    loads, notes = [], []
    if (problem := _transformers_problem(schemes)) is None:
        loads.append("transformers")
    else:
        notes.append(problem)
    if (problem := _vllm_problem(facts, schemes)) is None:
        loads.append("vLLM")
        if (problem := _sglang_problem(facts, schemes)) is None:
            loads.append("SGLang")
    if problem is not None:
        notes.append(problem)
    return tuple(loads), (*notes, *_advice(facts, schemes, loads))


def _transformers_problem(schemes: _Schemes) -> str | None:
    for scheme in schemes.experts:
        if problem := _fused_experts_problem(scheme, schemes):
            return problem
    dense = schemes.dense - {None}
    if len(dense) > 1 and any(s is not None and not s.sym for s in dense):
        # it needs dequantize=True for these, which reads every weight as the first group says
        return "transformers reads asymmetric weights only where all weights outside experts have one scheme"
    return None


def _fused_experts_problem(scheme: Scheme | None, schemes: _Schemes) -> str | None:
    """What keeps transformers from fusing experts stored as `scheme`, which its own code decodes."""
    if scheme is None:
        if schemes.groups and schemes.groups[0].numbers == "fp8":
            return None
        return "transformers looks for codes in experts that are kept: quantize them, or the rest to fp8"
    if scheme.numbers == "nvfp4":
        return "transformers forgets the scale of the tensor in nvfp4 experts and computes something else"
    if static_inputs(scheme):
        return "transformers has no place for the input scales of experts: use dynamic inputs"
    if scheme.tile is not None:
        return "transformers reads fp8 experts with a scale per row or tensor, not blocks"
    if layout_of(scheme) == "int-quantized" or not scheme.sym:
        return "transformers reads integer experts packed and symmetric only: not w8, not w8a8, not _asym"
    return None


def _vllm_problem(facts: FormatFacts, schemes: _Schemes) -> str | None:
    if any(layout_of(s) == "int-quantized" and s.activations is None for s in schemes.groups):
        return "vLLM reads 8-bit weight-only files packed only: w8g128 loads there"
    if facts.kv_cache == "int8":
        return "vLLM and SGLang hold key-value caches in fp8, not int8"
    if (problem := fusing_problem((a.weight, a.scheme) for a in facts.assigned)) is not None:
        return problem
    # of fused weights all but the last start the next one in a block of its own
    blocks = (a.weight for a in facts.assigned if a.scheme is not None and a.scheme.tile is not None)
    for weight in blocks:
        if weight.role in ("q", "k", "gate") and weight.shape[0] % 128:
            return f"vLLM and SGLang need blocks that do not cross fused weights: `{weight.name}` ends in one"
    for scheme in schemes.experts:
        if scheme is not None and not _vllm_fuses(scheme):
            return f"vLLM and SGLang do not run experts as {scheme.name}: use fp8a8, w8a8 or packed integers"
    return None


def _vllm_fuses(scheme: Scheme) -> bool:
    """It runs fused experts: inputs per token beside rows, of one scale beside tensors, or blocks of both."""
    inputs = scheme.activations
    if inputs is None:
        return layout_of(scheme) not in ("int-quantized", "float-quantized")
    if scheme.tile is not None:
        return True
    return scheme.per_tensor != inputs.dynamic and (inputs.dynamic or scheme.numbers == "fp8")


def _sglang_problem(facts: FormatFacts, schemes: _Schemes) -> str | None:
    if any(s.bits not in (4, 8) or not s.sym for s in schemes.groups):
        return "SGLang reads integers of 4 and 8 bits, symmetric, only"
    if any(s.tile is not None and s.activations is None for s in schemes.groups):
        return "SGLang reads fp8 blocks together with rounded inputs only: use fp8a8_block"
    if any(s.numbers == "mxfp4" for s in schemes.groups) or any(
        s is not None and s.numbers == "nvfp4" for s in schemes.experts
    ):
        return "SGLang reads neither mxfp4 weights nor nvfp4 experts whose inputs are not rounded"
    packed = [s for s in schemes.groups if layout_of(s) == "pack-quantized"]
    if any(s.group_size not in MARLIN_GROUPS for s in packed):
        return "SGLang reads packed integers in groups of 32, 64, 128 or a whole row"
    return marlin_problem(a.weight for a in facts.assigned if a.scheme in packed)


def _advice(facts: FormatFacts, schemes: _Schemes, loads: list[str]) -> Iterator[str]:
    """What to know where it does load."""
    groups = schemes.groups
    rounded = {s.numbers for s in groups if s.activations is not None}
    if "transformers" in loads:
        if any(not s.sym for s in groups):
            yield "transformers needs CompressedTensorsConfig(dequantize=True) for asymmetric packed weights"
        if facts.dtype != "bfloat16" and any(s.numbers in _E2M1 for s in groups):
            yield (
                "transformers computes mxfp4 and nvfp4 in bfloat16: give it dtype=torch.bfloat16, or "
                "CompressedTensorsConfig(dequantize=True)"
            )
        if any(s is not None and s.activations is not None for s in schemes.experts):
            yield "transformers does not round the inputs of experts"
    if "vLLM" in loads:
        if "fp8" in rounded:
            yield "vLLM and SGLang round inputs to fp8 from sm89 on; older GPUs run the weights alone"
        if "int" in rounded:
            yield "vLLM runs int8 inputs on sm75 to sm90, not on Blackwell: use fp8a8 there"
        if any(s.per_tensor and s.numbers == "fp8" and s.activations is not None for s in groups):
            yield "vLLM rounds q, k, v and gate, up again to one scale: fp8a8 keeps one per row"
        if facts.kv_cache is not None:
            yield "vLLM uses the key-value scales with --kv-cache-dtype fp8"
    if any(s.bits in (3, 5, 6, 7) for s in groups):
        yield "3, 5, 6 and 7 bits need compressed-tensors 0.18 or newer"
    used = ((a.weight, a.scheme) for a in facts.assigned if a.scheme is not None)
    yield from cutting_notes(loads, ((weight, s.tile or s.group_size) for weight, s in used))
