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

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
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
    picked = pd.concat([with_histogram[["step", "site"]], hot.iloc[[0, -1]][["step", "site"]]])
    picked["site"] = picked["site"].str.removesuffix(":product")
    return _frame("channels", run.reduced("channels", _at(picked)), TABLES["channels"].names)


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
        site = [_codes(chunk, rows) for chunk in piece["site"].chunks]
        return piece.filter(pa.array(is_wanted[np.concatenate(site), at])) if site else piece

    return pick


def _codes(chunk: pa.DictionaryArray, rows: dict[str, int]) -> NDArray[np.int64]:
    """The row of each site, the last one for those that are not wanted."""
    places = [rows.get(name, len(rows)) for name in chunk.dictionary.to_pylist()] + [len(rows)]
    found: NDArray[np.int64] = np.array(places)[chunk.indices.fill_null(len(places) - 1).to_numpy()]
    return found


def _frame(table: Table, pieces: list[pa.Table], names: list[str]) -> pd.DataFrame:
    """Pieces as `Run.tensors` and its like have them."""
    schema = pa.schema([TABLES[table].field(name) for name in names])
    rows = pa.concat_tables([schema.empty_table(), *(one.cast(schema) for one in pieces)])
    frame: pd.DataFrame = rows.to_pandas(split_blocks=True, self_destruct=True)
    if frame["step"].is_monotonic_increasing:
        return frame
    return frame.sort_values("step", kind="stable", ignore_index=True)
