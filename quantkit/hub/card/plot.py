"""The picture of a card: size against quality, one point per variant.

The same page gives the same bytes: no date, no style or font of the machine. Axes that do not begin at zero
say where they begin.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantkit.evaluate.quality import Quality
from quantkit.hub.card.measured import conventions, quality_of
from quantkit.hub.card.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GB = 1e9
_MB = 1e6
_COLOURS = 32
_INCHES, _DPI = (10.0, 5.625), 160
# Okabe and Ito's colours, told apart by all kinds of eyes, and a marker each for prints in grey.
_STYLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gguf": ("#0072B2", "o"),
        "gptq": ("#E69F00", "s"),
        "awq": ("#009E73", "^"),
        "compressed_tensors": ("#D55E00", "D"),
        "bitsandbytes": ("#CC79A7", "v"),
        "hqq": ("#56B4E9", "P"),
    }
)
_OTHER = ("#000000", "X")
_GREY = "#555555"
# Where a label may stand beside its point, in points of print: right, left, above, below, further away.
_PLACES = tuple(
    (dx * far, dy * far)
    for far in (1, 2, 3.2)
    for dx, dy in ((9, 0), (0, 10), (0, -10), (-9, 0), (8, 8), (8, -8), (-8, 8), (-8, -8))
)


@dataclass(frozen=True, slots=True)
class _Point:
    label: str
    format: str
    size: float
    value: float
    error: float


@dataclass(frozen=True, slots=True)
class _Chart:
    """What is drawn. `source` is (size, value), of KL divergence (size, None) since it has none."""

    points: tuple[_Point, ...]
    lossless: tuple[_Point, ...]
    source: tuple[float, float | None]
    convention: str
    unit: str

    @property
    def of_kl(self) -> bool:
        return self.source[1] is None


def problem(page: Page) -> str | None:
    """Why there is no picture; None: there is one."""
    if _chart(page) is None:
        return "a plot needs two variants measured on one text"
    if find_spec("matplotlib") is None:
        return "a plot needs matplotlib, which is not installed: pip install 'quantkit[plot]'"
    return None


def draw(page: Page) -> bytes | None:
    """A PNG of 1600 × 900, None where `problem` says why not."""
    chart = _chart(page)
    if chart is None or problem(page) is not None:
        return None
    # importing it changes the filters of the whole process
    with warnings.catch_warnings():
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=_INCHES, dpi=_DPI)
        canvas: Any = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.085, 0.16, 0.895, 0.76))
        _draw(chart, figure, axes, page)
        canvas.draw()
        return _png(canvas.buffer_rgba())


def _chart(page: Page) -> _Chart | None:
    """The measurement that most variants share; None when fewer than two do."""
    found = {
        name: [
            (v, label, q)
            for v, label in zip(page.listed, page.labels(), strict=True)
            if (q := quality_of(v, name)) is not None
        ]
        for name in conventions(page.listed)
    }
    best = max(found, key=lambda name: len(found[name]), default=None)
    if best is None or len(found[best]) < 2:
        return None
    per, unit = (_GB, "GB") if page.source.size_bytes >= _GB else (_MB, "MB")
    sound = [row for row in found[best] if math.isfinite(row[2].kl_mean) and row[2].kl_mean >= 0]
    of_kl = sum(q.kl_mean > 0 for _, _, q in sound) >= 2
    rows = sound if of_kl else found[best]
    points = [
        _Point(label, v.manifest.format, v.manifest.size_bytes / per, *_value(q, of_kl))
        for v, label, q in rows
    ]
    size = page.source.size_bytes / per
    source = (size, None if of_kl else rows[0][2].source.value)
    drawn = tuple(p for p in points if not of_kl or p.value > 0)
    lossless = tuple(p for p in points if of_kl and p.value == 0)
    return _Chart(drawn, lossless, source, best, unit)


def _value(quality: Quality, of_kl: bool) -> tuple[float, float]:
    return (quality.kl_mean, quality.kl_error) if of_kl else (quality.target.value, quality.target.error)


def _draw(chart: _Chart, figure: Figure, axes: Axes, page: Page) -> None:
    axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _draw_frontier(chart, axes)
    for name in dict.fromkeys(p.format for p in chart.points):
        colour, marker = _STYLES.get(name, _OTHER)
        group = [p for p in chart.points if p.format == name]
        axes.errorbar(
            [p.size for p in group],
            [p.value for p in group],
            # on a logarithmic axis an error bar that reaches zero would have no end
            yerr=[[min(p.error, 0.9 * p.value) for p in group], [p.error for p in group]],
            fmt=marker, color=colour, markersize=9, capsize=3, linewidth=1.2, label=name, zorder=3,
        )  # fmt: skip
    _scale(chart, axes)
    _draw_source(chart, axes)
    if len({p.format for p in chart.points}) > 1:
        axes.legend(loc="upper right", frameon=True, framealpha=1.0, edgecolor="#dddddd")
    what = "mean KL from the source, nats per token" if chart.of_kl else "perplexity"
    low = axes.get_ylim()[0]
    scale = " (logarithmic)" if chart.of_kl else f" (axis begins at {low:.4g})"
    axes.set_ylabel(what + scale)
    axes.set_xlabel(f"size, {chart.unit}")
    name = page.repo.rpartition("/")[2]
    axes.set_title(f"{name}: size against quality, lower left is better", loc="left", parse_math=False)
    bars = "bars: one standard error"
    caption = f"{chart.convention}; {bars}; measured by quantkit beside the unquantized weights"
    if page.source.quantized is not None:
        caption = f"{chart.convention}; {bars}; measured by quantkit beside the source"
    figure.text(0.085, 0.03, caption, fontsize=8.5, color=_GREY, parse_math=False)
    _label(chart, figure, axes)


def _scale(chart: _Chart, axes: Axes) -> None:
    """Sizes from zero; KL on a logarithmic axis, perplexity on one that begins a little below the least."""
    largest = max([chart.source[0], *(p.size for p in (*chart.points, *chart.lossless))])
    axes.set_xlim(0, largest * 1.12)
    if chart.source[1] is None:
        axes.set_yscale("log")
        values = [p.value for p in chart.points]
        axes.set_ylim(min(values) / 2.5, max(values) * 2.5)
        return
    values = [chart.source[1], *(p.value + sign * p.error for p in chart.points for sign in (-1, 1))]
    room = (max(values) - min(values)) * 0.1 or 0.05 * max(values)
    axes.set_ylim(min(values) - room, max(values) + room)


def _draw_frontier(chart: _Chart, axes: Axes) -> None:
    """A line through those that no other beats in both size and quality."""
    best = math.inf
    line = []
    for point in sorted(chart.points, key=lambda p: (p.size, p.value)):
        if point.value < best:
            best = point.value
            line.append(point)
    axes.plot([p.size for p in line], [p.value for p in line], color="#bbbbbb", linewidth=1.4, zorder=1)


def _draw_source(chart: _Chart, axes: Axes) -> None:
    size, value = chart.source
    axes.axvline(size, color=_GREY, linestyle="--", linewidth=1.0, zorder=1)
    if value is not None:
        axes.axhline(value, color=_GREY, linestyle=":", linewidth=1.0, zorder=1)
        axes.plot([size], [value], marker="*", markersize=14, color=_GREY, zorder=3)
    for point in chart.lossless:
        colour, marker = _STYLES.get(point.format, _OTHER)
        floor = axes.get_ylim()[0]
        axes.plot(
            [point.size], [floor], marker=marker, markersize=9, markerfacecolor="white", color=colour,
            clip_on=False, zorder=4,
        )  # fmt: skip


def _label(chart: _Chart, figure: Figure, axes: Axes) -> None:
    """Names beside points, each in the first place where it covers nothing drawn before."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    floor, top = axes.get_ylim()
    size, value = chart.source
    wanted = [(p.label, p.size, p.value) for p in chart.points]
    wanted += [(f"{p.label}: KL 0", p.size, floor) for p in chart.lossless]
    if value is None:
        source = axes.annotate(
            f"source, {size:.3g} {chart.unit}: KL 0", (size, top), xytext=(-5, -4),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=9, color=_GREY,
        )  # fmt: skip
        taken = [source.get_window_extent(renderer)]
    else:
        wanted.append((f"source, {size:.3g} {chart.unit}", size, value))
        taken = []
    legend = axes.get_legend()
    taken += [legend.get_window_extent(renderer)] if legend is not None else []
    taken += [_around(axes, x, y) for _, x, y in wanted]
    inside = axes.get_window_extent(renderer)
    for label, x, y in wanted:
        taken.append(_placed_label(axes, renderer, label, (x, y), (taken, inside)))


