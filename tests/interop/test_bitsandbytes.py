"""Transformers with bitsandbytes loads what quantkit writes, given nothing but the path.

4-bit weights: bitsandbytes computes scale · table[code] as we do, and logits agree but for the order of
sums; on CPUs with AVX512-BF16 it repacks weights for kernels that round scales, inputs and results to
bfloat16, 2⁻⁹ relative each, so both ways are run. LLM.int8 rounds inputs while the model runs: products
are compared one by one, with the inputs rounded as we do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit import Rule, plan
from quantkit.numerics.inputs import round_inputs
from quantkit.run.report import Report
from quantkit.schemes import parse_scheme
from tests.interop.conftest import WIDE
from tests.interop.engines import (
    Distance,
    Source,
    distance,
    engine_warnings,
    load,
    logits,
    make,
    ours,
    perplexity,
    quantize,
    recipe_of,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        find_spec("bitsandbytes") is None or find_spec("accelerate") is None,
        reason="needs quantkit[bitsandbytes]",
    ),
]

FORMAT = "bitsandbytes"
Make = Callable[..., Source]
# measured: 0
EXACT = 1e-4
# measured: 0.06 where logits reach 4 and rounding to 4 bits moves them by 1.5
BFLOAT16 = 0.08
# name → target. Searched scales may be negative, which no other tool writes.
TARGETS = {
    "nf4": "nf4",
    "nf4_dq": "nf4_dq",
    "nf4g128": "nf4g128",
    "fp4": "fp4",
    "nf4-plain": "nf4@method=rtn",
    "nf4_dq-plain": "nf4_dq@method=rtn",
    "fp4_dq-plain": "fp4_dq@method=rtn",
    "nf4g32-plain": "nf4g32@method=rtn",
}
MIXED = parse_scheme("w8a8_mixed")


@pytest.fixture(scope="module")
def llama(source: Make) -> Source:
    return source("llama", **WIDE)


@pytest.fixture(scope="module")
def results(llama: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All of TARGETS and int8, made in one sweep."""
    out = tmp_path_factory.mktemp(FORMAT)
    named = [f"{FORMAT}:{t}{',' if '@' in t else '@'}name={name}" for name, t in TARGETS.items()]
    return out, quantize(llama, out, [*named, f"{FORMAT}:int8@name=int8"])


def bare(folder: Path) -> PreTrainedModel:
    """What a user gets who gives the path alone; a tensor that is missing or left over fails."""
    with engine_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def exact(folder: Path) -> PreTrainedModel:
    """The same on a CPU without bfloat16 kernels."""
    import bitsandbytes

    model = bare(folder)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def check(folder: Path, made: Source) -> None:
    """Both ways of the engine agree with our reading of the files."""
    distance(logits(exact(folder)), folder, FORMAT, made).check(EXACT)
    found = logits(bare(folder))
    assert float((found - ours(folder, FORMAT)).abs().max()) < BFLOAT16


def check_int8(folder: Path) -> None:
    """Every product of the engine is that of our weights with the inputs it got, rounded as we do.

    Logits say little: a value that one hair moves to the next code moves a thousand others, block by block.
    """
    import bitsandbytes

    ours(folder, FORMAT)
    decoded = load(folder.with_name(f"{folder.name}-decoded-float32"))
    model = bare(folder)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    logits(model)
    assert seen
    for name, (x, y) in seen.items():
        # outlier columns are those of the whole call, all rows of the batch together
        rounded = round_inputs(x.reshape(1, -1, x.shape[-1]), MIXED).reshape(x.shape)
        with torch.no_grad():
            found, plain = (decoded.get_submodule(name)(given) - y for given in (rounded, x))
        # its 1/127² has four right digits
        tolerance = 5e-5 * float(y.abs().max())
        Distance(float(found.abs().max()), float(plain.abs().max())).check(tolerance)


@pytest.mark.parametrize("name", TARGETS)
def test_loads_and_computes_our_weights(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    check(results[0] / name, llama)


def test_int8_loads_and_rounds_inputs_as_we_say(llama: Source, results: tuple[Path, Report]) -> None:
    check_int8(results[0] / "int8")


@pytest.mark.parametrize("name", ["nf4", "fp4_dq-plain", "int8"])
def test_perplexity_is_what_the_report_says(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == name)
    assert perplexity(exact(results[0] / name), llama) == pytest.approx(told.target.value, rel=2e-3)


def test_searched_scales_are_of_both_signs_and_beat_plain_ones(results: tuple[Path, Report]) -> None:
    absmax = [
        t for n, t in load_file(results[0] / "nf4" / "model.safetensors").items() if n.endswith(".absmax")
    ]
    assert all(bool((t < 0).any()) and bool((t > 0).any()) for t in absmax)
    kl = {t.name: t.quality[0].kl_mean for t in results[1].targets}
    assert kl["nf4"] < 0.8 * kl["nf4-plain"] and kl["nf4_dq"] < 0.8 * kl["nf4_dq-plain"]


@pytest.mark.parametrize("name", ["nf4-plain", "nf4_dq-plain", "fp4_dq-plain", "int8"])
def test_files_are_those_that_the_library_makes(
    name: str, llama: Source, results: tuple[Path, Report]
) -> None:
    """Plain rounding, against quantizing while loading: the same names, and the same bytes."""
    from transformers import BitsAndBytesConfig

    kind = name.split("_")[0].removesuffix("-plain")
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": "_dq" in name,
        }
    with engine_warnings():
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=config)
    # before any forward pass: the first repacks weights
    theirs = model.state_dict()
    found = load_file(results[0] / name / "model.safetensors")
    assert found.keys() == theirs.keys()
    for key, tensor in found.items():
        if key.endswith(".absmax") and tensor.dtype == torch.uint8:
            off = (tensor.int() - theirs[key].int()).abs()
            assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 0.01, key
        elif "quant_state" not in key:
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("target", ["nf4_dq", "int8"])
def test_bfloat16_source(target: str, source: Make, tmp_path: Path) -> None:
    made = source("llama", torch.bfloat16, **WIDE)
    folder, engines = make(made, tmp_path, f"{FORMAT}:{target}")
    assert "transformers" in engines
    model = bare(folder)
    assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.uint8, torch.int8}
    # every activation is rounded to bfloat16, the reference's to float32
    assert float((logits(model) - ours(folder, FORMAT)).abs().max()) < 0.25


