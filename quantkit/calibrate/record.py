"""`Recorder`: feeds Statistics while a block runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.calibrate import statistics
from quantkit.calibrate.statistics import Need, Statistics


class Recorder:
    """Called with (site id, activations) during a forward pass; keeps one Statistics per wanted site.

    `held_out` is set while rows run that decisions are judged on.
    """

    def __init__(self, widths: Mapping[str, int], needs: Mapping[str, Need], device: torch.device) -> None:
        self.held_out = False
        self._stats = {site: statistics.zero(widths[site], need, device) for site, need in needs.items()}

    def __call__(self, site: str, x: Tensor) -> None:
        """x (…, in); sites that nobody asked for are ignored."""
        seen = self._stats.get(site)
        if seen is not None:
            self._stats[site] = statistics.update(seen, x, held_out=self.held_out)

    def take(self, site: str) -> Statistics:
        """The statistics of a site, given up by the recorder so that they are freed after use."""
        return self._stats.pop(site)
