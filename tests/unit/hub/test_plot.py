"""The picture shows what was measured, the same on every machine."""

from __future__ import annotations

import dataclasses
import io

import pytest

from quantkit.hub.card import Page, plot
from quantkit.hub.card.plot import _chart
from tests import cards

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def five() -> Page:
    return cards.page(*(cards.gguf(*row) for row in cards.GGUF))


def test_a_picture_of_the_right_size_and_no_more_bytes_than_needed() -> None:
    page = five()
    png = plot.draw(page)
    assert png is not None and plot.problem(page) is None
    assert Image.open(io.BytesIO(png)).size == (1600, 900)
    assert len(png) < 100_000
    assert plot.draw(page) == png
    assert b"Date" not in png and b"atplotlib" not in png


def test_points_are_those_of_the_manifests() -> None:
    chart = _chart(five())
    assert chart is not None and chart.convention == cards.CONVENTION and chart.unit == "GB"
    assert [p.label for p in chart.points] == [scheme.upper() for scheme, *_ in cards.GGUF]
    assert [p.value for p in chart.points] == [kl for _, _, kl, _ in cards.GGUF]
    assert chart.points[0].size == int(cards.PARAMETERS * 4.0 / 8) / 1e9
    assert chart.source == (2 * cards.PARAMETERS / 1e9, None)


def test_fewer_than_two_measured_variants_make_no_picture() -> None:
    page = cards.page(cards.gguf("q4_k_m", 4.89, 0.02), cards.gguf("q8_0", 8.5))
    assert plot.draw(page) is None
    assert plot.problem(page) == "a plot needs two variants measured on one text"


def test_without_matplotlib_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert plot.draw(five()) is None
    assert "pip install 'quantkit[plot]'" in (plot.problem(five()) or "")


def test_no_divergence_at_all_stands_at_the_floor() -> None:
    page = cards.page(*(cards.gguf(*row) for row in cards.GGUF), cards.gguf("bf16", 16.0, 0.0))
    chart = _chart(page)
    assert chart is not None and [p.label for p in chart.lossless] == ["BF16"] and len(chart.points) == 5
    assert plot.draw(page) is not None


@pytest.mark.parametrize("kl", [0.0, float("nan")])
def test_perplexity_where_divergence_says_nothing(kl: float) -> None:
    variants = [
        dataclasses.replace(
            v, manifest=dataclasses.replace(v.manifest, quality=(cards.quality(kl, target=target),))
        )
        for v, target in (
            (cards.gguf("q4_k_m", 4.89, 0.1), cards.Perplexity(13.4, 0.09)),
            (cards.gguf("q8_0", 8.5, 0.1), cards.Perplexity(13.2, 0.09)),
        )
    ]
    page = cards.page(*variants)
    chart = _chart(page)
    assert chart is not None and not chart.of_kl and [p.value for p in chart.points] == [13.4, 13.2]
    assert plot.draw(page) is not None


def test_formats_differ_in_colour_and_marker() -> None:
    styles = [*plot._STYLES.values(), plot._OTHER]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles)
    mixed = cards.page(cards.gguf("q4_k_m", 4.89, 0.02), cards.gptq())
    assert plot.draw(mixed) is not None
