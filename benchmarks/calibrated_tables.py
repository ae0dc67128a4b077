"""Sections of docs/results.md about GPTQ and AWQ."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import (
    TOOLS,
    cost,
    cost_rows,
    goals_met,
    header,
    not_measured,
    peers_of,
    ratio_rows,
    threads_of,
)


def calibrated(found: dict[str, Any]) -> list[str]:
    measured = [r for r in found["rows"] if "failed" not in r]
    source = next((r["source_perplexity"] for r in measured if "source_perplexity" in r), None)
    peers = peers_of(found)
    lines = [
        "## GPTQ and AWQ beside other tools",
        "",
        f"The reference checkpoint{f', perplexity of the source {source:.3f}' if source else ''}, 160 × 512 tokens, "
        f"every tool at its defaults{f': {peers}' if peers else ''}. Each row is a process from the source folder to "
        f"the quantized folder, in {threads_of(found)}; the processor seconds without imports are in parentheses. "
        "What is saved is measured in one way for all. Rows of quantkit: the default, with AWQ's rescaling, rounded "
        "to nearest on weighted scales, with learned rounding.",
        "",
        *header("tool", "row", "bpw", "perplexity", "mean KL (nats)", "CPU s", "peak MB"),
    ]
    for r in measured:
        scores = ""
        if "kl_mean" in r:
            scores = f"{r['bits_per_weight']:.2f} | {r['perplexity']:.3f} | {r['kl_mean']:.5f} ± {r['kl_error']:.5f}"
        lines.append(f"| {TOOLS[r['tool']]} | `{r['row']}` | {scores or ' | | '} | {cost(r)} |")
    if found["ratios"]:
        lines += [
            "",
            "Ratios quantkit / other. Goals: KL at most .65 at 4 bits, .5 at 3 and .3 at 2; for the default also a "
            "third of the processor time and half of the memory.",
            "",
            *ratio_rows(found["ratios"]),
        ]
    if found["large_rows"]:
        lines += [
            "",
            f"A random Llama of 252 M parameters, {found['large_calibration_rows']} × 512 tokens: time and memory alone.",
            "",
            *cost_rows(found["large_rows"]),
        ]
    if found["large_ratios"]:
        lines += ["", *ratio_rows(found["large_ratios"])]
    return [*lines, "", goals_met(found["ratios"], found["large_ratios"]), *not_measured(found)]


def ablation(found: dict[str, Any]) -> list[str]:
    lines = [
        "## What each step brings",
        "",
        "Each row has all steps above it; the last rows leave out the rescaling. Layer loss is the mean over weights "
        "of the relative squared error of their outputs on calibration tokens. `wiki-llama-7m` is the reference "
        "checkpoint; `qwen3-moe` a small mixture of experts that `benchmarks.second_model` trains.",
    ]
    for sweep in found["sweeps"]:
        steps = sweep["steps"]
        if not steps:
            continue
        lines += [
            "",
            f"### {sweep['row'].replace(':', ', ')}",
            "",
            f"Perplexity of the source {steps[0]['source_perplexity']:.3f}.",
            "",
            *header(
                "step", "adds", "layer loss", "mean KL (nats)", "KL / step before", "perplexity", "change"
            ),
        ]
        for before, r in zip([None, *steps[:-1]], steps, strict=True):
            loss = "" if r["layer_loss"] is None else f"{r['layer_loss']:.5f}"
            beside = "" if before is None else f"{r['kl_mean'] / before['kl_mean']:.3f}"
            change = f"{100 * (r['perplexity_ratio'] - 1):+.2f} ± {100 * r['perplexity_ratio_error']:.2f} %"
            lines.append(
                f"| {r['step']} | {r['adds']} | {loss} | {r['kl_mean']:.5f} ± {r['kl_error']:.5f} | {beside} "
                f"| {r['perplexity']:.3f} | {change} |"
            )
        refused = [f"- `{name}`: {reason}" for name, reason in sweep["refused"].items()]
        lines += ["", "Not possible:", "", *refused] if refused else []
    return lines


def time_split(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Where the time goes",
        "",
        f"Processor seconds of a GPTQ conversion by stage, in {threads_of(found)}, without what a stage calls. "
        f"Operations are counted from shapes; one plain fp32 matrix product reaches {found['product_gflops']:.0f} "
        "GFLOP/s here.",
    ]
    for name, split in found["splits"].items():
        what = "the reference checkpoint"
        if name == "block":
            what = f"one block {split['hidden']:,} wide, {split['intermediate']:,} inside"
        lines += [
            "",
            f"### {what[0].upper()}{what[1:]}: `{split['target']}`, {split['tokens']:,} tokens",
            "",
            *header("stage", "CPU s", "share", "share at 262,144 tokens", "calls", "GFLOP", "GFLOP/s"),
        ]
        for s in split["stages"]:
            work = f"{s['operations'] / 1e9:.1f} | {s['gflops']:.1f}" if s["gflops"] else " | "
            lines.append(
                f"| {s['stage']} | {s['cpu_seconds']:.2f} | {100 * s['share']:.1f} % "
                f"| {100 * s['share_at_262144_tokens']:.1f} % | {s['calls'] or ''} | {work} |"
            )
    return lines
