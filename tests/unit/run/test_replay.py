"""A block as a target leaves it: everything that the files will say has its effect on the states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.model.graph import Block
from quantkit.numerics.inputs import InputRounding, cache_round
from quantkit.numerics.nearest import nearest
from quantkit.recipe.plan import TargetPlan
from quantkit.run.replay import CacheRange, QuantizedBlock
from quantkit.run.results import BlockResult
from quantkit.tensors import QuantizedLinear, dequantize
from tests.quantized import random_linear, same

NAMES = ("a.k_scale", "a.v_scale")


def test_cache_ranges_by_hand() -> None:
    seen = CacheRange()
    keys, values = torch.tensor([[[[1.0, -255.0]]]]), torch.tensor([[[[0.5, 2.0]]]])
    assert all(a is b for a, b in zip(seen(keys, values), (keys, values), strict=True))
    seen(torch.full((1, 1, 3, 2), -3.0), torch.full((1, 1, 3, 2), -448.0))
    found = seen.scales(NAMES, "int8", "float32")
    # the largest of all rows: 255 / 127.5, and 448 / 127.5
    assert list(found) == list(NAMES)
    assert found["a.k_scale"].tolist() == [2.0] and found["a.v_scale"].tolist() == pytest.approx(
        [448 / 127.5]
    )
    found = seen.scales(NAMES, "fp8", "bfloat16")
    # 255 / 448 = .569196…, in bf16 .570312; 448 / 448
    assert found["a.k_scale"].tolist() == [0.5703125] and found["a.v_scale"].tolist() == [1.0]
    assert all(t.dtype == torch.bfloat16 and t.shape == (1,) for t in found.values())


def test_caches_of_zeros_and_of_half_precision() -> None:
    seen = CacheRange()
    seen(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.full((1, 1, 2, 2), 0.5, dtype=torch.float16))
    found = seen.scales(NAMES, "fp8", "float32")
    assert found["a.k_scale"].tolist() == [1.0] and found["a.v_scale"].tolist() == pytest.approx([0.5 / 448])


def test_a_cache_that_nobody_saw_has_no_scales() -> None:
    with pytest.raises(ValueError, match="no attention was seen"):
        CacheRange().scales(NAMES, "fp8", "float32")


def made(
    model: Any, target: TargetPlan, block: Block, inputs: float | None = None
) -> dict[str, QuantizedLinear]:
    """Weights of a block rounded to nearest, all with the same scale of static inputs."""
    found = {}
    for weight in block.weights():
        scheme = target.scheme_of(weight)
        if scheme is not None:
            scale = None if inputs is None else torch.tensor([inputs])
            q = nearest(model.runtime.read(weight), scheme, "absmax")
            found[weight.key] = QuantizedLinear(weight.key, q, scale)
    return found


def replayed(model: Any, target: TargetPlan, result: BlockResult, hidden: Tensor) -> Tensor:
    block = model.graph.blocks[0]
    with QuantizedBlock(target, block, result).within(model.runtime.load(0), model.runtime) as forward:
        return forward(hidden)


def by_hand(model: Any, linears: dict[str, QuantizedLinear], hidden: Tensor, **how: Any) -> Tensor:
    """The block with dequantized weights, run as `how` says."""
    loaded = model.runtime.load(0)
    tensors = how.pop("tensors", {})
    with loaded.replaced({k: dequantize(linear.weight) for k, linear in linears.items()}, tensors):
        found: Tensor = loaded.run(hidden, **how)
    return found


@pytest.mark.parametrize("text", ["gptq:w4g32", "bnb:nf4g32_dq", "ct:nvfp4", "ct:fp8", "ct:mxfp4"])
def test_weights_alone(text: str, model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    target, hidden = model.target(text), model.states()
    linears = made(model, target, model.graph.blocks[0])
    found = replayed(model, target, BlockResult(list(linears.values())), hidden)
    assert torch.equal(found, by_hand(model, linears, hidden))
    assert not torch.equal(found, model.runtime.load(0).run(hidden))


@pytest.mark.parametrize(
    ("text", "inputs"),
    [("ct:w8a8", None), ("ct:w8a8_static", 0.03), ("ct:fp8a8_static", 0.01), ("bnb:int8", None)],
)
def test_rounded_inputs(text: str, inputs: float | None, model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    target, hidden = model.target(text), model.states()
    block = model.graph.blocks[0]
    if text == "bnb:int8":
        rng = torch.Generator().manual_seed(1)
        linears = {w.key: random_linear(w.key, w.shape, target.default, rng) for w in block.weights()}
    else:
        linears = made(model, target, block, inputs)
    rounding = InputRounding(target.default, inputs)
    found = replayed(model, target, BlockResult(list(linears.values())), hidden)
    expected = by_hand(model, linears, hidden, rounding=dict.fromkeys(linears, rounding))
    assert torch.equal(found, expected)
    # states are random and small, so LLM.int8 finds no outlier and rounds everything
    assert not torch.equal(found, by_hand(model, linears, hidden))


def test_weights_that_a_rule_keeps_see_their_inputs_as_they_are(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    target, hidden = model.target("ct:w8a8"), model.states()
    kept = {key: None if "down_proj" in key else scheme for key, scheme in target.schemes.items()}
    target = replace(target, schemes=kept)
    linears = made(model, target, model.graph.blocks[0])
    assert len(linears) == 6
    rounding = dict.fromkeys(linears, InputRounding(target.default))
    found = replayed(model, target, BlockResult(list(linears.values())), hidden)
    assert torch.equal(found, by_hand(model, linears, hidden, rounding=rounding))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_cache_and_static_inputs_and_a_rewritten_norm_together(
    dtype: Any, model_of: Callable[..., Any]
) -> None:
    model = model_of("llama")
    target = model.target(f"ct:w8a8_static@kv_cache={dtype}")
    block, hidden = model.graph.blocks[0], model.states()
    linears = made(model, target, block, 0.05)
    norm = next(name for name in block.kept if "input_layernorm" in name)
    names = target.cache_names(block)
    assert names == ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")
    k, v = torch.tensor([0.02]), torch.tensor([0.03])
    tensors = {norm: model.runtime.read_tensor(norm) * 2, names[0]: k, names[1]: v}
    found = replayed(model, target, BlockResult(list(linears.values()), tensors), hidden)
    how: dict[str, Any] = {
        "rounding": dict.fromkeys(linears, InputRounding(target.default, 0.05)),
        "cache": lambda keys, values: (cache_round(keys, dtype, k), cache_round(values, dtype, v)),
        "tensors": {norm: tensors[norm]},
    }
    assert torch.equal(found, by_hand(model, linears, hidden, **how))
    for missing in how:
        less = {name: value for name, value in how.items() if name != missing}
        assert not torch.equal(found, by_hand(model, linears, hidden, **less)), missing


def test_scales_from_a_run_fit_the_run(model_of: Callable[..., Any]) -> None:
    """Ranges seen while a block runs give scales under which its cache is nearly what it was."""
    model = model_of("llama")
    hidden, loaded, seen = model.states(), model.runtime.load(0), CacheRange()
    plain = loaded.run(hidden, cache=seen)
    assert torch.equal(plain, loaded.run(hidden))
    for dtype, close in (("int8", 0.02), ("fp8", 0.06)):
        target = model.target(f"ct:w8@kv_cache={dtype}")
        block = model.graph.blocks[0]
        names = target.cache_names(block)
        tensors = seen.scales(names, dtype, "float32")  # type: ignore[arg-type]
        linears = made(model, target, block)
        found = replayed(model, target, BlockResult(list(linears.values()), tensors), hidden)
        without = by_hand(model, linears, hidden)
        change = float((found - without).norm() / (without - hidden).norm())
        assert 0 < change < close


def test_everything_is_undone_and_made_one_by_one(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    target, hidden = model.target("gptq:w4g32"), model.states()
    block, loaded = model.graph.blocks[0], model.runtime.load(0)
    plain = loaded.run(hidden)
    linears = made(model, target, block)
    asked: list[str] = []
    real = dequantize

    def counted(q: Any) -> Tensor:
        asked.append("dequantized")
        return real(q)

    monkeypatch.setattr("quantkit.run.replay.dequantize", counted)
    replay = QuantizedBlock(target, block, BlockResult(list(linears.values())))
    assert asked == []
    with replay.within(loaded, model.runtime) as forward:
        first = forward(hidden)
        assert same(first, forward(hidden)) and not torch.equal(first, plain)
    assert len(asked) == len(linears)
    assert torch.equal(loaded.run(hidden), plain)
    with pytest.raises(KeyError), replay.within(loaded, model.runtime):
        raise KeyError("while the rows run")
    assert torch.equal(loaded.run(hidden), plain)
