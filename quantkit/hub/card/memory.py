"""Which variant fits into how much memory: computed from sizes of files and of the key-value cache."""

from __future__ import annotations

from quantkit.hub.card import numbers
from quantkit.hub.card.markdown import table, text
from quantkit.hub.card.measured import conventions, quality_of
from quantkit.hub.card.page import Page, Variant

CONTEXTS = (4096, 8192, 32768)
MEMORIES = (8, 12, 16, 24)
# Buffers of the computation and the driver; and what other programs take.
OVERHEAD = int(0.8 * (1 << 30))
MARGIN = 1 << 30
_GIB = 1 << 30


def needed(variant: Variant, tokens: int) -> int | None:
    """Bytes to run it with a context of `tokens`; None: the size of the cache is not known."""
    made = variant.manifest
    if made.source.cache_bytes is None:
        return None
    return made.size_bytes + made.source.cache_bytes * tokens + OVERHEAD


def contexts(page: Page) -> tuple[int, ...]:
    """Those of CONTEXTS that the model was made for, else its own; none when that is not known."""
    longest = page.source.context
    if longest is None or page.source.cache_bytes is None:
        return ()
    return tuple(tokens for tokens in CONTEXTS if tokens <= longest) or (longest,)


def memory_table(page: Page) -> str:
    """What to take for a memory and a context; empty where that cannot be computed."""
    lengths = contexts(page)
    if not lengths:
        return ""
    if len(page.listed) == 1:
        return _alone(page, lengths)
    if not _chooses(page):
        return f"Every one of them fits into {MEMORIES[0]} GB with a context of {lengths[-1]:,} tokens."
    best = _best_first(page)
    columns = ("memory", *(f"context {tokens:,}" for tokens in lengths))
    rows = [(f"{memory} GB", *(_choice(best, tokens, memory) for tokens in lengths)) for memory in MEMORIES]
    return table(columns, rows)


def assumptions(page: Page) -> str:
    """What the table is computed from, in Markdown."""
    by = "smallest mean KL divergence" if _ranking(page) else "largest file"
    chosen = f"The one named has the {by} of those that fit. " if _chooses(page) else ""
    return (
        f"{chosen}Computed, not measured: the file, a key-value cache of 16 bits for one sequence "
        f"({page.source.cache_bytes or 0:,} bytes per token) and {numbers.gib(OVERHEAD)} for buffers and the "
        f"driver, all on the GPU, whose last {numbers.gib(MARGIN)} stays free. Engines that reserve more "
        "need more; with a part of the model in main memory less is enough."
    )


def _chooses(page: Page) -> bool:
    """Several, of which not every one fits everywhere."""
    longest = contexts(page)[-1:]
    everywhere = all(_fits(v, tokens, MEMORIES[0]) for v in page.listed for tokens in longest)
    return len(page.listed) > 1 and not everywhere


def _alone(page: Page, lengths: tuple[int, ...]) -> str:
    rows = []
    for tokens in lengths:
        size = needed(page.listed[0], tokens) or 0
        fits = next((f"{m} GB" for m in MEMORIES if _fits(page.listed[0], tokens, m)), "more than 24 GB")
        rows.append((f"{tokens:,}", numbers.gib(size), fits))
    return table(("context", "needs", "fits into"), rows, right=(0, 1))


def _choice(best: list[tuple[Variant, str]], tokens: int, memory: int) -> str:
    return next((text(label) for v, label in best if _fits(v, tokens, memory)), "–")


def _fits(variant: Variant, tokens: int, memory: int) -> bool:
    size = needed(variant, tokens)
    return size is not None and size <= memory * _GIB - MARGIN


def _best_first(page: Page) -> list[tuple[Variant, str]]:
    labelled = list(zip(page.listed, page.labels(), strict=True))
    scores = _ranking(page)
    if scores:
        return sorted(labelled, key=lambda pair: scores[pair[1]])
    return sorted(labelled, key=lambda pair: -pair[0].manifest.size_bytes)


def _ranking(page: Page) -> dict[str, float]:
    """Mean KL by label, of the first text that all were measured on; empty when there is none."""
    for name in conventions(page.listed):
        found = [quality_of(v, name) for v in page.listed]
        measured = [q.kl_mean for q in found if q is not None]
        if len(measured) == len(found):
            return dict(zip(page.labels(), measured, strict=True))
    return {}
