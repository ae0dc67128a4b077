"""Which engines are said to load a file. tests/interop asks transformers itself."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.formats.compressed_tensors import FORMAT, parse
from quantkit.model.graph import Part, Role, Weight
from quantkit.protocols import Assigned, FormatFacts

DENSE: tuple[tuple[str, Role], ...] = (
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.o_proj", "o"),
    ("mlp.gate_proj", "gate"),
    ("mlp.up_proj", "up"),
    ("mlp.down_proj", "down"),
)
EXPERTS: tuple[tuple[str, Role], ...] = (
    ("self_attn.o_proj", "o"),
    ("mlp.experts.0.gate_proj", "gate"),
    ("mlp.experts.0.down_proj", "down"),
)


def told(
    default: str,
    changes: dict[str, str | None] | None = None,
    parts: tuple[tuple[str, Role], ...] = DENSE,
    shape: tuple[int, int] = (256, 256),
    **more: Any,
) -> tuple[tuple[str, ...], str]:
    """(engines, notes in one line) of a block that is `default` but for `changes`, by a part of the name."""
    assigned = []
    for name, role in parts:
        given = [chosen for fragment, chosen in (changes or {}).items() if fragment in name]
        scheme = given[-1] if given else default
        weight = Weight(f"model.layers.0.{name}.weight", shape, role)
        assigned.append(Assigned(weight, None if scheme is None else parse(scheme)))
    facts = FormatFacts(assigned, parse(default), (), False, "rtn", "1.2.3", **more)
    loads, notes = FORMAT.engines(facts)
    assert all(len(note) > 20 for note in notes)
    return loads, "; ".join(notes)


ALL = ("transformers", "vLLM", "SGLang")


def test_four_bits_in_groups_load_everywhere() -> None:
    assert told("w4g128") == (ALL, "")


@pytest.mark.parametrize(
    "name, loads, why",
    [
        ("w8", ("transformers",), "w8g128"),
        ("w4g128_asym", ("transformers", "vLLM"), "dequantize=True"),
        ("w3g128", ("transformers", "vLLM"), "0.18"),
        ("fp8", ALL, ""),
        ("fp8_block", ("transformers", "vLLM"), "use fp8a8_block"),
        ("fp8a8", ALL, "sm89"),
        ("fp8a8_tensor", ALL, "again to one scale"),
        ("fp8a8_static", ALL, "sm89"),
        ("fp8a8_block", ALL, "sm89"),
        ("w8a8", ALL, "Blackwell"),
        ("w8a8_static", ALL, "Blackwell"),
        ("mxfp4", ("transformers", "vLLM"), "SGLang"),
        ("nvfp4", ALL, ""),
    ],
)
def test_dense_models(name: str, loads: tuple[str, ...], why: str) -> None:
    found, notes = told(name)
    assert found == loads
    assert why in notes and bool(why) == bool(notes)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_e2m1_is_computed_in_bfloat16(name: str) -> None:
    assert "bfloat16" not in told(name)[1]
    loads, notes = told(name, dtype="float16")
    assert "transformers" in loads and "dtype=torch.bfloat16" in notes


def test_caches() -> None:
    assert told("w4g128", kv_cache="fp8") == (ALL, "vLLM uses the key-value scales with --kv-cache-dtype fp8")
    loads, notes = told("w4g128", kv_cache="int8")
    assert loads == ("transformers",) and "not int8" in notes


@pytest.mark.parametrize("changes", [{"k_proj": "w8g128"}, {"v_proj": None}, {"gate_proj": "w4g64"}])
def test_what_vllm_fuses_has_one_scheme(changes: dict[str, str | None]) -> None:
    loads, notes = told("w4g128", changes)
    (changed,) = changes
    assert loads == ("transformers",) and f"{changed}`" in notes and "give them one scheme" in notes


@pytest.mark.parametrize("changes", [{"self_attn": "w8g128"}, {"mlp": None}, {"o_proj": "w3g64"}])
def test_what_is_not_fused_may_differ(changes: dict[str, str | None]) -> None:
    loads, notes = told("w4g128", changes)
    assert {"transformers", "vLLM"} <= set(loads) and "fuse" not in notes


def test_blocks_do_not_cross_fused_weights() -> None:
    loads, notes = told("fp8a8_block", shape=(192, 256))
    assert loads == ("transformers",) and "q_proj" in notes
    # v and up are the last of theirs
    parts = tuple((name, role) for name, role in DENSE if role in ("v", "up", "o", "down"))
    assert told("fp8a8_block", parts=parts, shape=(192, 256))[0] == ALL


@pytest.mark.parametrize("shape", [(96, 256), (256, 192)])
def test_sglang_takes_whole_tiles(shape: tuple[int, int]) -> None:
    loads, notes = told("w4g32", shape=shape, parts=(("self_attn.o_proj", "o"),))
    assert loads == ("transformers", "vLLM") and "SGLang's kernel takes" in notes
    assert told("fp8", shape=shape, parts=(("self_attn.o_proj", "o"),)) == (ALL, "")


def test_sglang_takes_the_groups_of_its_kernel() -> None:
    loads, notes = told("w4g256")
    assert loads == ("transformers", "vLLM") and "groups of 32, 64, 128" in notes


@pytest.mark.parametrize("name", ["w4g128", "fp8a8_block", "nvfp4"])
def test_groups_that_cannot_be_cut_are_announced(name: str) -> None:
    width = 7 * 128 if name != "nvfp4" else 7 * 16
    _, notes = told(name, shape=(2**21, width), parts=(("mlp.down_proj", "down"),))
    assert ("cannot cut the groups of `model.layers.0.mlp.down_proj` further: one GPU" in notes) == (
        name != "nvfp4"
    )
    assert "cannot cut" not in told("w4", shape=(2**21, width), parts=(("mlp.down_proj", "down"),))[1]


def test_asymmetric_weights_need_one_scheme_in_transformers() -> None:
    """It would read all weights as the first group says: some fail, some load as something else."""
    loads, notes = told("w4g128_asym", {"down_proj": "w8g128_asym"})
    assert loads == ("vLLM",) and "one scheme" in notes
    assert "transformers" in told("w4g128_asym", {"down_proj": None})[0]


@pytest.mark.parametrize(
    "name, loads, why",
    [
        ("w4g128", ALL, ""),
        ("w4g128_asym", ("vLLM",), "symmetric only"),
        ("w8", (), "symmetric only"),
        ("fp8", ("transformers",), "do not run experts as fp8"),
        ("fp8_block", (), "not blocks"),
        ("fp8a8", ALL, "does not round the inputs of experts"),
        ("fp8a8_block", ("vLLM", "SGLang"), "not blocks"),
        ("fp8a8_tensor", ("transformers",), "do not run experts as fp8a8_tensor"),
        ("fp8a8_static", (), "use dynamic inputs"),
        ("fp8_static", ("vLLM", "SGLang"), "use dynamic inputs"),
        ("w8a8", ("vLLM", "SGLang"), "not w8a8"),
        ("w8a8_tensor", (), "do not run experts as w8a8_tensor"),
        ("w8a8_static", (), "do not run experts as w8a8_static"),
        ("mxfp4", ("transformers", "vLLM"), "SGLang"),
        ("nvfp4", ("vLLM",), "forgets the scale of the tensor"),
    ],
)
def test_experts(name: str, loads: tuple[str, ...], why: str) -> None:
    found, notes = told(name, parts=EXPERTS)
    assert found == loads
    assert why in notes


@pytest.mark.parametrize("rest, loads", [("w4g128", ("vLLM", "SGLang")), ("fp8", ALL)])
def test_kept_experts(rest: str, loads: tuple[str, ...]) -> None:
    """transformers takes the first group for theirs, and only of fp8 it lets weights without scales pass."""
    assert told(rest, {"experts": None}, EXPERTS)[0] == loads


def test_experts_share_one_scheme() -> None:
    loads, notes = told("w4g128", {"experts.0.down_proj": "w8g128"}, EXPERTS)
    assert loads == () and "one scheme" in notes


def test_stacked_experts_that_are_kept_are_no_linears() -> None:
    stacked = Weight("model.layers.0.mlp.experts.down_proj", (64, 64), "down", Part(expert=0))
    dense = Weight("model.layers.0.self_attn.o_proj.weight", (64, 64), "o")
    scheme = parse("fp8")
    facts = FormatFacts((Assigned(stacked, None), Assigned(dense, scheme)), scheme, (), False, "rtn", "1.2.3")
    assert FORMAT.engines(facts) == (ALL, ())
