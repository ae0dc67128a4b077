"""What was measured about a target, as values: no tensors, so that a card can be written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean NLL, with the standard error over windows."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What one target scores on one text, beside the source.

    ratio           perplexity / source perplexity, error paired over windows
    kl_*            nats per token
    top1_agreement  share of positions whose most likely token is the source's
    """

    convention: str
    windows: int
    tokens: int
    source: Perplexity
    target: Perplexity
    ratio: Perplexity
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Quality:
        """Inverse of `to_json`; KeyError, TypeError or ValueError for anything else."""
        numbers = {f.name: found[f.name] for f in fields(cls)}
        for name in ("source", "target", "ratio"):
            numbers[name] = Perplexity(float(found[name]["value"]), float(found[name]["error"]))
        return cls(**numbers)
