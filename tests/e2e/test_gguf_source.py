"""A GGUF file wherever a checkpoint may stand: inspect, eval, convert, verify."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import quantkit
from quantkit import EvalText
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.main import run
from quantkit.errors import SourceError, UsageError
from quantkit.gguf.container import library, open_file
from quantkit.run.score import Scores, score
from quantkit.run.verify import verify
from tests.e2e.runs import recipe
from tests.gguf_files import TEXT, byte_tokenizer, rewrite, write_gguf
from tests.models import save_tiny

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows fill super-blocks, with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    changes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    save_tiny("llama", folder, vocab_size=420, **changes)
    return byte_tokenizer(folder)


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        source, tmp_path_factory.mktemp("plain") / "tiny-F32.gguf", keys={"general.file_type": 0}
    )


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        source, tmp_path_factory.mktemp("small") / "tiny-Q8_0.gguf", "q8_0", keys={"general.file_type": 7}
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n} {line}" for n in range(20) for line in TEXT))
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(f"{line[::-1]} {n}" for n in range(20) for line in TEXT))
    return path


def measured(text: Path, *models: Path, baseline: Path | None = None) -> Scores:
    texts = (EvalText(file=str(text), style="gptq", context=32, chunks=4),)
    return score([str(m) for m in models], baseline=None if baseline is None else str(baseline), texts=texts)


def test_inspect(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = quantkit.inspect(small)
    kinds = {kind.name: kind for kind in found.kinds}
    assert found.architecture == "LlamaForCausalLM" and not found.tied and set(kinds) == {"Q8_0", "F32"}
    assert kinds["Q8_0"].tensors == 16 and kinds["Q8_0"].size_bytes * 8 == 8.5 * (
        kinds["Q8_0"].parameters or 0
    )
    assert found.size_bytes == sum(t.nbytes for t in open_file(small).tensors.values())
    assert run(["inspect", str(small.parent), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gguf"]["file_type"] == "Q8_0" and document["gguf"]["context"] == 128
    assert document["gguf"]["tokenizer"] == "byte-level BPE, 420 tokens, split as dbrx"
    assert document["gguf"]["notes"] == [] and 8.5 < document["gguf"]["bits_per_weight"] < 8.6
    assert run(["inspect", str(small)]) == 0
    assert "tiny-Q8_0.gguf · LlamaForCausalLM · GGUF Q8_0" in capsys.readouterr().out


def test_inspect_says_what_is_odd(small: Path, tmp_path: Path) -> None:
    changes = {
        "general.file_type": 15,
        "quantize.imatrix.file": "x.imatrix",
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.chunks_count": 125,
        "llama.attention.clamp": 8.0,
    }
    found = quantkit.inspect(rewrite(small, tmp_path / "x.gguf", changes))
    notes = "\n".join(found.table().notes)
    assert "labelled Q4_K_M, and no weight in it is Q4_K: most are Q8_0" in notes
    assert "the importance matrix x.imatrix of wiki.txt, 125 chunks" in notes
    assert "cannot be evaluated or converted: " in notes and "llama.attention.clamp = 8.0" in notes
    assert found.architecture == "llama"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it has 0 bytes"),
        (b"GGML" + bytes(60), "it begins with b'GGML'"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16 + bytes(40), "do not fit its 64 bytes"),
    ],
    ids=("empty", "other", "counts"),
)
def test_inspect_hostile_files(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(SourceError, match=why):
        quantkit.inspect(tmp_path / "x.gguf")


def test_eval(source: Path, plain: Path, small: Path, text: Path) -> None:
    found = measured(text, plain, small, baseline=source)
    exact, rounded = found.models
    assert [m.format for m in found.models] == ["gguf", "gguf"] and exact.name == "tiny-F32.gguf"
    assert exact.scores[0].beside is not None and rounded.scores[0].beside is not None
    assert found.baseline is not None
    assert exact.scores[0].perplexity == found.baseline.scores[0].perplexity
    assert exact.scores[0].beside.kl_mean == 0 < rounded.scores[0].beside.kl_mean < 1e-3
    assert rounded.size_bytes == quantkit.inspect(small).size_bytes
    assert 8.5 < rounded.bits_per_weight < 8.6


def test_eval_with_a_baseline_of_another_tokenizer(
    source: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    byte_tokenizer(other, size=300)
    with pytest.raises(UsageError, match="make different tokens"):
        measured(text, plain, baseline=other)


def test_convert_gives_what_the_source_gives(
    source: Path, plain: Path, text: Path, calibration: Path, tmp_path: Path
) -> None:
    for name, model in (("a", source), ("b", plain)):
        quantkit.convert(recipe(model, calibration, text, tmp_path / name, "gptq:w4g128@name=made"))
    ours, theirs = tmp_path / "b" / "made", tmp_path / "a" / "made"
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    tokens, expected = (
        AutoTokenizer.from_pretrained(folder)(TEXT[0])["input_ids"] for folder in (ours, source)
    )
    assert tokens == expected
    assert json.loads((ours / "quantkit.json").read_text())["source"]["id"] == "tiny-F32.gguf"


def test_convert_warns_that_errors_add_up(small: Path, text: Path, tmp_path: Path) -> None:
    planned = quantkit.plan(recipe(small, text, text, tmp_path, "gptq:w4g32@method=rtn,name=made"))
    assert planned.warnings[0].startswith(f"`{small}` is already quantized (gguf, Q8_0): its errors")
    report = quantkit.convert(planned.recipe)
    assert report.targets[0].quality[0].kl_mean < 0.1
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["architectures"] == ["LlamaForCausalLM"]


def test_verify(source: Path, small: Path) -> None:
    found = verify(small, against=str(source))
    assert found.sound and len(found.differences) == 16
    assert all(0.001 < d.error < 0.01 for d in found.differences)
    assert found.checks["weights"] == "16 quantized (gguf), 5 floats"
    assert found.checks["against"] == "5 of 5 tensors equal the source's"
    assert verify(small.parent).checks["architecture"] == "21 tensors of the model, all there"


def damaged(path: Path, target: Path, name: str, value: float) -> Path:
    """A copy whose first scale of one tensor is `value`."""
    opened = open_file(path)
    shutil.copy(path, target)
    half = np.array([value], dtype=np.float16).tobytes()
    data = bytearray(target.read_bytes())
    begin = opened.places[name][1]
    data[begin : begin + 2] = half
    target.write_bytes(data)
    return target


def test_verify_finds_what_is_wrong(source: Path, small: Path, tmp_path: Path) -> None:
    bad = verify(
        damaged(small, tmp_path / "x.gguf", "blk.1.ffn_up.weight", float("nan")), against=str(source)
    )
    assert bad.problems == ["`blk.1.ffn_up.weight (scale)` is nan at index [0, 0]"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[:-100])
    assert "ends at byte" in verify(cut).problems[0]
    lacking = rewrite(small, tmp_path / "lacking.gguf", drop=("blk.0.attn_v.weight",))
    assert "it lacks 1 tensors: `blk.0.attn_v.weight`" in verify(lacking).problems[0]
    other = save_tiny("llama", tmp_path / "other", vocab_size=420, hidden_size=64)
    assert "does not fit its configuration" in verify(small, against=str(other)).problems[0]
    wild = damaged(small, tmp_path / "wild.gguf", "blk.1.ffn_up.weight", 6e4)
    found = verify(wild, against=str(source))
    assert found.problems == ["`model.layers.1.mlp.up_proj.weight` has nothing in common with the source's"]


def test_verify_finds_other_tokens(source: Path, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    assert verify(small, against=str(source)).checks["tokens"] == "llama.cpp against the source"
    assert verify(small).checks["tokens"] == "llama.cpp against its tokens as Transformers reads them"
    wrong = rewrite(small, tmp_path / "x.gguf", {"tokenizer.ggml.pre": "qwen2"})
    problems = verify(wrong, against=str(source)).problems
    assert problems and all("llama.cpp makes other tokens" in problem for problem in problems)


def requantized(path: Path, target: Path, file_type: int) -> Path:
    """What llama.cpp makes of a file."""
    llama: Any = pytest.importorskip("llama_cpp").llama_cpp
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 1
    assert llama.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(options)) == 0
    return target


@pytest.mark.parametrize(("file_type", "label", "most"), [(15, "Q4_K_M", 0.09), (10, "Q2_K", 0.3)])
def test_files_of_llama_cpp(
    file_type: int, label: str, most: float, source: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    made = requantized(plain, tmp_path / "x.gguf", file_type)
    found = quantkit.inspect(made)
    assert found.gguf is not None and found.gguf.label == label and found.gguf.notes == ()
    assert measured(text, made).models[0].bits_per_weight < 8
    checked = verify(made, against=str(source))
    assert checked.sound and all(d.error < most for d in checked.differences)
    original = Checkpoint.open(source)
    gguf = library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    down = tensors["blk.0.ffn_down.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    name = "model.layers.0.mlp.down_proj.weight"
    error = float((values - original.read(name)).norm() / original.read(name).norm())
    assert {d.name: d.error for d in checked.differences}[name] == pytest.approx(error)
