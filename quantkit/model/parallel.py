"""What tensor parallelism asks of groups: engines cut the inputs of `o` and `down`, and cut no group."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.model.graph import Weight

_CUT = ("o", "down")
MOST = 8


def narrowest(weights: Iterable[tuple[Weight, int]]) -> tuple[int, Weight | None]:
    """Largest power of two, up to 8, of GPUs over which all weights (with their group sizes) can be cut.

    Every GPU gets an equal slice of the inputs of `o` and `down`, which must hold whole groups. Also the
    first weight that allows no more, None at 8. Experts are left out: engines split their groups as needed.
    """
    slices, found = MOST, None
    for weight, group in weights:
        if weight.role not in _CUT or ".experts." in weight.name:
            continue
        while slices > 1 and weight.shape[1] % (slices * group):
            slices, found = slices // 2, weight
    return slices, found
