"""What the interop tests share: sources with a tokenizer, our own reading of a result, comparisons.

The reference for an engine is a plain float checkpoint whose weights are what *our* reader decodes
from the files: the engine must give the logits of that model, and not those of the source.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quantkit import (
    Calibration,
    Device,
    Eval,
    EvalText,
    Output,
    Recipe,
    Rule,
    convert,
    parse_targets,
    plan,
    registry,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.run.report import Report
from quantkit.tensors import dequantize
from tests.models import tiny_model, tiny_tokens

WORDS = 150
CONTEXT = 64
WINDOWS = 8


@dataclass(frozen=True, slots=True)
class Source:
    """A float checkpoint with its tokenizer, and a text to calibrate and one to measure on."""

    folder: Path
    calibration: Path
    text: Path


@dataclass(frozen=True, slots=True)
class Distance:
    """Largest difference of the engine's logits from ours and from the source's."""

    ours: float
    source: float

    def check(self, tolerance: float) -> None:
        """As near to ours as `tolerance`, and so much farther from the source that this says something."""
        assert self.ours <= tolerance, self
        assert self.source > 20 * tolerance, self


@contextmanager
def engine_warnings() -> Iterator[None]:
    """Engines warn about themselves in many words; only their calls are run in here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_source(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Source:
    """A tiny random model of `family`. A float32 source keeps scales in float32 where the format allows."""
    with engine_warnings():
        tiny_model(family, **changes).to(dtype).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    texts = []
    for seed, name in enumerate(("calibration.txt", "text.txt")):
        file = folder.parent / f"{folder.name}-{name}"
        file.write_text(_prose(4_000, seed), "utf-8")
        texts.append(file)
    return Source(folder, *texts)


def recipe_of(source: Source, out: Path, targets: Sequence[str], rules: Sequence[Rule] = ()) -> Recipe:
    """Every target, given as shorthands, with perplexity measured."""
    return Recipe(
        source=str(source.folder),
        targets=tuple(target for text in targets for target in parse_targets(text)),
        output=Output(dir=str(out)),
        device=Device(map="cpu", dtype="float32"),
        calibration=Calibration(file=str(source.calibration), rows=32, length=CONTEXT, seed=None),
        eval=Eval(
            perplexity=(EvalText(file=str(source.text), style="gptq", context=CONTEXT, chunks=WINDOWS),)
        ),
        rules=tuple(rules),
        engine_check=False,
    )


def quantize(source: Source, out: Path, targets: Sequence[str], rules: Sequence[Rule] = ()) -> Report:
    """Convert to all targets in one sweep."""
    return convert(recipe_of(source, out, targets, rules))


def make(source: Source, out: Path, target: str, rules: Sequence[Rule] = ()) -> tuple[Path, list[str]]:
    """The folder of one target, and the engines that quantkit says will load it."""
    recipe = recipe_of(source, out, [target], rules)
    (told,) = plan(recipe).to_json()["targets"]
    convert(recipe)
    return out / told["name"], told["engines"]


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained` in float32; a tensor that is missing, left over or misshapen fails."""
    with engine_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    wrong = {k: info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    assert not wrong, wrong
    assert not info.get("error_msgs"), info["error_msgs"]
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    """(rows, tokens, vocabulary) fp32 on a few fixed tokens."""
    with engine_warnings(), torch.no_grad():
        return model(tiny_tokens()).logits.float()


def ours(folder: Path, format_name: str, stored: torch.dtype = torch.float32) -> Tensor:
    """Logits of the plain model whose weights are what our reader finds in `folder`.

    `stored` is the dtype in which the engine holds dequantized weights, to which they are rounded.
    """
    plain = folder.with_name(f"{folder.name}-decoded-{str(stored).removeprefix('torch.')}")
    if not plain.exists():
        _write_decoded(folder, format_name, stored, plain)
    return logits(load(plain))


def measure(
    model: PreTrainedModel, folder: Path, format_name: str, source: Source, **options: Any
) -> Distance:
    """How far an engine's model is from ours and from the source."""
    return distance(logits(model), folder, format_name, source, **options)


def distance(found: Tensor, folder: Path, format_name: str, source: Source, **options: Any) -> Distance:
    """The same of logits that are there already."""
    assert bool(torch.isfinite(found).all())
    differences = (found - ours(folder, format_name, **options), found - logits(load(source.folder)))
    return Distance(*(float(d.abs().max()) for d in differences))


def perplexity(model: PreTrainedModel, source: Source) -> float:
    """exp of the mean NLL over whole windows of the text, each scored but for its first token."""
    from transformers import AutoTokenizer

    with engine_warnings():
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        ids = tokenizer(source.text.read_text("utf-8")[:400_000], add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: WINDOWS * CONTEXT]).view(WINDOWS, CONTEXT)
    total = 0.0
    with engine_warnings(), torch.no_grad():
        for row in rows:
            found = model(row[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(found, row[1:]).double())
    return float(torch.tensor(total / WINDOWS, dtype=torch.float64).exp())


def _write_decoded(folder: Path, format_name: str, stored: torch.dtype, out: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    config = dict(checkpoint.config)
    quantization = config.pop("quantization_config")
    reader = registry.load("formats", format_name).FORMAT
    packed: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        if (base := reader.base_name(name)) is not None:
            packed.setdefault(base, {base} & checkpoint.tensors.keys()).add(name)
    inside = {name for parts in packed.values() for name in parts}
    # divisors of one, which only readers of AWQ have a place for
    inside |= {name for name in checkpoint.tensors if name.endswith(".act.scales")}
    tensors = {name: checkpoint.read(name).float() for name in checkpoint.tensors if name not in inside}
    for base, parts in packed.items():
        linear = reader.decode(base, {name: checkpoint.read(name) for name in parts}, quantization)
        weight = dequantize(linear.weight).to(stored).float()
        # its Conv1D layers hold (in, out)
        tensors[base] = weight.T.contiguous() if config["model_type"] == "gpt2" else weight
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: ``w0`` … and three special ones."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n + 4 for n in range(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _prose(words: int, seed: int) -> str:
    """Words of falling frequency."""
    frequency = 1 / torch.arange(1, WORDS + 1)
    drawn = torch.multinomial(frequency, words, True, generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{n}" for n in drawn.tolist())
