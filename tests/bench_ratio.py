"""Ratios of times on machines that are shared and noisy: both sides in turns, in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

Work = Callable[[], object]


class Row(NamedTuple):
    """A line of a table: low, median, high of measured / baseline over interleaved turns."""

    name: str
    quartiles: tuple[float, ...]
    goal: str = ""


def turn_of(measured: Work, baseline: Work, turn: int) -> float:
    """measured / baseline, timed one after the other; every other turn in the other order."""
    seconds = {}
    for side in (measured, baseline) if turn % 2 else (baseline, measured):
        start = time.perf_counter()
        side()
        seconds[side] = time.perf_counter() - start
    return seconds[measured] / seconds[baseline]


def ratio(measured: Work, baseline: Work, turns: int = 31) -> tuple[float, ...]:
    """Quartiles of measured / baseline over interleaved turns."""
    for warm_up in (measured, baseline, measured, baseline):
        warm_up()
    ratios = [turn_of(measured, baseline, turn) for turn in range(turns)]
    return tuple(statistics.quantiles(ratios, n=4))


def decided(
    measured: Work, baseline: Work, goal: float, at_least: int = 15, at_most: int = 101
) -> tuple[float, ...]:
    """The median of measured / baseline between the bounds of its 95 % confidence interval.

    Turns are added until the interval lies on one side of `goal`, or `at_most` were taken.
    """
    for warm_up in (measured, baseline, measured, baseline):
        warm_up()
    ratios: list[float] = []
    while True:
        ratios.append(turn_of(measured, baseline, len(ratios)))
        low, median, high = median_interval(ratios)
        if len(ratios) >= at_most or (len(ratios) >= at_least and not low <= goal < high):
            return low, median, high


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median between the order statistics that enclose the true one with 95 % confidence,
    whatever the distribution: the sign test turned round."""
    ordered, n = sorted(values), len(values)
    outside, below = 0.0, 0
    while outside + math.comb(n, below) / 2.0**n <= 0.025 and below < n // 2:
        outside += math.comb(n, below) / 2.0**n
        below += 1
    lowest = max(below - 1, 0)
    return ordered[lowest], statistics.median(ordered), ordered[n - 1 - lowest]
