"""The whole pipeline on a tiny checkpoint, as a library."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import Interrupted, UsageError
from quantkit.run.budget import waves
from quantkit.run.store import RunStore
from quantkit.tensors import dequantize
from tests.e2e.conftest import write_tokenizer
from tests.e2e.runs import recipe, sums
from tests.models import save_tiny, tiny_model

GPTQ, RTN, W8 = "gptq:w4g32", "gptq:w4g32@method=rtn", "compressed_tensors:w8"


def test_results_are_there_and_measured(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    made = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ, RTN, W8)
    report = quantkit.convert(made)
    by_name = {t.name: t for t in report.targets}
    gptq, rtn, w8 = by_name["gptq-w4g32"], by_name["gptq-w4g32-rtn"], by_name["compressed_tensors-w8"]
    assert 0 < w8.quality[0].kl_mean < gptq.quality[0].kl_mean < rtn.quality[0].kl_mean
    for one, other in zip(gptq.tensors, rtn.tensors, strict=True):
        assert one.name == other.name and one.metric == "output"
        assert one.error < other.error, f"{one.name}: calibration did not help"
        assert one.tokens == 8 * 32 and one.note is None
    for target in report.targets:
        manifest = json.loads((tmp_path / target.name / "quantkit.json").read_text())
        assert manifest["quality"][0]["kl_mean"] == target.quality[0].kl_mean
        assert set(manifest["files"]) == {p.name for p in (tmp_path / target.name).iterdir()} - {
            "quantkit.json"
        }
        text = "".join(p.read_text() for p in (tmp_path / target.name).glob("*.json"))
        assert str(checkpoint.parent) not in text, "a path of this machine leaked"
    assert json.loads((tmp_path / "report.json").read_text())["targets"][0]["name"] == "gptq-w4g32"


def test_plan_sizes_are_exact_to_the_byte(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    made = recipe(
        checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ, W8, "compressed_tensors:w3g32"
    )
    planned = {t["name"]: t["size_bytes"] for t in quantkit.plan(made).to_json()["targets"]}
    quantkit.convert(made)
    for name, size in planned.items():
        assert size == sum(p.stat().st_size for p in (tmp_path / name).glob("*.safetensors"))


def test_evaluation_in_the_sweep_equals_the_dequantized_model(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    """Perplexity from the streams is that of a whole model whose weights are the file's, dequantized."""
    made = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ)
    quality = quantkit.convert(made).targets[0].quality[0]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    source_nll = whole_model_nll(model, evaluation_text)
    fmt = registry.load("formats", "gptq").FORMAT
    written = Checkpoint.open(tmp_path / "gptq-w4g32")
    config = written.config["quantization_config"]
    for name in [n for n in written.tensors if n.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        parts = {f"{base}.{p}": written.read(f"{base}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
        weight = dequantize(fmt.decode(f"{base}.weight", parts, config).weight)
        model.get_submodule(base).weight.data = weight
    # fp32 sums in another order, over a few hundred tokens
    assert quality.source.value == pytest.approx(float(source_nll.exp()), rel=1e-5)
    assert quality.target.value == pytest.approx(
        float(whole_model_nll(model, evaluation_text).exp()), rel=1e-5
    )


def whole_model_nll(model: torch.nn.Module, text: Path) -> torch.Tensor:
    ids = torch.tensor([int(word[1:]) + 3 for word in text.read_text().split()])[: 8 * 32].view(8, 32)
    with torch.no_grad():
        logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_two_targets_at_once_equal_each_alone(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    both = recipe(checkpoint, calibration_text, evaluation_text, tmp_path / "both", GPTQ, RTN)
    quantkit.convert(both)
    for name, text in (("gptq-w4g32", GPTQ), ("gptq-w4g32-rtn", RTN)):
        alone = recipe(checkpoint, calibration_text, evaluation_text, tmp_path / name, text)
        quantkit.convert(alone)
        weights = f"{name}/model.safetensors"
        assert sums(tmp_path / name, name)[weights] == sums(tmp_path / "both", name)[weights]
        own = json.loads((tmp_path / name / name / "quantkit.json").read_text())
        shared = json.loads((tmp_path / "both" / name / "quantkit.json").read_text())
        # a lone data-free target is given no statistics, so only its error figures differ
        assert own["quality"] == shared["quality"]


def test_feedback_uses_the_targets_own_stream(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    made = recipe(
        checkpoint, calibration_text, evaluation_text, tmp_path, "gptq:w3g32", "gptq:w3g32@feedback=true"
    )
    plain, fed = quantkit.convert(made).targets
    first = [t.error for t in plain.tensors if ".layers.0." in t.name]
    assert first == [t.error for t in fed.tensors if ".layers.0." in t.name], "block 0 sees the same input"
    later = [t.error for t in plain.tensors if ".layers.1." in t.name]
    assert later != [t.error for t in fed.tensors if ".layers.1." in t.name]


def test_a_finished_run_does_nothing_and_a_new_target_reuses_the_store(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    first = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ)
    quantkit.convert(first)
    before = sums(tmp_path, "gptq-w4g32")
    stamp = (tmp_path / "gptq-w4g32" / "model.safetensors").stat().st_mtime_ns
    quantkit.convert(first)
    assert (tmp_path / "gptq-w4g32" / "model.safetensors").stat().st_mtime_ns == stamp
    report = quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ, RTN))
    assert [t.name for t in report.targets] == ["gptq-w4g32", "gptq-w4g32-rtn"]
    assert sums(tmp_path, "gptq-w4g32") == before


def test_a_data_free_result_stays_when_a_calibrated_target_joins(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, RTN))
    before = sums(tmp_path, "gptq-w4g32-rtn")
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, RTN, GPTQ))
    assert sums(tmp_path, "gptq-w4g32-rtn") == before


