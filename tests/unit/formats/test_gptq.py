from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantkit.errors import UnsupportedError
from quantkit.formats.gptq import FORMAT
from quantkit.model.graph import Part, Weight
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
HEAD = Weight("lm_head.weight", (96, 64), "head")


def weight(module: str, shape: tuple[int, int] = (64, 64)) -> Weight:
    return Weight(f"{module}.weight", shape)


def facts(default: Scheme, changes: dict[str, Scheme | None], act_order: bool = False) -> FormatFacts:
    """Two blocks of four weights, all `default` but for `changes` by module."""
    modules = [f"model.layers.{n}.{part}" for n in range(2) for part in PARTS]
    assigned = tuple(Assigned(weight(m), changes.get(m, default)) for m in modules)
    return FormatFacts(assigned, default, (HEAD,), act_order, "gptq", "1.2.3")


def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(FORMAT.config(facts(*args, **kwargs)))


def sha16(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_one_row_by_hand() -> None:
    # w / .125 + 8 = 0 2 4 6 8 10 12 15 in hexadecimal digits from the right; then 24 times the middle, 8
    row = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.875] + [0.0] * 24
    codes = (torch.tensor([row] * 32) / 0.125).to(torch.int8)
    q = Affine(codes, 4, torch.full((32, 1), 0.125, dtype=torch.float16), (1, 32))
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), Scheme(4))
    assert [n & 0xFFFFFFFF for n in tensors["x.qweight"][:, 0].tolist()] == [0xFCA86420] + [0x88888888] * 3
    assert [n & 0xFFFFFFFF for n in tensors["x.qzeros"][0].tolist()] == [0x77777777] * 4
    assert tensors["x.g_idx"].tolist() == [0] * 32
    assert tensors["x.scales"].shape == (1, 32)
    assert dequantize(q)[0].tolist() == row


# (bits, as v1): words that stand for the middle in every field
MIDDLES = {2: [0x55555555], 3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], 4: [0x77777777], 8: [0x7F7F7F7F]}