def _placed_label(
    axes: Axes, renderer: Any, label: str, at: tuple[float, float], around: tuple[Sequence[Any], Any]
) -> Any:
    """The box of the label, put where it overlaps least."""
    taken, inside = around
    best = None
    for dx, dy in _PLACES:
        note = axes.annotate(
            label, at, xytext=(dx, dy), textcoords="offset points", fontsize=10, zorder=5,
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom" if dy > 0 else "top" if dy < 0 else "center", parse_math=False,
        )  # fmt: skip
        box = note.get_window_extent(renderer)
        outside = not (
            inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        )
        overlaps = sum(box.overlaps(other) for other in taken) + 10 * outside
        if best is None or overlaps < best[0]:
            if best is not None:
                best[1].remove()
            best = (overlaps, note, box)
        else:
            note.remove()
        if overlaps == 0:
            break
    return None if best is None else best[2]


def _around(axes: Axes, x: float, y: float) -> Any:
    from matplotlib.transforms import Bbox

    at_x, at_y = axes.transData.transform((x, y))
    return Bbox.from_extents(at_x - 10, at_y - 10, at_x + 10, at_y + 10)


def _png(image: Any) -> bytes:
    """Few colours suffice and make a small file."""
    from PIL import Image

    few = Image.fromarray(_array(image)).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def _array(image: Any) -> Any:
    import numpy as np

    return np.asarray(image)
