"""When a number that has become too large began to grow.

A threshold says that something is wrong; it is crossed late. The onset is the step after the last
one at which the number was still ordinary: at most three times the median of all steps until then,
or at most a mark below which every one is. Three, because what grows in proportion to time, as much
does in a healthy training, is at twice that median, and what grows exponentially soon is not.

Also here: the spread of a noisy number, by medians, which one outlier among ten does not move.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

DEPARTED = 3.0
# A normal distribution's standard deviation / its median absolute deviation.
NORMAL = 1.4826


def departure(values: Numbers, crossed: int, mark: float = 0.0) -> int:
    """Position from which on `values` [steps] were not ordinary any more, up to `crossed`."""
    before = pd.Series(values[: crossed + 1], dtype=float)
    ordinary = before <= np.maximum(DEPARTED * before.expanding().median(), mark)
    last = np.flatnonzero(ordinary.to_numpy()[:crossed])
    return int(last[-1]) + 1 if len(last) else 0


def spread(values: Numbers) -> float:
    """The standard deviation of most of them, as if they were normal; 0 of nothing."""
    if not len(values):
        return 0.0
    return float(NORMAL * np.median(np.abs(values - np.median(values))))
