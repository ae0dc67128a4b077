"""Rotary embeddings: from llama.cpp's keys and divisors to the parameters of Transformers.

Llama 3's scaling is stored as the divisors that it leads to. With x_i = θ^(−2i/n) for n
rotary dimensions:

    1 / d_i = (1 − s_i) / factor + s_i,    s_i = clamp((original · x_i / 2π − low) / (high − low), 0, 1)

Scaling original, low and high by one number changes nothing, so low = 1 is taken, as in every such model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.architectures.rope import DIVISORS, LONG, SHORT
from quantkit.run.gguf_source.keys import Keys

_ORIGINAL = "original_max_position_embeddings"
_TOLERANCE = 1e-5


def rope_parameters(keys: Keys, generated: Mapping[str, Tensor]) -> dict[str, Any]:
    """`rope_parameters` of the config; `generated` holds the divisors that the file has.

    UnsupportedError for scaling that cannot be expressed.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    scaling = _scaling(keys)
    if DIVISORS in generated and not bool((generated[DIVISORS] == 1).all()):
        if scaling["rope_type"] != "default":
            raise UnsupportedError(
                f"`{keys.where}` has rotary divisors beside {scaling['rope_type']} scaling"
            )
        scaling = _llama3(keys.where, generated[DIVISORS].double(), theta)
    if LONG in generated and SHORT in generated:
        scaling = _longrope(keys, generated[LONG], generated[SHORT])
    return {"rope_theta": theta, **scaling}


def _scaling(keys: Keys) -> dict[str, Any]:
    # files of the first versions name the factor alone
    kind = keys.text("rope.scaling.type", "linear" if "rope.scaling.factor" in keys else "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    match kind:
        case "none" | "longrope":
            return {"rope_type": "default"}
        case "linear":
            return {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
        case "yarn":
            keys.require("rope.scaling.yarn_ext_factor", 1.0, "YaRN is computed with 1 elsewhere")
            keys.require("rope.scaling.yarn_log_multiplier", 0.0, "no model here has it")
            attention = keys.number(
                "rope.scaling.yarn_attn_factor", keys.number("rope.scaling.attn_factor", 1.0)
            )
            own = {} if attention == 1 else {"attention_factor": attention * (0.1 * math.log(factor) + 1)}
            return {
                "rope_type": "yarn",
                "factor": factor,
                _ORIGINAL: keys.integer("rope.scaling.original_context_length"),
                "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
                **own,
            }
        case other:
            raise UnsupportedError(f"`{keys.where}`: rotary embeddings are scaled by {other!r:.40}")


def _longrope(keys: Keys, long: Tensor, short: Tensor) -> dict[str, Any]:
    original = keys.integer("rope.scaling.original_context_length")
    return {
        "rope_type": "longrope",
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "factor": keys.integer("context_length") / original,
        _ORIGINAL: original,
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
    }


def llama3_divisors(theta: float, pairs: int, scaling: Mapping[str, Any]) -> Tensor:
    """(pairs,) fp64 divisors of the frequencies, the formula above."""
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    turns = scaling[_ORIGINAL] / (2 * math.pi * theta**exponents)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors


def _llama3(where: str, divisors: Tensor, theta: float) -> dict[str, Any]:
    """The scaling that makes `divisors`; UnsupportedError when none that was tried does."""
    for scaling in _candidates(divisors, theta):
        made = llama3_divisors(theta, len(divisors), scaling)
        if torch.allclose(made, divisors, rtol=_TOLERANCE, atol=0):
            return scaling
    raise UnsupportedError(
        f"`{where}` divides its rotary frequencies by {divisors.tolist()[:4]}…, which no known scaling does",
        remedy="put the config.json of the model it was made from beside the file: it is preferred",
    )


def _candidates(divisors: Tensor, theta: float) -> Iterator[dict[str, Any]]:
    """Scalings to try: as Llama 3.1 has it over several lengths, then what the middle frequencies say."""
    factor = _nice(float(divisors.max()))
    shares = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    x = theta ** -(torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    # s = a · x − b is a line through the frequencies that are neither kept nor divided in full
    between = (shares > 1e-4) & (shares < 1 - 1e-4)
    x, shares = x[between], shares[between]
    lengths = (
        ((1 + 3 * shares) * 2 * math.pi / x).round().tolist() if len(x) else [2**n for n in range(4, 20)]
    )
    for original in lengths:
        yield _parameters(factor, 1.0, 4.0, int(original))
    if len(x) < 2:
        return
    columns = torch.stack((x, -torch.ones_like(x)), dim=1)
    a, b = torch.linalg.lstsq(columns, shares[:, None]).solution.flatten().tolist()
    if b > 0:
        original = a / b * 2 * math.pi
        yield _parameters(factor, 1.0, _nice(1 + 1 / b), round(original))
        yield _parameters(factor, 1.0, 1 + 1 / b, original)


def _parameters(factor: float, low: float, high: float, original: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        _ORIGINAL: original,
    }


def _nice(value: float) -> float:
    """`value` rounded to six digits: the number that somebody wrote."""
    return float(f"{value:.6g}")
