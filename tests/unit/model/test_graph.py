"""The graph's values, and that reading them costs no heavy import."""

from __future__ import annotations

import subprocess
import sys

from quantkit.model.graph import Block, ModelGraph, Part, Site, Weight


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
