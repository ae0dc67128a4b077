"""Rounded inputs and caches in a block equal those of a model whose own functions are patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.model.build import build_graph
from quantkit.model.emulate import Emulator, Place, Rounding, Roundings
from quantkit.model.graph import Vector, Weight
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.numerics.inputs import InputRounding, cache_round
from quantkit.schemes import parse_scheme
from tests.models import tiny_tokens

Saved = Callable[[str], Path]
INT8, MIXED = InputRounding(parse_scheme("w8a8")), InputRounding(parse_scheme("w8a8_mixed2"))
STATIC, FP8 = InputRounding(parse_scheme("w8a8_static"), 0.03), InputRounding(parse_scheme("fp8a8"))
# Measured: 0, as equal values go through equal kernels. In another build of torch some ulps may differ, and
# where one moves a value across the middle of two codes, one input differs by a step, 1/127 of the largest.
CLOSE = 1e-3


def open_runtime(folder: Path) -> Runtime:
    checkpoint = Checkpoint.open(folder)
    return Runtime(checkpoint, build_graph(checkpoint), dtype=torch.float32, device=torch.device("cpu"))


def opened(folder: Path, index: int = 0) -> tuple[LoadedBlock, Tensor]:
    """A block, and states that enter it."""
    runtime = open_runtime(folder)
    return runtime.load(index), runtime.embed(tiny_tokens())


def rounded_logits(
    runtime: Runtime, tokens: Tensor, rounding: Rounding, chosen: Callable[[Weight], bool] = lambda _w: True
) -> Tensor:
    hidden = runtime.embed(tokens)
    for block in runtime.graph.blocks:
        by_key = {weight.key: rounding for weight in block.weights() if chosen(weight)}
        hidden = runtime.load(block.index).run(hidden, rounding=by_key)
    return runtime.logits(hidden)


@contextmanager
def patched(model: PreTrainedModel, rounding: Rounding, names: Callable[[str], bool]) -> Iterator[None]:
    """Inputs of linear functions of the parameters called so are rounded, and those of every Conv1D."""
    storages = {p.untyped_storage().data_ptr() for name, p in model.named_parameters() if names(name)}
    linear, conv = F.linear, Conv1D.forward

    def rounding_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        known = weight.untyped_storage().data_ptr() in storages
        return linear(rounding(input) if known else input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", rounding_linear)
        patch.setattr(Conv1D, "forward", lambda self, x: conv(self, rounding(x)))
        yield


def inside(name: str) -> bool:
    """Matrices of blocks but routers, by runtime name."""
    return ".layers." in name and "norm" not in name and not name.endswith(("bias", "mlp.gate.weight"))


def reference(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("rounding", [INT8, STATIC, MIXED, FP8], ids=["int8", "static", "mixed", "fp8"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "phi3", "opt", "deepseek_v3"])
def test_logits_equal_those_of_a_patched_model(family: str, rounding: Rounding, saved: Saved) -> None:
    # OPT flattens rows of text into one before it multiplies; of one row that makes no difference
    folder, tokens = saved(family), tiny_tokens(rows=1 if family == "opt" else 3)
    model = reference(folder)
    with torch.no_grad():
        plain = model(tokens).logits
        with patched(model, rounding, inside):
            expected = model(tokens).logits
    found = rounded_logits(open_runtime(folder), tokens, rounding)
    assert (expected - plain).norm() > 5 * CLOSE * plain.norm()
    assert (found - expected).norm() <= CLOSE * expected.norm()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_left_out_see_their_inputs_as_they_are(family: str, saved: Saved) -> None:
    folder, tokens = saved(family), tiny_tokens()
    model = reference(folder)
    downs = (".down_proj", "experts.down_proj")
    with torch.no_grad(), patched(model, STATIC, lambda n: n.removesuffix(".weight").endswith(downs)):
        expected = model(tokens).logits
    found = rounded_logits(open_runtime(folder), tokens, STATIC, lambda w: w.role == "down")
    assert (found - expected).norm() <= CLOSE * expected.norm()
    assert (found - rounded_logits(open_runtime(folder), tokens, STATIC)).norm() > 5 * CLOSE * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "gemma2"])
def test_nothing_to_round_changes_no_bit(family: str, saved: Saved) -> None:
    block, hidden = opened(saved(family))
    plain = block.run(hidden)
    assert torch.equal(block.run(hidden, rounding={}), plain)
    assert torch.equal(block.run(hidden, rounding=everywhere(block, lambda x: x)), plain)
    assert torch.equal(block.run(hidden), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_oss"])
def test_whole_activations_come_by_rows_of_text(family: str, saved: Saved) -> None:
    block, hidden = opened(saved(family))
    seen: list[tuple[int, ...]] = []

    def look(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    block.run(hidden, rounding={w.key: look for w in block.block.weights() if "experts" not in w.name})
    assert len(seen) == len([s for s in block.block.sites if "experts" not in s.id])
    assert {shape[:2] for shape in seen} == {(3, 24)}


def test_one_activation_is_rounded_once(saved: Saved) -> None:
    block, hidden = opened(saved("llama"))
    made: list[Tensor] = []

    class Counting(InputRounding):
        def __call__(self, x: Tensor) -> Tensor:
            made.append(x)
            return super().__call__(x)

    scheme = parse_scheme("w8a8")
    block.run(hidden, rounding={w.key: Counting(scheme) for w in block.block.weights()})
    assert len(made) == len(block.block.sites) == 4


def test_what_is_recorded_is_not_rounded(saved: Saved) -> None:
    block, hidden = opened(saved("llama"))
    plain: dict[str, Tensor] = {}
    both: dict[str, Tensor] = {}
    block.run(hidden, lambda site, x: plain.update({site: x}))
    states = block.run(hidden, lambda s, x: both.update({s: x}), rounding=everywhere(block, INT8))
    first, *rest = (site.id for site in block.block.sites)
    assert torch.equal(both[first], plain[first])
    assert not any(torch.equal(both[site], plain[site]) for site in rest)
    assert torch.equal(states, block.run(hidden, rounding=everywhere(block, INT8)))


def everywhere(block: LoadedBlock, rounding: Rounding) -> Mapping[str, Rounding]:
    return {weight.key: rounding for weight in block.block.weights()}


def test_fused_weights_must_agree(saved: Saved) -> None:
    block, hidden = opened(saved("mixtral"))
    at = "model.layers.0.block_sparse_moe.experts."
    gates = {f"{at}{e}.w1.weight": INT8 for e in range(4)}
    with pytest.raises(UnsupportedError, match=rf"`{at}0.w1.weight` and `{at}0.w3.weight` at once"):
        block.run(hidden, rounding=gates)
    with pytest.raises(UnsupportedError, match="rounded differently"):
        block.run(hidden, rounding=gates | {f"{at}{e}.w3.weight": STATIC for e in range(4)})
    equal = {f"{at}{e}.w3.weight": InputRounding(parse_scheme("w8a8")) for e in range(4)}
    assert not torch.equal(block.run(hidden, rounding=gates | equal), block.run(hidden))


# --- products of several matrices, by hand -------------------------------------

E, TOKENS, IN, OUT = 3, 4, 2, 5


def emulated(run: Callable[[], Tensor], w: Tensor, by_key: Mapping[str, Rounding]) -> Tensor:
    """`run` with the matrices of `w` (E, IN, OUT) called w[0], w[1] …"""
    size = IN * OUT
    places = [Place(e * size, (e + 1) * size - 1, OUT, f"w[{e}]") for e in range(E)]
    with Emulator({"w": w}, Roundings({"w": places}, by_key), None, (1, TOKENS)):
        return run()


def test_matrices_with_inputs_of_their_own_are_rounded_apart() -> None:
    x, w = torch.rand(E, TOKENS, IN), torch.rand(E, IN, OUT)
    by_key = {"w[0]": torch.round, "w[2]": torch.ceil}
    found = emulated(lambda: torch.bmm(x, w), w, by_key)
    expected = torch.stack((x[0].round() @ w[0], x[1] @ w[1], x[2].ceil() @ w[2]))
    torch.testing.assert_close(found, expected)


def test_matrices_with_one_input_must_agree() -> None:
    x, w = torch.rand(TOKENS, IN), torch.rand(E, IN, OUT)
    every: Mapping[str, Rounding] = {f"w[{e}]": torch.round for e in range(E)}
    torch.testing.assert_close(emulated(lambda: x @ w, w, every), x.round() @ w)
    with pytest.raises(UnsupportedError, match="all matrices of `w` at once"):
        emulated(lambda: x @ w, w, {"w[1]": torch.round})


def test_slices_of_a_matrix_are_rounded_like_it() -> None:
    x, w = torch.rand(TOKENS, IN), torch.rand(E, IN, OUT)
    found = emulated(lambda: x @ w[1, :, 1:3], w, {"w[1]": torch.round})
    torch.testing.assert_close(found, x.round() @ w[1, :, 1:3])
    assert torch.equal(emulated(lambda: x @ w[0], w, {"w[1]": torch.round}), x @ w[0])


def test_turned_around() -> None:
    x, w = torch.rand(TOKENS, IN), torch.rand(E, IN, OUT)
    found = emulated(lambda: w[1].T @ x.T, w, {"w[1]": torch.round})
    torch.testing.assert_close(found, w[1].T @ x.round().T)


def test_an_activation_changed_in_place_is_rounded_again() -> None:
    w = torch.rand(E, IN, OUT)

    def run() -> Tensor:
        x = torch.zeros(TOKENS, IN)
        first = x @ w[1]
        x.add_(1.2)
        return first + x @ w[1]

    found = emulated(run, w, {"w[1]": torch.round})
    torch.testing.assert_close(found, torch.ones(TOKENS, IN) @ w[1])


# --- keys and values -----------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "deepseek_v3", "gemma3_text"])
def test_a_rounded_cache_equals_a_patched_attention(family: str, saved: Saved) -> None:
    folder, tokens = saved(family), tiny_tokens()
    scale = torch.tensor([0.5])

    def cache(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return cache_round(keys, "int8", scale), cache_round(values, "int8", scale)

    model, attention = reference(folder), F.scaled_dot_product_attention

    def rounding_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> Tensor:
        return attention(query, *cache(key, value), **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain = model(tokens).logits
        patch.setattr(F, "scaled_dot_product_attention", rounding_attention)
        expected = model(tokens).logits
    runtime = open_runtime(folder)
    hidden = runtime.embed(tokens)
    for index in range(2):
        hidden = runtime.load(index).run(hidden, cache=cache)
    found = runtime.logits(hidden)
    assert (expected - plain).norm() > 0.02 * plain.norm()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_keys_and_values_can_be_looked_at(saved: Saved) -> None:
    block, hidden = opened(saved("llama"))
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((tuple(keys.shape), tuple(values.shape)))
        return keys, values

    plain = block.run(hidden)
    assert torch.equal(block.run(hidden, cache=look), plain)
    assert len(shapes) == block.block.attentions == 1
    (keys, values), rows = shapes[0], 3
    assert keys == values and (keys[0], keys[-2:]) == (rows, (24, 16))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention_that_is_no_call_cannot_be_rounded(family: str, saved: Saved) -> None:
    block, hidden = opened(saved(family))
    assert block.block.attentions == 0
    with pytest.raises(UnsupportedError, match="block 0 hides its keys and values"):
        block.run(hidden, cache=lambda k, v: (k, v))


# --- the reason for it all -----------------------------------------------------


def test_planted_outliers_ruin_rounding_by_token_and_not_decomposition(saved: Saved) -> None:
    """Two inputs are made 50 times as large, and their columns of weights 50 times smaller."""
    runtime = open_runtime(saved("llama"))
    block, hidden = runtime.load(0), runtime.embed(tiny_tokens())
    factors = torch.ones(64)
    factors[[5, 40]] = 50
    weights: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for site in block.block.sites:
        if isinstance(site.producer, Vector):
            norms[site.producer.name] = runtime.read_tensor(site.producer.name) * factors
            weights |= {w.key: block.weight(w) / factors for w in site.weights}
    plain = block.run(hidden)
    with block.replaced(weights, norms) as planted:
        exact = planted.run(hidden)
        by_token = planted.run(hidden, rounding=dict.fromkeys(weights, INT8))
        mixed = InputRounding(parse_scheme("w8a8_mixed"))
        decomposed = planted.run(hidden, rounding=dict.fromkeys(weights, mixed))
    added = (plain - hidden).norm()
    assert (exact - plain).norm() < 1e-5 * added
    token_error, mixed_error = ((found - exact).norm() / added for found in (by_token, decomposed))
    assert mixed_error < 0.02
    assert token_error > 5 * mixed_error
