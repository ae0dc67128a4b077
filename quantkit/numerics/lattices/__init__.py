"""Vector codebooks of ggml (IQ1, IQ2, IQ3): choosing scales, codes, signs and shifts.

`nearest` rounds weights by themselves, `solve` with error feedback and coordinate descent. Tables of points
come as arguments, with the factor that makes a weight d·(s + ½)·sign·(table[code] + shift).
"""

from quantkit.numerics.lattices.kinds import KINDS, LatticeKind, order
from quantkit.numerics.lattices.nearest import nearest
from quantkit.numerics.lattices.scales import Scales, search
from quantkit.numerics.lattices.solve import solve

__all__ = ["KINDS", "LatticeKind", "Scales", "nearest", "order", "search", "solve"]
