"""Whole GGUF files in llama.cpp: what it computes from them, its own bytes, and what its rounding costs.

llama.cpp multiplies by quantized weights in integers: it rounds the inputs of every matrix to 8 bits, in
groups of 32 or 256. Quantkit's figures are of exact inputs. The perplexities of the same file therefore
differ a little: up to .2 % was seen, .5 % is allowed. Files of floats are multiplied as they are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit import resources
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.gguf import container, rounding
from quantkit.gguf.architectures import Model
from quantkit.gguf.imatrix import importance_for
from quantkit.gguf.mixes import MIXES
from quantkit.gguf.types import TYPES
from quantkit.model.build import build_graph
from quantkit.recipe.spec import Recipe
from quantkit.run.gguf_source import open_gguf, tokenizer_folder
from quantkit.run.report import Report, TargetReport
from quantkit.run.rows import evaluation_rows
from quantkit.schemes import parse_scheme
from quantkit.tensors import dequantize
from tests.interop import llama
from tests.interop.ggml import Ggml
from tests.interop.llama import llama_cpp

pytestmark = pytest.mark.interop

INTEGERS, FLOATS = 5e-3, 2e-4
CONTEXT = 128
TEXT = quantkit.EvalText(data="embedded", style="gptq", context=CONTEXT, chunks=8)
# type → a preset of which it is most; without rules of its own (`pure`) all matrices have it
PURE = {mix.default: mix.name for mix in reversed(list(MIXES.values()))}
SEARCHED = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
STORED = ("f32", "f16", "bf16")
PLAIN = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_SILENT: Any = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference


def recipe(out: Path, *targets: str, **changes: Any) -> Recipe:
    """The embedded model, a little text."""
    given = {
        "source": "demo",
        "targets": tuple(t for text in targets for t in quantkit.parse_targets(text)),
        "output": quantkit.Output(dir=str(out)),
        "calibration": quantkit.Calibration(set="embedded", rows=8, length=CONTEXT),
        "eval": quantkit.Eval(perplexity=(TEXT,)),
        "engine_check": False,
    }
    return Recipe(**{**given, **changes})


def windows(source: Path, text: quantkit.EvalText) -> list[list[int]]:
    ((_, rows),) = evaluation_rows((text,), load_tokenizer(source))
    found: list[list[int]] = rows.tokens.tolist()
    return found


@dataclass(frozen=True)
class Made:
    """What one conversion made of the embedded model."""

    out: Path
    planned: dict[str, Any]
    report: Report

    def target(self, name: str) -> TargetReport:
        return next(t for t in self.report.targets if t.name == name)

    def file(self, name: str) -> Path:
        (found,) = (self.out / name).glob("*.gguf")
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One file of every type, two presets with feedback, in one sweep."""
    out = tmp_path_factory.mktemp("types")
    targets = []
    for kind in TYPES:
        searched = "" if kind in (*STORED, "q8_0", "tq1_0", "tq2_0") else ",scales=weighted"
        targets.append(f"gguf:{PURE[kind]}@pure=true,method=rtn{searched},name={kind}")
    asked = recipe(out, *targets, "gguf:q4_k_m@name=mixed", "gguf:iq3_xxs@name=low")
    planned = quantkit.plan(asked).to_json()
    return Made(out, planned, quantkit.convert(asked))


@pytest.fixture(scope="module")
def demo() -> Path:
    return resources.folder("demo-llama")


NAMES = (*TYPES, "mixed", "low")


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_the_reported_perplexity(name: str, made: Made, demo: Path) -> None:
    found = llama.perplexity(made.file(name), windows(demo, TEXT))
    (told,) = made.target(name).quality
    assert found == pytest.approx(told.target.value, rel=FLOATS if name in STORED else INTEGERS)


def test_types_differ_as_they_should(made: Made) -> None:
    """What the comparison above could not tell: that every file is another one, and as good as its bits."""
    kl = {name: made.target(name).quality[0].kl_mean for name in NAMES}
    # the source is bf16, which most of its weights are in f16 too
    assert max(kl[name] for name in STORED) < 1e-6 < kl["q8_0"] < kl["q6_k"] < kl["q5_k"]
    assert kl["q5_k"] < kl["q4_k"] < kl["q3_k"] < kl["q2_k"] < kl["iq1_s"] < kl["tq2_0"]
    assert kl["iq3_s"] < kl["iq3_xxs"] < kl["iq2_s"] < kl["iq2_xs"] < kl["iq2_xxs"] < kl["iq1_m"]
    assert kl["mixed"] < kl["q4_k"] and kl["low"] < kl["iq3_xxs"], "feedback and more bits where they pay"


