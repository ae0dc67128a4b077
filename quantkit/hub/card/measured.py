"""What was measured: quality beside size, what engines made of the files, and by which convention.

A column is there when somebody measured it; a cell that nobody measured says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.evaluate.quality import Quality
from quantkit.hub.card import numbers
from quantkit.hub.card.markdown import code, table, text
from quantkit.hub.card.numbers import NOT_MEASURED
from quantkit.hub.card.page import Page, Variant
from quantkit.hub.manifest import Check
from quantkit.recipe.sizes import format_size

_CONVENTION = re.compile(r"(?P<text>.+)/(?P<style>llamacpp|gptq)-(?P<context>[0-9]+)@[0-9a-f]+")
_TEXTS = MappingProxyType(
    {
        "wikitext2": "WikiText-2 (raw, test)",
        "embedded": "the evaluation text that ships with quantkit",
    }
)
# What people say of a type, and up to which mean KL divergence it may stand.
_VERDICTS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        **dict.fromkeys(("f32", "f16", "bf16"), ("not quantized", 0.01)),
        "q8_0": ("8 bits: hard to tell from the source", 0.02),
        "q6_k": ("close to the source", 0.03),
        **dict.fromkeys(("q5_k_m", "q5_k_s"), ("where there is room for more than 4 bits", 1.0)),
        "q4_k_m": ("**the usual choice**", 1.0),
        **dict.fromkeys(("q4_k_s", "iq4_xs"), ("a little smaller than the usual choice", 1.0)),
        "q4_0": ("fast kernels, also on ARM", 1.0),
        **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), ("where 4 bits do not fit", 1.0)),
        **dict.fromkeys(("iq3_m", "iq3_s", "iq3_xs", "iq3_xxs"), ("where 4 bits do not fit", 1.0)),
        **dict.fromkeys(("q2_k", "q2_k_s", "iq2_m", "iq2_s"), ("where 3 bits do not fit", 5.0)),
        **dict.fromkeys(("iq2_xs", "iq2_xxs"), ("where 3 bits do not fit", 5.0)),
        **dict.fromkeys(("iq1_m", "iq1_s"), ("only where nothing else fits", 9.0)),
    }
)


@dataclass(frozen=True, slots=True)
class Convention:
    """What a perplexity was measured on and how: ``wikitext2/llamacpp-512@1a2b3c4d``."""

    name: str
    text: str
    style: str
    context: int

    @classmethod
    def of(cls, name: str) -> Convention | None:
        """None for a name that says nothing."""
        found = _CONVENTION.fullmatch(name)
        return found and cls(name, found["text"], found["style"], int(found["context"]))

    @property
    def described(self) -> str:
        """One line of Markdown."""
        what = _TEXTS.get(self.text, f"a text called {code(self.text)}")
        if self.style == "llamacpp":
            how = "of which the second half counts, as in llama-perplexity"
        else:
            how = "of which all but the first token count, as in the papers since GPTQ"
        return f"{what} in windows of {self.context:,} tokens, {how}"


@dataclass(frozen=True, slots=True)
class _Peaks:
    """The column of peak memory: its heading, and a cell per variant."""

    title: str
    cells: tuple[str, ...]


def conventions(variants: tuple[Variant, ...]) -> tuple[str, ...]:
    """Names of all measurements, in the order they were made."""
    return tuple(dict.fromkeys(q.convention for v in variants for q in v.manifest.quality))


def quality_of(variant: Variant, convention: str) -> Quality | None:
    return next((q for q in variant.manifest.quality if q.convention == convention), None)


def overview(page: Page) -> str:
    """The first table: what there is, where, how large."""
    verdicts = [_verdict(v) for v in page.listed]
    where = "branch" if page.siblings else "file" if page.listed[0].gguf else "repository"
    columns = [where, "type", "size", "split", "bits per weight", *(["for"] if any(verdicts) else [])]
    rows = []
    for variant, label, verdict in zip(page.listed, page.labels(), verdicts, strict=True):
        shown = _shown_name(page, variant, label)
        made, count = variant.manifest, len(variant.files)
        row = [
            f"[{shown}]({page.address(variant)})",
            text(made.scheme.upper() if variant.gguf else f"{made.format} {made.scheme}"),
            format_size(made.size_bytes),
            "no" if count == 1 else f"{count} files",
            f"{made.bits_per_weight:.2f}",
            verdict,
        ]
        rows.append(row[: len(columns)])
    return table(columns, rows, right=(2, 4))


def quality_tables(page: Page) -> str:
    """One table per convention, or one of peak memory alone; empty when nothing was measured."""
    peaks = _peaks(page)
    found = [
        _quality_table(page, convention, peaks if number == 0 else None)
        for number, convention in enumerate(conventions(page.listed))
    ]
    if not found and peaks:
        rows = [
            (label, format_size(v.manifest.size_bytes), peak)
            for v, label, peak in zip(page.listed, map(text, page.labels()), peaks.cells, strict=True)
        ]
        found = [table(("", "size", peaks.title), rows, right=(1,))]
    return "\n\n".join(found)


def _quality_table(page: Page, convention: str, peaks: _Peaks | None) -> str:
    found = [quality_of(v, convention) for v in page.listed]
    sources = {(q.source.value, q.source.error) for q in found if q is not None}
    columns = ["", "size", "perplexity", "against the source", "mean KL", "99.9 % KL", "same top-1"]
    # sweeps on different devices may differ in the last digits of the source, too
    own_source = len(sources) > 1
    columns += ["perplexity of the source"] if own_source else []
    columns += [peaks.title] if peaks is not None else []
    rows = [_source_row(page, found, len(columns))] if not own_source else []
    for number, (variant, label, q) in enumerate(zip(page.listed, page.labels(), found, strict=True)):
        cells = [text(label), format_size(variant.manifest.size_bytes)]
        if q is None:
            cells += [NOT_MEASURED] * (5 + own_source)
        else:
            cells += [
                numbers.perplexity(q.target),
                numbers.difference(q.ratio),
                numbers.kl(q.kl_mean, q.kl_error),
                numbers.kl(q.kl_p999),
                numbers.share(q.top1_agreement),
            ]
            cells += [numbers.perplexity(q.source)] if own_source else []
        rows.append([*cells, *([peaks.cells[number]] if peaks is not None else [])])
    return table(columns, rows, right=range(1, 7))


def _source_row(page: Page, found: list[Quality | None], width: int) -> list[str]:
    measured = next(q for q in found if q is not None)
    cells = [f"source, {text(page.source.dtype)}", format_size(page.source.size_bytes)]
    cells.append(numbers.perplexity(measured.source))
    return [*cells, *[""] * (width - len(cells))]


def quality_notes(page: Page) -> Iterator[str]:
    """What the numbers are, in lines of Markdown."""
    for name in conventions(page.listed):
        q = next(q for v in page.listed if (q := quality_of(v, name)) is not None)
        known = Convention.of(name)
        described = f": {known.described}" if known else ""
        yield f"Perplexity {code(name)}{described}; {q.windows:,} windows, {q.tokens:,} tokens counted."
    if conventions(page.listed):
        yield (
            "± is one standard error; that of the difference is paired, window by window. KL: divergence of "
            "the probabilities of the next token from the source's, in nats per token; 99.9 % of the tokens "
            "lie below the second number. Same top-1: how often the most likely token is the source's. "
            "Numbers compare only where the convention is the same. quantkit computed them from what the "
            "files hold."
        )
    for variant, label in zip(page.listed, page.labels(), strict=True):
        if any(numbers.better_than_source(q) for q in variant.manifest.quality):
            yield (
                f"{text(label)}: perplexity lies below the source's: the calibration text resembles the "
                "evaluation text; rank by KL."
            )


def engine_table(page: Page) -> str:
    """Which engine loaded what, and how closely it agreed with quantkit; empty when none did."""
    checks = [
        (label, check)
        for variant, label in zip(page.listed, page.labels(), strict=True)
        for check in variant.checks
    ]
    if not checks:
        return ""
    rows = [
        (
            text(label),
            text(f"{check.engine.replace('+', ' with ')} {check.version}"),
            text(check.device),
            "loads" if check.problem is None else f"**{text(check.problem)}**",
            f"{check.tokens:,}" if check.tokens else NOT_MEASURED,
            NOT_MEASURED if check.kl_mean is None else numbers.kl(check.kl_mean),
            NOT_MEASURED if check.top1_agreement is None else numbers.share(check.top1_agreement),
        )
        for label, check in checks
    ]
    columns = ("", "engine", "on", "result", "tokens compared", "mean KL", "same top-1")
    return table(columns, rows, right=(4, 5, 6))


def _peaks(page: Page) -> _Peaks | None:
    """Peak memory of each variant, with what was running; None when nobody looked."""
    found = [[c for c in v.checks if c.peak_bytes is not None] for v in page.listed]
    running = {_running(c) for checks in found for c in checks}
    if not running:
        return None
    alike = len(running) == 1 and all(len(checks) <= 1 for checks in found)
    cells = ("; ".join(_peak(c, alone=alike) for c in checks) or NOT_MEASURED for checks in found)
    return _Peaks(f"peak memory, {running.pop()}" if alike else "peak memory", tuple(cells))


def _peak(check: Check, *, alone: bool) -> str:
    size = format_size(check.peak_bytes or 0)
    return size if alone else f"{size} ({_running(check)})"


def _running(check: Check) -> str:
    return text(f"{check.engine.replace('+', ' with ')} on {check.device}")


def _shown_name(page: Page, variant: Variant, label: str) -> str:
    if variant.gguf and not page.siblings:
        return text(variant.file_name if len(variant.files) == 1 else variant.stem)
    return text(label if len(page.listed) > 1 or page.of_branch else page.repo)


def _verdict(variant: Variant) -> str:
    """What the type is for; nothing where a measurement says otherwise."""
    said, limit = _VERDICTS.get(variant.manifest.scheme, ("", 0.0)) if variant.gguf else ("", 0.0)
    return said if all(q.kl_mean <= limit for q in variant.manifest.quality) else ""
