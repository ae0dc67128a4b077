"""Learned rounding on a block small enough to see through, and on those of real families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError
from quantkit.methods import signround
from quantkit.methods.signround import Params, SignRound, batches, block_loss, split
from quantkit.model.build import build_graph
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Tuned
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.models import save_tiny, tiny_tokens
from tests.quantized import same

SCHEME = parse_scheme("w2g16")
QUICK = Params(start="rtn", iterations=20, rows=1, rate=0.1, held_out=0.25)


@dataclass
class Product:
    """A block that multiplies by one weight, and counts the rows that went through it."""

    runs: int = 0

    def differentiable(self, hidden: Tensor, new: Mapping[str, Tensor]) -> Tensor:
        self.runs += 1
        return hidden @ new["w"].T


@dataclass(frozen=True)
class Rows:
    inputs: Tensor
    goals: Tensor

    @property
    def rows(self) -> int:
        return self.inputs.shape[0]

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row : row + 1], self.goals[row : row + 1]


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows_for(weight: Tensor, rows: int = 16) -> Rows:
    """Correlated inputs, as those of a model are: rounding errors can cancel."""
    rng = torch.Generator().manual_seed(3)
    mixed = torch.randn(32, 32, generator=rng)
    inputs = torch.randn(rows, 24, 32, generator=rng) @ mixed
    return Rows(inputs, inputs @ weight.T)


def tuned(
    params: Params, goal: Tensor, weight: Tensor | None = None, scheme: Scheme = SCHEME
) -> tuple[QuantizedLinear, Tuned]:
    """(start, result) for one weight whose product is to be that of `goal`."""
    source = goal if weight is None else weight
    start = QuantizedLinear("w", nearest(source, scheme, "mse"))
    tuner = signround.quantizer(params).tuner
    return start, tuner.tune(Product(), {"w": source}, {"w": start}, {"w": scheme}, rows_for(goal))


def test_lowers_the_loss_of_the_output() -> None:
    weight = weight_of()
    start, result = tuned(replace(QUICK, iterations=300, rate=0.04), weight)
    everything = rows_for(weight)

    def loss(linear: QuantizedLinear) -> float:
        out = everything.inputs @ dequantize(linear.weight).T
        return float((out - everything.goals).square().sum())

    assert loss(result.linears["w"]) < 0.7 * loss(start)
    assert result.facts["block_loss"] < 0.7 * result.facts["block_loss_start"]
    assert result.note is None
    found = result.linears["w"].weight
    assert isinstance(found, Affine) and isinstance(start.weight, Affine)
    assert not torch.equal(found.codes, start.weight.codes)


@pytest.mark.parametrize("name", ["w3g16_asym", "w4g16_asymf", "nf4g16", "nf4g16_dq", "mxfp4"])
def test_every_grid(name: str) -> None:
    scheme = replace(parse_scheme(name), scale_dtype="float32")
    start, result = tuned(QUICK, weight_of(), weight_of() + 0.3 * weight_of(1), scheme)
    assert result.facts["block_loss"] < result.facts["block_loss_start"]
    assert type(result.linears["w"].weight) is type(start.weight)


def test_reported_loss_is_that_of_the_result() -> None:
    """What was judged is what is stored: scales rounded, codes as they are."""
    weight = weight_of()
    _, result = tuned(QUICK, weight)
    pairs = rows_for(weight)
    values = dequantize(result.linears["w"].weight)
    held, _ = split(pairs.rows, QUICK.held_out)
    losses = [float(block_loss(x @ values.T, goal, QUICK.drop)) for x, goal in map(pairs.read, held)]
    assert result.facts["block_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_start_that_nothing_beats_is_kept() -> None:
    """The start is exact; whatever moves is worse."""
    start = QuantizedLinear("w", nearest(weight_of(), SCHEME, "mse"), torch.ones(1))
    exact = dequantize(start.weight)
    tuner = signround.quantizer(QUICK).tuner
    # sources elsewhere and goals of noise push positions over
    pairs = rows_for(exact)
    noisy = Rows(pairs.inputs, pairs.goals + 0.3 * torch.randn(pairs.goals.shape))
    held, _ = split(pairs.rows, QUICK.held_out)
    noisy.goals[held] = pairs.goals[held]
    result = tuner.tune(Product(), {"w": weight_of(1)}, {"w": start}, {"w": SCHEME}, noisy)
    assert same(result.linears["w"].weight, start.weight)
    assert result.linears["w"].input_scale is start.input_scale
    assert result.note is not None and "start is kept" in result.note
    assert result.facts["block_loss"] == result.facts["block_loss_start"] == 0


def test_same_seed_same_bytes() -> None:
    first, second = (tuned(QUICK, weight_of())[1].linears["w"] for _ in range(2))
    assert same(first.weight, second.weight)
    other = tuned(replace(QUICK, seed=1), weight_of())[1].linears["w"]
    assert not same(first.weight, other.weight)


def test_nothing_is_written_to() -> None:
    weight = weight_of()
    start = QuantizedLinear("w", nearest(weight, SCHEME, "mse"))
    before = dequantize(start.weight)
    signround.quantizer(QUICK).tuner.tune(
        Product(), {"w": weight}, {"w": start}, {"w": SCHEME}, rows_for(weight_of(1))
    )
    assert torch.equal(weight, weight_of()) and torch.equal(dequantize(start.weight), before)


def test_runs() -> None:
    """Steps of so many rows, and the held-out rows for the start and five iterates of each attempt."""
    block, weight = Product(), weight_of()
    start = QuantizedLinear("w", nearest(weight, SCHEME, "mse"))
    given = {"w": weight}, {"w": start}, {"w": SCHEME}, rows_for(weight)
    params = replace(QUICK, rows=3)
    result = signround.quantizer(params).tuner.tune(block, *given)
    attempts = 1 if result.facts["block_loss"] < 0.97 * result.facts["block_loss_start"] else 2
    assert block.runs == attempts * (20 * 3 + 5 * 4) + 4


def test_loss_worked() -> None:
    """Residuals 1, 0, 0, 3 against a goal of squares 1 + 1 + 1 + 1; the largest quarter is left out."""
    goal = torch.ones(1, 1, 4)
    out = goal + torch.tensor([1.0, 0.0, 0.0, 3.0])
    assert float(block_loss(out, goal, 0.0)) == 2.5
    assert float(block_loss(out, goal, 0.25)) == 0.25


def test_split_worked() -> None:
    assert split(8, 0.25) == ([2, 6], [0, 1, 3, 4, 5, 7])
    assert split(3, 0.1) == ([0, 1, 2], [0, 1, 2])


def test_every_row_once_before_any_twice() -> None:
    found = [row for rows in batches(range(7), Params(iterations=7, rows=2)) for row in rows]
    assert sorted(found[:7]) == sorted(found[7:]) == list(range(7))
    assert found[:7] != found[7:]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"start": "awq"}, "start must be gptq or rtn"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"rate": 0.0}, "rate must lie"),
        ({"held_out": 0.6}, "held_out must lie"),
        ({"drop": -0.1}, "drop must lie"),
    ],
)
def test_wrong_parameters(params: dict[str, float | str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Params(**params)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp8", "w8a8", "w8a8_mixed"])
def test_refused(name: str) -> None:
    reason = signround.quantizer(Params()).accepts(parse_scheme(name))
    assert reason is not None and "use gptq or rtn" in reason


def test_start_is_made_by_gptq() -> None:
    found = signround.quantizer(Params(act_order="free"))
    assert isinstance(found, SignRound) and found.regroups_columns
    assert found.accepts(parse_scheme("nf4")) == found.start.accepts(parse_scheme("nf4")) is not None


# --- real blocks ----------------------------------------------------------------


def block_of(family: str, folder: Path) -> tuple[LoadedBlock, Tensor]:
    checkpoint = Checkpoint.open(save_tiny(family, folder))
    runtime = Runtime(checkpoint, build_graph(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    return runtime.load(0), runtime.embed(tiny_tokens())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_families(family: str, tmp_path: Path) -> None:
    block, hidden = block_of(family, tmp_path)
    scheme = parse_scheme("w2g16")
    sources = {w.key: block.weight(w).float().clone() for w in block.block.weights()}
    start = {key: QuantizedLinear(key, nearest(w, scheme, "mse")) for key, w in sources.items()}
    goals = block.run(hidden)
    tuner = signround.quantizer(replace(QUICK, held_out=0.0)).tuner
    result = tuner.tune(block, sources, start, dict.fromkeys(sources, scheme), Rows(hidden, goals))
    assert result.facts["block_loss"] < result.facts["block_loss_start"]
    assert result.linears.keys() == start.keys()
    assert torch.equal(block.run(hidden), goals)
