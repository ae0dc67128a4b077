"""Sources are made once per session; tests only read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.interop.engines import Source, make_source

# Groups of 128 need inputs that are multiples of 128; the two widths differ so that a transposed
# matrix cannot pass.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """(family, dtype, **changes) → a tiny checkpoint, not to be changed."""
    made: dict[str, Source] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Source:
        key = f"{family} {dtype} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / "source"
            made[key] = make_source(folder, family, dtype, **changes)
        return made[key]

    return make
