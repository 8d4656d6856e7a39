"""Cause: one hot channel sets the scale of an operand, and the other channels underflow.

One scale has to serve the whole tensor. Where a channel's amax is R times the typical one, the
typical channel is left with log2(R) octaves less of the format: in E4M3 it meets the subnormals at
R = 448 / 2^-6 = 28,672 and zero at 448 / 2^-9 = 229,376. The output error hides it, because the hot
channel dominates the output: 3.5 % beside a bulk error of 22 %. So the rule reads the bulk error:
the relative error of the cast without the channels beyond 16 times the median amax. It is read of
gate products, where hot channels are made, and of inputs, into which they are carried.

What contradicts: a bulk error at the format's floor (2.7 % for E4M3), however large the amax;
values that are neither flushed nor subnormal (then the bulk is wrong for another reason, clipping);
a scale that is of another time (`stale_scale`) or 1 (`cold_start`); and a damage that comes and
goes: a channel stays hot, a token does not (`token_outlier`).
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from fp8lab.diagnosis.casts import forward_casts
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

# E4M3's own rounding is 0.027. Four times that: two octaves of mantissa are gone.
DAMAGED = 0.11
# Half of the bulk's signal is error.
LOST = 0.5
# Share of the elements that must be below the format's normal range.
UNDERFLOWN = 0.2
# What the bulk error leaves out is an outlier by the same measure (measure.OUTLIER_CHANNEL).
HOT = 16.0
# The scale is that of this step, but for three octaves.
FRESH = 1 / 8
# Damaged steps, of all recorded since the first: more than a token in every other step.
PERSISTENT = 0.5
# So few steps before the loss tells, a hot channel is what blew up and not why.
BLOWN = 3

REMEDY = "SmoothSwiGLU, or keep the product in BF16: both treat the channels apart"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every scaled product or input whose bulk error rose above `DAMAGED`."""
    rows = forward_casts(run)
    rows = rows[~rows["site"].str.endswith(":weight") & rows["scale"].notna()]
    fresh = rows[~rows["cold"] & ~(rows["staleness"] < FRESH)]
    fresh = fresh.dropna(subset=["bulk_error", "hot_channel"])
    below_normal = fresh["flushed"] + fresh["subnormal"]
    is_hot = ~(fresh["channel_ratio"] < HOT)  # which is recorded of products
    damaged = fresh[(fresh["bulk_error"] > DAMAGED) & (below_normal > UNDERFLOWN) & is_hot]
    found, alarm = [], loss_alarm(run)
    for site, of in damaged.groupby("site"):
        since = fresh[(fresh["site"] == site) & (fresh["step"] >= of["step"].iloc[0])]
        if len(of) > PERSISTENT * len(since):
            finding = _judge(str(site), of)
            blown = alarm is not None and alarm - of["step"].iloc[0] <= BLOWN
            found.append(replace(finding, severity="low") if blown else finding)
    return found


def _judge(site: str, damaged: pd.DataFrame) -> Finding:
    first = damaged.iloc[0]
    worst = damaged.nlargest(1, "bulk_error").iloc[0]
    lost = worst["bulk_error"] >= LOST
    channel = int(worst["hot_channel"])
    ratio = worst["channel_ratio"]
    size = "the largest" if pd.isna(ratio) else f"{ratio:.3g} times the median channel"
    return Finding(
        cause="bulk_underflow",
        summary=(
            f"channel {channel} is {size} and takes the range: the others are cast with an error "
            f"of {worst['bulk_error']:.0%}, {worst['flushed']:.0%} of all values became zero"
        ),
        severity="high" if lost else "medium",
        confidence="high",
        site=site,
        channel=channel,
        since=int(first["step"]),
        evidence=(_evidence(first, DAMAGED), _evidence(worst, LOST if lost else DAMAGED)),
        remedy=REMEDY,
        cannot_exclude=(
            "that the hot channel alone carries the output and the rest is idle: the loss of the "
            "same run with the operand in BF16 decides"
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
