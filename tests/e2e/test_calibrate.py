"""`calibrate`: what hooks on the model see, under names of llama.cpp; killed, merged, as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit import Calibration, Device
from quantkit.cli.calibrate import command
from quantkit.errors import NumericsError, QuantkitError, UnsupportedError
from quantkit.gguf import imatrix
from quantkit.gguf.imatrix import Imatrix
from quantkit.model.runtime import Runtime
from quantkit.progress import BlockInfo, Silent
from quantkit.run.calibrate import collect_imatrix, merge_imatrix, store_of
from quantkit.run.store import RunStore
from tests.e2e.conftest import write_tokenizer
from tests.models import save_tiny

ROWS, LENGTH = 6, 32


@pytest.fixture(scope="module")
def text(calibration_text: Path) -> Calibration:
    return Calibration(file=str(calibration_text), rows=ROWS, length=LENGTH)


def equal(a: Imatrix, b: Imatrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        torch.equal(a.entries[n].sums, b.entries[n].sums)
        and torch.equal(a.entries[n].counts, b.entries[n].counts)
        for n in a.entries
    )


def hooked(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """(in,) Σ x² fp64 that enters every linear of the model, by module."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(_module: Any, args: tuple[Tensor, ...]) -> None:
            squares = args[0].double().square().flatten(0, -2).sum(0)
            found[name] = found.get(name, torch.zeros_like(squares)) + squares

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(tokens.long())
    return found


PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def test_what_hooks_see(
    checkpoint: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Tensor] = []
    embed = Runtime.embed

    def remember(runtime: Runtime, tokens: Tensor) -> Tensor:
        rows.append(tokens)
        return embed(runtime, tokens)

    monkeypatch.setattr(Runtime, "embed", remember)
    found = collect_imatrix(str(checkpoint), tmp_path / "x.imatrix.gguf", calibration=text)
    expected = hooked(checkpoint, torch.cat(rows))
    read = imatrix.read(found.path)
    assert set(read.entries) == {f"blk.{b}.{there}.weight" for b in range(2) for there in PLACES}
    for block in range(2):
        for there, here in PLACES.items():
            entry = read.entries[f"blk.{block}.{there}.weight"]
            torch.testing.assert_close(
                entry.sums[0], expected[f"model.layers.{block}.{here}"], rtol=1e-5, atol=0
            )
            assert entry.counts.tolist() == [ROWS * LENGTH]
    assert (read.datasets, read.chunks, read.chunk_size) == (("calibration.txt",), ROWS, LENGTH)
    assert [p.name for p in tmp_path.iterdir()] == ["x.imatrix.gguf"]
    assert found.table().rows[0] == ("attn_q", "2", "", "64", f"{ROWS * LENGTH}", "100 %")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen experts, one per token."""
    folder = tmp_path_factory.mktemp("experts")
    source = save_tiny("qwen3_moe", folder, num_experts=16, num_experts_per_tok=1, norm_topk_prob=True)
    write_tokenizer(source)
    return source


def test_experts(mixture: Path, calibration_text: Path, tmp_path: Path) -> None:
    few = Calibration(file=str(calibration_text), rows=1, length=8)
    found = collect_imatrix(str(mixture), tmp_path / "x.gguf", calibration=few)
    read = imatrix.read(found.path)
    gate, up, down = (read.entries[f"blk.0.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))
    assert gate.sums.shape == (16, 64) and down.sums.shape == (16, 32)
    assert torch.equal(gate.sums, up.sums) and not torch.equal(gate.sums[:, :32], down.sums)
    # each expert's own tokens, which together are all
    assert gate.counts.sum() == 8 and torch.equal(gate.counts, down.counts)
    unreached = [expert for expert, count in enumerate(gate.counts.tolist()) if not count]
    assert 0 < len(unreached) < 16
    assert not gate.sums[unreached].any() and gate.sums[gate.counts > 0].any(1).all()
    assert found.unreached()["blk.0.ffn_down_exps.weight"] == unreached
    assert found.to_json()["unreached"]["blk.0.ffn_up_exps.weight"] == unreached
    assert "blk.0.ffn_gate_inp.weight" not in read.entries
    notes = found.table().notes
    assert any(f"no token reached {len(unreached)} of 16 experts ({unreached[0]}" in note for note in notes)
    assert [row[2] for row in found.table().rows if "exps" in row[0]] == ["16", "16", "16"]


class Killed(Exception):
    """Stands in for a kill."""


class _Stops(Silent):
    """Ends the run when a block is done, and keeps what was told."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.blocks, self.notes = at, [0.0][:0], [""][:0]

    def block(self, index: int, info: BlockInfo) -> None:
        self.blocks.append(info.seconds)
        if index == self.at:
            raise Killed

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("at", [0, 1])
def test_a_killed_run_continues_to_the_same_bytes(
    at: int, checkpoint: Path, text: Calibration, tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    collect_imatrix(str(checkpoint), whole, calibration=text)
    with pytest.raises(Killed):
        collect_imatrix(str(checkpoint), path, calibration=text, progress=_Stops(at))
    assert store_of(path).is_dir() and not path.exists()
    again = _Stops()
    collect_imatrix(str(checkpoint), path, calibration=text, progress=again)
    # everything was committed when the second block was, and nothing is run again
    assert len(again.notes) == (at == 0) and again.blocks.count(0.0) == (at == 0)
    assert path.read_bytes() == whole.read_bytes()
    assert not store_of(path).exists()


def test_a_killed_run_of_something_else_is_not_continued(
    checkpoint: Path, text: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(Killed):
        collect_imatrix(str(checkpoint), path, calibration=text, progress=_Stops(1))
    fewer = Calibration(file=text.file, rows=2, length=LENGTH)
    found = collect_imatrix(str(checkpoint), path, calibration=fewer)
    assert {int(entry.counts[0]) for entry in found.imatrix.entries.values()} == {2 * LENGTH}


def test_files_of_parts_merge_to_the_file_of_the_whole(
    checkpoint: Path, text: Calibration, tmp_path: Path
) -> None:
    # without a seed rows come in order, so that one seeded choice more is other rows
    parts = []
    for number, seed in enumerate((None, 7)):
        part = Calibration(file=text.file, rows=ROWS, length=LENGTH, seed=seed)
        path = tmp_path / f"{number}.gguf"
        parts.append(collect_imatrix(str(checkpoint), path, calibration=part).imatrix)
    made = merge_imatrix([tmp_path / "0.gguf", tmp_path / "1.gguf"], tmp_path / "both.dat")
    read = imatrix.read(tmp_path / "both.dat", chunk_size=LENGTH)
    for name, entry in read.entries.items():
        total = sum(part.entries[name].sums for part in parts)
        assert isinstance(total, Tensor)
        torch.testing.assert_close(entry.sums, total, rtol=1e-6, atol=0)
        assert entry.counts.tolist() == [2 * ROWS * LENGTH]
    assert made.imatrix.chunks == 2 * ROWS and made.source == "0.gguf, 1.gguf" and not made.unshared


def test_models_without_names_are_refused_before_any_work(tmp_path: Path, text: Calibration) -> None:
    source = save_tiny("opt", tmp_path / "source")
    with pytest.raises(UnsupportedError):
        collect_imatrix(str(source), tmp_path / "x.gguf", calibration=text)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_memory_is_kept_to(checkpoint: Path, text: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"--max-memory allows 1\.00 MB"):
        collect_imatrix(
            str(checkpoint), tmp_path / "x.gguf", calibration=text, device=Device(max_memory="1MB")
        )


def test_activations_that_are_not_finite(
    checkpoint: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = Tensor.square
    monkeypatch.setattr(Tensor, "square", lambda x: square(x) / 0)
    with pytest.raises(NumericsError, match="not finite"):
        collect_imatrix(str(checkpoint), tmp_path / "x.gguf", calibration=text)
    assert not (tmp_path / "x.gguf").exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_command(checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.imatrix.gguf"
    flags = ("--calib", calibration_text, "--calib-rows", 2, "--calib-length", 32, "--progress", "off")
    done = invoke(checkpoint, "-o", out, *flags, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["schema"], document["status"]) == ("quantkit/calibrate/1", "ok")
    assert document["chunks"] == 2 and len(document["tensors"]) == 14
    assert document["tensors"]["blk.1.ffn_down.weight"] == {
        "experts": 1,
        "inputs": 96,
        "tokens_min": 64,
        "tokens_max": 64,
    }
    refused = invoke(checkpoint, "-o", out, *flags)
    assert isinstance(refused.exception, QuantkitError) and "exists" in str(refused.exception)
    legacy = tmp_path / "x.dat"
    done = invoke("--merge", out, "-o", legacy)
    assert done.exit_code == 0 and "14 tensors, 2 × 32 tokens of calibration.txt" in done.stdout
    # means of 64 tokens are exact
    assert equal(imatrix.read(out), imatrix.read(legacy, chunk_size=32))
    done = invoke("--merge", out, legacy, "--calib-length", 32, "-o", out, "--on-exists", "replace", "-q")
    assert (done.exit_code, done.stdout) == (0, f"{out}\n")
    assert imatrix.read(out).chunks == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one model is calibrated at a time, not 0"),
        (["a", "b"], "not 2"),
        (["--merge"], "nothing to merge"),
        (["a", "--merge", "--calib", "x.txt"], "--calib and --merge exclude each other"),
        (["a", "--merge", "--calib-rows", "3", "--device", "cpu"], "--calib-rows, --device and --merge"),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = invoke(*arguments, "-o", tmp_path / "x.gguf")
    assert isinstance(done.exception, QuantkitError) and said in str(done.exception)


def test_restart(checkpoint: Path, text: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    RunStore.open(store_of(path)).close()
    (store_of(path) / "journal.jsonl").write_text("nonsense\n")
    flags = ("--calib", text.file, "--calib-rows", 2, "--calib-length", 32, "--progress", "off", "-o", path)
    assert "--restart" in str(invoke(checkpoint, *flags).exception)
    assert invoke(checkpoint, *flags, "--restart").exit_code == 0
