from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, TensorInfo
from quantkit.errors import UnsupportedError
from quantkit.formats import gptq
from quantkit.formats.awq import FORMAT
from quantkit.model.graph import Part, Weight
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.quantized import random_affine, same

OUT, WIDTH, GROUPS = 32, 64, 2
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ASYM = Scheme(4, 32, sym=False)


def sha16(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def hexadecimal(words: Tensor) -> list[str]:
    return [f"{n & 0xFFFFFFFF:08X}" for n in words.flatten().tolist()]


def reference() -> Affine:
    """The weight that all layouts of the specification are shown with."""
    i, o, g = torch.arange(WIDTH), torch.arange(OUT), torch.arange(GROUPS)
    return Affine(
        codes=((7 * i[None] + 3 * o[:, None]) % 16).to(torch.uint8),
        bits=4,
        scale=((1 + (g[None] + o[:, None]) % 8) / 64).to(torch.float16),
        group=(1, 32),
        zero_point=((5 * g[None] + o[:, None]) % 16).to(torch.uint8),
    )


def encoded(q: Affine, scheme: Scheme = ASYM) -> dict[str, Tensor]:
    return {k.removeprefix("x."): t for k, t in FORMAT.encode(QuantizedLinear("x.weight", q), scheme).items()}


def decoded(parts: Mapping[str, Tensor], **config: Any) -> Affine:
    given = {f"x.{part}": tensor for part, tensor in parts.items()}
    found = FORMAT.decode("x.weight", given, {**CONFIG, **config}).weight
    assert isinstance(found, Affine)
    return found


def in_words(nibbles: list[int], dtype: torch.dtype) -> Tensor:
    """One word of each 4 (int16) or 8 (int32) nibbles, the first one lowest."""
    per = 4 if dtype == torch.int16 else 8
    words = [
        sum(n << (4 * k) for k, n in enumerate(nibbles[at : at + per])) for at in range(0, len(nibbles), per)
    ]
    limit = 1 << (4 * per - 1)
    return torch.tensor([w - 2 * limit if w >= limit else w for w in words], dtype=dtype)


def as_gemv(q: Affine) -> dict[str, Tensor]:
    """The gemv layout, spelled out: a row of 4 words of zero points, 32 scales, the rest padding."""
    assert q.zero_point is not None and isinstance(q.scale, Tensor)
    padded = torch.zeros(OUT, 32, dtype=torch.uint8)
    padded[:, :GROUPS] = q.zero_point
    scales = torch.zeros(OUT, 32, dtype=torch.float16)
    scales[:, :GROUPS] = q.scale
    return {
        "qweight": torch.stack([in_words(row, torch.int32) for row in q.codes.tolist()]),
        "qzeros": torch.stack([in_words(row, torch.int32) for row in padded.tolist()]),
        "scales": scales,
    }


def as_fast(q: Affine) -> dict[str, Tensor]:
    """The gemv_fast layout, spelled out code by code as the specification places it."""
    assert q.zero_point is not None and isinstance(q.scale, Tensor)
    nibbles = torch.zeros(OUT // 4, WIDTH, 4, dtype=torch.uint8)
    for n in range(OUT):
        for k in range(WIDTH):
            word = (k // 64) * 64 + (n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8
            nibbles[n // 4, word, (k % 32) // 8] = q.codes[n, k]
    scales, zeros = torch.zeros(32, OUT).half(), torch.zeros(32, OUT).half()
    scales[:GROUPS] = q.scale.T
    zeros[:GROUPS] = -(q.scale.float() * q.zero_point).T.half()
    words = [in_words(line.flatten().tolist(), torch.int16) for line in nibbles]
    return {"qweight": torch.stack(words), "qzeros": zeros, "scales": scales}


# eight neighbouring outputs, the word that holds them
WORDS = {
    "75316420": [0, 1, 2, 3, 4, 5, 6, 7],
    "2FDB1ECA": [10, 11, 12, 13, 14, 15, 1, 2],
    "88888888": [8] * 8,
}


@pytest.mark.parametrize("word", WORDS)
def test_one_word_by_hand(word: str) -> None:
    column = torch.tensor(WORDS[word] * 4, dtype=torch.uint8)[:, None]
    q = Affine(column, 4, torch.ones(32, 1).half(), (1, 1), column)
    parts = encoded(q)
    assert hexadecimal(parts["qweight"]) == [word] * 4 == hexadecimal(parts["qzeros"])
    assert same(decoded(parts, group_size=1), q)


def test_one_row_by_hand() -> None:
    row = [0.30, -0.20, 0.10, 0.0, -0.15, 0.25, -0.30, 0.05]
    q = nearest(torch.tensor([row] * 32), Scheme(4, sym=False), "absmax")
    parts = encoded(q, Scheme(4, sym=False)) if isinstance(q, Affine) else {}
    assert parts["scales"].tolist() == [[0.040008544921875] * 32]
    assert hexadecimal(parts["qzeros"]) == ["77777777"] * 4
    codes = [14, 2, 9, 7, 3, 13, 0, 8]
    assert [words[:1] * 8 for words in map(hexadecimal, parts["qweight"])] == [
        [f"{c:X}" * 8] * 8 for c in codes
    ]


def test_reference_vectors_of_gemm() -> None:
    q = reference()
    parts = encoded(q)
    words, zeros = parts["qweight"], parts["qzeros"]
    assert (words.shape, zeros.shape, parts["scales"].shape) == ((64, 4), (2, 4), (2, 32))
    assert hexadecimal(words[[0, -1], [0, -1]]) == ["5F932C60", "60A43D71"]
    assert hexadecimal(zeros[[0, 1], [0, 3]]) == ["75316420", "420E31FD"]
    assert (sha16(words), sha16(zeros)) == ("09b2ddc3a38e8ddb", "fc6ac7748f8b23ef")
    found = decoded(parts)
    assert same(found, q)
    weight = dequantize(found)
    assert (float(weight[0, 0]), float(weight[5, 40]), float(weight.sum())) == (0.0, -0.328125, -40.0)
    assert sha16(weight) == "f569a8178f824c52"


def test_reference_vectors_of_gemv() -> None:
    parts = as_gemv(reference())
    assert hexadecimal(parts["qweight"][0, 0]) == ["1A3C5E70"]
    assert hexadecimal(parts["qzeros"][0, 0]) == ["00000050"]
    sums = {part: sha16(tensor) for part, tensor in parts.items()}
    assert sums == {"qweight": "a865ea29960e473d", "qzeros": "a47aefce0d9c90a6", "scales": "f5effc382a3a40c9"}
    assert same(decoded(parts, version="gemv"), reference())


@pytest.mark.parametrize("name", ["qzeros", "scaled_zeros"])
def test_reference_vectors_of_gemv_fast(name: str) -> None:
    parts = as_fast(reference())
    assert parts["qweight"].shape == (8, 64) and int(parts["qweight"][0, 0]) & 0xFFFF == 0x8080
    assert parts["qzeros"][0, :3].tolist() == [0, -0.03125, -0.09375]
    sums = {part: sha16(tensor) for part, tensor in parts.items()}
    assert sums == {"qweight": "b259a4e6874eae51", "qzeros": "dc0b896db3d11242", "scales": "190cb7326c03f700"}
    parts[name] = parts.pop("qzeros")
    # llm-awq calls itself by either name, and gemv in older files
    for config in (
        {"version": "gemv_fast"},
        {"version": "llm-awq"},
        {"backend": "llm-awq", "version": "gemv"},
    ):
        assert same(decoded(parts, **config), reference())


def test_a_float_zero_point_that_stands_for_no_whole_one_is_kept() -> None:
    parts = as_fast(reference())
    parts["qzeros"] = parts["qzeros"] + 2.0**-8
    found = decoded(parts, version="gemv_fast")
    assert found.offset is not None and same(found.scale, reference().scale)
    wanted = dequantize(reference()) + 2.0**-8
    assert torch.equal(dequantize(found), wanted)


def test_float_zero_points_are_whole_again_whatever_their_scale(rng: torch.Generator) -> None:
    """Products with arbitrary scales are rounded; −scale · 0 and a scale of nothing are no exceptions."""
    scale = torch.randn(OUT, GROUPS, generator=rng).half()
    scale[3] = 0
    zeros = torch.randint(0, 16, scale.shape, generator=rng).to(torch.uint8)
    zeros[3] = 0
    q = replace(reference(), scale=scale, zero_point=zeros)
    assert same(decoded(as_fast(q), version="gemv_fast"), q)


def test_older_names_of_keys() -> None:
    parts = {f"x.{part}": tensor for part, tensor in as_gemv(reference()).items()}
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMV"}
    assert same(FORMAT.decode("x.weight", parts, config).weight, reference())


def test_whole_rows(rng: torch.Generator) -> None:
    q = random_affine((OUT, 96), Scheme(4, sym=False), rng)
    assert same(decoded(encoded(q), group_size=-1), q)


@pytest.mark.parametrize(
    ("layout", "version"), [(encoded, "gemm"), (as_gemv, "gemv"), (as_fast, "gemv_fast")]
)
def test_sizes_from_headers(layout: Any, version: str) -> None:
    kinds = {torch.int32: "I32", torch.int16: "I16", torch.float16: "F16"}
    infos = {
        f"x.{part}": TensorInfo(f"x.{part}", kinds[t.dtype], tuple(t.shape), Path("x"), 0, t.nbytes)
        for part, t in layout(reference()).items()
    }
    assert FORMAT.measure("x.weight", infos, {**CONFIG, "version": version}) == ((OUT, WIDTH), 4)


def symmetric(rng: torch.Generator) -> Affine:
    q = random_affine((OUT, WIDTH), Scheme(4, 32), rng)
    assert isinstance(q.scale, Tensor)
    # half of the groups of a search end up here
    return replace(q, scale=q.scale * torch.tensor([1.0, -1.0]).half())


def test_symmetric_files_hold_zero_points_of_8(rng: torch.Generator) -> None:
    q = symmetric(rng)
    parts = encoded(q, Scheme(4, 32))
    assert set(hexadecimal(parts["qzeros"])) == {"88888888"}
    assert same(decoded(parts, sym=True), q)
    # the same numbers where nobody says that they are symmetric
    plain = decoded(parts)
    assert plain.codes.dtype == torch.uint8 and torch.equal(dequantize(plain), dequantize(q))


def test_files_without_zero_points_that_hold_them_yet(rng: torch.Generator) -> None:
    q, asym = symmetric(rng), reference()
    assert same(decoded(encoded(q), zero_point=False), q)
    # whatever the config says, zero points that mean something are used
    assert same(decoded(encoded(asym), zero_point=False, sym=True), asym)


def test_an_asymmetric_weight_that_needs_8_everywhere_stays_one() -> None:
    q = replace(reference(), zero_point=torch.full((OUT, GROUPS), 8, dtype=torch.uint8))
    assert same(decoded(encoded(q)), q)


def test_what_cannot_be_read_is_refused() -> None:
    gemm, gemv = encoded(reference()), as_gemv(reference())
    del gemv["qzeros"]
    refused: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (gemv, {"zero_point": False}, "x` has no qzeros"),
        (gemm, {"version": "marlin"}, "x.qweight` is laid out as 'marlin'"),
        (gemm, {"bits": 8}, "x.qweight` is AWQ with 8 bits"),
        (gemm, {"version": "gemv"}, "x.scales` of shape"),
        (as_gemv(reference()), {}, "x.scales` of shape"),
        (as_gemv(reference()), {"version": "gemv", "group_size": 7}, "x.scales` of shape"),
    ]
    for parts, config, reason in refused:
        with pytest.raises(UnsupportedError, match=reason):
            decoded(parts, **config)


def test_divisors_of_activations_are_no_weights() -> None:
    assert FORMAT.base_name("h.0.mlp.c_fc.scales") == "h.0.mlp.c_fc.weight"
    assert FORMAT.base_name("h.0.mlp.c_fc.scaled_zeros") == "h.0.mlp.c_fc.weight"
    assert FORMAT.base_name("h.0.mlp.act.scales") is None
    assert FORMAT.base_name("h.0.mlp.gelu_impl.scales") is None


MLP = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
HEAD = Weight("lm_head.weight", (96, 128), "head")


def weights() -> Iterator[Weight]:
    for block in range(2):
        for name, role in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "o")):
            yield Weight(f"model.layers.{block}.self_attn.{name}.weight", (128, 1024), role)  # type: ignore[arg-type]
        yield from mlp(f"model.layers.{block}.mlp")


def mlp(parent: str) -> Iterator[Weight]:
    for name, role in MLP:
        yield Weight(f"{parent}.{name}.weight", (128, 1024), role)  # type: ignore[arg-type]


def experts(count: int = 2) -> list[Weight]:
    return [w for e in range(count) for w in mlp(f"model.layers.0.mlp.experts.{e}")]


def facts(
    scheme: Scheme = ASYM, keep: str = "", more: Iterator[Weight] | list[Weight] = (), **changes: Any
) -> FormatFacts:
    """Two blocks and `more`, all `scheme` but for weights whose name holds `keep`."""
    every = [*weights(), *more]
    assigned = [Assigned(w, None if keep and keep in w.name else scheme) for w in every]
    return replace(FormatFacts(assigned, scheme, (HEAD,), False, "gptq", "1.2.3", ("lm_head",)), **changes)


def test_config_has_the_keys_that_readers_require() -> None:
    found = dict(FORMAT.config(facts(Scheme(4, 128, sym=False))))
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert FORMAT.side_files(found) == {}


def test_symmetric_files_claim_zero_points() -> None:
    found = FORMAT.config(facts(Scheme(4)))
    assert found["zero_point"] is True and found["sym"] is True and found["group_size"] == -1


def test_nothing_kept_is_null_in_the_file() -> None:
    assert json.dumps(FORMAT.config(facts(outer=(), linears=()))["modules_to_not_convert"]) == "null"


def test_kept_weights_are_listed_by_full_name() -> None:
    kept = FORMAT.config(facts(keep="layers.1.mlp", linears=("lm_head", "model.layers.0.mlp.gate")))
    assert kept["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.mlp.gate",
        *(f"model.layers.1.mlp.{name}" for name, _ in MLP),
    ]


def test_experts_that_are_all_kept_are_listed_as_one() -> None:
    found = FORMAT.config(facts(keep=".experts.", more=experts()))
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.experts"]
    found = FORMAT.config(facts(keep="experts.1.down", more=experts()))
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.experts.1.down_proj"]


@pytest.mark.parametrize("other", [Scheme(4, 64, sym=False), Scheme(4, 32)])
def test_one_scheme_per_file(other: Scheme) -> None:
    given = facts()
    mixed = replace(given, assigned=(*given.assigned, Assigned(Weight("odd.weight", (32, 64)), other)))
    with pytest.raises(UnsupportedError, match=r"odd\.weight") as caught:
        FORMAT.config(mixed)
    assert caught.value.remedy is not None


def test_the_scheme_in_use_is_written_though_it_is_not_the_default() -> None:
    assert FORMAT.config(facts(default=Scheme(4, 64)))["group_size"] == 32


@pytest.mark.parametrize(
    ("scheme", "shape", "part", "reason"),
    [
        (Scheme(3, 32), (64, 64), None, "4 bits, not 3"),
        (Scheme(4, per_tensor=True), (64, 64), None, "not per tensor"),
        (Scheme(4, 8), (64, 64), None, "16, 32, 64, 128 or a whole row, not 8"),
        (Scheme(4, 256), (64, 256), None, "16, 32, 64, 128 or a whole row, not 256"),
        (Scheme(4), (48, 64), None, "multiples of 32, not 48"),
        (Scheme(4, 128), (64, 2880), None, "not a multiple of 128"),
        (Scheme(4), (64, 64), Part(expert=3), "experts stacked"),
        (Scheme(4, 64, sym=False, fractional=True), (64, 64), None, "an integer zero point"),
    ],
)
def test_what_cannot_be_stored(
    scheme: Scheme, shape: tuple[int, int], part: Part | None, reason: str
) -> None:
    found = FORMAT.accepts(scheme, Weight("x.weight", shape, "other", part))
    assert found is not None and reason in found


def test_codes_of_another_width_are_not_written(rng: torch.Generator) -> None:
    for scheme in (Scheme(3, 32, sym=False), Scheme(4, per_tensor=True)):
        with pytest.raises(UnsupportedError, match=r"x\.weight"):
            encoded(random_affine((64, 64), scheme, rng))


ALL = ("transformers+gptqmodel", "vLLM", "SGLang")


def test_engines() -> None:
    assert FORMAT.engines(facts()) == (ALL, ())
    loads, notes = FORMAT.engines(facts(Scheme(4, 128)))
    assert loads == ALL and any("8 is stored" in note for note in notes)
    loads, notes = FORMAT.engines(facts(Scheme(4, 16, sym=False)))
    assert loads == ("transformers+gptqmodel", "SGLang")
    assert any("not 16" in note for note in notes) and any("float16" in note for note in notes)


@pytest.mark.parametrize("kept", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
def test_engines_that_fuse_weights_want_them_alike(kept: str) -> None:
    loads, notes = FORMAT.engines(facts(keep=kept))
    assert loads == ("transformers+gptqmodel",)
    assert len(notes) == 1 and "fuse `model.layers" in notes[0] and f"{kept}`" in notes[0]
    assert FORMAT.engines(facts(keep="layers.1.mlp"))[0] == ALL


def test_engines_of_experts() -> None:
    loads, notes = FORMAT.engines(facts(more=experts()))
    assert loads == ("vLLM", "SGLang") and any("random" in note for note in notes)
    assert FORMAT.engines(facts(keep=".experts.", more=experts())) == (ALL, ())
    loads, notes = FORMAT.engines(facts(keep="experts.1.", more=experts()))
    assert loads == () and any("fuse the experts of `model.layers.0.mlp`" in note for note in notes)
    loads, notes = FORMAT.engines(facts(Scheme(4, sym=False), more=experts()))
    assert loads == () and any("32, 64 or 128" in note for note in notes)


@pytest.mark.parametrize(
    ("model_type", "before", "divisor"),
    [
        ("bloom", "h.0.mlp.dense_h_to_4h", "h.0.mlp.gelu_impl.scales"),
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h", "transformer.h.0.mlp.act.scales"),
        ("gpt_bigcode", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.act.scales"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.act.scales"),
        ("gptj", "transformer.h.0.mlp.fc_in", "transformer.h.0.mlp.act.scales"),
        ("mpt", "transformer.blocks.0.ffn.up_proj", "transformer.blocks.0.ffn.act.scales"),
        ("starcoder2", "model.layers.0.mlp.c_fc", "model.layers.0.mlp.act.scales"),
    ],
)
def test_transformers_divides_activations_of_some_models(model_type: str, before: str, divisor: str) -> None:
    first = Assigned(Weight(f"{before}.weight", (96, 64)), ASYM)
    for assigned in (first, replace(first, scheme=None)):
        given = replace(facts(model_type=model_type), assigned=(assigned,))
        ((name, ones),) = FORMAT.companions(given).items()
        assert name == divisor and torch.equal(ones, torch.ones(96)) and FORMAT.base_name(name) is None
        loads, notes = FORMAT.engines(given)
        assert loads == ("transformers+gptqmodel",)
        assert any(name in note and model_type in note for note in notes)


def test_no_other_model_has_divisors() -> None:
    named_alike = [Weight("h.0.mlp.c_fc.weight", (64, 64))]
    for model_type in ("llama", "gpt2", ""):
        given = facts(more=named_alike, model_type=model_type)
        assert FORMAT.companions(given) == {} and FORMAT.engines(given)[0] == ALL


def test_weights_of_conv1d_are_not_for_transformers() -> None:
    turned = Weight("h.0.attn.c_attn.weight", (96, 64), "qkv", Part(transposed=True))
    loads, notes = FORMAT.engines(facts(more=[turned]))
    assert loads == ("vLLM", "SGLang") and any("Conv1D" in note for note in notes)


def test_narrow_weights_are_announced() -> None:
    narrow = Weight("x.weight", (64, 48))
    _, notes = FORMAT.engines(facts(Scheme(4, sym=False), more=[narrow]))
    assert any("multiples of 32, and `x` has 48" in note for note in notes)


def test_groups_that_cannot_be_cut_are_announced() -> None:
    odd = Weight("odd.weight", (2**21, 128 * 6), "down")
    _, notes = FORMAT.engines(facts(Scheme(4, 128, sym=False), more=[odd]))
    assert notes == ("vLLM and SGLang cannot cut the groups of `odd` further: 2 of 8 GPUs at most",)
    _, notes = FORMAT.engines(facts(Scheme(4, sym=False), more=[odd]))
    assert any("one GPU" in note for note in notes)


def test_scales_are_always_fp16() -> None:
    assert {FORMAT.scale_dtype(source) for source in ("bfloat16", "float32", "float16")} == {"float16"}
    assert not FORMAT.holds_column_groups()


def stranger(folder: Path, reader: Format) -> dict[str, Affine]:
    """What our reader finds in a checkpoint that another tool wrote; skips without it."""
    if not folder.is_dir():
        pytest.skip(f"needs strangers/{folder.name} in ../shared")
    checkpoint = Checkpoint.open(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for name in checkpoint.tensors:
        if (base := reader.base_name(name)) is not None:
            parts.setdefault(base, {})[name] = checkpoint.read(name)
    config = checkpoint.config["quantization_config"]
    found = {base: reader.decode(base, tensors, config).weight for base, tensors in parts.items()}
    assert len(found) == 14
    return {base: weight for base, weight in found.items() if isinstance(weight, Affine)}


def test_a_file_of_autoawq(shared: Path) -> None:
    folder = shared / "strangers" / "autoawq"
    found = stranger(folder, FORMAT)
    source = Checkpoint.open(folder.with_name("source-bf16"))
    written = Checkpoint.open(folder)
    for name, q in found.items():
        assert q.zero_point is not None and q.group == (1, 128)
        # it multiplied columns by factors of its own, and nothing else: v and o of GQA have none
        if "v_proj" in name:
            norm = name.replace("self_attn.v_proj", "input_layernorm")
            factors = source.read(norm).float() / written.read(norm).float()
            original = source.read(name).float() * factors
            assert 0.05 < float((dequantize(q) - original).norm() / original.norm()) < 0.2
        parts = FORMAT.encode(QuantizedLinear(name, q), Scheme(4, 128, sym=False))
        assert all(torch.equal(tensor, written.read(key)) for key, tensor in parts.items()), name


def test_two_exports_of_one_tuning_are_equal(shared: Path) -> None:
    """auto-round says `zero_point: false`, stores zero points of 8, and half of its scales are negative."""
    folder = shared / "strangers" / "autoround-auto-awq-w4g128"
    found = stranger(folder, FORMAT)
    other = stranger(folder.with_name("autoround-auto-gptq-w4g128"), gptq.FORMAT)
    assert found.keys() == other.keys() and all(same(found[name], other[name]) for name in found)
    assert all(q.zero_point is None for q in found.values())
    assert any(bool((q.scale < 0).any()) for q in found.values() if isinstance(q.scale, Tensor))
