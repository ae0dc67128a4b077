"""What `verify` makes of weights that are not those of the source, and of factors that were folded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import Calibration, Eval, Output, Recipe, parse_targets
from quantkit.run import verify as whole
from quantkit.run.convert import convert
from quantkit.run.verification import Verification
from tests.gguf_files import byte_tokenizer
from tests.models import save_tiny

verify = partial(whole.verify, engine=False)
Change = Callable[[dict[str, Tensor]], None]
EMBED, HEAD, FINAL = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST, SECOND = (f"model.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
MLP = "model.layers.1.mlp."


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            made[family] = byte_tokenizer(save_tiny(family, tmp_path_factory.mktemp(family), vocab_size=420))
        return made[family]

    return source


@pytest.fixture(scope="module")
def source(sources: Callable[..., Path]) -> Path:
    return sources("llama")


def make(source: Path, out: Path, target: str) -> Path:
    targets = parse_targets(f"{target},name=made")
    rows = Calibration(set="embedded", rows=4, length=32)
    asked = Recipe(
        str(source), targets, output=Output(dir=str(out)), calibration=rows, eval=Eval(enabled=False)
    )
    convert(replace(asked, engine_check=False))
    return out / "made"


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(source, tmp_path_factory.mktemp("out"), "gptq:w4g32@method=rtn")


@pytest.fixture
def look(original: Path, source: Path, tmp_path: Path) -> Callable[..., Verification]:
    """What is found in the GPTQ folder with other tensors, as another tool's work: without its manifest."""

    def looked(how: Change, made: Path = original, against: Path = source) -> Verification:
        folder = shutil.copytree(made, tmp_path / "changed", dirs_exist_ok=True)
        (folder / "quantkit.json").unlink()
        tensors = load_file(folder / "model.safetensors")
        how(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return verify(folder, against=str(against))

    return looked


def swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    for name in [name for name in tensors if one in name]:
        there = name.replace(one, other)
        tensors[name], tensors[there] = tensors[there].clone(), tensors[name].clone()


def scale(tensors: dict[str, Tensor], name: str, by: Tensor | float) -> None:
    tensors[name] = tensors[name] * by


def flip(tensors: dict[str, Tensor], name: str, bit: int) -> None:
    """Flip a bit of the first value, in its highest byte."""
    tensors[name].view(torch.uint8).reshape(-1)[3] ^= 1 << bit


NO_FACTORS = "differs from the source, and not by factors that are finite and positive"


# ---------------------------------------------------------------------------------------------------- damages
@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda t: scale(t, EMBED, 0), f"`{EMBED}` differs from the source"),
        (lambda t: t.update({EMBED: t[EMBED].roll(1, 0)}), f"`{EMBED}` differs from the source"),
        (lambda t: flip(t, EMBED, 7), f"`{EMBED}` differs from the source"),
        (lambda t: flip(t, EMBED, 5), f"`{EMBED}` differs from the source"),
        (lambda t: t.update({HEAD: torch.randn_like(t[HEAD])}), f"`{HEAD}` differs from the source"),
        (lambda t: swap(t, EMBED, HEAD), f"`{HEAD}`, `{EMBED}` differ from the source"),
        (lambda t: scale(t, FINAL, 8), f"and `{HEAD}` does not make up for it"),
        (lambda t: scale(t, FINAL, 0), f"`{FINAL}` {NO_FACTORS}"),
        (lambda t: scale(t, SECOND, -1), f"`{SECOND}` {NO_FACTORS}"),
        (lambda t: swap(t, FIRST, SECOND), f"`{FIRST}` differs from the source, and "),
        (lambda t: swap(t, FIRST, SECOND), ", `model.layers.0.mlp.up_proj.weight` do not make up for it"),
        (lambda t: flip(t, SECOND, 3), f"`{SECOND}` differs from the source, and "),
        (lambda t: t.update({FINAL: t[FINAL][:9].clone()}), f"`{FINAL}` is (9,), the source has (64,)"),
    ],
)  # fmt: skip
def test_floats_that_are_not_the_sources(
    how: Change, problem: str, look: Callable[..., Verification]
) -> None:
    found = look(how)
    assert problem in "\n".join(found.problems)
    assert not any("may have been folded" in note for note in found.notes)


def test_blocks_in_another_order(look: Callable[..., Verification]) -> None:
    found = look(lambda t: swap(t, "layers.0.", "layers.1."))
    assert any("and 11 more have nothing in common with the source's" in p for p in found.problems)
    assert any(f"`{FIRST}` differs from the source, and" in p for p in found.problems)


def test_a_changed_float_hides_no_other_weight(look: Callable[..., Verification]) -> None:
    def how(tensors: dict[str, Tensor]) -> None:
        scale(tensors, EMBED, 2)
        scale(tensors, f"{MLP}up_proj.scales", -1)

    assert look(how).problems == [
        f"`{EMBED}` differs from the source",
        f"`{MLP}up_proj.weight` has nothing in common with the source's",
    ]


def test_values_that_are_not_finite_are_told_once(look: Callable[..., Verification]) -> None:
    found = look(lambda t: scale(t, FINAL, float("nan")))
    assert found.problems == [f"`{FINAL}` is nan at index [0]"]


