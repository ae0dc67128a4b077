from __future__ import annotations

import re
import time
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.calibrate.overlap import _hashes, check_disjoint
from quantkit.calibrate.text import EvalSpec, find_set
from quantkit.calibrate.tokens import CalibrationSet, EvalSet, build, build_eval
from quantkit.errors import CalibrationError


def calibration(rows: np.ndarray[Any, Any]) -> CalibrationSet:
    return CalibrationSet.of(torch.from_numpy(rows), ())


def measured(windows: np.ndarray[Any, Any]) -> EvalSet:
    return EvalSet("held-out", "gptq", torch.from_numpy(windows), 0, None, len(windows), windows.size, "", "")


def tokens(seed: int, rows: int, length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 30_000, (rows, length), dtype=np.int32)


def test_equal_runs_have_equal_hashes_wherever_they_lie() -> None:
    table = tokens(0, 2, 200)
    table[1, 77:177] = table[0, 5:105]
    found = _hashes(table)
    assert found.shape == (2, 137)
    np.testing.assert_array_equal(found[1, 77:114], found[0, 5:42])
    assert len(np.unique(found)) == found.size - 37


def test_different_texts_are_disjoint() -> None:
    check_disjoint(calibration(tokens(0, 20, 256)), [measured(tokens(1, 20, 256))])


@pytest.mark.parametrize("begin", [0, 1, 31, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("place", [0, 7, 73])
def test_a_run_of_127_is_found_wherever_it_lies(begin: int, place: int) -> None:
    rows, windows = tokens(0, 5, 256), tokens(1, 9, 200)
    windows[6, place : place + 127] = rows[3, begin : begin + 127]
    with pytest.raises(CalibrationError, match=r"1 of 9 windows.* window 6 .* row 3"):
        check_disjoint(calibration(rows), [measured(windows)])


def test_a_run_of_63_is_no_overlap() -> None:
    rows, windows = tokens(0, 5, 256), tokens(1, 9, 200)
    windows[6, 10:73] = rows[3, 64:127]
    check_disjoint(calibration(rows), [measured(windows)])


def test_equal_rows_are_named() -> None:
    rows, windows = tokens(0, 5, 32), tokens(1, 9, 32)
    windows[[2, 4]] = rows[[3, 1]]
    with pytest.raises(CalibrationError, match=r"2 of 9 windows.* window 2 is calibration row 3"):
        check_disjoint(calibration(rows), [measured(windows)])


def test_every_evaluation_set_is_looked_at() -> None:
    rows = tokens(0, 5, 128)
    clean, same = measured(tokens(1, 5, 128)), replace(measured(rows), name="same")
    check_disjoint(calibration(rows), [])
    with pytest.raises(CalibrationError, match="same"):
        check_disjoint(calibration(rows), [clean, same])


def test_rulers_are_no_overlap() -> None:
    rows, windows = tokens(0, 5, 256), tokens(1, 9, 256)
    rows[2, 20:240] = np.tile(np.arange(7), 40)[:220]
    windows[3] = 4
    windows[5] = np.tile(np.arange(7), 40)[:256]
    check_disjoint(calibration(rows), [measured(windows)])
    windows[5] = np.tile(np.arange(8), 32)
    rows[2, 20:240] = np.tile(np.arange(8), 40)[:220]
    with pytest.raises(CalibrationError):
        check_disjoint(calibration(rows), [measured(windows)])


def test_a_full_calibration_set_takes_seconds() -> None:
    rows, windows = tokens(0, 256, 2048), tokens(1, 970, 512)
    begin = time.process_time()
    check_disjoint(calibration(rows), [measured(windows)])
    assert time.process_time() - begin < 5


def test_the_embedded_texts_are_disjoint() -> None:
    class Signs:
        """Tokens are words, spaces and signs: about as short as those of a small vocabulary."""

        is_fast = False
        eos_token_id = None
        chat_template = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [zlib.crc32(word.encode()) >> 1 for word in re.findall(r"\w+|\W", text)]}

    tokenizer = Signs()
    rows = build(find_set("embedded"), tokenizer, rows=300, length=512, seed=None)  # type: ignore[arg-type]
    check_disjoint(rows, [build_eval(EvalSpec("embedded"), tokenizer)])  # type: ignore[arg-type]
