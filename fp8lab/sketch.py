"""`Sketch`: what is kept of a tensor once the tensor is gone.

Exact counts, extremes and power sums, and a histogram over (exponent, two leading mantissa bits),
that is four bins an octave, aligned with the bits of a float32 and hence the same for every tensor.
Two sketches merge into the sketch of both tensors, so micro-batches, steps and ranks can be added
in any order: counts and extremes exactly, power sums to float64 rounding. Everything else that a
row shows of a tensor's values follows from these numbers.

What needs structure (rows, channels, blocks) cannot be had from a sketch and is measured apart.
Cost: 1024 bins and 12 numbers, whatever the tensor's size. Rejected: quantile sketches (t-digest
and its kin), whose merges depend on their order.

Sums are of the finite elements, in float64. Kurtosis is mean(x^4) / mean(x^2)^2, uncentred: FOG's
definition (2505.20524), 3 for a Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One bin per value of the ten bits below the sign: 8 exponent bits, 2 leading mantissa bits.
HISTOGRAM_BINS = 1024

# The order in which a sketch travels as one float64 vector, before its histogram.
SCALARS = (
    "count",
    "zeros",
    "nans",
    "infs",
    "amax",
    "amin",
    "min",
    "max",
    "sum",
    "sum_abs",
    "sum_squares",
    "sum_fourth_powers",
)


@dataclass(frozen=True)
class Sketch:
    """Summary of a tensor's values, as float32.

    `amin` is the smallest non-zero magnitude; extremes are of the finite elements. Where there is
    none, `amax` is 0, `amin` and `min` are infinity and `max` is -infinity. The histogram counts
    the finite elements that are not zero.
    """

    count: int
    zeros: int
    nans: int
    infs: int
    amax: float
    amin: float
    min: float
    max: float
    sum: float
    sum_abs: float
    sum_squares: float
    sum_fourth_powers: float
    histogram: NDArray[np.int64]

    @classmethod
    def from_vector(cls, vector: NDArray[np.float64]) -> Sketch:
        """From float64 [12 + 1024]: `SCALARS` in order, then the histogram."""
        values: dict[str, Any] = dict(zip(SCALARS, vector[: len(SCALARS)].tolist(), strict=True))
        for name in ("count", "zeros", "nans", "infs"):
            values[name] = int(values[name])
        return cls(**values, histogram=vector[len(SCALARS) :].astype(np.int64))

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both tensors together."""
        return Sketch(
            self.count + other.count,
            self.zeros + other.zeros,
            self.nans + other.nans,
            self.infs + other.infs,
            max(self.amax, other.amax),
            min(self.amin, other.amin),
            min(self.min, other.min),
            max(self.max, other.max),
            self.sum + other.sum,
            self.sum_abs + other.sum_abs,
            self.sum_squares + other.sum_squares,
            self.sum_fourth_powers + other.sum_fourth_powers,
            self.histogram + other.histogram,
        )

    @property
    def finite(self) -> int:
        """Number of finite elements."""
        return self.count - self.nans - self.infs

    def statistics(self) -> dict[str, float | int | list[int] | None]:
        """The columns of a tensor row that follow from the sketch; None where undefined."""
        n = self.finite
        row: dict[str, float | int | list[int] | None] = {
            "count": self.count,
            "zeros": self.zeros,
            "nans": self.nans,
            "infs": self.infs,
        }
        if n == 0:
            return row
        mean, mean_square = self.sum / n, self.sum_squares / n
        row |= {
            "cur_amax": self.amax,
            "min": self.min,
            "max": self.max,
            "mean": mean,
            "std": float(np.sqrt(max(mean_square - mean * mean, 0.0))),
            "l1_norm": self.sum_abs,
            "l2_norm": float(np.sqrt(self.sum_squares)),
        }
        if self.amax > 0:
            row["crest"] = self.amax / float(np.sqrt(mean_square))
            row["kurtosis"] = (self.sum_fourth_powers / n) / mean_square**2
            row["dynamic_range"] = float(np.log2(self.amax) - np.log2(self.amin))
            used = np.flatnonzero(self.histogram)
            row["histogram_start"] = int(used[0])
            row["histogram"] = self.histogram[used[0] : used[-1] + 1].tolist()
        return row


def bin_edge(index: int) -> float:
    """Lower edge of a histogram bin: the magnitude whose float32 bits are index · 2^21."""
    return float(np.array([index << 21], dtype=np.uint32).view(np.float32)[0])
