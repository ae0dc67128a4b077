"""auto-round's reader in transformers, a second opinion on GPTQ files of four bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.interop.conftest import WIDE
from tests.interop.engines import Source, engine_warnings, measure, quantize

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("auto_round") is None, reason="needs auto-round"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("scheme", ["w4g32", "w4g128"])
def test_auto_round_computes_our_weights(scheme: str, source: Callable[..., Source], tmp_path: Path) -> None:
    from transformers import AutoRoundConfig

    made = source("llama", **WIDE)
    quantize(made, tmp_path, [f"gptq:{scheme}@name=file"])
    folder = tmp_path / "file"
    with engine_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=AutoRoundConfig(backend="auto_round:torch_zp"),
            output_loading_info=True,
        )
    # group numbers in file order say nothing, and this reader has no place for them
    assert {key.rpartition(".")[2] for key in info["unexpected_keys"]} == {"g_idx"}
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert any(type(module).__name__ == "QuantLinear" for module in model.modules())
    # its kernels compute in float16
    measure(model, folder, "gptq", made, stored=torch.float16).check(1e-2)
