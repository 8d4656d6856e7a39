"""Which rows of a run a page looks at more closely: by rules that it states, never by eye.

Rejected: leaving the choice to each picture. A static one and the chart that takes its place would
soon show different rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from fp8lab import formats
from fp8lab.report.story import Arm, Part, Place, Seen


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


class DoseRows(NamedTuple):
    """Of a dose response the arms that have one, what their runs measured at each `dose`, and the
    rows of the product at `site`, each with its `arm`, `run` and `dose`."""

    site: str
    arms: list[Arm]
    measured: pd.DataFrame
    cast: pd.DataFrame


def dose_rows(part: Part) -> DoseRows:
    """The product is that of the layer in which a run's channel stands out most."""
    arms = [arm for arm in part.arms if any(run.doses for run in arm.runs)]
    first = next(run for run in part.runs if run.doses)
    ratios = first.products.dropna(subset="channel_ratio")
    site = "" if ratios.empty else str(ratios.nlargest(1, "channel_ratio").iloc[0]["site"])
    results, casts = [], []
    for arm in arms:
        for run in arm.runs:
            results.append(pd.DataFrame(run.doses).assign(arm=arm.name, run=run.label))
            rows = run.products[run.products["site"] == site]
            steps = run.steps.reindex(columns=["step", "dose"])  # a damaged run may lack them
            joined = rows.merge(steps.dropna(), on="step") if len(rows) else rows
            casts.append(joined.assign(arm=arm.name, run=run.label))
    return DoseRows(site, arms, pd.concat(results), pd.concat(casts))


def ranged_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that hold a histogram, and a scale that is the product's own: amax / staleness is then
    the magnitude that the scale maps to the format's largest. With a scale a channel it is not,
    and of a format that has an unknown name it cannot be told."""
    rows = rows[rows["histogram"].notna() & rows["format"].notna() & (rows["scale"] > 0)]
    known = {k: one for k, one in vars(formats).items() if isinstance(one, formats.FloatFormat)}
    largest = rows["format"].map({name: one.max for name, one in known.items()}).astype(float)
    off = rows["cur_amax"] / rows["staleness"] * rows["scale"] / largest - 1.0
    return rows[off.abs() < 1e-3]
