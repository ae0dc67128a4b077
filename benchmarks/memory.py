"""Peak memory of a conversion against what the design promises, on a synthetic Llama of several GB.

    python -m benchmarks.memory [--blocks 24] [--hidden 3072] [--intermediate 6144]

The checkpoint is random, sharded, written block by block. The conversion runs in a process of its own;
its peak resident set (the kernel's count) is compared with
    bound = 1.5 × (largest block in fp32 + embeddings + hidden states)
and with half the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.record import ROOT, save
from quantkit import resources
from quantkit.checkpoint.writer import ShardedWriter, TensorSpec, plan_shards

ROWS, LENGTH, EVAL_WINDOWS, EVAL_CONTEXT = 8, 256, 4, 256


def specs(config: LlamaConfig) -> list[TensorSpec]:
    d, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for n in range(config.num_hidden_layers):
        at = f"model.layers.{n}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (d, d),
            f"{at}self_attn.k_proj.weight": (kv, d),
            f"{at}self_attn.v_proj.weight": (kv, d),
            f"{at}self_attn.o_proj.weight": (d, d),
            f"{at}mlp.gate_proj.weight": (i, d),
            f"{at}mlp.up_proj.weight": (i, d),
            f"{at}mlp.down_proj.weight": (d, i),
            f"{at}input_layernorm.weight": (d,),
            f"{at}post_attention_layernorm.weight": (d,),
        }
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (v, d)}
    return [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]


def write_checkpoint(folder: Path, config: LlamaConfig, shard_bytes: int = 2 * 10**9) -> int:
    """A random bf16 checkpoint with the embedded model's tokenizer; returns its bytes."""
    generator = torch.Generator().manual_seed(0)
    planned = plan_shards(specs(config), shard_bytes)
    with ShardedWriter(folder, planned) as writer:
        for file in planned.files:
            for spec in file.specs:
                values = torch.empty(spec.shape, dtype=torch.bfloat16)
                if len(spec.shape) == 1:
                    values.fill_(1.0)
                else:
                    values.normal_(0, spec.shape[1] ** -0.5, generator=generator)
                writer.write(spec.name, values)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    for file in resources.folder("demo-llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return planned.total_bytes


def converted(source: Path, out: Path, targets: list[str]) -> dict[str, Any]:
    """Run the command line in a child and return its peak memory, time and report."""
    command = [sys.executable, "-m", "quantkit", "convert", str(source), "-o", str(out), "--json"]
    for target in targets:
        command += ["--to", target]
    command += ["--calib", "embedded", "--calib-rows", str(ROWS), "--calib-length", str(LENGTH)]
    command += [
        "--eval",
        "embedded",
        "--eval-style",
        f"gptq-{EVAL_CONTEXT}",
        "--eval-chunks",
        str(EVAL_WINDOWS),
    ]
    began = time.monotonic()
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"conversion failed with exit code {child.returncode}")
    report = json.loads(output)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "seconds": time.monotonic() - began,
        "kl_mean": {t["name"]: t["quality"][0]["kl_mean"] for t in report["targets"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=6144)
    parser.add_argument("--vocabulary", type=int, default=32000)
    given = parser.parse_args()
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=given.hidden // 128,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        source = Path(folder) / "synthetic"
        source.mkdir()
        size = write_checkpoint(source, config)
        found = converted(source, Path(folder) / "out", ["gptq:w4g128@method=rtn", "gptq:w4g128@polish=0"])
    d, i = given.hidden, given.intermediate
    block = 4 * (4 * d * d + 3 * d * i)
    # embedding and head: both are matrices of vocabulary × hidden outside the blocks
    embeddings = 2 * 4 * given.vocabulary * d
    hidden = 4 * d * (ROWS * LENGTH + EVAL_WINDOWS * EVAL_CONTEXT)
    bound = int(1.5 * (block + embeddings + hidden))
    save(
        "memory",
        {
            "checkpoint_bytes": size,
            "blocks": given.blocks,
            "largest_block_fp32_bytes": block,
            "embeddings_fp32_bytes": embeddings,
            "hidden_states_bytes": hidden,
            "bound_bytes": bound,
            **found,
            "peak_over_bound": found["peak_rss_bytes"] / bound,
            "peak_over_checkpoint": found["peak_rss_bytes"] / size,
        },
    )
    print(
        f"peak {found['peak_rss_bytes'] / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB, "
        f"checkpoint {size / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
