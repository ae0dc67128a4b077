"""The section of docs/results.md about the Hub and about engines."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import header

_NAMES = {"lfs": "LFS", "xet": "Xet"}
_ROWS = {
    "push": "`quantkit push` / `HfApi.upload_folder`",
    "download": "`quantkit` fetching / `snapshot_download`",
}
_TIMES = {"first": "first", "again": "again"}


def hub(found: dict[str, Any]) -> list[str]:
    lines = ["## Hub"]
    if "transfers" in found:
        lines += ["", *_transfers(found["transfers"])]
    if "engines" in found:
        lines += ["", *_engines(found["engines"])]
    return lines


def _transfers(t: dict[str, Any]) -> list[str]:
    plan = t["plan"]
    whole = plan["download"]["bytes"]
    lines = [
        f"A random Llama of {t['weight_bytes'] / 1e9:.2f} GB in {t['weight_files']} files and {t['other_files']} "
        "small ones, on the loopback server of the tests, which adds no delay of its own.",
        "",
        "What `quantkit plan` asks of the Hub beside a download of everything:",
        "",
        *header("", "requests", "bytes", "share of the download"),
    ]
    for name, shown in (("first", "plan"), ("again", "plan, again"), ("download", "download")):
        row = plan[name]
        lines.append(
            f"| {shown} | {row['requests']} | {row['bytes']:,} | {100 * row['bytes'] / whole:.3g} % |"
        )
    lines += [
        "",
        f"Beside the client's own functions, median of {t['rounds']} rounds with the extremes in parentheses, each "
        "step a process of its own, imports not counted. Quantkit does more on both ways: after a download it reads "
        "every file again and compares its hash with the listing, which the client does not; before an upload it "
        "hashes, searches every file for secrets and paths, afterwards it compares the listing, and it writes the "
        "card in a second commit. *Again* finds nothing to do.",
        "",
        *header("quantkit / client", "by", "", "time", "CPU", "requests", "commits"),
    ]
    for pair, label in _ROWS.items():
        for protocol, named in _NAMES.items():
            for when in _TIMES:
                r = t[protocol][pair][when]
                spread = f"({min(r['seconds_ratios']):.2f}–{max(r['seconds_ratios']):.2f})"
                commits = f"{r['own_commits']} / {r['their_commits']}" if pair == "push" else ""
                lines.append(
                    f"| {label} | {named} | {when} | {r['seconds_ratio']:.2f} {spread} | {r['cpu_ratio']:.2f} "
                    f"| {r['own_requests']} / {r['their_requests']} | {commits} |"
                )
    return [*lines, "", "Requests by Xet are those to the Hub alone; chunks go to a folder on this machine."]


def _engines(e: dict[str, Any]) -> list[str]:
    lines = [
        "### Engines beside quantkit's reading of the files",
        "",
        "What `quantkit verify` finds on the embedded model: the divergence of the engine's next-token probabilities "
        "from those that quantkit computes from the same files, in nats per token over "
        f"{e['rows'][0]['tokens']} tokens. Above {e['limit']:g} files are not sound. *Of the source* is what "
        "quantization itself costs, for comparison.",
        "",
        *header("target", "engine", "KL", "same top-1", "of the source", "limit / KL"),
    ]
    for r in e["rows"]:
        if r["problem"] is not None:
            lines.append(f"| `{r['target']}` | {r['engine']} {r['version']} | {r['problem']} | | | |")
            continue
        divergence, margin = "0", ""
        if r["kl"] > 0:
            divergence, margin = f"{r['kl']:.1e}", f"{e['limit'] / r['kl']:,.0f}"
        lines.append(
            f"| `{r['target']}` | {r['engine']} {r['version']} | {divergence} | {100 * r['top1']:.1f} % "
            f"| {r['source_kl']:.1e} | {margin} |"
        )
    if e["absent"]:
        lines += ["", f"Not measured, no engine here: {', '.join(f'`{name}`' for name in e['absent'])}."]
    return lines
