"""Cause: values that cluster tightly share an exponent and a code, and their differences are gone.

The 32 values of an MX block share one exponent, and each has three bits of mantissa. Values that
differ by many octaves lose nothing that way. Values that lie close together (LayerNorm-like weights
around 1, decay factors below it) fall on one or two codes: what told them apart is lost, and stays
lost, for an update that moves them by less than a code changes nothing. Where the exponent is
rounded down (the OCP floor) and the cluster lies above 1.75 of a power of two, the whole block is
clipped into the last code (2506.20752, their "last bin"). The relative error hides it: it is a few
per cent, as that of any cast, but all in one direction.

So the error is held against what the values vary by: `collapse` = mean squared error of the cast /
variance of the magnitudes, from one row's mse, l1_norm, l2_norm and count. Zero means that all
differences survive, 1 that the cast is as good as replacing all by their mean magnitude. It counts
where the relative error too is what rounding costs or more, and sets in before: a cluster that
contracts onto a code is off by less than rounding until it has left the code.

Told from `floor_saturation`: that is the recipe's doing and hits the few largest of every block of
every operand, ordinary ones: collapse 0.002 for normal numbers, up to 0.01 for uniform ones, 0.1
for a saturated tanh, at a floor that clips 0.5 to 60 % of them. This is the tensor's doing, is
there without any saturation too, and stays in this operand. What contradicts: a collapse below the
threshold, whatever saturates.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.rows import Rows, once
from fp8lab.record import Evidence, Finding
from fp8lab.runs import hottest

MX = "MXFP8BlockScaling"
# A quarter of the variation. Measured: magnitudes that spread by 5 % of their mean have 0.17 to
# 0.75, by 2 % 0.8 to 15, ordinary tensors (see above) at most 0.1.
COLLAPSED = 0.25
# Nothing is left of it.
LOST = 1.0
# Relative error of the cast: E4M3's own, of normal numbers. Values that lie on a code, such as
# gains that are still near 1, collapse on it too and lose next to nothing.
ROUNDING = 0.0266
STEPS = 2
# Where most of the values are ever clipped, it sets in there.
MOST = 0.5

REMEDY = (
    "keep this operand in BF16, or cast its difference from 1 (weights as 1 + w); for a floor that "
    "clips: round scales up (scale_rounding='up')"
)


def collapse_of(rows: pd.DataFrame) -> pd.Series:
    """mse / variance of the magnitudes of tensor rows; NaN where a number is missing or nothing
    varies."""
    count = rows["count"].where(rows["count"] > 0)
    mean, power = rows["l1_norm"] / count, rows["l2_norm"] ** 2 / count
    variance = power - mean**2
    # What is left of the difference of two sums of float64 that are equal but for rounding.
    varies = variance > 1e-12 * power
    return (rows["mse"] / variance).where(varies, np.nan)


COLUMNS = ("cur_amax", "recipe", "count", "l1_norm", "l2_norm", "mse", "saturated")
SITES = ("*:input", "*:weight", "*:grad_output")


@once
def mx_rows(run: Rows) -> pd.DataFrame:
    """Of the operands in an MX format a row a step and site, with their `collapse_of`."""
    rows = run.tensors(COLUMNS, sites=SITES)
    rows = hottest(rows[rows["recipe"] == MX])
    return rows.assign(collapse=collapse_of(rows))


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every MX operand that loses `COLLAPSED` of its variation in its cast."""
    rows = mx_rows(run)
    error = np.sqrt(rows["mse"] * rows["count"]) / rows["l2_norm"]
    lost = rows[(rows["collapse"] >= COLLAPSED) & (error >= ROUNDING)]
    return [
        _judge(str(site), found, rows[rows["site"] == site])
        for site, found in lost.groupby("site", observed=True)
        if len(found) >= STEPS
    ]


def _set_in(found: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """The first of the steps without a break up to the first found in which most was clipped; if
    none ever was, the first found."""
    clipped = found[found["saturated"] >= MOST]
    if clipped.empty:
        return found.iloc[0]
    since = clipped["step"].iloc[0]
    other = (rows["collapse"] < COLLAPSED) | (rows["saturated"] < MOST)
    other_before = rows.loc[other & (rows["step"] < since), "step"].max()
    return rows[rows["step"] > other_before].iloc[0] if pd.notna(other_before) else rows.iloc[0]


def _judge(site: str, found: pd.DataFrame, rows: pd.DataFrame) -> Finding:
    first = _set_in(found, rows)
    worst = found.nlargest(1, "collapse").iloc[0]
    bad = bool(worst["collapse"] >= LOST)
    mean = worst["l1_norm"] / worst["count"]
    spread = float(np.sqrt(worst["l2_norm"] ** 2 / worst["count"] / mean**2 - 1.0))
    summary = (
        f"the magnitudes of this operand lie within {spread:.1%} of {mean:.3g}; the cast costs "
        f"{worst['collapse']:.3g} times what they vary by"
    )
    if worst["saturated"] > 0:
        summary += f", and clips {worst['saturated']:.0%} of them into the last code"
    return Finding(
        cause="shared_exponent",
        summary=summary,
        severity="high" if bad else "medium",
        confidence="high",
        site=site,
        since=int(first["step"]),
        evidence=(_evidence(first, COLLAPSED), _evidence(worst, LOST if bad else COLLAPSED)),
        remedy=REMEDY,
        cannot_exclude=(
            "that only the common value matters and not what the values differ by: the same run "
            "with this operand in BF16 decides"
        ),
    )


def _evidence(row: pd.Series, threshold: float) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="mean squared error of the cast / variance of the magnitudes",
        value=float(row["collapse"]),
        threshold=threshold,
        source="ordinary tensors 0.001 to 0.1, measured",
    )
