"""Stand-ins for methods, transforms and formats, so that recipe tests need neither torch nor real plugins."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import pytest

from quantkit import registry
from quantkit.allocate import gguf_mix
from quantkit.errors import RecipeError
from quantkit.schemes import Scheme, parse_scheme


@dataclass(frozen=True, slots=True)
class GptqParams:
    damp: float = 0.01
    act_order: Literal["none", "static"] = "none"
    batch_columns: int = 128
    plain: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.damp <= 0:
            raise RecipeError(f"damp must be positive, not {self.damp}")


@dataclass(frozen=True, slots=True)
class RtnParams:
    scales: Literal["absmax", "mse"] = "absmax"


@dataclass(frozen=True, slots=True)
class SmoothquantParams:
    alpha: float | None = None
    search: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha > 1:
            raise RecipeError(f"alpha must be at most 1, not {self.alpha}")


@dataclass(frozen=True, slots=True)
class AwqParams:
    """Shares a name with the parameters of a method."""

    damp: float = 0.5


def parse_known(text: str) -> Scheme:
    """Schemes by the names that users of one format know."""
    return parse_scheme("w8a8_mixed" if text.lower() == "int8" else text)


def _module(**values: object) -> ModuleType:
    module = ModuleType("fake")
    vars(module).update(values)
    return module


FAKES = {
    "allocate": {"gguf_mix": gguf_mix},
    "methods": {
        "gptq": _module(Params=GptqParams, SUMMARY="error feedback"),
        "rtn": _module(Params=RtnParams, SUMMARY="nearest"),
    },
    "transforms": {
        "awq": _module(Params=AwqParams, SUMMARY="by mean activations"),
        "smoothquant": _module(Params=SmoothquantParams, SUMMARY="by largest activations"),
    },
    "formats": {
        "bitsandbytes": _module(
            SUMMARY="bitsandbytes files",
            parse=parse_known,
            default_method=lambda scheme: "rtn",
            DEFAULT_SCHEME="nf4",
            PRESETS=("nf4", "nf4_dq", "int8"),
        ),
        "gptq": _module(
            SUMMARY="GPTQ files",
            parse=parse_scheme,
            default_method=lambda scheme: "gptq",
            DEFAULT_SCHEME="w4g128",
            PRESETS=("w4g128", "w8g128"),
        ),
        "compressed_tensors": _module(
            SUMMARY="vLLM files",
            parse=parse_scheme,
            default_method=lambda scheme: "rtn",
            DEFAULT_SCHEME="w8",
            PRESETS=("w8", "w4g128"),
        ),
    },
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the registry see only the fakes; its own error messages stay in use."""
    monkeypatch.setattr(registry, "names", lambda kind: tuple(sorted(FAKES[kind])))
    real = registry.load

    def load(kind: registry.Kind, name: str) -> ModuleType:
        return FAKES[kind][name] if name in FAKES[kind] else real(kind, name)

    monkeypatch.setattr(registry, "load", load)
