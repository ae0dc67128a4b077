"""llama.cpp's quantizer, asked which type it gives to every tensor of models of many shapes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from quantkit.allocate.gguf_mix import (
    Facts,
    Item,
    Params,
    assign,
    quantizable,
)
from quantkit.gguf.mixes import MIXES, Mix
from quantkit.gguf.rounding import STARVED

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
np = pytest.importorskip("numpy")

pytestmark = pytest.mark.interop

ROWS = 8
_LINE = re.compile(r"\] (\S+) .*MiB ->.*\((\w+)\)")


@dataclass(frozen=True)
class Tiny:
    """A model of zeros whose matrices have few rows, and rows as long as they need to be."""

    architecture: str = "llama"
    blocks: int = 8
    heads: int = 4
    kv_heads: int = 1
    experts: int = 0
    embedding: int = 256
    feed_forward: int = 512
    tied: bool = False
    fused: bool = False
    shared_expert: bool = False

    @property
    def facts(self) -> Facts:
        return Facts(self.architecture, self.blocks, self.heads, self.kv_heads, self.experts)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        e, f = self.embedding, self.feed_forward
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, e), "output_norm.weight": (e,)}
        if not self.tied:
            shapes["output.weight"] = (ROWS, e)
        attention = ["attn_qkv"] if self.fused else ["attn_q", "attn_k", "attn_v"]
        for block in range(self.blocks):
            shapes[f"blk.{block}.attn_norm.weight"] = (e,)
            shapes |= {f"blk.{block}.{name}.weight": (ROWS, e) for name in (*attention, "attn_output")}
            stack = (self.experts,) if self.experts else ()
            ffn = {"ffn_gate": e, "ffn_up": e, "ffn_down": f}
            exps = "_exps" if self.experts else ""
            shapes |= {f"blk.{block}.{n}{exps}.weight": (*stack, ROWS, width) for n, width in ffn.items()}
            if self.experts:
                shapes[f"blk.{block}.ffn_gate_inp.weight"] = (self.experts, e)
            if self.shared_expert:
                shapes |= {f"blk.{block}.{n}_shexp.weight": (ROWS, width) for n, width in ffn.items()}
        return shapes

    @property
    def items(self) -> list[Item]:
        return [Item(name, shape) for name, shape in self.shapes.items() if quantizable(name, shape)]

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.blocks)
        writer.add_context_length(64)
        writer.add_embedding_length(self.embedding)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_expert_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(ROWS)
        writer.add_tokenizer_model("no_vocab")
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        for name, shape in self.shapes.items():
            writer.add_tensor(name, np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


class Quantizer:
    """llama.cpp's, told not to write; what it says of each tensor goes to its log."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        # kept alive: llama.cpp holds no reference
        self._callback = llama_cpp.llama_log_callback(lambda _, text, __: self.lines.append(text.decode()))
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def types(
        self,
        source: Path,
        mix: Mix,
        *,
        measured: Sequence[Item] = (),
        fixed: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Types by name of tensor; `measured` tensors are in the imatrix that it is given."""
        kept: list[Any] = []
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.dry_run = mix.file_type, 1, True
        for key, value in (options or {}).items():
            setattr(params, key, value)
        if measured:
            params.imatrix = _imatrix(measured, params, kept)
        if fixed:
            params.tt_overrides = _overrides(fixed, params, kept)
        self.lines.clear()
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(source.with_suffix(".out")).encode(), ctypes.byref(params)
        )
        assert code == 0, self.log[-2000:]
        return {name: kind.lower() for name, kind in _LINE.findall(self.log)}

    @property
    def log(self) -> str:
        return "".join(self.lines)


def _imatrix(items: Sequence[Item], params: Any, kept: list[Any]) -> Any:
    kind = type(params.imatrix)._type_
    array = (kind * (len(items) + 1))()
    for entry, item in zip(array, items, strict=False):
        size = item.shape[-1] * (item.shape[0] if len(item.shape) == 3 else 1)
        values = (ctypes.c_float * size)(*([1.0] * size))
        kept.append(values)
        entry.name, entry.size = item.name.encode(), size
        entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    kept.append(array)
    return array


def _overrides(fixed: Mapping[str, str], params: Any, kept: list[Any]) -> Any:
    kind = type(params.tt_overrides)._type_
    array = (kind * (len(fixed) + 1))()
    for entry, (name, wanted) in zip(array, fixed.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), number(wanted)
    kept.append(array)
    return array


def number(kind: str) -> int:
    return int(gguf.GGMLQuantizationType[kind.upper()])


@pytest.fixture(scope="module")
def quantizer() -> Iterator[Quantizer]:
    yield Quantizer()
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


MODELS = {
    "grouped": Tiny(blocks=24),
    "ungrouped": Tiny(blocks=17, kv_heads=4),
    "pairs": Tiny(blocks=9, kv_heads=2),
    "three blocks": Tiny(blocks=3),
    "tied": Tiny(blocks=4, tied=True),
    "rows of 288 and 320": Tiny(embedding=288, feed_forward=320, tied=True),
    "rows of 96 and 256": Tiny(embedding=96, feed_forward=256),
    "rows of 100 and 512": Tiny(blocks=4, embedding=100),
    "eight experts": Tiny(blocks=16, experts=8),
    "four experts": Tiny(experts=4, kv_heads=4),
    "sixteen experts": Tiny("qwen3moe", experts=16, heads=8),
    "a shared expert": Tiny("qwen2moe", experts=8, shared_expert=True),
    "falcon": Tiny("falcon", blocks=32, fused=True),
    "falcon, tied": Tiny("falcon", blocks=20, kv_heads=4, fused=True, tied=True),
    "gpt2": Tiny("gpt2", blocks=12, kv_heads=4, fused=True, tied=True),
    "phi3": Tiny("phi3", blocks=12, kv_heads=2, fused=True),
    "llama 70b": Tiny(blocks=80, heads=8),
    "llama 65b": Tiny(blocks=80, kv_heads=4),
    "qwen2 72b": Tiny("qwen2", blocks=80, heads=8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_mix_of_every_model(name: str, quantizer: Quantizer, tmp_path: Path) -> None:
    model = MODELS[name]
    source = model.write(tmp_path / "model.gguf")
    for mix in MIXES.values():
        for measured in ((), model.items):
            ours = assign(mix, model.items, model.facts, imatrix=bool(measured))
            theirs = quantizer.types(source, mix, measured=measured)
            assert list(theirs) == (list(ours) if mix.name != "f32" else []), f"{mix.name}: other tensors"
            wrong = {n: (ours[n].type, kind) for n, kind in theirs.items() if kind != ours[n].type}
            assert not wrong, f"{mix.name}, imatrix {bool(measured)}: (ours, theirs) of {wrong}"
            # rtn refuses the same types; q2_k in that mix it does write
            inside = {choice.type for n, choice in ours.items() if n.startswith("blk.")}
            refused = not measured and bool(inside & {*STARVED, *(["q2_k"] if mix.name == "q2_k_s" else [])})
            assert refused == ("will require an imatrix" in quantizer.log), mix.name


@pytest.mark.parametrize("mix", ["q4_k_m", "q3_k_m", "iq3_xxs", "q8_0", "f16"])
@pytest.mark.parametrize(
    "params",
    [
        Params(pure=True),
        Params(output="q8_0"),
        Params(embedding="q6_k"),
        Params(output="q5_k", embedding="q4_0"),
        Params(pure=True, embedding="q8_0"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_options(mix: str, params: Params, tied: bool, quantizer: Quantizer, tmp_path: Path) -> None:
    model = Tiny(tied=tied)
    # beside floats llama.cpp does not hear the option for an embedding that is the output; quantkit does
    heard = not (mix == "f16" and tied and params.embedding is None)
    options: dict[str, Any] = {"pure": params.pure}
    if params.output:
        options["output_tensor_type"] = number(params.output)
    if params.embedding:
        options["token_embedding_type"] = number(params.embedding)
    asked = params if heard else Params()
    ours = assign(MIXES[mix], model.items, model.facts, asked, imatrix=False)
    theirs = quantizer.types(model.write(tmp_path / "model.gguf"), MIXES[mix], options=options)
    assert theirs == {name: choice.type for name, choice in ours.items()}


@pytest.mark.parametrize("mix", ["q4_k_m", "q3_k_m", "q4_k_s", "iq2_m", "iq3_xs"])
@pytest.mark.parametrize("embedding", [256, 288])
def test_types_by_rule(mix: str, embedding: int, quantizer: Quantizer, tmp_path: Path) -> None:
    model = Tiny(blocks=16, embedding=embedding)
    fixed = {f"blk.{n}.attn_v.weight": kind for n, kind in ((0, "q8_0"), (3, "iq4_xs"), (9, "f16"))}
    fixed |= {"blk.1.ffn_down.weight": "q3_k", "token_embd.weight": "q2_k", "output.weight": "q4_k"}
    ours = assign(MIXES[mix], model.items, model.facts, imatrix=False, fixed=fixed)
    theirs = quantizer.types(model.write(tmp_path / "model.gguf"), MIXES[mix], fixed=fixed)
    assert theirs == {name: choice.type for name, choice in ours.items()}


@pytest.mark.parametrize("mix", ["q2_k", "q4_k_m", "iq4_xs", "q5_0", "tq1_0"])
def test_the_file_that_is_written(mix: str, quantizer: Quantizer, tmp_path: Path) -> None:
    model = Tiny(blocks=4)
    ours = assign(MIXES[mix], model.items, model.facts, imatrix=False)
    source = model.write(tmp_path / "model.gguf")
    quantizer.types(source, MIXES[mix], options={"dry_run": False})
    reader = gguf.GGUFReader(source.with_suffix(".out"))
    written = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert {name: written[name] for name in ours} == {name: choice.type for name, choice in ours.items()}
    assert int(reader.fields["general.file_type"].contents()) == MIXES[mix].file_type
