"""What cannot be run block by block is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.model.blocks import Call, Visitor, find_blocks, trace
from quantkit.model.build import build_graph
from tests.models import save_tiny

EMBEDDED = (torch.zeros(1, 2, 4), torch.ones(1, 2, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device="meta")

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return self.linear(hidden)


def run_plainly(visit: Visitor, hidden: Tensor) -> None:
    for index in range(2):
        hidden = visit(index, hidden, Call((), {}))


def test_blocks_of_one_structure_share_a_trace() -> None:
    first, second = trace([Block(), Block()], run_plainly, EMBEDDED)
    assert first is second
    assert [use.parameter for use in first.uses] == ["linear.weight"]
    assert not first.returns_tuple


def test_out_of_order() -> None:
    def run(visit: Visitor, hidden: Tensor) -> None:
        visit(1, hidden, Call((), {}))

    with pytest.raises(UnsupportedError, match="calls block 1 where block 0 was expected"):
        trace([Block(), Block()], run, EMBEDDED)


def test_some_never_called() -> None:
    with pytest.raises(UnsupportedError, match="called 2 blocks of its 3"):
        trace([Block(), Block(), Block()], run_plainly, EMBEDDED)


def test_hidden_states_changed_between_blocks() -> None:
    def run(visit: Visitor, hidden: Tensor) -> None:
        visit(1, visit(0, hidden, Call((), {})) * 2, Call((), {}))

    with pytest.raises(UnsupportedError, match="changes the hidden states between blocks 0 and 1"):
        trace([Block(), Block()], run, EMBEDDED)


def test_told_about_the_tokens() -> None:
    def run(visit: Visitor, hidden: Tensor) -> None:
        embedded = hidden
        for index in range(2):
            hidden = visit(index, hidden, Call((), {"original": embedded}))

    with pytest.raises(UnsupportedError, match="block 0 is told more about the tokens"):
        trace([Block(), Block()], run, EMBEDDED)


def test_a_real_model_that_is_told_about_the_tokens(tmp_path: Path) -> None:
    folder = save_tiny("gemma3n_text", tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be run block by block"):
        build_graph(Checkpoint.open(folder))


def test_no_blocks() -> None:
    with pytest.raises(UnsupportedError, match="Linear has no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


def test_the_largest_outermost_list_wins() -> None:
    model = nn.ModuleDict(
        {
            "small": nn.ModuleList([nn.Linear(2, 2)]),
            "layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(9, 9)])})] * 2),
        }
    )
    prefix, blocks = find_blocks(model)
    assert (prefix, len(blocks)) == ("layers", 2)
