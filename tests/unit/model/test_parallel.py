from __future__ import annotations

import pytest

from quantkit.model.graph import Role, Weight
from quantkit.model.parallel import cutting_notes, marlin_problem, narrowest


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


def test_only_large_models_and_groups_that_are_cut_are_worth_a_note() -> None:
    large = Weight("mlp.down_proj.weight", (2**20, 1024), "down")
    given = [(large, 256)]
    (note,) = cutting_notes(("transformers", "vLLM"), given)
    assert note == "vLLM cannot cut the groups of `mlp.down_proj` further: 4 of 8 GPUs at most"
    assert list(cutting_notes(("transformers",), given)) == []
    assert list(cutting_notes(("vLLM",), [(large, None)])) == []
    assert list(cutting_notes(("vLLM",), [(weight(1024), 256)])) == []


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ({"mlp.down_proj": (64, 128)}, True),
        ({"mlp.down_proj": (96, 128)}, False),
        ({"mlp.down_proj": (64, 192)}, False),
        # put side by side: 96 + 32 + 64
        ({"attn.q_proj": (96, 128), "attn.k_proj": (32, 128), "attn.v_proj": (64, 128)}, True),
        ({"attn.q_proj": (96, 128), "attn.k_proj": (32, 128), "attn.v_proj": (32, 128)}, False),
        ({"mlp.experts.0.down_proj": (128, 64)}, True),
        ({"mlp.experts.0.down_proj": (64, 128)}, False),
        ({"mlp.experts.0.gate_proj": (32, 128), "mlp.experts.0.up_proj": (32, 128)}, True),
    ],
)
def test_tiles_of_marlin(shapes: dict[str, tuple[int, int]], fits: bool) -> None:
    given = [
        Weight(f"{name}.weight", shape, name.split(".")[-1].removesuffix("_proj"))
        for name, shape in shapes.items()
    ]  # type: ignore[arg-type]
    problem = marlin_problem(given)
    assert (problem is None) == fits
    assert fits or "SGLang's kernel takes outputs in multiples of" in str(problem)
