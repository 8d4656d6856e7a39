"""Cause: MX scales are rounded down, and the largest of every fifth block are clipped.

With OCP's own rule the shared exponent is that of the block's largest value, rounded down. E4M3
ends at 1.75 of its last power of two, so a block whose largest value has a mantissa above 1.75 is
clipped, by up to an eighth: one block in five, whatever the tensor. The error is always towards
zero and always of the largest values, so it does not average out; the MX reports that train well
round up (2506.08027), and the instabilities of 2506.20752 grow from such a bias.

Seen: an operand under MXFP8 with any saturated element at all. Scales that are rounded up are the
smallest at which nothing saturates: there the share is exactly 0. It is there from the first step
under that recipe on, and in every operand that has it, for it is the recipe's doing.

Told from `shared_exponent`, where the tensor is at fault: there the cast eats what the values
differ by (collapse at its threshold or above). Such operands are left out here, and where there is
one, what the floor does to the ordinary ones beside it is a note. So is what a layer does that says
it rounds its scales to even: that clips as few blocks by a tenth at most, and trains as BF16 does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fp8lab.diagnosis.rows import Rows, facts_of
from fp8lab.diagnosis.shared_exponent import COLLAPSED, mx_rows
from fp8lab.record import Evidence, Finding

# FP8-LM's rule (2310.18313); normal numbers have 0.008, rounded to even 0.005, rounded up 0.
SATURATED = 1e-5
STEPS = 2
# Relative error of the cast: twice what E4M3's rounding costs normal numbers.
HARMFUL = 0.0532
# It sets in where nothing had been clipped for so many steps, and is from then on; where a tensor
# comes to be clipped by and by, with two thirds of what its upper quartile of steps has.
NONE_BEFORE, SET_IN = 3, 2 / 3

REMEDY = "scale_rounding='up', which TE and cuBLAS use and at which nothing saturates"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for the run, at the operand that is clipped most."""
    rows = mx_rows(run)
    clustered = rows.loc[rows["collapse"] >= COLLAPSED, "site"].unique()
    clipped = rows[(rows["saturated"] > SATURATED) & ~rows["site"].isin(clustered)]
    counts = clipped.groupby("site", observed=True)["step"].transform("size")
    clipped = clipped[counts >= STEPS]
    is_note = len(clustered) > 0 or _says_even(run.info)
    return [_judge(clipped, rows, is_note)] if len(clipped) else []


def _says_even(info: dict[str, Any]) -> bool:
    layers = facts_of(info, "precision").values()
    return any("scales rounded even" in str(uses) for uses in layers)


def _set_in(clipped: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    first = clipped.iloc[0]
    before = rows[rows["step"] < first["step"]]
    if len(before) >= NONE_BEFORE and len(clipped) == len(rows) - len(before):
        return first  # exactly none, then always some: the scales are rounded another way
    level = SET_IN * clipped["saturated"].quantile(0.75)
    return clipped[clipped["saturated"] >= level].iloc[0]


def _judge(clipped: pd.DataFrame, rows: pd.DataFrame, is_note: bool) -> Finding:
    mean = clipped.groupby("site", observed=True)["saturated"].mean()
    site = str(mean.idxmax())
    of_site = clipped[clipped["site"] == site]
    first = _set_in(of_site, rows[rows["site"] == site])
    worst = of_site.nlargest(1, "saturated").iloc[0]
    error = float(np.sqrt(worst["mse"] * worst["count"]) / worst["l2_norm"])
    return Finding(
        cause="floor_saturation",
        summary=(
            f"{len(mean)} operands under MX scales are clipped in the largest values of their "
            f"blocks, {mean[site]:.2%} of this one's elements: the scales are rounded down; "
            f"its cast is off by {error:.1%}, of which rounding is 2.7%"
        ),
        severity="low" if is_note else "high" if error >= HARMFUL else "medium",
        confidence="high",
        site=site,
        since=int(first["step"]),
        evidence=(_evidence(first), _evidence(worst)),
        remedy=REMEDY,
        cannot_exclude="that the training tolerates it: the same run with scales rounded up tells",
    )


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="saturated under a scale made just in time",
        value=float(row["saturated"]),
        threshold=SATURATED,
        source="scales that are rounded up give exactly 0",
    )
