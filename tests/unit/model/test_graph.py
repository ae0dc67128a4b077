"""The graph's values, and that reading them costs no heavy import."""

from __future__ import annotations

import subprocess
import sys

from quantkit.model.graph import Block, ModelGraph, Part, Rows, Site, Vector, Weight


def test_importing_the_graph_imports_no_torch() -> None:
    code = (
        "import sys, quantkit.model.graph; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keys_modules_and_width() -> None:
    q = Weight("b.q.weight", (8, 4), "q")
    down = Weight("b.experts.down", (4, 6), "down", Part(expert=1))
    assert (q.key, q.module) == ("b.q.weight", "b.q")
    assert (down.key, down.module) == ("b.experts.down[1]", "b.experts.down[1]")
    assert Site("b.q", (q,)).width == 4
    graph = ModelGraph((Block(0, (Site("b.q", (q,)), Site("d", (down,))), ()),), (), {}, (), {})
    assert list(graph.weights()) == [q, down]


def test_rows_behind_channels() -> None:
    assert Rows("up").sources(4) == [0, 1, 2, 3]
    # two heads of values of 2 channels, each shared by three heads of queries
    shared = Rows("v", start=8, repeat=3, span=2)
    assert shared.sources(12) == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]


def test_sites_that_one_vector_scales() -> None:
    norm, other = Vector("norm"), Vector("norm", offset=1.0)
    sites = [
        Site(f"s{n}", (Weight(f"w{n}", (8, 4)),), made)
        for n, made in enumerate((norm, other, None, norm, Rows("w0"), Rows("w0"), None))
    ]
    block = Block(0, tuple(sites), ())
    assert block.together(sites[3]) == (sites[0], sites[3])
    for alone in (*sites[1:3], *sites[4:]):
        assert block.together(alone) == (alone,)
