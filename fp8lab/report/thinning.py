"""Fewer points and fewer digits, so that a page can hold what a screen can show.

A long line is thinned to the rows that hold the smallest and the largest value of each stretch, so
that no spike is lost. Numbers have four digits; what is not finite is null. Rejected: every n-th
row, which loses the one step that matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

LINE_POINTS = 600  # of one line


def thin(columns: Sequence[NDArray[np.float64]], most: int) -> NDArray[np.intp]:
    """Of rows in order, at most `most` positions: each stretch's smallest and largest, by column.

    `columns` are of one length and may hold what is not finite; a row where all are, is left out.
    """
    values = np.array(columns, dtype=float)
    finite = np.isfinite(values)
    rows = np.flatnonzero(finite.any(axis=0))
    if len(rows) <= most:
        return rows
    stretches = max(1, (most - 2) // (2 * len(values)))
    width = -(-len(rows) // stretches)
    known = finite[:, rows]
    kept = [np.array([0, len(rows) - 1])]
    for column in np.concatenate(  # to be smallest: the values, and the values turned over
        [np.where(known, sign * values[:, rows], np.inf) for sign in (1.0, -1.0)]
    ):
        padded = np.pad(column, (0, stretches * width - len(rows)), constant_values=np.inf)
        best = padded.reshape(stretches, width).argmin(axis=1) + np.arange(stretches) * width
        kept.append(best[np.isfinite(padded[best])])
    picked: NDArray[np.intp] = rows[np.unique(np.concatenate(kept))]
    return picked


def short(values: Iterable[Any]) -> list[float | int | str | None]:
    """Four significant digits; null for what is missing or not finite."""
    return [rounded(value) for value in np.asarray(values, dtype=float).ravel().tolist()]


def rounded(value: float, digits: int = 4, *, infinite: bool = False) -> float | int | str | None:
    """Null for what is not finite; with `infinite`, "inf" and "-inf" are told."""
    if not isfinite(value):
        return None if isnan(value) or not infinite else f"{value:g}"
    told = float(f"{value:.{digits}g}")
    return int(told) if told.is_integer() and abs(told) < 1e15 else told


def line(rows: pd.DataFrame, values: Any, most: int = LINE_POINTS) -> list[list[Any]]:
    """Steps and values of a thinned line; both empty where nothing was recorded."""
    y = np.asarray(values, dtype=float)
    kept = thin([y], most)
    return [rows["step"].to_numpy()[kept].tolist(), short(y[kept])]
