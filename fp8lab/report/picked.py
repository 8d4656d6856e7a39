"""Which rows of a run a page looks at more closely: by rules that it states, never by eye.

Rejected: leaving the choice to each picture. A static one and the chart that takes its place would
soon show different rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from fp8lab import formats
from fp8lab.report.story import Place, Seen


def weight_rows(run: Seen, place: Place) -> list[pd.Series]:
    """The first and the last channel row that holds the place's weights; one or none if fewer."""
    rows = run.channels[
        (run.channels["site"] == place.module)
        & (run.channels["channel"] == place.channel)
        & run.channels["gate_weights"].notna()
        & run.channels["up_weights"].notna()
        & run.channels["alignment"].notna()  # weights that are numbers
    ]
    picked = [0, len(rows) - 1] if len(rows) > 1 else range(len(rows))
    return [rows.iloc[position] for position in picked]


def clipped_row(run: Seen, place: Place) -> pd.Series | None:
    """The histogram recorded where the scale in force was most stale."""
    rows = ranged_rows(run.products[run.products["site"] == place.site])
    return None if rows.empty else rows.nlargest(1, "staleness").iloc[0]


def starved_row(runs: Iterable[Seen]) -> tuple[Seen, pd.Series] | None:
    """The histogram with the largest bulk error under a scale that was made just in time."""
    best: tuple[Seen, pd.Series] | None = None
    for run in runs:
        rows = ranged_rows(run.products).dropna(subset="bulk_error")
        rows = rows[rows["recipe"] == "Float8CurrentScaling"]
        if len(rows):
            row = rows.nlargest(1, "bulk_error").iloc[0]
            if best is None or row["bulk_error"] > best[1]["bulk_error"]:
                best = run, row
    return best


def ranged_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that hold a histogram, and a scale that is the product's own: amax / staleness is then
    the magnitude that the scale maps to the format's largest. With a scale a channel it is not,
    and of a format that has an unknown name it cannot be told."""
    rows = rows[rows["histogram"].notna() & rows["format"].notna() & (rows["scale"] > 0)]
    known = {k: one for k, one in vars(formats).items() if isinstance(one, formats.FloatFormat)}
    largest = rows["format"].map({name: one.max for name, one in known.items()}).astype(float)
    off = rows["cur_amax"] / rows["staleness"] * rows["scale"] / largest - 1.0
    return rows[off.abs() < 1e-3]