@pytest.mark.parametrize("bits", MIDDLES)
def test_symmetric_zero_points_are_the_middle_minus_one(bits: int) -> None:
    q = Affine(torch.zeros(32, 32, dtype=torch.int8), bits, torch.ones(32, 1).half(), (1, 32))
    words = FORMAT.encode(QuantizedLinear("x.weight", q), Scheme(bits))["x.qzeros"].flatten().tolist()
    pattern = MIDDLES[bits]
    assert [n & 0xFFFFFFFF for n in words] == pattern * (bits // len(pattern))


# bits: sha256 of qweight, of qzeros as v2, of the dequantized fp32 matrix
VECTORS = {
    2: ("5dc5ee578024eee5", "73b843c221edd716", "04f08ef0b7aa82e5"),
    3: ("a98cf3a0d3ced38d", "bb658ea27af06b24", "17a82d9c3c41372a"),
    4: ("a92cb148a78a7475", "7043b475aa0de4c2", "4b2c20812a6dbac1"),
    8: ("9e083b267fe10c3c", "d03549a6203f2ec0", "345f337a5720cd9e"),
}


@pytest.mark.parametrize("bits", VECTORS)
def test_reference_vectors(bits: int) -> None:
    i, o, g = torch.arange(64), torch.arange(32), torch.arange(2)
    q = Affine(
        codes=((7 * i[None] + 3 * o[:, None]) % (1 << bits)).to(torch.uint8),
        bits=bits,
        scale=((1 + (g[None] + o[:, None]) % 8) / 64).to(torch.float16),
        group=(1, 32),
        zero_point=(1 + (5 * g[None] + o[:, None]) % ((1 << bits) - 1)).to(torch.uint8),
    )
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), Scheme(bits, 32, sym=False))
    weight_sum, zeros_sum, values_sum = VECTORS[bits]
    assert sha16(tensors["x.qweight"]) == weight_sum
    assert sha16(tensors["x.qzeros"]) == zeros_sum
    assert sha16(tensors["x.scales"]) == "02afa12c26870562"
    assert sha16(dequantize(q)) == values_sum
    assert tensors["x.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_files_of_others_in_v1_are_read() -> None:
    # zeros 1 … 8 stored minus one, as 0x76543210; a missing g_idx is the trivial one
    names = {
        "x.qweight": torch.zeros(8, 32, dtype=torch.int32),
        "x.qzeros": torch.full((2, 4), 0x76543210, dtype=torch.int32),
        "x.scales": torch.ones(2, 32).half(),
    }
    for key in ({"checkpoint_format": "gptq"}, {"format": "gptq"}, {}):
        q = FORMAT.decode("x.weight", names, {"bits": 4, "group_size": 32, "sym": False, **key}).weight
        assert isinstance(q, Affine) and q.zero_point is not None
        assert q.zero_point[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] * 4
        assert q.column_group is None
    v2 = FORMAT.decode("x.weight", names, {"bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}).weight
    assert isinstance(v2, Affine) and v2.zero_point is not None
    assert v2.zero_point[:8, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_wrapped_zero_point_of_v1_is_zero() -> None:
    for bits in (2, 3, 4, 8):
        names = {
            "x.qweight": torch.zeros(bits, 32, dtype=torch.int32),
            "x.qzeros": torch.full((1, bits), -1, dtype=torch.int32),
            "x.scales": torch.ones(1, 32).half(),
        }
        q = FORMAT.decode("x.weight", names, {"bits": bits, "sym": False}).weight
        assert isinstance(q, Affine) and q.zero_point is not None
        assert int(q.zero_point.max()) == 0


def test_config_has_the_keys_that_readers_require() -> None:
    found = config(Scheme(4, 128), {})
    required = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    written = {"lm_head": False, "pack_dtype": "int32", "checkpoint_format": "gptq", "format": "gptq"}
    assert found.items() >= (required | written).items()
    # null makes transformers fail with a TypeError
    assert isinstance(found["damp_percent"], float) and 0 < found["damp_percent"] < 1
    # auto-round reads files without it; those whose zero points it would misread have it
    assert "meta" not in found
    assert config(Scheme(4, 128, sym=False), {})["meta"]["quantizer"] == ["quantkit:1.2.3"]
    assert "dynamic" not in found and "modules_in_block_to_quantize" not in found
    assert FORMAT.side_files(found) == {"quantize_config.json": found}


def test_whole_rows_are_minus_one_in_the_file_only() -> None:
    assert config(Scheme(8), {})["group_size"] == -1


def test_asymmetric_files_are_v2() -> None:
    found = config(Scheme(4, 64, sym=False), {})
    assert found["sym"] is False
    assert found["checkpoint_format"] == found["format"] == "gptq_v2"


@pytest.mark.parametrize("act_order", [False, True])
def test_desc_act_says_whether_columns_were_regrouped(act_order: bool) -> None:
    found = config(Scheme(4, 64), {}, act_order)
    assert found["desc_act"] is act_order
    assert found["static_groups"] is not act_order


def quantized(found: dict[str, Any], modules: Sequence[str]) -> set[str]:
    """What gptqmodel, vLLM and SGLang quantize: the first rule that matches from the start decides."""
    chosen = set()
    for module in modules:
        rules = [
            k for k in found.get("dynamic", {}) if re.match(k.removeprefix("+:").removeprefix("-:"), module)
        ]
        if not (rules and rules[0].startswith("-:")):
            chosen.add(module)
    return chosen


def suffixed(found: dict[str, Any], modules: Sequence[str]) -> set[str]:
    """What transformers quantizes: names that end with one of the listed ones."""
    listed = [name for group in found["modules_in_block_to_quantize"] for name in group]
    return {m for m in modules if any(m.endswith(name) for name in listed)}


@pytest.mark.parametrize(
    "kept",
    [
        [f"model.layers.{n}.mlp.down_proj" for n in range(2)],
        ["model.layers.0.mlp.down_proj"],
        [f"model.layers.1.{part}" for part in PARTS],
    ],
    ids=["one kind", "one weight", "one block"],
)
def test_kept_weights_are_declared_for_every_reader(kept: list[str]) -> None:
    given = facts(Scheme(4, 64), dict.fromkeys(kept))
    found = json.loads(json.dumps(FORMAT.config(given)))
    modules = [a.weight.module for a in given.assigned]
    # a block with two digits shares its first one with block 1
    modules += [m.replace(".1.", ".11.") for m in modules if ".1." in m and m not in kept]
    assert quantized(found, modules) == set(modules) - set(kept)
    assert suffixed(found, modules[:8]) == set(modules[:8]) - set(kept)


def test_mixed_bits_and_groups_are_declared() -> None:
    changes: dict[str, Scheme | None] = {
        "model.layers.0.mlp.down_proj": Scheme(8, 32),
        "model.layers.1.mlp.down_proj": Scheme(4),
        "model.layers.1.self_attn.q_proj": None,
    }
    found = config(Scheme(4, 64), changes)
    # weights left alone come first: the first rule that matches decides
    assert list(found["dynamic"].items()) == [
        (r"-:model\.layers\.1\.self_attn\.q_proj$", {}),
        (r"+:model\.layers\.0\.mlp\.down_proj$", {"bits": 8, "group_size": 32, "sym": True}),
        (r"+:model\.layers\.1\.mlp\.down_proj$", {"bits": 4, "group_size": -1, "sym": True}),
    ]
    w = weight("model.layers.0.mlp.down_proj")
    infos = {s.name: s for s in FORMAT.layout(w, Scheme(8, 32))}
    assert FORMAT.measure(w.name, infos, found) == ((64, 64), 8)  # type: ignore[arg-type]


def test_symmetric_and_asymmetric_weights_cannot_share_a_file() -> None:
    """v1 and v2 zero points are told apart per file: mixing them would be garbage in silence."""
    for default, other in ((True, False), (False, True)):
        changes: dict[str, Scheme | None] = {"model.layers.0.mlp.up_proj": Scheme(4, 64, sym=other)}
        with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj") as caught:
            config(Scheme(4, 64, sym=default), changes)
        assert caught.value.remedy is not None


@pytest.mark.parametrize(
    "scheme, shape, part, reason",
    [
        (Scheme(5, 32), (64, 64), None, "2, 3, 4 or 8 bits, not 5"),
        (Scheme(8, per_tensor=True), (64, 64), None, "not per tensor"),
        (Scheme(4), (48, 64), None, "48 × 64"),
        (Scheme(4), (64, 48), None, "64 × 48"),
        (Scheme(4, 128), (64, 2880), None, "not a multiple of 128"),
        (Scheme(4), (64, 64), Part(expert=3), "experts stacked"),
    ],
)
def test_what_cannot_be_stored(
    scheme: Scheme, shape: tuple[int, int], part: Part | None, reason: str
) -> None:
    found = FORMAT.accepts(scheme, Weight("x.weight", shape, "other", part))
    assert found is not None and reason in found


def test_transposed_weights_are_stored_like_any_other() -> None:
    assert FORMAT.accepts(Scheme(4), Weight("x.weight", (64, 64), "qkv", Part(transposed=True))) is None


EVERY = ("transformers+gptqmodel", "gptqmodel", "vLLM", "SGLang", "ExLlamaV2")


def told(
    scheme: Scheme, changes: dict[str, Scheme | None] | None = None, act_order: bool = False, **parts: Any
) -> tuple[tuple[str, ...], str]:
    """(engines, notes in one line) of one block that is `scheme` but for `changes`."""
    shapes = parts or {"q_proj": (192, 256), "k_proj": (64, 256), "o_proj": (256, 192 * 4)}
    assigned = []
    for name, shape in shapes.items():
        found = Weight(f"model.layers.0.{name}.weight", shape, name.removesuffix("_proj"))  # type: ignore[arg-type]
        assigned.append(Assigned(found, (changes or {}).get(name, scheme)))
    loads, notes = FORMAT.engines(replace(facts(scheme, {}, act_order), assigned=tuple(assigned)))
    return loads, "; ".join(notes)


@pytest.mark.parametrize(
    ("scheme", "missing", "why"),
    [
        (Scheme(4, 128), set(), ""),
        (Scheme(4), set(), ""),
        (Scheme(8, 32), {"ExLlamaV2"}, "4 bits only"),
        (Scheme(4, 128, sym=False), {"vLLM", "SGLang"}, "symmetric, only"),
        (Scheme(3, 128), {"vLLM", "SGLang", "ExLlamaV2"}, "4 and 8 bits"),
        (Scheme(4, 16), {"vLLM", "SGLang", "ExLlamaV2"}, "32, 64, 128"),
        (Scheme(4, 48), set(EVERY), "powers of two"),
    ],
)
def test_engines(scheme: Scheme, missing: set[str], why: str) -> None:
    loads, notes = told(scheme)
    assert set(EVERY) - set(loads) == missing and why in notes and bool(why) == bool(notes)


def test_engines_of_act_order() -> None:
    loads, notes = told(Scheme(4, 128), act_order=True)
    assert set(EVERY) - set(loads) == {"vLLM"} and "act_order" in notes


def test_engines_that_fuse_weights_want_them_alike() -> None:
    for other in (None, Scheme(8, 128), Scheme(4, 64)):
        loads, notes = told(Scheme(4, 128), {"k_proj": other})
        assert not {"vLLM", "SGLang"} & set(loads)
        assert "fuse `model.layers.0.q_proj`, `model.layers.0.k_proj`: give them one scheme" in notes
        assert {"vLLM", "SGLang"} <= set(told(Scheme(4, 128), {"o_proj": other})[0])


def test_engines_of_odd_shapes() -> None:
    loads, notes = told(Scheme(4, 32), o_proj=(96, 256))
    assert set(EVERY) - set(loads) == {"SGLang"} and "multiples of 64 and inputs of 128" in notes
    assert "`model.layers.0.o_proj` is 96 × 256" in notes


def test_groups_that_cannot_be_cut_are_announced() -> None:
    large = (2**21, 128 * 6)
    assert "`model.layers.0.o_proj` further: 2 of 8 GPUs" in told(Scheme(4, 128), o_proj=large)[1]
    # scales of whole rows are on every GPU
    assert told(Scheme(4), o_proj=large)[1] == ""


def test_engines_of_mixed_files_leave_out_transformers() -> None:
    mixed = facts(Scheme(4, 128), {"model.layers.0.mlp.up_proj": Scheme(8, 128)})
    loads, notes = FORMAT.engines(mixed)
    assert "transformers+gptqmodel" not in loads and any("ignores" in note for note in notes)
    expert = Assigned(weight("model.layers.0.mlp.experts.3.up_proj"), Scheme(4, 128))
    loads, notes = FORMAT.engines(replace(mixed, assigned=(expert,)))
    assert "transformers+gptqmodel" not in loads and any("experts" in note for note in notes)


def test_scales_are_always_fp16() -> None:
    assert {FORMAT.scale_dtype(source) for source in ("bfloat16", "float32", "float16")} == {"float16"}
    assert FORMAT.holds_column_groups()
