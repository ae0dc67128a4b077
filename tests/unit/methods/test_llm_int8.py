from __future__ import annotations

import hashlib
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need
from quantkit.errors import NumericsError
from quantkit.methods.llm_int8 import Params, quantizer
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Float, dequantize
from tests.quantized import statistics_of

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs quantkit[bitsandbytes]"
)
SCHEME = parse_scheme("w8a8_mixed")
SILENT = quantizer(Params(report_outliers=False))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and the largest magnitudes (out, 1)."""
    q = SILENT.quantize(weight.float(), SILENT.prepare(None, SCHEME), SCHEME).weight
    assert isinstance(q, Affine) and isinstance(q.scale, Float)
    return q.codes, q.scale.values


def sha16(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_two_rows_by_hand() -> None:
    # 127 · 0.5 = 63.5 rounds to the even 64, 31.75 to 32, 95.25 to 95; the second row is four times the first
    codes, absmax = quantize(torch.tensor([[0.5, -1, 0.25, 0.75], [2, -4, 1, 3]]))
    assert codes.tolist() == [[64, -127, 32, 95]] * 2
    assert absmax.tolist() == [[1.0], [4.0]]


def test_reference_vector() -> None:
    n = torch.arange(4096)
    codes, absmax = quantize((((37 * n % 101) - 50) / 100).view(64, 64))
    assert codes[0, :6].tolist() == [-127, -33, 61, -102, -8, 86]
    assert sha16(codes) == "89cb875c3adb7593"
    assert absmax[:3, 0].tolist() == [0.5] * 3 and sha16(absmax) == "8dd87cc4f7974070"


def test_a_code_stands_for_its_share_of_the_largest_weight() -> None:
    q = SILENT.quantize(torch.tensor([[0.5, -1.0], [0.0, 127.0]]), None, SCHEME).weight
    assert dequantize(q).tolist() == [pytest.approx([64 / 127, -1.0]), pytest.approx([0.0, 127.0])]
    assert q.group == (1, 2) and isinstance(q, Affine) and q.codes.dtype == torch.int8


def test_rows_of_zeros_have_a_scale() -> None:
    # 1e-9 is zero in fp16
    weight = torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [0.25, 0.0]])
    codes, absmax = quantize(weight)
    assert codes.tolist() == [[0, 0], [0, 0], [127, 0]]
    assert absmax.tolist() == [[1.0], [1.0], [0.25]]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 96), (40, 333), (16, 2048)])
def test_codes_are_those_of_bitsandbytes(
    dtype: torch.dtype, shape: tuple[int, int], rng: torch.Generator
) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    for size in (1e-4, 0.02, 1.0, 900.0):
        weight = (torch.randn(shape, generator=rng) * size).to(dtype)
        # sixteenths of a power of two, whose products with 127 often end in one half
        weight[:, ::2] = (weight[:, ::2] * (16 / size)).round() * (size / 16)
        weight[0, 0] = size
        codes, absmax = quantize(weight)
        theirs, stats, _ = int8_vectorwise_quant(weight.to(torch.float16))
        assert torch.equal(codes, theirs) and torch.equal(absmax[:, 0], stats)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = value
    with pytest.raises(NumericsError, match="non-finite") as caught:
        quantize(weight)
    assert caught.value.remedy is not None


def test_weights_beyond_float16_are_refused_with_a_remedy() -> None:
    quantize(torch.tensor([[65_504.0, -65_504.0]]))
    with pytest.raises(NumericsError, match="70,000 is beyond float16") as caught:
        quantize(torch.tensor([[1.0, -70_000.0]]))
    assert caught.value.remedy is not None and "rule" in caught.value.remedy


def counted(x: Tensor, scheme: Scheme = SCHEME) -> Outcome:
    method = quantizer(Params())
    weight = torch.ones(3, x.shape[1])
    return method.quantize(weight, method.prepare(statistics_of(x), scheme), scheme)


def test_outlier_inputs_are_counted() -> None:
    x = torch.zeros(5, 8)
    x[1, 2], x[3, 2], x[0, 5], x[4, 7] = 6.0, -9.0, -6.5, 5.9
    assert counted(x).facts == {"outlier_columns": 2}
    assert counted(x, parse_scheme("w8a8_mixed8")).facts == {"outlier_columns": 1}
    assert counted(torch.zeros(5, 8)).facts == {"outlier_columns": 0}
    # the runtime takes a threshold of 0 for none
    assert counted(x, parse_scheme("w8a8_mixed0")).facts == {"outlier_columns": 0}


def test_inputs_are_compared_in_float16_as_the_runtime_does() -> None:
    # fp16 has steps of 1/256 here: 5.9985 is 6, 5.9979 is 5.996
    assert counted(torch.tensor([[5.9985, 5.9979]])).facts == {"outlier_columns": 1}
    assert counted(torch.tensor([[1e6, 0.0]])).facts == {"outlier_columns": 1}


def test_counting_is_all_that_statistics_are_for(rng: torch.Generator) -> None:
    method, x = quantizer(Params()), torch.randn(9, 6, generator=rng) * 4
    assert method.needs is Need.ABSMAX and SILENT.needs is Need.NOTHING
    weight = torch.randn(4, 6, generator=rng)
    loud = method.quantize(weight, method.prepare(statistics_of(x), SCHEME), SCHEME)
    silent = SILENT.quantize(weight, SILENT.prepare(statistics_of(x), SCHEME), SCHEME)
    assert torch.equal(dequantize(loud.weight), dequantize(silent.weight))
    assert silent.facts == {} and loud.facts != {}


def test_statistics_must_be_there_and_finite() -> None:
    method = quantizer(Params())
    for nothing in (None, statistics_of(torch.empty(0, 4))):
        with pytest.raises(NumericsError, match="no token"):
            method.prepare(nothing, SCHEME)
    with pytest.raises(NumericsError, match="non-finite"):
        method.prepare(statistics_of(torch.tensor([[1.0, torch.inf]])), SCHEME)


@pytest.mark.parametrize("text", ["w8", "w8a8", "w8a8_static", "w4g64", "nf4", "fp8a8"])
def test_other_schemes_are_refused(text: str) -> None:
    reason = SILENT.accepts(parse_scheme(text))
    assert reason is not None and text in reason and not reason.endswith(".")


def test_schemes_with_outliers_are_accepted() -> None:
    assert SILENT.accepts(SCHEME) is None
    assert SILENT.accepts(parse_scheme("w8a8_mixed4.5")) is None
