"""`Magnitudes`: which magnitudes the elements of recorded tensors have, of many rows at once.

A row keeps of its tensor how many elements lie in each eighth of an octave, how many of them on the
lower edge of their bin and how many a step above it (`Sketch.packed_bins`). That is what decides a
cast with one scale: which elements saturate, which become zero, which fall into the format's
subnormals, are three magnitudes to be compared with. Where the scale is a power of two the three
are edges of bins (or a step or three above), and the answer is exact; else it lies between two, the
elements of one bin apart. Rows that were written before schema version 3 have a histogram of four
bins an octave, without edges, and give bounds that are twice as wide.

How far a cast moves the elements of a bin is known between two numbers as well (to 10^-5 of them:
FP32 rounds scale_inv). The estimate beside
these takes the elements of a bin as evenly spread.

Cost: the bins of all rows lie one behind the other, with running sums, and no row has a loop of its
own but for its unpacking: 2 µs a row. Rejected: a `Sketch` a row, 100 kB and a millisecond each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fp8lab.formats import FloatFormat
from fp8lab.sketch import COUNTS, INFINITY, LOW_BITS, NEAR

Integers = NDArray[np.int64]
Numbers = NDArray[np.float64]

# Where in a bin the estimate looks: the Gauss points of either half, which are exact for a rounding
# error that rises over the one and falls over the other.
_POINTS = tuple((half + 0.5 + sign / 12**0.5) / 2 for half in (0, 1) for sign in (-1, 1))
_STEPS = np.arange(-3, 4)


class Limits(NamedTuple):
    """Numbers of elements, one a row, of which each is known to lie between two; where these are
    equal it is known. int64 [rows]."""

    low: Integers
    high: Integers


class Errors(NamedTuple):
    """Sums of the squared errors of a cast, float64 [rows]: bounds, and what is likely; of the
    bulk what is likely, and the bulk's own sum of squares."""

    low: Numbers
    high: Numbers
    likely: Numbers
    bulk: Numbers
    bulk_power: Numbers


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """The finite elements of rows that are not zero, by bins.

    `bins` int64 [3, all bins + 1] has counts, edges, near of one row's bins behind another's, and
    a last one of zeros; those of row i are `ends[i]` to `ends[i + 1]`, int64 [rows + 1], of which
    the first is bin `starts[i]`, int64 [rows]. `low_bits` are those of a float32 that tell elements
    of a bin apart. `infs` int64 [rows].
    """

    low_bits: int
    starts: Integers
    ends: Integers
    bins: Integers
    infs: Integers

    @classmethod
    def unpacked(cls, cells: Sequence[bytes], infs: Integers) -> Magnitudes:
        """From the column `bins` of rows, and their infinities.

        Raises ValueError for bytes that `Sketch.packed_bins` cannot have written.
        """
        starts, parts = [], []
        for cell in cells:
            part, start = np.zeros((NEAR + 1, 0), np.int64), 0
            if cell:
                start, width = int.from_bytes(cell[:2], "little"), cell[2] if len(cell) > 2 else 0
                planes = np.frombuffer(cell, np.uint8)[3:]
                if width not in (1, 2, 4, 8) or planes.size % (width * (NEAR + 1)):
                    raise ValueError(f"bins: {len(cell)} bytes, expected those of packed_bins")
                whole = np.ascontiguousarray(planes.reshape(width, -1).T).view(f"<u{width}")
                part = whole.reshape(NEAR + 1, -1).astype(np.int64)
            starts.append(start)
            parts.append(part)
        return cls._of(LOW_BITS, starts, parts, infs)

    @classmethod
    def coarse(
        cls, starts: Sequence[int], histograms: Sequence[Integers], infs: Integers
    ) -> Magnitudes:
        """From the columns `histogram_start` and `histogram`, which know of no edges."""
        parts = []
        for counts in histograms:
            part = np.zeros((NEAR + 1, len(counts)), np.int64)
            part[COUNTS] = counts
            parts.append(part)
        return cls._of(LOW_BITS + 1, starts, parts, infs)

    @classmethod
    def _of(
        cls, low_bits: int, starts: Sequence[int], parts: list[Integers], infs: Integers
    ) -> Magnitudes:
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        bins = np.concatenate([*parts, np.zeros((NEAR + 1, 1), np.int64)], axis=1)
        return cls(low_bits, np.array(starts, np.int64), ends, bins, infs)

    @cached_property
    def _running(self) -> Integers:
        return np.concatenate([[0], np.cumsum(self.bins[COUNTS])])

    @cached_property
    def nonzero(self) -> Integers:
        """int64 [rows]: elements that are neither 0 nor NaN."""
        numbers: Integers = self._running[self.ends[1:]] - self._running[self.ends[:-1]]
        return numbers + self.infs

    def at_least(self, codes: Integers) -> Limits:
        """How many elements of each row have at least the magnitude whose float32 bits are
        `codes`, int64 [rows], from 1; NaNs are none of them. int64."""
        index, low = codes >> self.low_bits, codes & ((1 << self.low_bits) - 1)
        first, last = self.ends[:-1], self.ends[1:]
        place = first + np.clip(index - self.starts, 0, last - first)
        inside = (index >= self.starts) & (place < last)
        above = self._running[last] - self._running[place + inside]
        counts, edges, near = self.bins[:, place] * inside
        most = above + counts - edges * (low > 0) - near * (low > 2)
        told = (low == 0) | ((self.low_bits == LOW_BITS) & ((low == 1) | (low == 3)))
        infinite = self.infs * (codes <= INFINITY)
        return Limits(np.where(told, most, above) + infinite, most + infinite)

    def saturated(self, fmt: FloatFormat, scales: Numbers) -> Limits:
        """How many elements of each row `casting.Cast.saturated` finds. int64.

        Here and below `scales`, [rows], are what float32 makes of them, positive and finite.
        """
        return self.at_least(thresholds(fmt, scales)[0])

    def flushed(self, fmt: FloatFormat, scales: Numbers) -> Limits:
        """How many elements that are not zero become zero. int64."""
        kept = self.at_least(thresholds(fmt, scales)[1])
        return Limits(self.nonzero - kept.high, self.nonzero - kept.low)

    def subnormal(self, fmt: FloatFormat, scales: Numbers) -> Limits:
        """How many elements are cast into the format's subnormals. int64."""
        _, first, normal = thresholds(fmt, scales)
        kept, beyond = self.at_least(first), self.at_least(normal)
        return Limits(np.maximum(kept.low - beyond.high, 0), kept.high - beyond.low)

    def errors(self, fmt: FloatFormat, scales: Numbers, amax: Numbers, cut: Numbers) -> Errors:
        """What the cast of each row's finite elements to nearest costs, in the tensor's units.

        `amax` [rows] is the largest of them; the bulk are those up to `cut` [rows].
        """
        rows = np.repeat(np.arange(len(self.starts)), np.diff(self.ends))
        index = np.arange(len(rows)) - self.ends[rows] + self.starts[rows]
        counts, edges, _ = self.bins[:, :-1].astype(np.float64)
        scale = scales[rows]
        low = _value(index << self.low_bits) * scale
        high = np.minimum(_value((index + 1) << self.low_bits), amax[rows]) * scale
        high = np.maximum(high, low)
        at_edge = _error(fmt, low) ** 2
        points = [_error(fmt, low + point * (high - low)) ** 2 for point in _POINTS]
        likely = np.mean(points, axis=0)
        inside, is_bulk = counts - edges, low <= cut[rows] * scale
        each = edges * at_edge + inside * likely
        middle = edges * low**2 + inside * (low**2 + low * high + high**2) / 3
        terms = (
            edges * at_edge + inside * _least_error(fmt, low, high) ** 2,
            edges * at_edge + inside * _largest_error(fmt, low, high) ** 2,
            each,
            each * is_bulk,
            middle * is_bulk,
        )
        sums: list[Any] = [np.bincount(rows, t / scale**2, len(self.starts)) for t in terms]
        return Errors(*sums)


