"""A second architecture for the ablation: a small Qwen3-MoE, trained here in minutes, kept out of the repository.

    python -m benchmarks.second_model [--folder DIR] [--steps 600] [--threads 2]

Hidden 192 in 4 blocks: grouped-query attention with norms of queries and keys, a router, 8 experts of which 2
see each token; the tokenizer of `../shared/models/wiki-llama-7m`. Embedding and head start as the leading
principal directions of that checkpoint's, which millions of tokens have shaped; all else starts at random and
learns from WikiText-2's validation text, the reference model's predictions as soft labels beside the text's own
(a few hundred thousand tokens seen several times teach less). The test text is never seen. Seeded: one machine
with one number of threads makes the same bytes; a folder that is there is used as it is.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.peers.texts import SOURCE
from benchmarks.record import SHARED

FOLDER = Path(tempfile.gettempdir()) / "quantkit-second-model"
TEXT = SHARED / "data" / "wikitext-2"
HIDDEN, LENGTH, BATCH = 192, 128, 16
RATE, WARM_UP, DECAY = 3e-3, 60, 0.05
SOFT = 0.7


def new_model(reference: Any) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=reference.config.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=reference.config.bos_token_id,
        eos_token_id=reference.config.eos_token_id,
    )
    config._experts_implementation = "eager"
    model: Any = Qwen3MoeForCausalLM(config)
    for own, given in (
        (model.get_input_embeddings().weight, reference.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, reference.get_output_embeddings().weight),
    ):
        with torch.no_grad():
            own.copy_(leading(given.float()))
    return model


def leading(matrix: Tensor) -> Tensor:
    """(rows, HIDDEN): the rows in the coordinates in which they vary most."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :HIDDEN] * s[:HIDDEN]


def tokens(file: str) -> Tensor:
    text = (TEXT / file).read_text(encoding="utf-8")
    found = AutoTokenizer.from_pretrained(SOURCE)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(found)


def batch(stream: Tensor, generator: torch.Generator) -> Tensor:
    """(BATCH, LENGTH) rows from anywhere in the text."""
    starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([stream[at : at + LENGTH] for at in starts.tolist()])


def loss(model: Any, reference: Any, rows: Tensor) -> Tensor:
    """Cross-entropy with the text and with the reference's predictions, and the balance of the router."""
    out = model(rows, output_router_logits=True, labels=rows, use_cache=False)
    with torch.no_grad():
        wanted = torch.softmax(reference(rows, use_cache=False).logits.float(), -1)
    soft = functional.cross_entropy(out.logits.flatten(0, 1), wanted.flatten(0, 1))
    return (1 - SOFT) * out.loss + SOFT * soft


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = max(0, step - WARM_UP) / max(1, steps - WARM_UP)
    return RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))


def train(model: Any, reference: Any, steps: int) -> None:
    stream, generator = tokens("wiki.valid.tokens"), torch.Generator().manual_seed(0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        found = loss(model, reference, batch(stream, generator))
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step:5} loss {float(found.detach()):.3f} {time.monotonic() - began:6.0f} s",
                flush=True,
            )


@torch.no_grad()
def perplexity(model: Any, windows: int = 64, context: int = 512) -> float:
    """On the first windows of the test text."""
    rows = tokens("wiki.test.raw")[: windows * context].view(windows, context)
    total = 0.0
    for part in rows.split(8):
        logits = model(part, use_cache=False).logits[:, :-1]
        mean = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        total += float(mean) * len(part)
    return math.exp(total / windows)


def second_model(folder: Path, steps: int = 600) -> Path:
    """The folder, trained if it is not there."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    reference: Any = AutoModelForCausalLM.from_pretrained(SOURCE).eval()
    model = new_model(reference)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"training a Qwen3-MoE of {parameters / 1e6:.2f} M parameters", flush=True)
    train(model, reference, steps)
    model.eval()
    model.to(torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(SOURCE).save_pretrained(made)
        # a folder that has its name is whole
        Path(made).rename(folder)
        Path(made).mkdir()
    print(f"perplexity on the test text: {perplexity(model.float()):.2f}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(second_model(given.folder, given.steps))


if __name__ == "__main__":
    main()
