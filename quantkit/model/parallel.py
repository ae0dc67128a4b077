"""What serving engines ask of shapes: whole groups on every GPU, and whole tiles of their kernel, Marlin."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from quantkit.model.fused import fused_sets
from quantkit.model.graph import Weight

_CUT = ("o", "down")
MOST = 8
# parameters of a model that anybody cuts
_LARGE = 10**9
# outputs and inputs of Marlin's smallest tile; vLLM pads what is left over, SGLang does not
_OUTPUTS, _INPUTS = 64, 128
MARLIN_GROUPS = (32, 64, 128, None)


def narrowest(weights: Iterable[tuple[Weight, int]]) -> tuple[int, Weight | None]:
    """Largest power of two, up to 8, of GPUs over which all weights (with their group sizes) can be cut.

    Every GPU gets an equal slice of the inputs of `o` and `down`, which must hold whole groups. Also the
    first weight that allows no more, None at 8. Experts are left out: engines split their groups as needed.
    """
    slices, found = MOST, None
    for weight, group in weights:
        if weight.role not in _CUT or _of_expert(weight):
            continue
        while slices > 1 and weight.shape[1] % (slices * group):
            slices, found = slices // 2, weight
    return slices, found


def cutting_notes(loads: Collection[str], weights: Iterable[tuple[Weight, int | None]]) -> Iterator[str]:
    """What to know about several GPUs, of weights with their group sizes; None: no group to be cut.

    loads  names of the engines that load the file
    """
    serving = " and ".join(name for name in ("vLLM", "SGLang") if name in loads)
    every = list(weights)
    most, least = narrowest((weight, group) for weight, group in every if group is not None)
    if serving and least is not None and sum(weight.parameters for weight, _ in every) >= _LARGE:
        many = f"{most} of {MOST} GPUs" if most > 1 else "one GPU"
        yield f"{serving} cannot cut the groups of `{least.module}` further: {many} at most"


def marlin_problem(weights: Iterable[Weight]) -> str | None:
    """Why SGLang cannot run weights of packed integers, None when it can."""
    for members in fused_sets(weights):
        weight = members[0]
        out, width = sum(w.shape[0] for w in members), weight.shape[1]
        # of experts the hidden states are to be multiples of the larger number
        flipped = _of_expert(weight) and weight.role == "down"
        outputs, inputs = (_INPUTS, _OUTPUTS) if flipped else (_OUTPUTS, _INPUTS)
        if out % outputs or width % inputs:
            return (
                f"SGLang's kernel takes outputs in multiples of {outputs} and inputs of {inputs}, and "
                f"`{weight.module}` is {out:,} × {width:,}"
            )
    return None


def _of_expert(weight: Weight) -> bool:
    return ".experts." in weight.name
