"""How measured numbers are written: alike everywhere, never more exact than they are."""

from __future__ import annotations

import math

from quantkit.evaluate.quality import Perplexity, Quality

NOT_MEASURED = "not measured"
_GIB = 1 << 30


def perplexity(found: Perplexity) -> str:
    return f"{found.value:.3f} ± {found.error:.3f}"


def difference(ratio: Perplexity) -> str:
    """A ratio of perplexities in percent."""
    return f"{100 * (ratio.value - 1):+.2f} ± {100 * ratio.error:.2f} %"


def kl(value: float, error: float | None = None) -> str:
    """Nats per token, both numbers with as many decimals as the error needs."""
    if error is None:
        return _decimal(value, _decimals(value, 2))
    places = _decimals(error, 1)
    return f"{_decimal(value, places)} ± {_decimal(error, places)}"


def share(value: float) -> str:
    return f"{100 * value:.2f} %"


def gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def better_than_source(quality: Quality) -> bool:
    """The perplexity lies below the source's by more than chance."""
    return quality.ratio.value < 1 - 2 * quality.ratio.error


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many digits of `value`, at least 5 and at most 9."""
    if value == 0 or not math.isfinite(value):
        return 5
    return min(max(5, digits - 1 - math.floor(math.log10(abs(value)))), 9)


def _decimal(value: float, places: int) -> str:
    return "0" if value == 0 else f"{value:.{places}f}"
