from __future__ import annotations

import pytest

from quantkit.model.graph import Role, Weight
from quantkit.model.parallel import narrowest


def weight(width: int, role: Role = "down", name: str = "mlp.down_proj.weight") -> Weight:
    return Weight(name, (64, width), role)


@pytest.mark.parametrize(
    ("width", "group", "slices"),
    [
        (14_336, 128, 8),
        (11_008, 128, 2),  # 86 groups
        (18_944, 128, 4),  # 148
        (18_944, 64, 8),
        (896, 128, 1),  # 7
        (4096, 4096, 1),
    ],
)
def test_slices_hold_whole_groups(width: int, group: int, slices: int) -> None:
    given = weight(width)
    assert narrowest([(given, group)]) == (slices, None if slices == 8 else given)


def test_the_weight_that_allows_least_is_named() -> None:
    wide, narrow = weight(11_008, name="first"), weight(896, "o", "second")
    assert narrowest([(weight(4096), 128), (wide, 128), (narrow, 128), (wide, 128)]) == (1, narrow)
    assert narrowest([(narrow, 64), (wide, 128)]) == (2, narrow)


def test_only_inputs_that_are_cut_matter() -> None:
    inside = weight(896, name="mlp.experts.3.down_proj.weight")
    assert narrowest([(weight(896, "q"), 128), (weight(896, "up"), 128), (inside, 128)]) == (8, None)
    assert narrowest([]) == (8, None)