def _value(codes: Integers) -> Numbers:
    """The magnitudes of float32 bits; beyond the largest, the largest."""
    return np.minimum(codes, INFINITY - 1).astype(np.uint32).view(np.float32).astype(np.float64)


def _step(fmt: FloatFormat, values: Numbers) -> Numbers:
    """From a value on, how far apart the format's are."""
    exponent = np.frexp(np.maximum(values, fmt.smallest_normal))[1] - 1
    step: Numbers = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    return step


def _error(fmt: FloatFormat, values: Numbers) -> Numbers:
    step = _step(fmt, values)
    return np.abs(np.minimum(np.rint(values / step) * step, fmt.max) - values)


def _largest_error(fmt: FloatFormat, low: Numbers, high: Numbers) -> Numbers:
    """Of a value between the two."""
    below = np.nextafter(np.minimum(high, fmt.max), 0.0)
    rounding = _step(fmt, below) / 2
    return np.maximum(np.minimum(rounding, high), high - fmt.max)


def _least_error(fmt: FloatFormat, low: Numbers, high: Numbers) -> Numbers:
    flushed = np.where(high <= fmt.smallest_subnormal / 2, low, 0.0)
    return np.maximum(low - fmt.max, flushed)


def thresholds(fmt: FloatFormat, scales: Numbers) -> Integers:
    """int64 [3, rows]: float32 bits of the first magnitudes that saturate, that do not become zero,
    and that become normal numbers of the format, for each of the scales; one beyond infinity's
    where there is none. Ties go to even: half the smallest subnormal is zero, and halfway between
    the largest subnormal and the smallest normal is the latter."""
    single = scales.astype(np.float32)
    half = fmt.smallest_subnormal / 2
    with np.errstate(over="ignore"):
        limit = np.float32(fmt.max * (1 + 2.0**-23))
        beyond = np.nextafter(limit, np.float32(np.inf))
        kept = np.nextafter(np.float32(half), np.float32(np.inf))
        firsts = [_first(single, one) for one in (beyond, kept, fmt.smallest_normal - half)]
    if np.isinf(limit):  # FP32's
        firsts[0] = np.full(len(single), INFINITY + 1)
    return np.stack(firsts)


def _first(scales: NDArray[np.float32], value: float) -> Integers:
    """Bits of the least float32 whose float32 product with the scale is at least `value`: a few
    steps from the quotient at most."""
    with np.errstate(over="ignore", under="ignore"):
        quotient = (value / scales.astype(np.float64)).astype(np.float32)
        codes = quotient.view(np.uint32).astype(np.int64)[:, None] + _STEPS
        codes = np.clip(codes, 1, INFINITY)
        products = codes.astype(np.uint32).view(np.float32) * scales[:, None]
    reached: Integers = codes[np.arange(len(codes)), (products >= np.float32(value)).argmax(axis=1)]
    return reached
