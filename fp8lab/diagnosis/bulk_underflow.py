"""Cause: one hot channel sets the scale of the gate product, and the other channels underflow.

One scale has to serve the whole tensor. Where a channel's amax is R times the typical one, the
typical channel is left with log2(R) octaves less of the format: in E4M3 it meets the subnormals at
R = 448 / 2^-6 = 28,672 and zero at 448 / 2^-9 = 229,376. The output error hides it, because the hot
channel dominates the output: 3.5 % beside a bulk error of 22 %. So the rule reads the bulk error:
the relative error of the cast without the channels beyond 16 times the median amax.

What contradicts: a bulk error at the format's floor (2.7 % for E4M3), however large the amax; and
values that are neither flushed nor subnormal: then the bulk is wrong for another reason, clipping.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding
from fp8lab.runs import hottest

# E4M3's own rounding is 0.027. Four times that: two octaves of mantissa are gone.
DAMAGED = 0.11
# Half of the bulk's signal is error.
LOST = 0.5
# Share of the elements that must be below the format's normal range.
UNDERFLOWN = 0.2

REMEDY = "SmoothSwiGLU, or keep the product in BF16: both treat the channels apart"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every scaled gate product whose bulk error rose above `DAMAGED`."""
    tensors = run.tensors()
    products = tensors[
        tensors["site"].str.endswith(":product", na=False) & tensors["scale"].notna()
    ]
    below_normal = products["flushed"] + products["subnormal"]
    damaged = products[(products["bulk_error"] > DAMAGED) & (below_normal > UNDERFLOWN)]
    damaged = hottest(damaged.dropna(subset=["hot_channel", "channel_ratio"]))
    return [_judge(str(site), rows) for site, rows in damaged.groupby("site")]


def _judge(site: str, damaged: pd.DataFrame) -> Finding:
    first = damaged.iloc[0]
    worst = damaged.nlargest(1, "bulk_error").iloc[0]
    lost = worst["bulk_error"] >= LOST
    return Finding(
        cause="bulk_underflow",
        summary=(
            f"channel {int(worst['hot_channel'])} is {worst['channel_ratio']:.3g} times the median "
            f"channel and takes the range: the others are cast with an error of "
            f"{worst['bulk_error']:.0%}, {worst['flushed']:.0%} of all values became zero"
        ),
        severity="high" if lost else "medium",
        confidence="high",
        site=site,
        channel=int(worst["hot_channel"]),
        since=int(first["step"]),
        evidence=(_evidence(first, DAMAGED), _evidence(worst, LOST if lost else DAMAGED)),
        remedy=REMEDY,
        cannot_exclude=(
            "that the hot channel alone carries the output and the rest is idle: the loss of the "
            "same run with the product in BF16 decides"
        ),
    )


def _evidence(row: pd.Series, threshold: float) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="bulk_error",
        value=float(row["bulk_error"]),
        threshold=threshold,
        source="E4M3's own rounding error is 0.027",
    )
