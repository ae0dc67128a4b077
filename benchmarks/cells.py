"""Lines and cells that several tables of docs/results.md share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TOOLS = {
    "quantkit": "quantkit",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "autoround": "auto-round",
    "llm_compressor": "llm-compressor",
    "gptqmodel": "gptqmodel",
    "llamacpp": "llama.cpp",
}
RATIOS = {
    "process_cpu": "CPU",
    "step_cpu": "CPU without imports",
    "peak_rss": "peak memory",
    "weight_error": "weight error",
    "kl": "KL",
}


def header(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def cost(r: Mapping[str, Any]) -> str:
    """Two cells: processor seconds, without imports in parentheses, and MB at the peak."""
    if "process_cpu_seconds" not in r:
        return " | "
    step, process = r["step_cpu_seconds"], r["process_cpu_seconds"]
    return f"{process:.1f} ({step:.2f}) | {r['peak_rss_bytes'] / 1e6:.0f}"


def cost_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return header("tool", "row", "MB", "CPU s", "peak MB") + [
        f"| {TOOLS[r['tool']]} | `{r['row']}` | {r['size_bytes'] / 1e6:.0f} | {cost(r)} |"
        for r in rows
        if "failed" not in r
    ]


def ratio_rows(ratios: Sequence[Mapping[str, Any]]) -> list[str]:
    """quantkit / other, and what of it is short of the goal."""
    columns = [name for name in RATIOS if any(name in c for c in ratios)]
    kinds = any("same" in c for c in ratios)
    lines = header("row", "beside", *(["work"] if kinds else []), *(RATIOS[name] for name in columns), "goal")
    for c in ratios:
        cells = [f"{c[name]:.2f}" if name in c else "" for name in columns]
        short = [f"{RATIOS[g['what']]} above {g['limit']:.3g}" for g in c["goals"] if not g["met"]]
        goal = f"short: {', '.join(short)}" if short else "met" if c["goals"] else ""
        work = ["same" if c["same"] else "searched"] if kinds else []
        names = (f"`{c['row']}`", f"{TOOLS[c['peer']]} `{c['theirs']}`")
        lines.append(f"| {' | '.join((*names, *work, *cells, goal))} |")
    return lines


def goals_met(*ratios: Sequence[Mapping[str, Any]]) -> str:
    goals = [goal for some in ratios for c in some for goal in c["goals"]]
    return f"Goals met: {sum(goal['met'] for goal in goals)} of {len(goals)}."


def not_measured(found: Mapping[str, Any]) -> list[str]:
    """What quantkit refused and what failed, with the reasons."""
    reasons = [f"- `{name}`: {reason}" for name, reason in found["refused"].items()]
    failed = [r for r in (*found["rows"], *found["large_rows"]) if "failed" in r]
    reasons += [f"- {TOOLS[r['tool']]} `{r['row']}`: {r['failed']}" for r in failed]
    return ["", "Not measured:", "", *reasons] if reasons else []


def peers_of(found: Mapping[str, Any]) -> str:
    """Other tools with their versions; the first package of a peer's list is the peer."""
    return ", ".join(f"{TOOLS[name]} {next(iter(v.values()), name)}" for name, v in found["peers"].items())


def threads_of(found: Mapping[str, Any]) -> str:
    return "one thread" if found["threads"] == 1 else f"{found['threads']} threads"
