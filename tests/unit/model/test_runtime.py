"""Block by block equals the whole model; what is recorded equals what hooks see."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NumericsError
from quantkit.model.build import build_graph
from quantkit.model.graph import Vector
from quantkit.model.runtime import LoadedBlock, Runtime
from tests.models import FAMILIES, save_tiny, tiny_tokens

Saved = Callable[[str], Path]
CPU = torch.device("cpu")
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def open_runtime(folder: Path, dtype: torch.dtype = torch.float32) -> Runtime:
    checkpoint = Checkpoint.open(folder)
    return Runtime(checkpoint, build_graph(checkpoint), dtype=dtype, device=CPU)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def block_by_block(runtime: Runtime, tokens: Tensor) -> Tensor:
    hidden = runtime.embed(tokens)
    runtime.release_embed()
    for index in range(len(runtime.graph.blocks)):
        hidden = runtime.load(index).run(hidden)
    return runtime.logits(hidden)


def read_weight(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, saved: Saved) -> None:
    folder = saved(family)
    tokens = tiny_tokens()
    with torch.no_grad():
        expected = reference(folder)(tokens).logits
    found = block_by_block(open_runtime(folder), tokens)
    # The same kernels run on the same values, so most families agree bit for bit. Experts run one
    # by one here and grouped there: sums of fp32 products in another order, hence some ulps.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "gpt2"])
def test_bfloat16_logits_equal_transformers(family: str, saved: Saved) -> None:
    folder = saved(family)
    tokens = tiny_tokens()
    with torch.no_grad():
        expected = reference(folder, torch.bfloat16)(tokens).logits
    found = block_by_block(open_runtime(folder, torch.bfloat16), tokens)
    # bf16 has 8 bits: one ulp is 2⁻⁸ of the scale, and grouped experts may round twice differently.
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_parameters_that_stay_in_fp32(saved: Saved) -> None:
    folder = saved("deepseek_v3")
    block = open_runtime(folder, torch.bfloat16).load(1)
    state = block._module.state_dict()
    assert state["mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert state["mlp.gate.weight"].dtype == torch.bfloat16


def test_nothing_depends_on_other_rows_or_on_the_past(saved: Saved) -> None:
    runtime = open_runtime(saved("gemma2"))
    tokens = tiny_tokens(rows=2)
    first = block_by_block(runtime, tokens)
    block_by_block(runtime, tiny_tokens(rows=3, length=11, seed=5))
    assert torch.equal(block_by_block(runtime, tokens), first)


def test_resumed_without_embedding_first(saved: Saved) -> None:
    folder = saved("qwen3")
    runtime = open_runtime(folder)
    hidden = runtime.embed(tiny_tokens())
    expected = runtime.load(1).run(runtime.load(0).run(hidden))
    resumed = open_runtime(folder)
    assert torch.equal(resumed.load(1).run(resumed.load(0).run(hidden)), expected)


# --- recording ---------------------------------------------------------------


def recorded_grams(runtime: Runtime, tokens: Tensor) -> dict[str, Tensor]:
    """Site → Σ x xᵀ over the run, in fp32, one addition per call of the recorder."""
    grams: dict[str, Tensor] = {}

    def record(site: str, x: Tensor) -> None:
        assert x.dim() == 2
        grams[site] = grams.get(site, 0) + x.T @ x

    hidden = runtime.embed(tokens)
    for index in range(len(runtime.graph.blocks)):
        hidden = runtime.load(index).run(hidden, record)
    return grams


def hooked_grams(model: PreTrainedModel, tokens: Tensor, kind: type[nn.Module]) -> dict[str, Tensor]:
    """Module name → Σ x xᵀ of its input, by forward hooks."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            grams[name] = x.T @ x

        return seen

    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(tokens)
    return grams


