"""The tokens that every script calibrates and measures on, and the source's states to compare with.

    python -m benchmarks.peers.texts OUT

One file for all: `calibration` (rows, length), `evaluation` (windows, context), `states` (windows,
context − 1, hidden) behind the last norm of the fp32 source, `head` (vocabulary, hidden).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.record import SHARED
from quantkit import Calibration, Eval, EvalText, Recipe, parse_targets
from quantkit.run.rows import build_rows

SOURCE = SHARED / "models" / "wiki-llama-7m"
_TEXT = SHARED / "data" / "wikitext-2"
CALIBRATION = Calibration(
    file=str(_TEXT / "wiki.valid.tokens"), rows=160, length=512, seed=None, max_chars=900_000
)
EVALUATION = EvalText(file=str(_TEXT / "wiki.test.raw"), style="gptq", context=512, chunks=64)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    recipe = Recipe(
        source=str(SOURCE),
        targets=parse_targets("gptq:w4g128"),
        calibration=CALIBRATION,
        eval=Eval(perplexity=(EVALUATION,)),
    )
    rows = build_rows(recipe, SOURCE, calibrate=True, length=512)
    calibration, evaluation = rows.calibration.tokens, rows.evaluation[0][0].tokens
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    states = [model.model(rows, use_cache=False).last_hidden_state for rows in evaluation.long().split(8)]
    save_file(
        {
            "calibration": calibration,
            "evaluation": evaluation,
            "states": torch.cat(states)[:, :-1].contiguous(),
            "head": model.lm_head.weight.detach(),
        },
        given.out,
    )


if __name__ == "__main__":
    main()