def test_types_of_the_files(made: Made) -> None:
    """Rows of 384 weights fit no super-block of 256: another type takes its place, as in llama.cpp."""
    for kind in TYPES:
        kinds = {t.name: t.kind for t in container.open_file(made.file(kind)).tensors.values()}
        matrices = {name: k for name, k in kinds.items() if not name.endswith("norm.weight")}
        narrow = {name for name in matrices if "ffn_down" in name}
        assert {k for name, k in matrices.items() if name not in narrow} == {kind}
        assert ({kinds[name] for name in narrow} == {kind}) == (TYPES[kind].elements < 256)


def test_plans_are_exact(made: Made) -> None:
    assert {t["name"]: t["size_bytes"] for t in made.planned["targets"]} == {
        name: made.file(name).stat().st_size for name in NAMES
    }


@pytest.mark.parametrize("name", ["f16", "q5_1", "q4_k", "iq2_xs", "iq1_m", "mxfp4"])
def test_read_back_it_scores_what_was_reported(name: str, made: Made) -> None:
    (model,) = quantkit.score([str(made.file(name))], texts=(TEXT,)).models
    (told,) = made.target(name).quality
    assert model.scores[0].perplexity.value == pytest.approx(told.target.value, rel=1e-6)


def test_tokens_are_those_of_the_source(made: Made, demo: Path) -> None:
    text = (demo / "README.md").read_text("utf-8") + "\n\nif x is None: return 12345 # naïve 漢字\r\n"
    expected = load_tokenizer(demo)(text)["input_ids"]
    with llama.opened(made.file("q4_0"), vocabulary_only=True) as opened:
        assert opened.tokenize(text, special=True) == expected
    again = open_gguf(made.file("q4_0"))  # its folder goes with it
    assert load_tokenizer(tokenizer_folder(again))(text)["input_ids"] == expected


def test_shards(made: Made, demo: Path, tmp_path: Path) -> None:
    output = quantkit.Output(dir=str(tmp_path), shard_size="500KB")
    asked = recipe(tmp_path, "gguf:q4_0@method=rtn,pure=true,name=cut", output=output)
    (planned,) = quantkit.plan(asked).to_json()["targets"]
    (target,) = quantkit.convert(asked).targets
    shards = sorted((tmp_path / "cut").glob("*.gguf"))
    assert len(shards) > 2 and shards[0].name == f"demo-Q4_0-00001-of-{len(shards):05}.gguf"
    assert planned["size_bytes"] == target.size_bytes == sum(p.stat().st_size for p in shards)
    (told,) = target.quality
    found = llama.perplexity(shards[0], windows(demo, TEXT))
    assert found == pytest.approx(told.target.value, rel=INTEGERS)


