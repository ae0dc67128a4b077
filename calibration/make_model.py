"""Train the embedded demonstration model.

What: trains a byte-level BPE tokenizer and then a Llama of four decoder blocks
on the training text of ``make_text.py``, and writes both, with a README, as an
ordinary checkpoint folder.

Why: the demonstration has to run offline on a model whose weights carry
something, because rounding random weights costs nothing and shows nothing. The
shapes are the ones quantization meets in large models, made small: grouped-query
attention, a gated MLP, an untied head, and input widths that are whole groups
of 128 with more than one group to a row.

How to run, from the repository root, after ``make_text.py``:

    python calibration/make_model.py --train-text build/embedded-train.txt

The seed fixes the initial weights and the order of the data. The last bits of
the weights still depend on the processor and on the number of threads.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import torch
from demo_tokenizer import END_OF_TEXT, VOCABULARY, save_tokenizer, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

LOG = logging.getLogger("make_model")
ROOT = Path(__file__).resolve().parent.parent
README = """\
# demo-llama

A very small Llama that was really trained, so that quantizing it changes its
perplexity measurably. It completes text in the manner of Python's library
documentation and is of no other use.

| | |
| --- | --- |
| parameters | {parameters:,} (bfloat16) |
| decoder blocks | {config.num_hidden_layers} |
| hidden size | {config.hidden_size} |
| intermediate size | {config.intermediate_size} |
| attention heads | {config.num_attention_heads} |
| key-value heads | {config.num_key_value_heads} |
| longest input | {config.max_position_embeddings} tokens |
| vocabulary | {config.vocab_size} (byte-level BPE, Llama 3 splitting) |
| head | not tied to the embedding |
| training tokens | {tokens:,} ({steps:,} steps of {batch} rows of {length}) |
| passes over the training text | {passes:.1f} of {corpus:,} tokens each |
| final training loss | {loss:.3f} (mean of the last 50 steps) |
| held-out perplexity | {perplexity:.3f} |

The held-out perplexity is that of the saved bfloat16 weights, computed in
float32, over the {windows} whole windows of {length} tokens of
`calibration/embedded-eval.txt`. No module and no topic of that text is in the
training text.

The tokenizer adds no token of its own. `{end}` ended each document in
training and is both `bos_token_id` and `eos_token_id` in `config.json`.

Made by `calibration/make_text.py` and then `calibration/make_model.py
--steps {steps} --batch {batch} --rate {rate:g} --seed {seed}`.

Licence: the training text is CPython's docstrings, reference topics and source
comments, under PSF-2.0 (see `calibration/PROVENANCE.md`); the weights are
offered under the same.
"""


def new_model(end_id: int, length: int) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    model = LlamaForCausalLM(config)
    # With embeddings as small as the other weights, the first layers' mean
    # output drowns what token is being read, and the loss rests for hundreds of
    # steps on the plateau of word frequencies.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def rate_at(step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up, then a cosine down to a fiftieth."""
    if step < args.warmup:
        return args.rate * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_for(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that leaves the norms undecayed: pulling a gain to zero is no prior."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)


class Batches:
    """Rows of the token stream, in a new order and at a new offset each pass.

    The moving offset keeps a repeated pass from showing the same rows again.
    """

    def __init__(self, stream: torch.Tensor, args: argparse.Namespace) -> None:
        self._stream = stream
        self._args = args
        self._generator = torch.Generator().manual_seed(args.seed)
        self._rows: list[torch.Tensor] = []

    def next(self) -> torch.Tensor:
        length, batch = self._args.length, self._args.batch
        if len(self._rows) < batch:
            offset = int(torch.randint(length, (1,), generator=self._generator))
            count = (len(self._stream) - offset) // length
            rows = self._stream[offset : offset + count * length].view(count, length)
            order = torch.randperm(count, generator=self._generator)
            self._rows.extend(rows[order])
        taken, self._rows = self._rows[:batch], self._rows[batch:]
        return torch.stack(taken)


def train(model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> float:
    """Train in place and return the mean loss of the last 50 steps."""
    optimizer = optimizer_for(model, args)
    batches = Batches(stream, args)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args)
        rows = batches.next()
        # The matrix products run in bfloat16 because that is what is saved;
        # the weights and the optimizer stay in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            LOG.info("step %d: loss %.4f, %.0f s", step + 1, sum(losses[-50:]) / 50, seconds)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> tuple[float, int]:
    """Perplexity over the whole non-overlapping windows, and their number."""
    model.eval()
    count = len(stream) // length
    windows = stream[: count * length].view(count, length)
    # Every window predicts the same number of tokens, so the mean of the
    # windows' mean losses is the mean over all tokens.
    total = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in windows)
    return math.exp(total / count), count


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-text", type=Path, default=Path("build/embedded-train.txt"))
    parser.add_argument("--eval-text", type=Path, default=ROOT / "calibration" / "embedded-eval.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "quantkit" / "data" / "demo-llama")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    text = args.train_text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text.split(END_OF_TEXT))
    stream = torch.tensor(tokenizer(text)["input_ids"])
    LOG.info("%d characters, %d tokens", len(text), len(stream))
    model = new_model(tokenizer.eos_token_id, args.length)
    loss = train(model, stream, args)

    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    held_out = torch.tensor(tokenizer(args.eval_text.read_text(encoding="utf-8"))["input_ids"])
    result, windows = perplexity(saved, held_out, args.length)
    tokens = args.steps * args.batch * args.length
    LOG.info("loss %.4f, held-out perplexity %.4f over %d windows", loss, result, windows)
    readme = README.format(
        parameters=model.num_parameters(),
        config=model.config,
        tokens=tokens,
        corpus=len(stream),
        passes=tokens / len(stream),
        loss=loss,
        perplexity=result,
        windows=windows,
        end=END_OF_TEXT,
        **{name: getattr(args, name) for name in ("steps", "batch", "length", "rate", "seed")},
    )
    (args.out / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