def test_two_formats_of_the_same_codes_share_one_result(
    calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    """From an fp16 source both formats store fp16 scales, so the targets differ in their files alone."""
    source = tmp_path / "half"
    tiny_model("llama").to(torch.float16).save_pretrained(source)
    write_tokenizer(source)
    targets = (GPTQ, "compressed_tensors:w4g32")
    report = quantkit.convert(recipe(source, calibration_text, evaluation_text, tmp_path / "out", *targets))
    one, other = report.targets
    assert len(one.quality) == len(other.quality) == 1
    assert one.quality == other.quality and one.tensors == other.tensors


def test_waves_and_memory_budget_do_not_change_a_byte(
    checkpoint: Path,
    calibration_text: Path,
    evaluation_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Statistics taken one site at a time, the block run once per site, are the same statistics."""
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path / "one", GPTQ))
    seen: list[int] = []

    def alone(sites: Any, needs: Any, budget: int) -> Any:
        found = list(waves(sites, needs, 1))
        seen.append(len(found))
        return found

    monkeypatch.setattr("quantkit.run.sweep.waves", alone)
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path / "many", GPTQ))
    assert seen == [4, 4], "qkv, o, gate and up, down: each a wave of its own"
    assert sums(tmp_path / "one", "gptq-w4g32") == sums(tmp_path / "many", "gptq-w4g32")


def test_stop_ends_after_a_commit_and_the_next_run_continues(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    made = recipe(checkpoint, calibration_text, evaluation_text, tmp_path / "stopped", GPTQ)
    stop = Event()
    stop.set()
    with pytest.raises(Interrupted) as caught:
        quantkit.convert(made, stop=stop)
    assert caught.value.exit_code == 130 and not (tmp_path / "stopped" / "gptq-w4g32").exists()
    quantkit.convert(made)
    whole = recipe(checkpoint, calibration_text, evaluation_text, tmp_path / "whole", GPTQ)
    quantkit.convert(whole)
    same = {k: v for k, v in sums(tmp_path / "whole").items() if k != "recipe.resolved.yaml"}
    assert {k: v for k, v in sums(tmp_path / "stopped").items() if k != "recipe.resolved.yaml"} == same


def test_a_damaged_result_is_made_again(
    calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    """Its block lies before the streams that are stored, so all rows travel from the start."""
    source = save_tiny("llama", tmp_path / "deep", num_hidden_layers=4)
    write_tokenizer(source)
    # both need the same statistics: beside one that needs fewer, errors would be those of fewer
    made = recipe(source, calibration_text, evaluation_text, tmp_path / "out", GPTQ, "gptq:w3g32")
    stop = Event()
    stop.set()
    for _ in range(3):
        with pytest.raises(Interrupted):
            quantkit.convert(made, stop=stop)
    damaged = sorted((tmp_path / "out" / ".quantkit" / "results").glob("*/0001.safetensors"))
    assert len(damaged) == 2
    damaged[0].write_bytes(damaged[0].read_bytes()[:-1] + b"\xff")
    quantkit.convert(made)
    (tmp_path / "out").rename(tmp_path / "continued")
    quantkit.convert(made)
    assert sums(tmp_path / "continued") == sums(tmp_path / "out")


def test_another_plan_in_the_same_folder_is_refused(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, "gptq:w4g32@name=x"))
    other = "gptq:w3g32@name=x"
    with pytest.raises(UsageError):
        quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, other))
    replaced = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, other, on_exists="replace")
    assert quantkit.convert(replaced).targets[0].scheme == "w3g32"


def test_a_persons_folder_is_never_replaced(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "gptq-w4g32" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    for on_exists in ("resume", "replace", "fail"):
        made = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ, on_exists=on_exists)
        with pytest.raises(UsageError):
            quantkit.convert(made)
    assert precious.read_text() == "mine"


def test_files_carry_source_bytes_for_everything_kept(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, GPTQ))
    source = load_file(checkpoint / "model.safetensors")
    with safe_open(tmp_path / "gptq-w4g32" / "model.safetensors", "pt") as written:
        kept = [n for n in written.keys() if n in source]  # noqa: SIM118
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(kept)
        for name in kept:
            assert torch.equal(written.get_tensor(name), source[name])
        bases = {n.removesuffix(".qweight") + ".weight" for n in written.keys() if n.endswith(".qweight")}  # noqa: SIM118
        assert bases | set(kept) == set(source)


def test_a_failed_gate_keeps_the_files(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    made = recipe(checkpoint, calibration_text, evaluation_text, tmp_path, RTN)
    strict = quantkit.Eval(perplexity=made.eval.perplexity, gates=quantkit.Gates(kl_mean_max=1e-9))
    gated = quantkit.Recipe(
        source=made.source,
        targets=made.targets,
        output=made.output,
        calibration=made.calibration,
        eval=strict,
        engine_check=False,
    )
    report = quantkit.convert(gated)
    assert len(report.broken_gates) == 1 and report.to_json()["status"] == "gates-failed"
    assert (tmp_path / "gptq-w4g32-rtn" / "model.safetensors").is_file()


def test_two_runs_in_one_folder_refuse(tmp_path: Path) -> None:
    held = RunStore.open(tmp_path)
    with pytest.raises(UsageError):
        RunStore.open(tmp_path)
    held.close()
    RunStore.open(tmp_path).close()
