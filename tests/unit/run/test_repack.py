"""How repacking chooses what to store, and that its proof can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError, VerifyError
from quantkit.model.graph import Weight
from quantkit.protocols import Format
from quantkit.registry import load
from quantkit.run.proof import prove
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.run.repack import Proof, Repacked
from quantkit.run.survey import Found, refuse, schemes_for
from quantkit.schemes import parse_scheme
from quantkit.tensors import QuantizedLinear, dequantize
from tests.quantized import random_affine

NOTHING = QuantizedCheckpoint(Checkpoint(Path(), {}, {}), "gptq", {}, {})


def found(name: str = "a.q_proj.weight", shape: tuple[int, int] = (64, 512), **changes: Any) -> Found:
    plain = Found(
        weight=Weight(name, shape),
        bits=4,
        group=(1, 128),
        symmetric=True,
        zero_points=False,
        column_groups=False,
        dtype="float16",
        scales=256,
        inexact={"float16": 0, "bfloat16": 200, "float32": 0},
    )
    return replace(plain, **changes)


def chosen(to: str, *weights: Found, dtype: str = "bfloat16") -> list[str]:
    return [s.name for s in schemes_for(NOTHING, weights, to, dtype, None).values()]


@pytest.mark.parametrize(
    ("to", "group", "name"),
    [
        ("awq", (1, 128), "w4g128"),
        ("awq", (1, 256), "w4g128"),
        ("awq", (1, 512), "w4"),
        ("gptq", (64, 512), "w4"),
        ("gptq", (1, 256), "w4g256"),
    ],
)
def test_the_coarsest_group_that_the_format_has(to: str, group: tuple[int, int], name: str) -> None:
    assert chosen(to, found(group=group)) == [name]


def test_a_row_as_wide_as_the_groups_of_others_is_such_a_group() -> None:
    narrow = found("a.o_proj.weight", (64, 128), group=(1, 128))
    assert chosen("gptq", found(), narrow) == ["w4g128", "w4g128"]
    assert chosen("gptq", narrow) == ["w4"]


def test_zero_points_are_kept_when_one_weight_needs_them() -> None:
    needs = found("b.q_proj.weight", symmetric=False, zero_points=True)
    assert chosen("awq", found(zero_points=True)) == ["w4g128"]
    assert chosen("awq", found(), needs) == ["w4g128_asym", "w4g128_asym"]


def test_scales_take_the_first_dtype_that_holds_them_all() -> None:
    def dtype(to: str, *weights: Found) -> set[str]:
        return {s.scale_dtype for s in schemes_for(NOTHING, weights, to, "bfloat16", None).values()}

    exact = found("b.q_proj.weight", inexact={"float16": 0, "bfloat16": 0, "float32": 0})
    assert dtype("compressed_tensors", exact) == {"bfloat16"}
    assert dtype("compressed_tensors", exact, found()) == {"float16"}
    wide = found(dtype="float32", inexact={"float16": 3, "bfloat16": 9, "float32": 0})
    with pytest.raises(UnsupportedError, match=r"3 of 256 float32 scales of `a\.q_proj\.weight`"):
        dtype("gptq", wide)


def test_every_format_that_is_offered_exists() -> None:
    for name in ("awq", "compressed_tensors", "gptq"):
        fmt: Format = load("formats", name).FORMAT
        assert fmt.scale_dtype("float16") == "float16"


def test_many_problems_are_said_once() -> None:
    refuse([])
    with pytest.raises(UnsupportedError, match="without loss") as caught:
        refuse([f"problem {n}" for n in range(40)])
    assert caught.value.message.splitlines()[1:] == [
        "problem 0",
        "problem 1",
        "problem 2",
        "37 more likewise",
    ]


class Halves(QuantizedCheckpoint):
    """Random weights, the same at every look."""

    def linear(self, name: str) -> QuantizedLinear:
        rng = torch.Generator().manual_seed(len(name) + ord(name[-8]))
        return QuantizedLinear(name, random_affine((8, 64), parse_scheme("w4g32"), rng))


def test_the_proof_fails_when_a_single_value_differs(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    names = [w.name for w in model.graph.weights()]
    source = Halves(model.checkpoint, "gptq", {}, {name: () for name in names})

    def value(name: str) -> torch.Tensor:
        if name in source.parts:
            return dequantize(source.linear(name).weight)
        read: torch.Tensor = model.checkpoint.read(name)
        return read

    proof = prove(source, model.checkpoint, model.graph, value)
    assert proof.weights == 14 and proof.codes == 14 * 8 * 64 and proof.before == proof.after

    def broken(name: str) -> torch.Tensor:
        tensor = value(name)
        if name == names[-1]:
            tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(9.0))
        return tensor

    with pytest.raises(VerifyError, match=r"`model\.layers\.1\..* does not read back"):
        prove(source, model.checkpoint, model.graph, broken)


def test_a_result_survives_its_manifest() -> None:
    proof = Proof(1, 2, 3, "a", "a")
    made = Repacked("x", "awq-w4", Path("y"), 9, proof, (("w4", "w4", 1),), {"b": "zeros"}, ("vLLM",), ())
    assert Repacked.from_json(made.to_json(), Path("y")) == made
    assert made.table().rows == (("1", "w4", "w4"),)
