"""`export`: from format to format without changing a value, or the reason why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.main import run
from quantkit.errors import QuantkitError, UnsupportedError, UsageError
from quantkit.gguf.container import read
from quantkit.run.quantized import dequantized, open_quantized
from tests.cards import quality
from tests.e2e.conftest import write_tokenizer
from tests.models import save_tiny, tiny_model

Quantized = Callable[..., Path]
STRANGERS = Path(__file__).parents[3] / "shared" / "strangers"
BYTE_VOCABULARY = 300


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """(target, family, dtype) → a folder that convert made, without calibration."""
    made: dict[tuple[str, str, torch.dtype], Path] = {}

    def folder(target: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        key = (target, family, dtype)
        if key not in made:
            at = tmp_path_factory.mktemp("repack")
            tiny_model(family).to(dtype).save_pretrained(at / "tiny")
            write_tokenizer(at / "tiny")
            made[key] = convert(at, target)
        return made[key]

    return folder


def convert(at: Path, target: str) -> Path:
    recipe = quantkit.Recipe(
        source=str(at / "tiny"),
        targets=quantkit.parse_targets(target),
        output=quantkit.Output(dir=str(at / "out")),
        eval=quantkit.Eval(perplexity=()),
        engine_check=False,
    )
    return at / "out" / quantkit.convert(recipe).targets[0].folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def floats(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a quantized folder as an unquantized model has it."""
    found = open_quantized(Checkpoint.open(folder))
    assert found is not None
    view = dequantized(found)
    return {name: view.read(name).to(torch.float32) for name in view.tensors}


def edit(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of `folder` with other tensors."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name not in ("model.safetensors", "quantkit.json"):
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("target", "stops"),
    [
        ("gptq:w4g32@method=rtn", ("awq", "compressed_tensors", "gptq")),
        ("gptq:w4g32_asym@method=rtn", ("compressed_tensors", "awq", "gptq")),
        ("gptq:w8g32@method=rtn", ("compressed_tensors", "gptq")),
        ("gptq:w3@method=rtn", ("compressed_tensors", "gptq")),
    ],
)
def test_a_round_trip_gives_the_same_bytes(
    quantized: Quantized, target: str, stops: tuple[str, ...], tmp_path: Path
) -> None:
    start = quantized(target)
    folder = start
    sums = set()
    for n, to in enumerate(stops):
        made = quantkit.export(folder, to, tmp_path / f"{n}-{to}")
        folder = made.folder
        assert made.proof.weights == 14 and made.proof.before == made.proof.after
        sums.add(made.proof.after)
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] in (
            to,
            "compressed-tensors",
        )
    assert len(sums) == 1
    first, last = weights(start), weights(folder)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    for name in ("config.json", "tokenizer.json"):
        one, other = (json.loads((f / name).read_text()) for f in (start, folder))
        for content in (one, other):
            content.get("quantization_config", {}).pop("meta", None)
        assert one == other


