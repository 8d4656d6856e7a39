"""What a page holds of a run that is longer than any page is wide.

The numbers of a gate product are a few hundred bytes a row and are read whole: a million rows of
eighty layers are some 300 MB. Its histogram is twice that and the rows of its channels are ten
times as many, and no picture shows more than some hundred steps of either. So the steps are cut
into `STRETCHES`, and in each stretch a product has its histogram and its channels in the steps in
which its amax, its staleness or its bulk error is largest, and at both ends of the run. What is
extreme is shown; what is left out lies between. A run of at most three steps a stretch is whole.

Files are read a piece at a time, of which the rows that were picked stay: memory goes with what is
shown, time with what was recorded. Rejected: every n-th step, which misses the one that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fp8lab.record import TABLES, Table
from fp8lab.runs import Run, hottest

STRETCHES = 200
PEAKS = ("cur_amax", "staleness", "bulk_error")
# A list, a byte string and a map in each row.
_HEAVY = ("histogram", "bins", "statistics")
_KEYS = ["step", "rank", "site"]


def products(run: Run) -> pd.DataFrame:
    """Tensor rows of the gate products, with the histograms of `extremes`."""
    numbers = [name for name in TABLES["tensors"].names if name not in _HEAVY]
    rows = hottest(run.coded("tensors", numbers, sites="*:product"))
    picked = extremes(rows)
    kept = run.reduced("tensors", _at(picked), ("histogram",), sites="*:product")
    found = _frame("tensors", kept, [*_KEYS, "histogram"])
    wanted = picked[_KEYS].astype({"site": found["site"].dtype}).reset_index()
    found = wanted.merge(found.drop_duplicates(_KEYS), on=_KEYS)
    histogram = pd.Series(None, index=rows.index, dtype=object)
    histogram.loc[found["index"]] = found["histogram"].to_numpy(object)
    rows = rows.assign(histogram=histogram)
    texts = rows.columns[rows.dtypes == "category"]
    return rows.astype({name: rows[name].cat.categories.dtype for name in texts})


def extremes(products: pd.DataFrame) -> pd.DataFrame:
    """Of rows that were recorded in full, those that a page looks at more closely."""
    full = products[products["histogram_start"].notna()]
    known = np.unique(full["step"])
    if len(known) <= len(PEAKS) * STRETCHES:
        return full
    stretch = np.searchsorted(known, full["step"]) * STRETCHES // len(known)
    picked = [full.index[full["step"].isin(known[[0, -1]])]]
    for name in PEAKS:
        rows = full.assign(stretch=stretch).dropna(subset=name)
        largest = rows.groupby(["site", "stretch"], observed=True)[name].idxmax()
        picked.append(pd.Index(largest))
    return full.loc[np.unique(np.concatenate(picked))]


def channels(run: Run, products: pd.DataFrame, looked_at: tuple[str, int] | None) -> pd.DataFrame:
    """Channel rows of the steps in which the product has a histogram.

    Of the product and channel that are `looked_at`, the largest product and its hottest channel
    unless told, also the first and the last step in which that channel was the hottest.
    """
    full = products[products["histogram_start"].notna()]
    with_histogram = products[products["histogram"].notna()]
    if len(with_histogram) == len(full):
        return run.channels()
    if looked_at is None:
        largest = with_histogram.nlargest(1, "cur_amax")
    else:
        largest = pd.DataFrame([looked_at], columns=["site", "hot_channel"])
    hot = full.merge(largest[["site", "hot_channel"]], on=["site", "hot_channel"])
    ends = hot.iloc[[0, -1] if len(hot) else []]
    picked = pd.concat([with_histogram[["step", "site"]], ends[["step", "site"]]])
    picked["site"] = picked["site"].str.removesuffix(":product")
    return _frame("channels", run.reduced("channels", _at(picked)), TABLES["channels"].names)


def worst(
    run: Run, statistics: Mapping[str, bool], most: int
) -> dict[str, tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]]:
    """Of each statistic that was recorded, the worst of at most `most` stretches of steps.

    `statistics` tells of each whether its smallest is the worst. Returned are the first step of
    each stretch that has it, int64 [stretches], and by site a value a stretch, NaN where it has
    none. All statistics are read at once, rows of all processes together (rank -1) left out.
    """
    keys = run.reduced("tensors", _steps_and_sites, ())
    known = np.unique(np.concatenate([np.array([], np.int64), *(steps for steps, _ in keys)]))
    rows = {site: row for row, site in enumerate(dict.fromkeys(s for _, of in keys for s in of))}
    if not len(known):
        return {}
    count = min(most, len(known))
    starts = known[[part[0] for part in np.array_split(np.arange(len(known)), count)]]
    # The last row is that of sites that a run still going on has gained since.
    values = {name: np.full((len(rows) + 1) * count, np.nan) for name in statistics}
    since = {name: np.full(count, known[-1]) for name in statistics}

    def fold(piece: pa.Table) -> None:  # what is folded in once more changes nothing
        piece = piece.filter(pa.compute.greater_equal(piece["rank"], 0))
        steps = piece["step"].to_numpy()
        stretch = np.searchsorted(starts, steps, side="right") - 1
        place = _rows_of(piece, rows) * count + stretch
        for name, low_is_bad in statistics.items():
            numbers = piece[name].to_numpy().astype(float)
            at = np.flatnonzero(~np.isnan(numbers))
            pick = np.fmin if low_is_bad else np.fmax
            pick.at(values[name], place[at], numbers[at])
            np.minimum.at(since[name], stretch[at], steps[at])

    run.reduced("tensors", fold, tuple(statistics))
    found = {}
    for name, flat in values.items():
        table = flat.reshape(-1, count)[: len(rows)]
        known_at = ~np.isnan(table)
        told = np.flatnonzero(known_at.any(axis=0))
        by_site = {s: table[r, told] for s, r in rows.items() if known_at[r].any()}
        if by_site:
            found[name] = since[name][told], by_site
    return found


def _steps_and_sites(piece: pa.Table) -> tuple[NDArray[np.int64], list[str]]:
    chunks = piece["site"].chunks
    names = dict.fromkeys(name for chunk in chunks for name in chunk.dictionary.to_pylist())
    return np.unique(piece["step"].to_numpy()), list(names)


def _at(picked: pd.DataFrame) -> Callable[[pa.Table], pa.Table]:
    """Of a piece, the rows of the steps and sites of `picked`."""
    known, step_of = np.unique(picked["step"], return_inverse=True)
    site_of, names = pd.factorize(picked["site"])
    is_wanted = np.zeros((len(names) + 1, len(known) + 1), dtype=bool)  # the last are all others
    is_wanted[site_of, step_of] = True
    rows = {str(name): row for row, name in enumerate(names)}

    def pick(piece: pa.Table) -> pa.Table:
        steps = piece["step"].to_numpy()
        at = np.searchsorted(known, steps)
        at[np.append(known, 0)[at] != steps] = len(known)
        return piece.filter(pa.array(is_wanted[_rows_of(piece, rows), at]))

    return pick


def _rows_of(piece: pa.Table, rows: Mapping[str, int]) -> NDArray[np.int64]:
    """The row of each row's site, the last one for those that have none."""
    found = [np.array([], np.int64)]
    for chunk in piece["site"].chunks:
        places = [rows.get(name, len(rows)) for name in chunk.dictionary.to_pylist()] + [len(rows)]
        found.append(np.array(places)[chunk.indices.fill_null(len(places) - 1).to_numpy()])
    return np.concatenate(found)


def _frame(table: Table, pieces: list[pa.Table], names: list[str]) -> pd.DataFrame:
    """Pieces as `Run.tensors` and its like have them."""
    schema = pa.schema([TABLES[table].field(name) for name in names])
    rows = pa.concat_tables([schema.empty_table(), *(one.cast(schema) for one in pieces)])
    frame: pd.DataFrame = rows.to_pandas(split_blocks=True, self_destruct=True)
    if frame["step"].is_monotonic_increasing:
        return frame
    return frame.sort_values("step", kind="stable", ignore_index=True)