def test_kept_weights_and_kinds_of_4_bits_side_by_side(llama: Source, tmp_path: Path) -> None:
    rules = [
        Rule("*.down_proj", scheme="fp4g128"),
        Rule("*.o_proj", scheme="nf4_dq"),
        Rule("*.q_proj", keep=True, blocks="0"),
    ]
    folder, _ = make(llama, tmp_path, f"{FORMAT}:nf4", rules)
    check(folder, llama)
    kept = load(llama.folder).get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(bare(folder).get_submodule("model.layers.0.self_attn.q_proj").weight, kept)


def test_kept_weights_beside_int8(llama: Source, tmp_path: Path) -> None:
    folder, _ = make(llama, tmp_path, f"{FORMAT}:int8", [Rule("*.q_proj", keep=True)])
    check_int8(folder)


@pytest.mark.parametrize(
    ("family", "target", "changes"),
    [
        ("qwen3", "nf4g32", {**WIDE, "tie_word_embeddings": True}),
        ("phi3", "nf4g32", {}),
        ("gpt2", "nf4g32", {}),  # Conv1D: the file holds (out, in) for it
        ("gpt2", "int8", {}),
        ("opt", "nf4g32", {}),  # tied head, and projections around the blocks that stay float
        ("starcoder2", "int8", {}),  # biases
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_architectures(
    family: str, target: str, changes: dict[str, Any], source: Make, tmp_path: Path
) -> None:
    made = source(family, **changes)
    folder, engines = make(made, tmp_path, f"{FORMAT}:{target}")
    assert "transformers" in engines
    if target == "int8":
        check_int8(folder)
    else:
        check(folder, made)


KEPT = [Rule("*.experts.*", keep=True)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_stay_float(family: str, source: Make, tmp_path: Path) -> None:
    made = source(family)
    folder, engines = make(made, tmp_path, f"{FORMAT}:nf4g32", KEPT)
    assert engines == ["transformers"]
    distance(logits(exact(folder)), folder, FORMAT, made).check(EXACT)


def blockers(made: Source, out: Path, target: str, rules: Sequence[Rule] = ()) -> str:
    return "\n".join(plan(recipe_of(made, out, [f"{FORMAT}:{target}"], rules)).blockers)


def test_what_the_engine_cannot_load_is_refused_beforehand(source: Make, tmp_path: Path) -> None:
    assert "'*.experts.*=keep'" in blockers(source("qwen3_moe"), tmp_path, "nf4g32")
    llama = source("llama")
    assert "not a multiple of 64" in blockers(llama, tmp_path, "nf4")
    assert "one kind" in blockers(llama, tmp_path, "nf4g32", [Rule("*.o_proj", scheme="w8a8_mixed")])
    assert "write int8" in blockers(llama, tmp_path, "w8@method=rtn")


def test_widths_that_stop_some_processors_are_announced(source: Make, tmp_path: Path) -> None:
    """The day bitsandbytes can do it, this fails and the announcement can go."""
    from bitsandbytes.functional import has_avx512bf16

    made = source("llama", num_attention_heads=4, num_key_value_heads=1)
    (told,) = plan(recipe_of(made, tmp_path, [f"{FORMAT}:nf4g32"])).to_json()["targets"]
    assert any("AVX512-BF16" in note for note in told["notes"])
    folder, _ = make(made, tmp_path, f"{FORMAT}:nf4g32")
    distance(logits(exact(folder)), folder, FORMAT, made).check(EXACT)
    if has_avx512bf16():
        with pytest.raises(AssertionError, match="divisible"):
            logits(bare(folder))


@pytest.fixture(scope="module")
def outliers(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The llama with two inputs of every projection 50 times larger, and their weights as much smaller."""
    plain = source("llama", **WIDE)
    folder = tmp_path_factory.mktemp("outliers") / "source"
    folder.mkdir()
    for file in plain.folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain.folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 77]] *= 50
        elif any(f".{part}_proj.weight" in name for part in ("q", "k", "v", "gate", "up")):
            tensor[:, [3, 77]] /= 50
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Source(folder, plain.calibration, plain.text)


def test_decomposition_survives_outliers_that_ruin_plain_int8(outliers: Source, tmp_path: Path) -> None:
    """Dettmers et al. 2022, table 1: absmax fails, mixed decomposition is as good as no rounding at all."""
    import bitsandbytes

    report = quantize(outliers, tmp_path, [f"{FORMAT}:int8@name=int8"])
    counted = {t.name: t.facts["outlier_columns"] for t in report.targets[0].tensors}
    assert all(n >= 2 for name, n in counted.items() if "q_proj" in name or "up_proj" in name)
    wanted = logits(load(outliers.folder)).log_softmax(-1)
    folder = tmp_path / "int8"

    def divergence(found: Tensor) -> float:
        return float((wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean())

    model = bare(folder)
    mixed, weights_alone = divergence(logits(model)), divergence(ours(folder, FORMAT))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.state.threshold = 0.0
    # measured: 0.0076, 0.0072, 0.078
    assert mixed < 1.3 * weights_alone
    assert divergence(logits(model)) > 5 * mixed
