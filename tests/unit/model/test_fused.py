from __future__ import annotations

from quantkit.model.fused import fused_sets, fusing_problem
from quantkit.model.graph import Role, Weight
from quantkit.schemes import Scheme


def weight(module: str, role: Role) -> Weight:
    return Weight(f"{module}.weight", (64, 64), role)


Q, K, OUT = weight("0.attn.q", "q"), weight("0.attn.k", "k"), weight("0.attn.o", "o")
GATE, UP = weight("0.mlp.gate", "gate"), weight("0.mlp.up", "up")
EXPERTS = [weight(f"0.mlp.experts.{n}.down", "down") for n in range(2)]
FOUR, EIGHT = Scheme(4, 32), Scheme(8, 32)


def test_sets_are_of_one_module() -> None:
    other = weight("1.attn.q", "q")
    assert fused_sets([Q, GATE, K, other, OUT, UP]) == [[Q, K], [GATE, UP], [other], [OUT]]


def test_weights_that_are_fused_agree() -> None:
    agreeing = [(Q, FOUR), (K, FOUR), (OUT, EIGHT), (GATE, None), (UP, None)]
    assert fusing_problem(agreeing) is None
    for other in (EIGHT, None):
        found = fusing_problem([*agreeing[:1], (K, other), *agreeing[2:]])
        assert found == "vLLM and SGLang fuse `0.attn.q`, `0.attn.k`: give them one scheme, or keep them all"


def test_experts_agree() -> None:
    assert fusing_problem([(Q, EIGHT), *((w, FOUR) for w in EXPERTS)]) is None
    found = fusing_problem(zip(EXPERTS, (FOUR, None), strict=True))
    assert found is not None and "fuse the experts of `0.mlp`: give them one scheme" in found
