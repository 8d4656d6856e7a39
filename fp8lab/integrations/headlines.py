"""Which of a step's scalars a dashboard shows.

`watch` hands its listeners every number of a recorded step: tens for each of four tensors of each
feed-forward. A dashboard with thousands of curves shows nothing, so the writers pass on a short
list, by statistic, and all that belongs to no site (loss, gradient norm, the caller's metrics).
The run directory keeps everything in any case. Rejected: patterns over whole names, because one
that matches nothing is silent; the names here are checked when the writer is made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fp8lab.monitor.statistics import check
from fp8lab.record import CHANNELS, TENSORS

HEADLINES = (
    "cur_amax",
    "staleness",
    "saturated",
    "flushed",
    "bulk_error",
    "kurtosis",
    "channel_ratio",
    "alignment",
    "amplification",
    "persistence",
)

_COLUMNS = {column.name for column in (*TENSORS, *CHANNELS)}


def checked(statistics: Collection[str]) -> frozenset[str]:
    """The statistics as a set. Raises ValueError for one that is neither a column nor one that a
    selection can name."""
    if isinstance(statistics, str):
        raise ValueError(f"statistics: {statistics!r}, expected a collection of names")
    names = frozenset(statistics)
    check(sorted(names - _COLUMNS))
    return names


def chosen(scalars: Mapping[str, float], statistics: frozenset[str]) -> dict[str, float]:
    """Of scalars such as `fp8lab/layers.3.mlp/product/cur_amax`, those with such a last part, and
    those of no site, such as `fp8lab/loss`."""
    return {
        name: value
        for name, value in scalars.items()
        if name.count("/") == 1 or name.rpartition("/")[2] in statistics
    }
