"""`Sketch`: what is kept of a tensor once the tensor is gone. Every number of it is an integer.

A float32 is split between its bits: the eleven below the sign say its *bin* (8 exponent bits and 3
leading mantissa bits: 8 bins an octave), the 20 *low bits* where in the bin it is. Kept for each of
the 2048 bins:

    counts          elements
    edges           elements at the lower edge (low bits 0)
    near            elements one or two float32 steps above it (low bits 1 or 2)
    low             sum of the low bits
    squares         sum of their squares, in two halves of which 2^38 elements fill neither

and for each exponent the signed sum of the significands, and the extremes as bit patterns. So sums,
sums of magnitudes and of squares are exact, and two sketches merge into the sketch of both tensors,
in any order and for any split of the same elements, equal to the bit. Micro-batches, steps and
ranks add up; on the way they may be summed as they are (extremes: the maximum), see `from_packed`.

A fourth power is taken as the quadratic function of the low bits that is nearest to it in the bin:
right to 0.03 % (normal numbers), with an odd error that all but cancels in a sum (to 10^-5 of a
Gaussian's), and as exact to merge.

Every edge of every 8-bit format is the edge of a bin, 240 (1.875 · 2^7) and 7.5 included, and what
counts as saturated starts three steps above one. So for a scale for a whole tensor that is a power
of two (and no so large one that the format's range leaves float32's normal numbers, 2^112 at least)
`saturated`, `flushed` and `subnormal` are exact; for another, they are two numbers with
the answer between. What needs structure (rows, channels, blocks) is measured apart.

Cost: 12,548 numbers, whatever the tensor's size. Rejected: quantile sketches (t-digest and its
kin), whose merges depend on their order; float64 sums, which do so in their last digits.

Kurtosis is mean(x^4) / mean(x^2)^2, uncentred: FOG's definition (2505.20524), 3 for a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fp8lab.formats import FloatFormat

Integers = NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float64)

BINS = 2048  # values of the eleven bits below the sign
EXPONENTS = 256
LOW_BITS = 20  # of a float32, below those that say its bin
FIELDS = ("counts", "edges", "near", "low", "squares", "squares_high")
COUNTS, EDGES, NEAR, LOW, SQUARES, SQUARES_HIGH = range(len(FIELDS))
# Extremes of the finite elements, so that of each the maximum is kept: the largest magnitude,
# - the smallest one that is not zero, - the place of the least element, that of the greatest.
# Magnitudes are bit patterns; a place is the integer that orders as the floats do.
NUM_EXTREMES = 4
NUM_SUMS = len(FIELDS) * BINS + EXPONENTS
PACKED = NUM_SUMS + NUM_EXTREMES

INFINITY = 0x7F800000  # bit pattern
FIRST_SPECIAL = INFINITY >> LOW_BITS  # bins from here on hold infinities and NaNs
NOTHING = (0, -INFINITY, -INFINITY, -INFINITY - 1)  # extremes of no element

# Rows show half as many bins, four an octave.
HISTOGRAM_BINS = 1024

# Leading four bits of the significand, and its weight (units of 2^-149), by bin or by exponent.
_LEADING = np.arange(BINS) % 8 + np.where(np.arange(BINS) < 8, 0, 8)
_SHIFT = np.maximum(np.arange(EXPONENTS), 1) - 1


def _fourth_powers() -> NDArray[np.float64]:
    """float64 [3, 2048]: factors of count, low and squares in the sum of fourth powers of a bin.

    The quadratic through (leading + t)^4 at the three Chebyshev points of 0 <= t <= 1.
    """
    t = 0.5 + 0.5 * np.cos((2 * np.arange(3) + 1) * np.pi / 6)
    points = np.linalg.inv(np.vander(t, increasing=True))
    factors = (_LEADING[:, None] + t) ** 4 @ points.T * 0.5 ** (LOW_BITS * np.arange(3))
    exponent = 4 * (_SHIFT[np.arange(BINS) // 8] - 149 + LOW_BITS)
    scaled: NDArray[np.float64] = np.ldexp(factors, exponent[:, None]).T.copy()
    return scaled


_FOURTH_POWERS = _fourth_powers()


class Bounds(NamedTuple):
    """A number of elements that is known to lie between two, or known: then they are equal."""

    low: int
    high: int

    @property
    def exact(self) -> bool:
        """Whether there is only one answer."""
        return self.low == self.high


@dataclass(frozen=True, eq=False)
class Sketch:
    """Summary of a tensor's values, as float32.

    `bins` int64 [6, 2048], one row for each of `FIELDS`; `signed` int64 [256]; `extremes` int64
    [4]. Infinities are counted in bin 2040 and NaNs in bin 2047, which have no sums. Made by
    `from_packed`, which brings everything into this form.
    """

    bins: Integers
    signed: Integers
    extremes: Integers

    @classmethod
    def from_packed(cls, packed: Integers) -> Sketch:
        """From int64 [12548]: the fields of `bins`, `signed`, extremes; as `measure.summary` and
        `to_packed` give, or several of these summed (extremes: the maximum).

        Raises ValueError for another length.
        """
        if packed.shape != (PACKED,):
            raise ValueError(f"Sketch: {list(packed.shape)} numbers, expected [{PACKED}]")
        bins = packed[: len(FIELDS) * BINS].reshape(len(FIELDS), BINS).copy()
        signed = packed[len(FIELDS) * BINS : NUM_SUMS].copy()
        bins[SQUARES_HIGH] += bins[SQUARES] >> 32
        bins[SQUARES] &= 0xFFFFFFFF
        infs = bins[EDGES, FIRST_SPECIAL]
        nans = bins[COUNTS, FIRST_SPECIAL:].sum() - infs
        bins[:, FIRST_SPECIAL:] = 0
        bins[:2, FIRST_SPECIAL] = infs
        bins[COUNTS, -1] = nans
        signed[-1] = 0
        return cls(bins, signed, packed[NUM_SUMS:].copy())

    def to_packed(self) -> Integers:
        """int64 [12548], of which `from_packed` makes an equal sketch."""
        return np.concatenate([self.bins.ravel(), self.signed, self.extremes])

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both tensors together: equal in any order, for any split."""
        bins = self.bins + other.bins
        bins[SQUARES_HIGH] += bins[SQUARES] >> 32
        bins[SQUARES] &= 0xFFFFFFFF
        extremes = np.maximum(self.extremes, other.extremes)
        return Sketch(bins, self.signed + other.signed, extremes)

    def __eq__(self, other: object) -> bool:
        """Whether all integers are equal."""
        return isinstance(other, Sketch) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("bins", "signed", "extremes")
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return int(self.bins[COUNTS].sum())

    @property
    def zeros(self) -> int:
        """Number of zeros of either sign."""
        return int(self.bins[EDGES, 0])

    @property
    def nans(self) -> int:
        """Number of NaNs."""
        return int(self.bins[COUNTS, -1])

    @property
    def infs(self) -> int:
        """Number of infinities."""
        return int(self.bins[COUNTS, FIRST_SPECIAL])

    @property
    def finite(self) -> int:
        """Number of finite elements."""
        return self.count - self.nans - self.infs

    @property
    def amax(self) -> float:
        """Largest finite magnitude, 0 without one."""
        return _float_of(int(self.extremes[0]))

    @property
    def amin(self) -> float:
        """Smallest magnitude that is not zero, infinity without one."""
        return _float_of(-int(self.extremes[1]))

    @property
    def min(self) -> float:
        """Least finite element, infinity without one."""
        return _at_place(-int(self.extremes[2]))

    @property
    def max(self) -> float:
        """Greatest finite element, -infinity without one."""
        return _at_place(int(self.extremes[3]))

    # Exact sums of the finite elements, in units of 2^-149, the smallest float32, or its square.

    @cached_property
    def _used(self) -> tuple[int, int]:
        """Exponents of the finite elements that are not zero: the first, and one past the last."""
        largest, smallest = int(self.extremes[0]), -int(self.extremes[1])
        return (smallest >> 23, (largest >> 23) + 1) if largest else (0, 1)

    def _of_used(self, per_bin: NDArray[_Number]) -> NDArray[_Number]:
        first, end = self._used
        return per_bin[..., 8 * first : 8 * end]

    @cached_property
    def _sums(self) -> tuple[int, int, int]:
        first, end = self._used
        bins, leading = self._of_used(self.bins), self._of_used(_LEADING)
        counted = bins[COUNTS] * leading
        parts = np.stack(
            [counted, bins[LOW], counted * leading, bins[LOW] * leading, *bins[SQUARES:]]
        )
        parts = parts.reshape(len(parts), end - first, 8).sum(axis=2)
        total = magnitudes = squares = 0
        for shift, signed, (count, low, count2, low2, square, high) in zip(
            _SHIFT[first:end].tolist(),
            self.signed[first:end].tolist(),
            parts.T.tolist(),
            strict=True,
        ):
            total += signed << shift
            magnitudes += ((count << LOW_BITS) + low) << shift
            square += (count2 << 2 * LOW_BITS) + (low2 << LOW_BITS + 1) + (high << 32)
            squares += square << 2 * shift
        return total, magnitudes, squares

    @property
    def sum(self) -> float:
        """Of the finite elements, rounded once; so are the two below."""
        return math.ldexp(float(self._sums[0]), -149)

    @property
    def sum_abs(self) -> float:
        """Of the magnitudes."""
        return math.ldexp(float(self._sums[1]), -149)

    @property
    def sum_squares(self) -> float:
        """Of the squares."""
        return math.ldexp(float(self._sums[2]), -298)

    @cached_property
    def sum_fourth_powers(self) -> float:
        """Of the fourth powers, within 0.03 % of it (if the elements are 0 or at least 2^-126)."""
        bins, factors = self._of_used(self.bins), self._of_used(_FOURTH_POWERS)
        counts, low = bins[COUNTS].astype(np.float64), bins[LOW].astype(np.float64)
        if self._used[0] == 0:
            counts[0] -= self.zeros
        squares = bins[SQUARES] + bins[SQUARES_HIGH] * 2.0**32
        return float((factors[0] * counts + factors[1] * low + factors[2] * squares).sum())

    @property
    def histogram(self) -> Integers:
        """int64 [1024]: finite elements that are not zero, in bins of a quarter of an octave."""
        first, end = self._used
        histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        counts = self._of_used(self.bins[COUNTS]).reshape(-1, 2)
        histogram[4 * first : 4 * end] = counts[:, 0] + counts[:, 1]
        histogram[0] -= self.zeros if first == 0 else 0
        return histogram

    def packed_bins(self) -> bytes:
        """What a row keeps of the bins: `counts`, `edges` and `near` of the finite elements that
        are not zero. `magnitudes` reads it.

        Two bytes say the first bin, one says how many bytes w a number has; then come the numbers
        of the used bins [3, n], little-endian, all their first bytes, all their second ones, …: so
        they compress best. Empty if there are none.
        """
        bins = self._of_used(self.bins[: NEAR + 1]).copy()
        bins[:NEAR, 0] -= self.zeros if self._used[0] == 0 else 0
        used = np.flatnonzero(bins[COUNTS])
        if not len(used):
            return b""
        bins = bins[:, used[0] : used[-1] + 1]
        width = next(w for w in (1, 2, 4, 8) if w == 8 or int(bins[COUNTS].max()) < 1 << 8 * w)
        planes = bins.ravel().astype(f"<u{width}").view(np.uint8).reshape(-1, width).T
        start = 8 * self._used[0] + int(used[0])
        return start.to_bytes(2, "little") + bytes([width]) + planes.tobytes()

    def statistics(self) -> dict[str, float | int | list[int] | bytes | None]:
        """The columns of a tensor row that follow from the sketch; missing where undefined."""
        n = self.finite
        row: dict[str, float | int | list[int] | bytes | None] = {
            "count": self.count,
            "zeros": self.zeros,
            "nans": self.nans,
            "infs": self.infs,
        }
        if n == 0:
            return row
        # Both terms are exact: nothing cancels.
        total, magnitudes, squares = self._sums
        variance = n * squares - total * total
        row |= {
            "cur_amax": self.amax,
            "min": self.min,
            "max": self.max,
            "mean": self.sum / n,
            "l1_norm": math.ldexp(float(magnitudes), -149),
            "l2_norm": math.ldexp(math.sqrt(squares), -149),
        }
        if n > 1:
            row["std"] = math.ldexp(math.sqrt(variance / (n * (n - 1))), -149)
        if self.amax > 0:
            mean_square = self.sum_squares / n
            row["crest"] = self.amax / math.sqrt(mean_square)
            row["kurtosis"] = (self.sum_fourth_powers / n) / mean_square**2
            row["dynamic_range"] = math.log2(self.amax) - math.log2(self.amin)
            histogram = self.histogram
            used = np.flatnonzero(histogram)
            row["histogram_start"] = int(used[0])
            row["histogram"] = histogram[used[0] : used[-1] + 1].tolist()
            row["bins"] = self.packed_bins()
        return row

    # Questions about a cast with one scale for the whole tensor, to nearest even.

    def saturated(self, fmt: FloatFormat, scale: float = 1.0) -> Bounds:
        """How many elements `casting.Cast.saturated` finds: |x · scale| > max · (1 + 2^-23).

        Here and below `scale` is what float32 makes of it. Exact for a power of two and a format
        of at most 8 bits (and BF16, FP32), and otherwise known to the elements of one bin, half an
        octave in eight. Raises ValueError for a scale that is not positive and finite, and for a
        format of scales.
        """
        return self.at_least(_thresholds(fmt, _checked(fmt, scale))[0])

    def flushed(self, fmt: FloatFormat, scale: float = 1.0) -> Bounds:
        """How many elements that are not zero become zero."""
        zeros, kept = self.zeros, self.at_least(_thresholds(fmt, _checked(fmt, scale))[1])
        numbers = self.count - self.nans - zeros
        return Bounds(numbers - kept.high, numbers - kept.low)

    def subnormal(self, fmt: FloatFormat, scale: float = 1.0) -> Bounds:
        """How many elements are cast into the format's subnormals."""
        _, first, normal = _thresholds(fmt, _checked(fmt, scale))
        kept, beyond = self.at_least(first), self.at_least(normal)
        return Bounds(max(kept.low - beyond.high, 0), kept.high - beyond.low)

    def at_least(self, code: int) -> Bounds:
        """How many elements have at least the magnitude whose float32 bits are `code` > 0.

        NaNs are none of them. Exact where the low 20 bits of `code` are 0, 1 or 3.
        """
        if code > INFINITY:
            return Bounds(0, 0)
        index, low = code >> LOW_BITS, code & ((1 << LOW_BITS) - 1)
        counts, edges, near = (int(self.bins[field, index]) for field in (COUNTS, EDGES, NEAR))
        above = int(self.bins[COUNTS, index + 1 : -1].sum())
        most = above + counts - edges * (low > 0) - near * (low > 2)
        exact = low in (0, 1, 3) or index >= FIRST_SPECIAL
        return Bounds(most if exact else above, most)


