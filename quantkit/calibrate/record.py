"""`Recorder`: feeds Statistics while a block runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate import statistics
from quantkit.calibrate.statistics import Need, Statistics

# One batch of rows in so many is what decisions are judged on, from the fifth on.
HELD_OUT = 8


def held_out(number: int) -> bool:
    """Whether decisions are judged on batch `number` of the calibration rows."""
    return number % HELD_OUT == HELD_OUT // 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be known of an activation of `width` channels."""

    width: int
    need: Need

    @property
    def nbytes(self) -> int:
        return statistics.nbytes(self.width, self.need)


class Recorder:
    """Called with (site id, activations) during a forward pass; keeps one Statistics per wanted site.

    held_out  set while rows run that decisions are judged on
    pooling   set while rows run that feed the pools, of which `kin` names one per site of an expert: what
              all experts of a layer see together
    Where a cross gram is wanted, `pair` is called with the same rows in the untouched model first.
    """

    def __init__(
        self,
        sites: Mapping[str, Wanted],
        device: torch.device,
        pools: Mapping[str, Wanted] | None = None,
        kin: Mapping[str, str] | None = None,
    ) -> None:
        self.held_out = self.pooling = False
        self.pairs = any(Need.CROSS in wanted.need for wanted in sites.values())
        self._stats = {site: statistics.zero(w.width, w.need, device) for site, w in sites.items()}
        self._pools = {n: statistics.zero(w.width, w.need, device) for n, w in (pools or {}).items()}
        self._kin = kin or {}
        self._paired: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor) -> None:
        """x (…, in); sites that nobody asked for are ignored."""
        seen = self._stats.get(site)
        if seen is not None:
            reference = self._paired.pop(site, None)
            self._stats[site] = statistics.update(seen, x, held_out=self.held_out, reference=reference)
        pool = self._kin.get(site)
        if pool is not None and self.pooling:
            self._pools[pool] = statistics.update(self._pools[pool], x, held_out=self.held_out)

    def pair(self, site: str, x: Tensor) -> None:
        """Remember what the untouched model has where the next call for this site brings something else."""
        seen = self._stats.get(site)
        if seen is not None and seen.cross is not None:
            self._paired[site] = x

    def take(self, site: str) -> Statistics:
        """The statistics of a site, given up by the recorder so that they are freed after use."""
        return self._stats.pop(site)

    def pool(self, site: str) -> Statistics | None:
        """What the experts of a layer saw together where `site` is; None outside mixtures."""
        name = self._kin.get(site)
        return None if name is None else self._pools[name]