def test_kept_weights_stay_kept_and_are_declared(quantized: Quantized, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "tiny")
    write_tokenizer(source)
    recipe = quantkit.Recipe(
        source=str(source),
        targets=quantkit.parse_targets("gptq:w4g32@method=rtn"),
        rules=(quantkit.Rule(match="*.down_proj", keep=True),),
        output=quantkit.Output(dir=str(tmp_path / "out")),
        eval=quantkit.Eval(perplexity=()),
        engine_check=False,
    )
    folder = tmp_path / "out" / quantkit.convert(recipe).targets[0].folder
    made = quantkit.export(folder, "compressed_tensors")
    assert made.folder.name == f"{folder.name}-compressed_tensors" and made.folder.parent == folder.parent
    ignored = json.loads((made.folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.down_proj" in ignored and "lm_head" in ignored
    assert made.proof.weights == 12
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights(made.folder)[name], weights(source)[name])


def test_the_manifest_keeps_what_was_measured(quantized: Quantized, tmp_path: Path) -> None:
    start = quantized("gptq:w4g32@method=rtn")
    made = quantkit.export(start, "awq", tmp_path / "awq")
    before, after = (json.loads((f / "quantkit.json").read_text()) for f in (start, made.folder))
    for key in ("source", "method", "made", "quality", "calibration", "fallbacks"):
        assert after[key] == before[key]
    assert after["repacked"]["source"] == start.name and after["name"] == "awq-w4g32"
    assert set(after["files"]) == {p.name for p in made.folder.iterdir()} - {"quantkit.json"}
    texts = "".join(p.read_text() for p in made.folder.glob("*.json"))
    assert str(tmp_path) not in texts and str(start.parent) not in texts
    inspected = quantkit.inspect(made.folder).manifest
    assert inspected is not None and json.loads(json.dumps(inspected.to_json())) == after
    # the same again is found, anything else is not replaced
    assert quantkit.export(start, "awq", tmp_path / "awq").proof == made.proof
    with pytest.raises(UsageError, match="result of another plan"):
        quantkit.export(start, "awq:w4g16", tmp_path / "awq")
    assert quantkit.export(start, "awq:w4g16", tmp_path / "awq", on_exists="replace").target == "awq-w4g16"


@pytest.mark.parametrize(
    ("target", "to", "reason"),
    [
        ("gptq:w3g32@method=rtn", "awq", "awq stores 4 bits, not 3"),
        ("gptq:w4g32@method=rtn", "gptq:w4", "groups of 32 and neighbours differ: groups of a whole row"),
        ("gptq:w4g32@method=rtn", "gptq:w3g32", "codes of 4 bits and w3g32 holds 3"),
        ("gptq:w4g32_asym@method=rtn", "compressed_tensors:w4g32", "zero points of .* are not 8"),
        ("gptq:w4g32@method=rtn", "hqq", "fractional zero points, not w4g32"),
        ("gptq:w4g32@method=rtn", "gguf:q4_k", "'q4_k' without rounding anew"),
        ("gptq:w4g32@method=rtn", "exl9", "unknown format 'exl9'"),
        ("bitsandbytes:nf4g32@method=rtn", "gptq", r"no plain grid of integers \(codebook\)"),
        ("hqq:w4g32@method=rtn", "awq", "fractional zero points"),
        ("compressed_tensors:fp8@method=rtn", "gptq", r"no plain grid of integers \(float\)"),
        ("compressed_tensors:w8a8@method=rtn", "gptq", "rounds the inputs of its weights while it runs"),
    ],
)
def test_what_cannot_be_moved_is_refused_with_the_reason(
    quantized: Quantized, target: str, to: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        quantkit.export(quantized(target), to, tmp_path / "no")
    assert caught.value.remedy is not None
    assert not list(tmp_path.iterdir())


def test_columns_in_groups_of_their_own_stay_with_gptq(quantized: Quantized, tmp_path: Path) -> None:
    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name] = tensors[name].flip(0).contiguous()

    folder = edit(quantized("gptq:w4g32@method=rtn"), tmp_path / "shuffled", shuffle)
    with pytest.raises(UnsupportedError, match=r"\(act-order\), which awq does not record"):
        quantkit.export(folder, "awq", tmp_path / "no")
    with pytest.raises(UnsupportedError, match=r"\(act-order\)"):
        quantkit.export(folder, "gptq:w4g16", tmp_path / "no")
    made = quantkit.export(folder, "gptq", tmp_path / "again")
    assert json.loads((made.folder / "quantize_config.json").read_text())["desc_act"] is True


def test_scales_that_another_dtype_would_round(quantized: Quantized, tmp_path: Path) -> None:
    """Into compressed-tensors float16 stays float16 beside bfloat16; into gptq only what float16 holds."""
    made = quantkit.export(
        quantized("gptq:w4g32@method=rtn", dtype=torch.bfloat16), "compressed_tensors", tmp_path / "ct"
    )
    assert {t.dtype for n, t in weights(made.folder).items() if n.endswith("_scale")} == {torch.float16}
    assert any("scales stay float16" in note for note in made.notes)

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight_scale"
        tensors[name][:3] *= 1e-9

    source = quantized("compressed_tensors:w4g32@method=rtn", dtype=torch.bfloat16)
    assert quantkit.export(source, "gptq", tmp_path / "fine").proof.weights == 14
    small = edit(source, tmp_path / "small", shrink)
    with pytest.raises(UnsupportedError, match=r"6 of 192 bfloat16 scales of .* are not exact in float16"):
        quantkit.export(small, "gptq", tmp_path / "no")


def test_a_model_that_is_not_quantized_is_sent_to_convert(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="is not quantized") as caught:
        quantkit.export(checkpoint, "awq")
    assert "quantkit convert" in str(caught.value.remedy)


def test_the_command(quantized: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = quantized("gptq:w4g32@method=rtn"), tmp_path / "made"
    assert run(["export", str(source), "--to", "awq", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "dequantized values identical in every bit" in shown and "sha256" in shown
    assert f"written to `{out}`" in shown
    assert run(["export", str(source), "--to", "awq", "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lossless"] and document["folder"] == str(out)
    assert run(["export", str(source), "--to", "gptq:w3g32", "-o", str(tmp_path / "no")]) == 2
    assert "holds 3" in capsys.readouterr().err
    assert run(["export", str(source), "--to", "exl9"]) == 2
    assert "known: awq, bitsandbytes, compressed_tensors, gguf, gptq, hqq" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "mode"), "--to", "awq"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_divisors_that_readers_of_awq_want_come_and_go(quantized: Quantized, tmp_path: Path) -> None:
    """transformers divides activations of this model by them, in AWQ files and in no others."""
    names = {f"model.layers.{n}.mlp.act.scales" for n in range(2)}
    start = quantized("awq:w4g32@method=rtn", "starcoder2")
    divisors = {name: tensor for name, tensor in weights(start).items() if name in names}
    assert divisors.keys() == names and all(torch.equal(t, torch.ones(96)) for t in divisors.values())
    gptq = quantkit.export(start, "gptq", tmp_path / "gptq").folder
    assert not names & weights(gptq).keys()
    again = quantkit.export(gptq, "awq", tmp_path / "awq").folder
    first, last = weights(start), weights(again)
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    assert all(quantkit.verify(folder, engine=False).sound for folder in (start, gptq, again))


def test_what_a_repacked_folder_says_of_itself(quantized: Quantized, tmp_path: Path) -> None:
    start = quantized("gptq:w4g32@method=rtn")
    made = quantkit.export(start, "awq", tmp_path / "made")
    notes = quantkit.inspect(made.folder).table().notes
    assert f"from {start.name}, every value the same" in notes[0]
    assert "quantized from tiny with rtn (" in notes[1]
    (start.parent / "bare").mkdir()
    for file in start.iterdir():
        if file.name != "quantkit.json":
            (start.parent / "bare" / file.name).write_bytes(file.read_bytes())
    bare = quantkit.export(start.parent / "bare", "awq", tmp_path / "unknown")
    assert len(quantkit.inspect(bare.folder).table().notes) == 1


@pytest.mark.parametrize("name", ["autogptq", "autoawq", "autoround-auto-gptq-w4g128", "llmc-gptq-w4a16"])
def test_files_of_other_tools(name: str, tmp_path: Path) -> None:
    folder = STRANGERS / name
    if not folder.is_dir():
        pytest.skip(f"the shared checkpoint strangers/{name} is not here")
    whole = _with_ends(folder, tmp_path / name)
    to = "gptq" if name == "autoawq" else "awq"
    made = quantkit.export(whole, to, tmp_path / "made")
    assert made.proof.weights == 14 and made.proof.before == made.proof.after
    assert bool(made.left_out) == (name == "autogptq"), "biases of zeros are left out"
    twin = STRANGERS / "autoround-auto-awq-w4g128"
    if name.startswith("autoround") and twin.is_dir():
        theirs, ours = weights(twin), weights(made.folder)
        packed = [n for n in theirs if n.endswith(("qweight", "qzeros", "scales"))]
        assert len(packed) == 42 and all(torch.equal(theirs[n], ours[n]) for n in packed)


def _with_ends(folder: Path, copy: Path) -> Path:
    """Embedding and head, which the shared files leave out, put back."""
    copy.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    ends = torch.zeros(config["vocab_size"], config["hidden_size"], dtype=torch.bfloat16)
    tensors |= {"model.embed_tokens.weight": ends, "lm_head.weight": ends.clone()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def write_byte_tokenizer(folder: Path) -> None:
    """A freshly trained byte-level BPE, split as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_VOCABULARY - 4,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "target", "kind", "changes"),
    [
        ("llama", "gptq:w4g32@method=rtn", "q4_0", {"tie_word_embeddings": True}),
        ("llama", "gptq:w4g32_asym@method=rtn", "q8_0", {}),
        ("mistral", "gptq:w8g32@method=rtn", "q8_0", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", "gptq:w3g32@method=rtn", "q4_0", {}),
        ("qwen3", "gptq:w4g32@method=rtn", "q4_1", {"head_dim": 128}),
    ],
)
def test_gguf_loads_in_transformers_with_the_same_logits(
    family: str, target: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    source = save_tiny(family, tmp_path / "tiny", vocab_size=BYTE_VOCABULARY, **changes)
    write_byte_tokenizer(source)
    folder = convert(tmp_path, target)
    made = quantkit.export(folder, f"gguf:{kind}", tmp_path / "gguf")
    file = next(made.folder.glob("*.gguf"))
    assert file.name == f"tiny-{kind.upper()}.gguf"
    assert [p.name for p in sorted(made.folder.iterdir())] == ["quantkit.json", file.name]
    loaded, info = AutoModelForCausalLM.from_pretrained(
        made.folder, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference.load_state_dict(floats(folder), strict=False)
    reference.tie_weights()
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(source),
        AutoTokenizer.from_pretrained(made.folder, gguf_file=file.name),
    )
    ids = tokenizer("the quick dog jumps,  over 12 lazy foxes\n", return_tensors="pt")["input_ids"]
    assert torch.equal(
        ids, theirs("the quick dog jumps,  over 12 lazy foxes\n", return_tensors="pt")["input_ids"]
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reference(ids).logits)


def test_queries_and_keys_are_put_in_the_order_of_llama_cpp(tmp_path: Path) -> None:
    """Biases too, which transformers does not read from these files."""
    pytest.importorskip("gguf")
    source = save_tiny("llama", tmp_path / "tiny", vocab_size=BYTE_VOCABULARY, attention_bias=True)
    write_byte_tokenizer(source)
    made = quantkit.export(convert(tmp_path, "gptq:w4g32@method=rtn"), "gguf:q8_0", tmp_path / "gguf")
    stored = {t.name: (t, data) for t, data in read(next(made.folder.glob("*.gguf")))}
    bias, data = stored["blk.1.attn_k.bias"]
    assert bias.kind == "f32"
    original = weights(source)["model.layers.1.self_attn.k_proj.bias"].view(2, 2, 8)
    assert torch.equal(data.view(torch.float32), original.transpose(1, 2).reshape(-1))
    assert stored["blk.1.attn_k.weight"][0].kind == "q8_0" and stored["output.weight"][0].kind == "f32"


@pytest.mark.parametrize(
    ("target", "to", "reason"),
    [
        ("gptq:w4g32_asym@method=rtn", "gguf:q4_0", "zero points of .* are not 8"),
        ("gptq:w4g32_asym@method=rtn", "gguf:q4_1", r"minima \(−scale · zero point\) of .* are not exact"),
        ("gptq:w8g32@method=rtn", "gguf:q4_0", "codes of 8 bits"),
    ],
)
def test_what_gguf_cannot_hold(
    quantized: Quantized, target: str, to: str, reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UnsupportedError, match=reason) as caught:
        quantkit.export(quantized(target), to, tmp_path / "no")
    assert "gguf:q8_0" in str(caught.value.remedy)


def test_models_and_tokenizers_that_gguf_cannot_hold(quantized: Quantized, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(QuantkitError, match="tokenizer of the type 'WordLevel'"):
        quantkit.export(quantized("gptq:w4g32@method=rtn"), "gguf:q4_0", tmp_path / "no")
    with pytest.raises(QuantkitError, match="tokenizer of the type"):
        quantkit.export(quantized("gptq:w4g32@method=rtn", "olmo2"), "gguf:q4_0", tmp_path / "no")


def test_what_was_measured_of_other_files_is_left_out(quantized: Quantized, tmp_path: Path) -> None:
    start = quantized("gptq:w4g32@method=rtn")
    told = json.loads((start / "quantkit.json").read_text())
    told["quality"] = [quality().to_json()]

    def exported(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Any:
        folder = edit(start, tmp_path / name, change)
        (folder / "quantkit.json").write_text(json.dumps(told))
        return quantkit.export(folder, "awq", tmp_path / f"{name}-awq")

    def nothing(tensors: dict[str, torch.Tensor]) -> None:
        pass

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if name.endswith("scales"))] *= 8

    told["files"]["model.safetensors"]["sha256"] = hashlib.sha256(
        (edit(start, tmp_path / "saved", nothing) / "model.safetensors").read_bytes()
    ).hexdigest()
    for name, change, kept in (("same", nothing, 1), ("changed", louder, 0)):
        made = exported(name, change)
        assert len(json.loads((made.folder / "quantkit.json").read_text())["quality"]) == kept
