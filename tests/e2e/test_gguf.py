"""GGUF files of a tiny model through the whole pipeline, without any engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.convert import command
from quantkit.errors import RecipeError, UnsupportedError
from quantkit.gguf import container, rounding
from quantkit.gguf.blocks import TYPES, pack, unpack
from quantkit.recipe.load import load_recipe
from quantkit.recipe.spec import Recipe
from quantkit.run.report import Report
from quantkit.schemes import parse_scheme
from quantkit.tensors import dequantize
from tests.e2e.runs import recipe, sums
from tests.gguf_files import byte_tokenizer
from tests.models import save_tiny

ROOT = Path(__file__).parents[2]
# rows of 256 weights, and rows of 96, which fit no super-block
WIDE = {"hidden_size": 256, "intermediate_size": 96, "vocab_size": 448}
MIXED = "gguf-q4_k_m"
ENDS = "gguf-q2_k-pure-output_q8_0-embedding_q6_k"
TARGETS = (
    "gguf:q4_k_m",
    "gguf:q2_k@pure=true,output=q8_0,embedding=q6_k",
    "gguf:q4_0@method=rtn,name=plain",
    "gptq:w4g32",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("gguf") / "tiny-llama", **WIDE)
    return byte_tokenizer(folder)


@pytest.fixture(scope="module")
def texts(calibration_text: Path, evaluation_text: Path) -> tuple[Path, Path]:
    return calibration_text, evaluation_text


@pytest.fixture(scope="module")
def made(
    source: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recipe, Report]:
    """(folder, recipe, report) of one run with several files and another format beside them."""
    out = tmp_path_factory.mktemp("out")
    asked = recipe(source, *texts, out, *TARGETS)
    return out, asked, quantkit.convert(asked)


def types(path: Path) -> dict[str, str]:
    """Type of every matrix, by its name in the file without the ending."""
    found = container.open_file(path).tensors.values()
    return {t.name.removesuffix(".weight"): t.kind for t in found if len(t.shape) > 1}


def planned(asked: Recipe) -> Mapping[str, str | None]:
    """Types that a plan gives, by module of the source; None: kept."""
    plan = quantkit.plan(asked)
    plan.check()
    return {
        key.removesuffix(".weight"): None if scheme is None else scheme.numbers
        for key, scheme in plan.targets[0].schemes.items()
    }


def refusal(asked: Recipe) -> str:
    with pytest.raises(UnsupportedError) as refused:
        quantkit.plan(asked).check()
    return str(refused.value)


def test_files_are_there_as_planned(made: tuple[Path, Recipe, Report]) -> None:
    out, asked, report = made
    sizes = {t["name"]: t["size_bytes"] for t in quantkit.plan(asked).to_json()["targets"]}
    names = {MIXED: "tiny-llama-Q4_K_M", ENDS: "tiny-llama-Q2_K", "plain": "tiny-llama-Q4_0"}
    assert [t.folder for t in report.targets] == [*names, "gptq-w4g32"]
    for folder, stem in names.items():
        # a file is all that an engine needs
        assert {p.name for p in (out / folder).iterdir()} == {f"{stem}.gguf", "quantkit.json"}
        manifest = json.loads((out / folder / "quantkit.json").read_text())
        size = (out / folder / f"{stem}.gguf").stat().st_size
        assert size == sizes[folder] == manifest["size_bytes"]
        assert list(manifest["files"]) == [f"{stem}.gguf"]
        assert quantkit.verify(out / folder, engine=False).problems == []


def test_types_by_rules_of_the_preset(made: tuple[Path, Recipe, Report]) -> None:
    mixed = types(made[0] / MIXED / "tiny-llama-Q4_K_M.gguf")
    assert mixed["token_embd"] == mixed["blk.0.attn_v"] == "q4_k"
    assert mixed["output"] == mixed["blk.1.attn_v"] == "q6_k"
    # of 96 weights: in place of q4_k and q6_k
    assert (mixed["blk.0.ffn_down"], mixed["blk.1.ffn_down"]) == ("q5_0", "q8_0")
    notes = quantkit.plan(made[1]).table().notes
    assert f"{MIXED}: 1 tensor: row length 96 is not a multiple of 256: q5_0 instead of q4_k" in notes
    ends = types(made[0] / ENDS / "tiny-llama-Q2_K.gguf")
    assert (ends.pop("output"), ends.pop("token_embd")) == ("q8_0", "q6_k")
    assert set(ends.values()) == {"q2_k", "q4_0"}


def test_what_was_measured_is_that_of_the_files(made: tuple[Path, Recipe, Report]) -> None:
    out, asked, report = made
    text = asked.eval.perplexity
    for target in report.targets[:3]:
        (file,) = (out / target.folder).glob("*.gguf")
        (model,) = quantkit.score([str(file)], baseline=asked.source, texts=text).models
        beside, (told,) = model.scores[0].beside, target.quality
        assert beside is not None and beside.kl_mean == pytest.approx(told.kl_mean, rel=1e-4)
        assert 0 < told.kl_mean < 0.1
        # embedding and head are in the report, too
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= {t.name for t in target.tensors}


def test_files_hold_the_weights_of_the_source(made: tuple[Path, Recipe, Report], source: Path) -> None:
    """Names that need no permutation, as far as the type allows; norms as they are."""
    checkpoint = Checkpoint.open(source)
    names = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }
    for folder, most in ((MIXED, 0.01), (ENDS, 0.2)):
        (file,) = (made[0] / folder).glob("*.gguf")
        opened, kinds = container.open_file(file), types(file)
        for there, here in names.items():
            value = dequantize(unpack(opened.read_bytes(f"{there}.weight"), TYPES[kinds[there]]))
            wanted = checkpoint.read(f"{here}.weight")
            assert float((value - wanted).square().sum() / wanted.square().sum()) < most, (folder, there)
        norm = opened.read_bytes("output_norm.weight").view(torch.float32)
        assert torch.equal(norm, checkpoint.read("model.norm.weight"))


def test_plain_rounding_is_llama_cpps_everywhere(made: tuple[Path, Recipe, Report], source: Path) -> None:
    """Without text and search: of the embedding, too."""
    opened = container.open_file(made[0] / "plain" / "tiny-llama-Q4_0.gguf")
    for there, here in (("token_embd", "model.embed_tokens"), ("blk.0.ffn_up", "model.layers.0.mlp.up_proj")):
        weight = Checkpoint.open(source).read(f"{here}.weight")
        expected = pack(rounding.convention(weight, parse_scheme("q4_0")), TYPES["q4_0"])
        assert torch.equal(opened.read_bytes(f"{there}.weight"), expected), there


def test_gates(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(source, *texts, tmp_path, "gguf:q2_k@method=rtn")
    gates = quantkit.Gates(kl_mean_max=1e-6)
    report = quantkit.convert(replace(asked, eval=replace(asked.eval, gates=gates)))
    assert len(report.broken_gates) == 1 and "gguf-q2_k-rtn: kl_mean_max is 1e-06" in report.broken_gates[0]
    assert list(tmp_path.glob("*/*.gguf"))


def test_rules_by_either_name(source: Path, texts: tuple[Path, Path]) -> None:
    asked = recipe(source, *texts, Path("out"), "gguf:q4_k_s@method=rtn")
    plain = planned(asked)
    for match, key, scheme in (
        ("*.0.self_attn.v_proj", "model.layers.0.self_attn.v_proj", "q6_k"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", "iq4_xs"),
        ("re:.*ffn_gate", "model.layers.1.mlp.gate_proj", None),
        ("token_embd", "model.embed_tokens", None),
        ("lm_head", "lm_head", "q5_1"),
    ):
        rule = quantkit.Rule(match, keep=scheme is None, scheme=scheme)
        changed = planned(replace(asked, rules=(rule,)))
        assert changed[key] == scheme != plain[key], match
        others = {k for k in plain if changed[k] != plain[k]}
        assert all("gate_proj" in k or k == key for k in others), match


def test_a_kept_matrix_is_the_sources(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(source, *texts, tmp_path, "gguf:q8_0@name=kept")
    quantkit.convert(replace(asked, rules=(quantkit.Rule("blk.0.attn_v", keep=True),)))
    opened = container.open_file(tmp_path / "kept" / "tiny-llama-Q8_0.gguf")
    weight = Checkpoint.open(source).read("model.layers.0.self_attn.v_proj.weight")
    assert opened.tensors["blk.0.attn_v.weight"].kind == "f32"
    assert torch.equal(opened.read_bytes("blk.0.attn_v.weight").view(torch.float32), weight)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (quantkit.Rule("blk.0.attn_vv", keep=True), "matches no weight; close: blk.0.attn_v"),
        (quantkit.Rule("*.q_proj", bits=8), "q4_k fixes its bits"),
        (quantkit.Rule("*.q_proj", scheme="w4g32"), "w4g32"),
        (quantkit.Rule("*", keep=True), "nothing to quantize"),
    ],
)
def test_rules_that_cannot_be(rule: quantkit.Rule, said: str, source: Path, texts: tuple[Path, Path]) -> None:
    asked = recipe(source, *texts, Path("out"), "gguf:q4_k_s")
    assert said in refusal(replace(asked, rules=(rule,)))


def test_low_types_without_importance_are_refused(source: Path, texts: tuple[Path, Path]) -> None:
    said = refusal(recipe(source, *texts, Path("out"), "gguf:iq2_xs@method=rtn"))
    assert "cannot be iq2_xs: iq2_xs needs to know which inputs matter" in said
    assert "use the method gptq, or scales weighted" in said and "more weights likewise" in said
    planned(recipe(source, *texts, Path("out"), "gguf:iq2_xs@method=rtn,scales=weighted"))
    # with the embedding alone in such a type nothing is lost: it has no inputs
    planned(recipe(source, *texts, Path("out"), "gguf:q4_k_m@method=rtn,embedding=iq3_s"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("gguf:q4_k_x", "did you mean 'q4_k_s'"),
        ("gguf:w4g128", "unknown GGUF file type 'w4g128'"),
        ("gguf:q4_k_m@output=q9", "unknown GGUF type 'q9'"),
        ("gptq:w4g128@pure=true", "has no parameter 'pure'"),
        ("gguf:q4_k_m@embeding=q6_k", "has no parameter 'embeding'"),
    ],
)
def test_targets_that_mean_nothing(target: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        quantkit.parse_targets(target)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("gguf:q4_k_m@kv_cache=fp8", "kv_cache: gguf has no place for fp8 scales"),
        ("gguf:q4_k_m@method=rtn,scales=absmax", "q4_k has scales of its own kind"),
        ("gguf:q4_k_m@act_order=free", "column groups"),
    ],
)
def test_targets_that_cannot_be(target: str, said: str, source: Path, texts: tuple[Path, Path]) -> None:
    assert said in refusal(recipe(source, *texts, Path("out"), target))


def test_models_without_a_place_in_gguf(texts: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    # a tokenizer of whole words, which llama.cpp does not know
    assert "gguf-q8_0: " in (said := refusal(recipe(checkpoint, *texts, Path("out"), "gguf:q8_0")))
    assert "WordLevel" in said
    strange = byte_tokenizer(save_tiny("opt", tmp_path / "opt", vocab_size=448))
    assert "opt" in refusal(recipe(strange, *texts, Path("out"), "gguf:q8_0"))


def test_print_recipe(source: Path, tmp_path: Path) -> None:
    given = "gguf:q4_k_m@pure=true,output=q8_0"
    done = CliRunner().invoke(command, [str(source), "--to", given, "-o", "out", "--print-recipe"])
    assert done.exit_code == 0, done.output
    (tmp_path / "recipe.yaml").write_text(done.stdout)
    (target,) = load_recipe(tmp_path / "recipe.yaml").targets
    assert target == quantkit.parse_targets(given)[0]
    assert target.mix["pure"] is True and target.mix["output"] == "q8_0"


def test_killed_again_and_again_the_bytes_are_the_same(
    source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out, targets = tmp_path / "out", ("gguf:q4_k_m", "gguf:q2_k@method=rtn,scales=weighted")
    quantkit.convert(recipe(source, *texts, out, *targets))
    expected = sums(out)
    assert len([name for name in expected if name.endswith(".gguf")]) == 2
    out.rename(tmp_path / "uninterrupted")
    # each run continues the one before: embedding, two blocks, head, evaluation, two folders
    kills = ("after 1", "after 1", "before 2", "before 1", "after 2", "before 2")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed", *map(str, (source, *texts, out)), *targets],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input="\n".join((*kills, "never 0")) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    assert codes[:-1] == [-signal.SIGKILL] * len(kills), (codes, done.stderr)
    assert codes[-1] == 1, "only the last folder was missing"
    assert sums(out) == expected