@pytest.mark.parametrize("family", ["llama", "cohere", "opt", "phi3", "starcoder2", "gpt2"])
def test_recorded_grams_equal_those_of_hooks(family: str, saved: Saved) -> None:
    folder = saved(family)
    runtime = open_runtime(folder)
    model = reference(folder)
    kind = type(model.transformer.h[0].mlp.c_fc) if family == "gpt2" else nn.Linear
    hooked = hooked_grams(model, tiny_tokens(), kind)
    recorded = recorded_grams(runtime, tiny_tokens())
    compared = 0
    for block in runtime.graph.blocks:
        for site in block.sites:
            for weight in site.weights:
                assert torch.equal(recorded[site.id], hooked[weight.module])
                compared += 1
    assert compared == len([name for name in hooked if ".0." in name or ".1." in name])


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_records_its_own_tokens(family: str, saved: Saved) -> None:
    """Each routed token appears at exactly top-k experts, and `down` sees as many rows as `gate`."""
    folder = saved(family)
    runtime = open_runtime(folder)
    tokens = tiny_tokens()
    rows: dict[str, list[int]] = {}
    hidden = runtime.embed(tokens)
    for index in range(2):
        hidden = runtime.load(index).run(hidden, lambda s, x: rows.setdefault(s, []).append(x.shape[0]))
    assert all(len(calls) == 1 for calls in rows.values())
    up = {
        s: n
        for s, (n,) in rows.items()
        if "experts" in s and "shared" not in s and s.startswith("model.layers.1.")
    }
    gates = [n for s, n in up.items() if not s.split("experts")[1].count("down") and not s.endswith("w2")]
    downs = [n for s, n in up.items() if s.split("experts")[1].count("down") or s.endswith("w2")]
    assert gates == downs
    assert sum(gates) == 2 * tokens.numel()