# ------------------------------------------------------------------------------------------------ what may be
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_of_another_dtype(dtype: torch.dtype, look: Callable[..., Verification]) -> None:
    def how(tensors: dict[str, Tensor]) -> None:
        for name in (EMBED, HEAD, FINAL, FIRST, SECOND):
            tensors[name] = tensors[name].to(dtype)

    found = look(how)
    assert found.sound and found.checks["against"] == "7 of 7 tensors equal the source's"


def test_factors_of_a_norm_and_of_what_reads_it(look: Callable[..., Verification]) -> None:
    by = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3 + 0.3
    groups = by.reshape(2, 32)[:, :1].expand(2, 32).flatten()

    def fold(tensors: dict[str, Tensor]) -> None:
        scale(tensors, FIRST, groups)
        for name in ("q", "k", "v"):
            scale(tensors, f"model.layers.0.self_attn.{name}_proj.scales", 1 / groups[::32, None])

    found = look(fold)
    assert found.sound
    assert (
        f"`{FIRST}` differs from the source by factors that what reads them makes up for: they may have been "
        "folded, as AWQ and SmoothQuant do" in found.notes
    )
    assert all(d.error < 0.2 for d in found.differences), "without the factors"

    def partly(tensors: dict[str, Tensor]) -> None:
        fold(tensors)
        scale(tensors, "model.layers.0.self_attn.k_proj.scales", groups[::32, None])

    (problem,) = look(partly).problems
    assert problem.endswith("and `model.layers.0.self_attn.k_proj.weight` does not make up for it")


def test_factors_of_rows_and_of_what_takes_them_back(
    source: Path, tmp_path: Path, look: Callable[..., Verification]
) -> None:
    """AWQ on every site: rows of codes tell of their factors by estimate alone."""
    made = make(source, tmp_path / "out", "awq:w4g32@transforms=awq,alpha=0.5,method=rtn")
    found = look(lambda t: None, made)
    assert found.sound and len(found.differences) == 14 and all(d.error < 0.2 for d in found.differences)
    (note,) = (note for note in found.notes if "folded" in note)
    assert f"`{FIRST}`" in note

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MLP}up_proj.scales"][:, :1] *= 3

    (problem,) = look(damage, made).problems
    assert problem == (
        f"rows of `{MLP}up_proj.weight` differ from the source's by factors, and `{MLP}down_proj.weight` "
        "does not make up for them"
    )


def test_a_head_takes_the_final_norm_in(look: Callable[..., Verification]) -> None:
    def fold(tensors: dict[str, Tensor]) -> None:
        scale(tensors, HEAD, tensors[FINAL])
        tensors[FINAL] = torch.ones_like(tensors[FINAL])

    found = look(fold)
    assert found.sound and any(
        f"`{FINAL}`, `{HEAD}` differ from the source by factors" in n for n in found.notes
    )


# ------------------------------------------------------------------------------------ what quantkit.json says
def test_no_transform_changes_nothing(original: Path, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "made")
    tensors = load_file(folder / "model.safetensors")
    scale(tensors, FIRST, 3)
    for name in ("q", "k", "v"):
        scale(tensors, f"model.layers.0.self_attn.{name}_proj.scales", 1 / 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    manifest = json.loads((folder / "quantkit.json").read_text())

    def found() -> list[str]:
        (folder / "quantkit.json").write_text(json.dumps(manifest))
        return [p for p in verify(folder, against=str(source)).problems if "sha256" not in p]

    changed = found()
    assert f"`{FIRST}` differs from the source, and quantkit.json names no transform" in changed
    manifest["made"]["transforms"] = [{"name": "awq", "options": {}}]
    assert found() == []
    manifest["made"]["transforms"], manifest["method"] = [], "unknown"
    assert found() == [], "codes that were moved from a folder of another tool"


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2", "gptq:w2g32@transforms=awq,method=rtn"),
        ("gemma2", "ct:w8a8@transforms=smoothquant,alpha=0.5"),
        ("gpt2", "awq:w4g32@transforms=awq,alpha=0.5,method=rtn"),
        ("opt", "ct:w4g32@transforms=awq,alpha=0.5,method=rtn"),
        ("mixtral", "ct:w8a8@transforms=smoothquant,alpha=0.5"),
        ("deepseek_v3", "ct:nvfp4@transforms=awq,alpha=0.5,method=rtn"),
    ],
)
def test_folds_of_other_architectures(
    family: str,
    target: str,
    sources: Callable[..., Path],
    tmp_path: Path,
    look: Callable[..., Verification],
) -> None:
    made = make(sources(family), tmp_path / "out", target)
    found = verify(made, against=str(sources(family)))
    assert found.problems == [] and any("may have been folded" in note for note in found.notes)
    stranger = look(lambda t: None, made, sources(family))
    assert stranger.problems == [] and max(d.error for d in stranger.differences) < 0.6


def test_a_source_without_its_ends(
    sources: Callable[..., Path], tmp_path: Path, look: Callable[..., Verification]
) -> None:
    """What factors may be in is known from the configuration then."""
    part = shutil.copytree(sources("llama"), tmp_path / "part")
    tensors = load_file(part / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n not in (EMBED, HEAD)},
        part / "model.safetensors",
        {"format": "pt"},
    )
    assert "do not make up for it" in "\n".join(look(lambda t: swap(t, FIRST, SECOND), against=part).problems)
