"""How much is tried for each type.

Trials stand in the order in which each takes off most of the error that those before it left, found greedily
on Gaussian, Laplace, Student-t and trained weights, weighed by log-normal importances and alike. So any first
few of them are the best few. Where scales stand alone, the plain rule, 1 or (1, 0), is always among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from quantkit.numerics.superblocks import affine, symmetric

Effort = Literal["fast", "best"]
Plan = affine.Plan | symmetric.Plan

_Q8_0 = (
    *(1.0, 0.984, 0.968, 0.992, 0.952, 0.976, 0.924, 0.96, 0.936, 0.944),
    *(0.908, 0.876, 1.004, 0.9, 0.916, 0.928),
)
_Q4_0 = (
    *(1.04, 0.92, 1.16, 1.0, 1.28, 1.1, 0.86, -1.07),
    *(0.77, 0.97, 1.43, 1.22, 1.07, 1.73, 0.89, -1.16),
)
_Q5_0 = (
    *(1.0, 0.945, 1.05, 0.885, 1.11, 0.825, 0.99, 1.02),
    *(0.93, 0.75, 1.08, 0.87, 1.185, 0.96, 0.795, 1.035),
)
_Q3_K = (1.05, 1.3, -0.8, 0.95, -1.15, 1.15, 1.6, 0.7, -1.0, -1.4, 1.85, 1.45)
_Q6_K = (1.0, 0.97, 0.94, 0.91, 0.87, 1.02, 0.84, -0.81, 0.78, 0.75, 0.99, 0.9)
_IQ4_NL = (
    *(1.0, 1.1, -0.89, 0.86, -0.98, 0.95, 1.19, 1.04, 0.8, -1.1),
    *(-0.92, -0.86, -0.71, 1.31, 0.98, 0.68, -1.04, 1.13, 1.07, 0.83),
)
_IQ4_XS = (
    *(1.04, -0.92, 0.95, 1.13, 0.83, -1.01, -0.86, 1.01),
    *(1.22, 0.89, 1.07, -1.1, -0.74, -0.95, 0.98, 1.34),
)
_Q4_1 = (
    *((1.05, -0.3), (1.05, -0.6), (1.05, 0.0), (0.93, 0.0), (1.0, 0.0), (0.99, 0.3), (1.02, -0.6)),
    *((0.87, 0.9), (0.93, 1.2), (1.11, -0.3), (1.02, -0.3), (1.11, -1.5), (1.02, 0.0), (1.11, -0.9)),
    *((0.96, 0.6), (0.9, 0.9), (1.11, -0.6), (1.11, -1.2), (1.11, 0.0), (0.96, 0.9), (0.84, -0.3)),
    *((0.96, 0.3), (1.05, -0.9), (1.02, 0.3)),
)
_Q5_1 = (
    *((1.0, 0.0), (0.98, 0.9), (1.0, 0.3), (1.02, -0.6), (0.94, 0.0), (0.96, 0.0), (0.9, 0.0)),
    *((1.02, -0.3), (0.94, -0.3), (1.02, 0.0), (0.88, 0.9), (1.0, -0.3), (0.9, 1.2), (0.96, 0.3)),
    *((1.04, -1.2), (0.98, -0.3), (1.04, 0.0), (0.98, 0.3), (0.94, 0.9), (0.94, 1.2), (1.04, -0.6)),
    *((0.86, -0.3), (1.04, -0.3), (0.88, -0.3)),
)
_Q2_K = (
    *((1.2, -0.4), (1.3, -0.2), (1.3, -0.8), (1.2, -0.2), (1.3, 0.0), (1.4, -1.2), (0.8, -0.2)),
    *((1.5, -0.8), (1.0, -0.2), (1.6, -0.2), (1.0, 0.2), (1.0, 0.0), (1.6, -1.2), (1.7, -0.8)),
)
_Q4_K = (
    *((1.02, -0.3), (1.02, 0.0), (1.02, -0.6), (1.05, 0.0), (0.93, 0.0), (1.08, -0.6), (1.05, -0.6)),
    *((0.99, 0.0), (0.96, 0.0), (0.99, 0.3), (1.11, -0.3), (1.11, -1.5), (0.96, -0.3), (0.9, -0.3)),
    *((1.05, -0.3), (1.11, 0.0), (1.11, -0.6), (1.08, -0.9), (0.93, -0.3), (0.96, 0.9)),
)
_Q5_K = (
    *((1.02, -0.3), (1.02, -0.6), (1.02, 0.0), (0.98, -0.3), (0.94, 0.0), (1.0, 0.0), (0.98, 0.0)),
    *((0.94, -0.3), (0.96, 0.0), (1.0, 0.3), (1.0, -0.3), (1.04, 0.0), (0.96, 1.2), (0.9, 0.0)),
    *((0.98, 0.3), (0.94, 0.9), (0.96, 0.9), (1.04, -0.3), (0.96, 0.3), (1.04, -0.6)),
)

# A larger d than the largest scale needs leaves its sub-block a choice of neighbouring sub-scales too.
_STARTS = (1.0, 1.04, 1.08)
_NINE = tuple((a, b) for a in (1.0, 1.05, 1.1) for b in (1.0, 1.05, 1.1))

PLANS: Mapping[Effort, Mapping[str, Plan]] = MappingProxyType(
    {
        "fast": {
            "q8_0": symmetric.Plan(_Q8_0[:2]),
            "q4_0": symmetric.Plan(_Q4_0[:12]),
            "q5_0": symmetric.Plan(_Q5_0[:12]),
            "iq4_nl": symmetric.Plan(_IQ4_NL[:12]),
            "q4_1": affine.Plan(_Q4_1[:16]),
            "q5_1": affine.Plan(_Q5_1[:16]),
            "q2_k": affine.Plan(_Q2_K[:8]),
            "q3_k": symmetric.Plan(_Q3_K[:6], rounds=0),
            "q4_k": affine.Plan(_Q4_K[:12]),
            "q5_k": affine.Plan(_Q5_K[:12]),
            "q6_k": symmetric.Plan(_Q6_K[:5], rounds=0),
            "iq4_xs": symmetric.Plan(_IQ4_XS[:10]),
        },
        "best": {
            "q8_0": symmetric.Plan(_Q8_0),
            "q4_0": symmetric.Plan(_Q4_0),
            "q5_0": symmetric.Plan(_Q5_0),
            "iq4_nl": symmetric.Plan(_IQ4_NL),
            "q4_1": affine.Plan(_Q4_1),
            "q5_1": affine.Plan(_Q5_1),
            "q2_k": affine.Plan(_Q2_K, _NINE),
            "q3_k": symmetric.Plan(_Q3_K, _STARTS),
            "q4_k": affine.Plan(_Q4_K, _NINE, rounds=2),
            "q5_k": affine.Plan(_Q5_K, _NINE, rounds=2),
            "q6_k": symmetric.Plan(_Q6_K, _STARTS),
            "iq4_xs": symmetric.Plan(_IQ4_XS, _STARTS),
        },
    }
)