# ------------------------------------------------------------------------------- llama.cpp's own quantizer
@pytest.fixture(scope="module")
def plain(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Types of one pass, rounded without any text, as presets."""
    out = tmp_path_factory.mktemp("plain")
    asked = recipe(out, *(f"gguf:{kind}@method=rtn,name={kind}" for kind in PLAIN))
    asked = replace(asked, eval=quantkit.Eval(enabled=False))
    return Made(out, {}, quantkit.convert(asked))


@pytest.mark.parametrize("source", ["f32", "f16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_bytes_of_llama_cpp(kind: str, source: str, plain: Made, made: Made, tmp_path: Path) -> None:
    own = container.open_file(plain.file(kind))
    theirs = container.open_file(quantized(made.file(source), tmp_path / "theirs.gguf", kind))
    kinds = {name: tensor.kind for name, tensor in own.tensors.items()}
    assert kinds == {name: tensor.kind for name, tensor in theirs.tensors.items()}
    # beside most plain types a preset has a head of 6 bits, whose scales are searched
    same = [name for name, found in kinds.items() if found in (kind, "f32")]
    assert len(same) >= len(kinds) - 1 and "token_embd.weight" in same
    wrong = [name for name in same if not torch.equal(own.read_bytes(name), theirs.read_bytes(name))]
    assert not wrong


def quantized(source: Path, out: Path, kind: str) -> Path:
    """`source` by `llama_model_quantize`."""
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = MIXES[kind].file_type, 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    assert code == 0
    return out


# ----------------------------------------------------------------------------------- the trained model
@pytest.fixture(scope="module")
def trained(shared: Path) -> Path:
    folder = shared / "models" / "wiki-llama-7m"
    if not folder.is_dir() or not (shared / "data" / "wikitext-2").is_dir():
        pytest.skip("needs models/wiki-llama-7m and data/wikitext-2 in ../shared")
    return folder


@pytest.fixture(scope="module")
def calibration(trained: Path, shared: Path) -> quantkit.Calibration:
    file = shared / "data" / "wikitext-2" / "wiki.valid.tokens"
    return quantkit.Calibration(file=str(file), rows=8, length=512, seed=None, max_chars=100_000)


def test_wikitext(trained: Path, shared: Path, calibration: quantkit.Calibration, tmp_path: Path) -> None:
    """As the page of reference figures measures: windows of 512 tokens of the test text."""
    file = shared / "data" / "wikitext-2" / "wiki.test.raw"
    text = quantkit.EvalText(file=str(file), style="gptq", context=512, chunks=4)
    kinds = ("q8_0", "q4_k_m", "q2_k", "iq3_s")
    asked = recipe(
        tmp_path,
        *(f"gguf:{k}@name={k}" + ("" if k == "q8_0" else ",method=rtn,scales=weighted") for k in kinds),
        source=str(trained),
        calibration=calibration,
        eval=quantkit.Eval(perplexity=(text,)),
    )
    rows = windows(trained, text)
    for target in quantkit.convert(asked).targets:
        (found,) = (tmp_path / target.folder).glob("*.gguf")
        (told,) = target.quality
        assert llama.perplexity(found, rows) == pytest.approx(told.target.value, rel=INTEGERS), target.name


@dataclass(frozen=True)
class Rows:
    """A few rows of a matrix and the mean squares of its inputs."""

    name: str
    weight: Tensor
    importance: Tensor


@pytest.fixture(scope="module")
def matrices(
    trained: Path, calibration: quantkit.Calibration, tmp_path_factory: pytest.TempPathFactory
) -> list[Rows]:
    """16 rows of every matrix in the blocks."""
    out = tmp_path_factory.mktemp("imatrix") / "x.gguf"
    seen = quantkit.collect_imatrix(str(trained), out, calibration=calibration).imatrix
    checkpoint = Checkpoint.open(trained)
    graph = build_graph(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    importance = importance_for(seen, Model.of(checkpoint.config).placements(graph, shapes))
    rng = torch.Generator().manual_seed(3)
    found = []
    for weight in graph.weights():
        chosen = torch.randperm(weight.shape[0], generator=rng)[:16]
        values = checkpoint.read(weight.name).float()[chosen]
        found.append(Rows(weight.key, values, importance[weight.key]))
    return found


SEARCHES = (*SEARCHED, *(kind for kind in TYPES if kind.startswith(("iq1", "iq2", "iq3"))))


@pytest.mark.parametrize("kind", SEARCHES)
def test_weighted_error_is_never_above_llama_cpps(kind: str, matrices: list[Rows]) -> None:
    ggml, scheme = Ggml.load(), parse_scheme(kind)
    ratios = {}
    for rows in matrices:
        width = rows.weight.shape[1]
        theirs = ggml.dequantize(kind, ggml.quantize(kind, rows.weight, rows.importance), width)
        own = dequantize(rounding.nearest(rows.weight, scheme, rows.importance))
        errors = [
            float(((values - rows.weight).square() * rows.importance).sum(dtype=torch.float64))
            for values in (own, theirs)
        ]
        ratios[rows.name] = errors[0] / errors[1]
    above = {name: ratio for name, ratio in ratios.items() if ratio > 1}
    assert not above, f"{len(above)} of {len(ratios)}: {max(above.items(), key=lambda item: item[1])}"
