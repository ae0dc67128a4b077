"""Sections of docs/results.md about GGUF."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import TOOLS, goals_met, header, peers_of, ratio_rows, threads_of


def gguf_quality(found: dict[str, Any]) -> list[str]:
    source = found["rows"][0]["source_perplexity"]
    lines = [
        "## GGUF beside llama.cpp",
        "",
        f"The reference checkpoint, {found['calibration_rows']} × 512 tokens, perplexity of the source {source:.3f} on "
        f"`{found['convention']}`. {peers_of(found)} quantizes our F16 file with the importance matrix of the same "
        "tokens. All files are read by quantkit and run in fp32 beside the source; *in llama.cpp* is the perplexity "
        "that it computes itself from the file, with inputs of matrices rounded to 8 bits. Rows `-weighted` are rounded "
        "to nearest on searched scales, as llama.cpp's are.",
        "",
        *header("tool", "row", "bytes", "perplexity", "in llama.cpp", "mean KL (nats)", "same top-1"),
    ]
    for r in found["rows"]:
        engine = "" if r["engine_perplexity"] is None else f"{r['engine_perplexity']:.3f}"
        lines.append(
            f"| {TOOLS[r['tool']]} | `{r['row']}` | {r['size_bytes']:,} | {r['perplexity']:.3f} | {engine} "
            f"| {r['kl_mean']:.5f} ± {r['kl_error']:.5f} | {100 * r['top1_agreement']:.2f} % |"
        )
    lines += [
        "",
        "Ratios quantkit / llama.cpp. Goals: KL at most .75 at Q4_K_M, .6 at Q3_K_M, IQ3_S, Q2_K and IQ2_XS.",
        "",
        *ratio_rows(found["ratios"]),
        "",
        "Weighted error of single tensors, Σ importance · (ŵ − w)²: quantkit rounding to nearest / llama.cpp.",
        "",
        *header("type", "tensors", "median", "worst", "above 1"),
    ]
    for r in found["rows"]:
        error = r.get("weighted_error")
        if error is not None and error["tensors"]:
            lines.append(
                f"| `{r['row']}` | {error['tensors']} | {error['median']:.3f} | {error['worst']:.3f} "
                f"| {error['worse']} |"
            )
    return [*lines, "", goals_met(found["ratios"])]


def gguf_speed(found: dict[str, Any]) -> list[str]:
    where = "" if found["device"] == "cpu" else f"; quantkit on one {found['device']}"
    lines = [
        "## Speed of GGUF's types",
        "",
        f"Million weights per second from fp32 rows of 4,096 to packed bytes, {found['weights'] / 1e6:.1f} million "
        f"Gaussian weights and one importance per column, {threads_of(found)} for either side{where}, beside "
        f"{peers_of(found)}. *Error* is quantkit's weighted error / llama.cpp's. Rows `-fast` search with `effort: fast`, rows `-convention` know no importance.",
        "",
        *header("row", "quantkit", "llama.cpp", "ratio", "error", "goal"),
    ]
    for r in found["rows"]:
        error = "same bytes" if r["same_bytes"] else f"{r['error_ratio']:.3f}" if r["error_ratio"] else ""
        goal = "met" if r["met"] else f"short of {r['goal']:g}"
        lines.append(
            f"| `{r['row']}` | {r['own_mweights_per_s']:.2f} | {r['theirs_mweights_per_s']:.2f} "
            f"| {r['ratio']:.2f} | {error} | {goal} |"
        )
    if found["files"]:
        lines += [
            "",
            "Whole files of a random Llama of 109 M parameters: from the source folder to the checked file, and "
            "from the F16 file by `llama_model_quantize`.",
            "",
            *header("row", "quantkit, s", "llama.cpp, s", "ratio of speeds"),
            *(
                f"| `{r['row']}` | {r['own_s']:.1f} | {r['theirs_s']:.1f} | {r['ratio']:.2f} |"
                for r in found["files"]
            ),
        ]
    return [*lines, "", f"Goals met: {sum(r['met'] for r in found['rows'])} of {len(found['rows'])}."]
