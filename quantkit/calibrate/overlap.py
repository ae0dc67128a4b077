"""Calibration and evaluation text must not overlap: what was fitted to a text says nothing on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quantkit.calibrate.tokens import CalibrationSet, EvalSet
from quantkit.errors import CalibrationError

SHINGLE = 64
DISTINCT = 8

Table = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]


def check_disjoint(calib: CalibrationSet, evals: Sequence[EvalSet]) -> None:
    """CalibrationError when a window of an evaluation set shares a long run of tokens with a row.

    Every run of 64 tokens of a window is looked up among the runs of 64 that begin at multiples of
    64 in a row, so every shared run of 127 tokens is found wherever it lies, and none under 64 is.
    Runs with fewer than 8 distinct tokens (rulers, blank lines) do not count. Rows and windows
    shorter than 64 tokens are only compared as a whole.
    """
    rows = calib.tokens.numpy()
    for measured in evals:
        windows = measured.tokens.numpy()
        equal = _equal_rows(rows, windows)
        shared = equal or _shared_runs(rows, windows)
        if shared:
            row, window = shared[0]
            count = len({window for _, window in shared})
            raise CalibrationError(
                f"evaluation text '{measured.name}' overlaps the calibration text: {count:,} of "
                f"{len(windows):,} windows, for example window {window:,} "
                + (f"is calibration row {row:,}" if equal else f"shares {SHINGLE} tokens with row {row:,}"),
                remedy="calibrate on another text, or measure on another",
            )


def _equal_rows(rows: Table, windows: Table) -> list[tuple[int, int]]:
    """(row, window) pairs with the same tokens throughout."""
    known = {row.tobytes(): index for index, row in enumerate(rows)}
    found = ((known.get(window.tobytes()), index) for index, window in enumerate(windows))
    return [(row, index) for row, index in found if row is not None]


def _shared_runs(rows: Table, windows: Table) -> list[tuple[int, int]]:
    """(row, window) pairs that share a run of SHINGLE tokens; one pair per window."""
    if min(rows.shape[1], windows.shape[1]) < SHINGLE:
        return []
    per_row = rows.shape[1] // SHINGLE
    runs = rows[:, : per_row * SHINGLE].reshape(-1, SHINGLE)
    telling = np.flatnonzero((np.diff(np.sort(runs, axis=1), axis=1) != 0).sum(axis=1) + 1 >= DISTINCT)
    known = _hashes(runs[telling])[:, 0]
    sought = _hashes(windows)
    hits = np.isin(sought, known)
    pairs = []
    for window in np.flatnonzero(hits.any(axis=1)):
        run = telling[np.argmax(known == sought[window, np.argmax(hits[window])])]
        pairs.append((int(run) // per_row, int(window)))
    return pairs


def _hashes(table: Table) -> Hashes:
    """Hash of every run of SHINGLE tokens in each row: (rows, length − SHINGLE + 1).

    Modulo 2⁶⁴, h(i) = Σⱼ mix(tᵢ₊ⱼ)·Bʲ with an odd B: differences of one running sum, shifted back by
    the inverse of Bⁱ.
    """
    base = 0x9E3779B97F4A7C15
    powers = _powers(base, table.shape[1])
    inverse = _powers(pow(base, -1, 1 << 64), table.shape[1] - SHINGLE + 1)
    mixed = table.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(29)
    sums = np.zeros((len(table), table.shape[1] + 1), dtype=np.uint64)
    np.cumsum(mixed * powers, axis=1, out=sums[:, 1:])
    return np.asarray((sums[:, SHINGLE:] - sums[:, :-SHINGLE]) * inverse)


def _powers(base: int, count: int) -> Hashes:
    """1, base, base², … modulo 2⁶⁴."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