def _float_of(code: int) -> float:
    return float(np.uint32(code).view(np.float32))


def _at_place(place: int) -> float:
    return _float_of(place) if place >= 0 else -_float_of(-1 - place)


def _checked(fmt: FloatFormat, scale: float) -> float:
    if not fmt.signed:
        raise ValueError(f"Sketch: {fmt.name} is a format of scales, expected one of elements")
    if not 0.0 < scale < 2.0**128 * (1.0 - 2.0**-25):
        raise ValueError(f"Sketch: scale {scale}, expected positive and finite")
    return scale


@lru_cache(maxsize=256)
def _thresholds(fmt: FloatFormat, scale: float) -> tuple[int, int, int]:
    """Bit patterns of the first magnitudes that saturate, that do not become zero, and that become
    normal numbers of the format; one beyond infinity's where there is none.

    All three only come true as magnitudes grow, float32's roundings included, so that the cast
    itself can be asked.
    """
    single = np.float32(scale)

    def cast(code: int) -> float:
        return fmt.round(float(np.float32(_float_of(code)) * single))

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        limit = np.float32(fmt.max * (1 + 2.0**-23))  # FP32's is infinity
        inverse = np.float32(1.0) / single
        return (
            _first(lambda code: bool(np.float32(_float_of(code)) * single > limit)),
            _first(lambda code: bool(np.float32(cast(code)) * inverse != 0)),
            _first(lambda code: cast(code) >= fmt.smallest_normal),
        )


def _first(holds: Callable[[int], bool]) -> int:
    low, high = 1, INFINITY + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def bin_edge(index: int) -> float:
    """Lower edge of a bin of a row's histogram: the magnitude whose bits are index · 2^21."""
    return _float_of(index << 21)
