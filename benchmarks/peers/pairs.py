"""What is compared with what, and what must come of it.

A pair does the *same* when both put the same kind of numbers into the same kind of file with comparable
work; then quantkit must be no slower, no worse, and on the large model need half the memory. Otherwise
quantkit searches where the peer does not, and must be better by as much as `error` and `kl` say.
"""

from __future__ import annotations

from dataclasses import dataclass

# A result as good as the peer's may differ by the convention of its scales.
AS_GOOD = 1.05


@dataclass(frozen=True)
class Pair:
    """A row of quantkit beside a row of a peer; `error` and `kl` are the largest ratios that will do."""

    row: str
    peer: str
    theirs: str
    same: bool = True
    error: float | None = None
    kl: float | None = AS_GOOD


def _searched(
    row: str, peer: str, theirs: str, *, error: float | None = None, kl: float | None = None
) -> Pair:
    return Pair(row, peer, theirs, same=False, error=error, kl=kl)


BETTER, FAR_BETTER = 0.9, 0.75
PAIRS = (
    Pair("nf4", "bitsandbytes", "nf4", error=1.0001),
    Pair("nf4_dq", "bitsandbytes", "nf4_dq", error=1.001),
    Pair("fp4", "bitsandbytes", "fp4", error=1.0001),
    Pair("int8", "bitsandbytes", "int8", error=1.0001),
    _searched("nf4-mse", "bitsandbytes", "nf4", error=0.85),
    _searched("nf4-weighted", "bitsandbytes", "nf4", kl=BETTER),
    _searched("nf4-gptq", "bitsandbytes", "nf4", kl=FAR_BETTER),
    _searched("nf4_dq-mse", "bitsandbytes", "nf4_dq", error=0.85),
    _searched("nf4_dq-gptq", "bitsandbytes", "nf4_dq", kl=FAR_BETTER),
    _searched("fp4-gptq", "bitsandbytes", "fp4", kl=FAR_BETTER),
    *(Pair(f"hqq-w{bits}g64", "hqq", f"w{bits}g64", error=1.001) for bits in (8, 4, 3, 2)),
    Pair("hqq-w1g32", "hqq", "w1g32", error=1.001),
    Pair("hqq-w4g64_axis0", "hqq", "w4g64_axis0", error=1.001),
    _searched("hqq-w4g64-mse", "hqq", "w4g64", error=1.0),
    *(_searched(f"hqq-w{bits}g64-weighted", "hqq", f"w{bits}g64", kl=BETTER) for bits in (4, 3, 2)),
    *(_searched(f"hqq-w{bits}g64-gptq", "hqq", f"w{bits}g64", kl=FAR_BETTER) for bits in (4, 3, 2)),
    Pair("w8g128", "autoround", "w8g128"),
    Pair("w4g128", "autoround", "w4g128-plain"),
    Pair("w4g128-weighted", "autoround", "w4g128"),
    _searched("w4g128-gptq", "autoround", "w4g128", kl=FAR_BETTER),
    Pair("w4g128_asym", "autoround", "w4g128_asym-plain"),
    Pair("mxfp4", "autoround", "mxfp4-plain"),
    Pair("mxfp4-weighted", "autoround", "mxfp4"),
    Pair("nvfp4-weighted", "autoround", "nvfp4"),
    Pair("fp8a8_block", "autoround", "fp8a8_block"),
    Pair("w8a8", "autoround", "w8a8"),
    *(
        Pair(row, "llm_compressor", row)
        for row in (
            *("w8g128", "w4g128", "w4g128_asym", "w8a8", "w8a8_static"),
            *("w8a8-smoothquant", "w8a8_static-smoothquant", "fp8a8", "fp8a8_tensor_static"),
            *("fp8a8_block", "fp8a8-kv", "mxfp4", "nvfp4"),
        )
    ),
    Pair("fp8a8", "llm_compressor", "fp8a8-free"),
    Pair("nvfp4", "llm_compressor", "nvfp4-free"),
    _searched("w4g128-gptq", "llm_compressor", "w4g128", kl=FAR_BETTER),
    _searched("mxfp4-gptq", "llm_compressor", "mxfp4", kl=FAR_BETTER),
    _searched("nvfp4-gptq", "llm_compressor", "nvfp4", kl=FAR_BETTER),
)
# on the large synthetic model: time and memory alone
LARGE = (
    Pair("nf4", "bitsandbytes", "nf4"),
    Pair("int8", "bitsandbytes", "int8"),
    Pair("hqq-w4g64", "hqq", "w4g64"),
    Pair("w4g128", "autoround", "w4g128-plain"),
    Pair("w4g128", "llm_compressor", "w4g128"),
    Pair("w8a8", "llm_compressor", "w8a8"),
    Pair("fp8a8", "llm_compressor", "fp8a8"),
    Pair("fp8a8", "llm_compressor", "fp8a8-free"),
)
PEERS = tuple(dict.fromkeys(pair.peer for pair in PAIRS))