def block_widths(block: LoadedBlock, hidden: Tensor) -> tuple[Tensor, list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    return block.run(hidden, lambda s, x: seen.append((s, x.shape[1]))), seen


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_the_graph_are_recorded_once_in_its_order(family: str, saved: Saved) -> None:
    """What was observed without data and what is seen with data agree."""
    runtime = open_runtime(saved(family))
    hidden = runtime.embed(tiny_tokens())
    for index in range(2):
        block = runtime.load(index)
        hidden, seen = block_widths(block, hidden)
        expected = [(s.id, s.width) for s in block.block.sites]
        # experts: the graph lists all gate and up first, a run finishes one expert after another
        assert sorted(seen) == sorted(expected) if family in MIXTURES else seen == expected


def test_an_expert_without_tokens_is_not_called(saved: Saved) -> None:
    runtime = open_runtime(saved("mixtral"))
    hidden = runtime.embed(tiny_tokens(rows=1, length=1))
    seen: list[str] = []
    runtime.load(0).run(hidden, lambda site, _x: seen.append(site))
    assert len([site for site in seen if site.endswith("w1+w3")]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_activations_reproduce_the_products(family: str, saved: Saved) -> None:
    """Independent of names and hooks: changing one weight along what a site never sees changes nothing."""
    runtime = open_runtime(saved(family))
    tokens = tiny_tokens(rows=1, length=8)  # fewer tokens than inputs, so a null space exists
    hidden = runtime.embed(tokens)
    block = runtime.load(0)
    inputs: dict[str, Tensor] = {}
    expected = block.run(hidden, lambda site, x: inputs.update({site: x.clone()}))
    blind: dict[str, Tensor] = {}
    seeing: dict[str, Tensor] = {}
    for site in block.block.sites:
        if site.id not in inputs:
            continue
        *_, basis = torch.linalg.svd(inputs[site.id].double())
        # expert sites may have fewer rows still; the last row of V is orthogonal to every input
        for weight in site.weights:
            value = block.weight(weight)
            ones = torch.ones(weight.shape[0], 1)
            blind[weight.key] = value + (ones.double() @ basis[-1:]).float()
            seeing[weight.key] = value + (ones.double() @ basis[:1]).float()
    blind = {key: value.clone() for key, value in blind.items()}
    with block.replaced(blind):
        same = block.run(hidden)
    with block.replaced(seeing):
        other = block.run(hidden)
    scale = expected.abs().max()
    # fp32 products of rows orthogonal to 1e-7 of their length, through a dozen matrices
    assert (same - expected).abs().max() <= 1e-4 * scale
    assert (other - expected).abs().max() >= 1e-2 * scale


# --- weights and replacement --------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_returns_the_values_on_disk(family: str, saved: Saved) -> None:
    folder = saved(family)
    tensors = load_file(folder / "model.safetensors")
    runtime = open_runtime(folder)
    for index in range(2):
        block = runtime.load(index)
        for weight in block.block.weights():
            stored = tensors[weight.name]
            if weight.part is not None:
                stored = stored if weight.part.expert is None else stored[weight.part.expert]
                stored = stored.T if weight.part.transposed else stored
            assert torch.equal(block.weight(weight), stored)


class Changed(Mapping[str, Tensor]):
    """Every weight changed, made from the block when asked."""

    def __init__(self, block: LoadedBlock) -> None:
        self.block = block
        self.weights = {w.key: w for w in block.block.weights()}

    def __getitem__(self, key: str) -> Tensor:
        return self.block.weight(self.weights[key]) * 1.5 + 0.01

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def every_weight_changed(block: LoadedBlock) -> dict[str, Tensor]:
    return dict(Changed(block))


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_changes_and_restores_exactly(family: str, saved: Saved) -> None:
    runtime = open_runtime(saved(family))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(1)
    before = block.run(hidden)
    new = every_weight_changed(block)
    with block.replaced(new) as inside:
        changed = inside.run(hidden)
        assert all(torch.equal(inside.weight(w), new[w.key]) for w in block.block.weights())
    assert not torch.allclose(changed, before, rtol=1e-3)
    assert torch.equal(block.run(hidden), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral"])
def test_replaced_equals_a_model_saved_with_these_values(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    runtime = open_runtime(folder)
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    new = every_weight_changed(block)
    with block.replaced(new):
        found = block.run(hidden)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for weight in block.block.weights():
        value = new[weight.key]
        target = tensors[weight.name]
        if weight.part is not None:
            value = value.T if weight.part.transposed else value
            target = target if weight.part.expert is None else target[weight.part.expert]
        target.copy_(value)
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(found, open_runtime(folder).load(0).run(hidden))


def test_replaced_one_after_another(saved: Saved) -> None:
    runtime = open_runtime(saved("llama"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    new = every_weight_changed(block)
    q, down = block.block.sites[0].weights[0].key, block.block.sites[3].weights[0].key
    with block.replaced({down: new[down]}):
        only_down = block.run(hidden)
    with block.replaced({q: new[q]}):
        block.run(hidden)
    with block.replaced({down: new[down]}):
        assert torch.equal(block.run(hidden), only_down)


def test_replacements_may_be_made_from_the_block_while_it_takes_them(saved: Saved) -> None:
    runtime = open_runtime(saved("mixtral"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    with block.replaced(every_weight_changed(block)):
        expected = block.run(hidden)
    with block.replaced(Changed(block)):
        assert torch.equal(block.run(hidden), expected)


def test_replaced_does_not_nest(saved: Saved) -> None:
    block = open_runtime(saved("llama")).load(0)
    with block.replaced({}), pytest.raises(RuntimeError, match="does not nest"), block.replaced({}):
        pass


def test_replaced_restores_after_an_exception(saved: Saved) -> None:
    runtime = open_runtime(saved("llama"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    before = block.run(hidden)
    key = block.block.sites[0].weights[0].key
    with pytest.raises(ZeroDivisionError), block.replaced({key: torch.zeros(64, 64)}):
        raise ZeroDivisionError
    with (
        pytest.raises(ValueError, match=r"has shape \(64, 64\), not \(2, 2\)"),
        block.replaced({key: torch.zeros(2, 2)}),
    ):
        pass
    assert torch.equal(block.run(hidden), before)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])
def test_a_scale_folded_into_what_produces_an_input_changes_nothing(family: str, saved: Saved) -> None:
    """The graph is right about producers, their biases and offsets: x/s and W·s give what x and W give."""
    runtime = open_runtime(saved(family))
    hidden = runtime.embed(tiny_tokens())
    for index in range(2):
        block = runtime.load(index)
        made = dict.fromkeys(s.producer for s in block.block.sites if isinstance(s.producer, Vector))
        assert made
        weights: dict[str, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        for vector in made:
            folded = [site for site in block.block.sites if site.producer == vector]
            s = torch.rand(folded[0].width, generator=torch.Generator().manual_seed(index)) + 0.5
            held = runtime.read_tensor(vector.name)
            vectors[vector.name] = (held + vector.offset) / s - vector.offset
            if vector.bias is not None:
                vectors[vector.bias] = runtime.read_tensor(vector.bias) / s
            vectors |= {name: runtime.read_tensor(name) * s for name in folded[0].readers}
            weights |= {w.key: block.weight(w) * s for site in folded for w in site.weights}
        plain = block.run(hidden)
        with block.replaced(weights, vectors):
            same = block.run(hidden)
        for half in ((weights, {}), ({}, vectors)):
            with block.replaced(*half):
                assert (block.run(hidden) - plain).norm() > 0.01 * plain.norm()
        # deepseek picks experts by scores, which move by an ulp; here no choice is that close
        assert (same - plain).norm() <= 1e-5 * plain.norm()
        hidden = plain


def test_other_tensors_are_replaced_and_restored(saved: Saved) -> None:
    runtime = open_runtime(saved("gpt2"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    before = block.run(hidden)
    name = "transformer.h.0.ln_1.bias"
    with block.replaced({}, {name: torch.zeros(64)}):
        changed = block.run(hidden)
        assert not block._module.get_parameter("ln_1.bias").any()
    with block.replaced({}, tensors={name: runtime.read_tensor(name)}):
        assert torch.equal(block.run(hidden), before)
    assert not torch.allclose(changed, before, rtol=1e-3)
    assert torch.equal(block.run(hidden), before)
    with pytest.raises(ZeroDivisionError), block.replaced({}, {name: torch.ones(64)}):
        raise ZeroDivisionError
    assert torch.equal(block.run(hidden), before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.h.0.ln_1.bias": torch.zeros(2)}, r"has shape \(64,\), not \(2,\)"),
        ({"transformer.h.1.ln_1.bias": torch.zeros(64)}, "not a tensor that block 0 keeps"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 96)}, "not a tensor that block 0 keeps"),
    ],
)
def test_other_tensors_that_do_not_fit(tensors: dict[str, Tensor], message: str, saved: Saved) -> None:
    block = open_runtime(saved("gpt2")).load(0)
    with pytest.raises(ValueError, match=message), block.replaced({}, tensors):
        pass


def test_read_tensor_gives_what_the_file_holds(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    found = open_runtime(folder, torch.bfloat16).read_tensor(name)
    assert torch.equal(found, tensors[name])
    assert found.dtype == torch.float16


# --- gradients ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *MIXTURES])
def test_differentiable_is_replaced(family: str, saved: Saved) -> None:
    """The same output as with the weights written into the block, and gradients at every one in use."""
    runtime = open_runtime(saved(family))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    rng = torch.Generator().manual_seed(0)
    new = {
        w.key: 1.1 * block.weight(w) + 0.01 * torch.randn(w.shape, generator=rng)
        for w in block.block.weights()
    }
    norm = next(n for n in block.block.kept if "norm" in n or "ln_1" in n)
    vector = 0.9 * runtime.read_tensor(norm).float()
    before = block.run(hidden)
    with block.replaced(new, {norm: vector}):
        expected = block.run(hidden)
    leaves = {key: t.clone().requires_grad_() for key, t in {**new, norm: vector}.items()}
    found = block.differentiable(hidden, leaves)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    found.square().sum().backward()
    for key, leaf in leaves.items():
        # an expert that no token chose has none
        reached = leaf.grad is not None and bool(leaf.grad.any())
        assert reached or "experts" in key, key
    assert any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves.values())
    assert torch.equal(block.run(hidden), before)


def test_differentiable_by_differences(saved: Saved) -> None:
    """A transposed weight: the gradient is the slope of the loss."""
    runtime = open_runtime(saved("gpt2"))
    hidden = runtime.embed(tiny_tokens()).double().float()
    block = runtime.load(0)
    weight = next(w for w in block.block.weights() if w.role == "up" or "c_fc" in w.name)
    value = block.weight(weight).clone()
    leaf = value.clone().requires_grad_()
    block.differentiable(hidden, {weight.key: leaf}).square().sum().backward()
    assert leaf.grad is not None
    direction = leaf.grad / leaf.grad.norm()
    ends = []
    for side in (-1, 1):
        with block.replaced({weight.key: value + side * 0.01 * direction}):
            ends.append(block.run(hidden).double().square().sum())
    slope = float(ends[1] - ends[0]) / 0.02
    assert slope == pytest.approx(float(leaf.grad.norm()), rel=1e-2)


def test_differentiable_within_replaced(saved: Saved) -> None:
    """What `new` leaves out is what was written."""
    runtime = open_runtime(saved("llama"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    first, second, *_ = block.block.weights()
    a, b = 2 * block.weight(first).clone(), 3 * block.weight(second).clone()
    with block.replaced({first.key: a, second.key: b}):
        expected = block.run(hidden)
    with block.replaced({first.key: a}):
        found = block.differentiable(hidden, {second.key: b})
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_differentiable_refuses(saved: Saved) -> None:
    runtime = open_runtime(saved("llama"))
    hidden = runtime.embed(tiny_tokens())
    block = runtime.load(0)
    weight = next(block.block.weights())
    with pytest.raises(ValueError, match="has shape"):
        block.differentiable(hidden, {weight.key: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="not a tensor that block 0 keeps"):
        block.differentiable(hidden, {"model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 64)})


# --- memory and damage --------------------------------------------------------


def test_blocks_are_not_kept(saved: Saved) -> None:
    runtime = open_runtime(saved("llama"))
    hidden = runtime.embed(tiny_tokens())
    runtime.load(0).run(hidden)
    runtime.release_embed()
    large = [
        name for name, p in runtime.skeleton.model.named_parameters() if not p.is_meta and p.numel() > 64
    ]
    assert large == []
    assert all(p.is_meta for block in runtime.skeleton.blocks for p in block.parameters())


def test_a_dropped_block_frees_its_memory_at_once(saved: Saved) -> None:
    runtime = open_runtime(saved("mixtral"))
    block = runtime.load(0)
    block.run(runtime.embed(tiny_tokens()), lambda _site, _x: None)
    weights = [weakref.ref(p) for p in block._module.parameters()]
    del block
    assert [ref for ref in weights if ref() is not None] == []


def test_tied_ends_share_memory_and_release_apart(saved: Saved) -> None:
    runtime = open_runtime(saved("gemma2"))
    tokens = tiny_tokens()
    expected = block_by_block(runtime, tokens)
    runtime.embed(tokens)
    head, embed = (
        runtime.skeleton.model.get_parameter(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert head.data_ptr() == embed.data_ptr()
    runtime.release_head()
    assert torch.equal(block_by_block(runtime, tokens), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_are_named(bad: float, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][5, 7] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    runtime = open_runtime(folder)
    runtime.load(0)
    with pytest.raises(NumericsError, match=rf"`{name}` is (nan|inf) at index \[5, 7\]"):
        runtime.load(1)


def test_overflow_in_float16_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 2] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=rf"`{name}` is inf in float16 at index \[3, 2\]"):
        open_runtime(folder, torch.float16).load(0)
