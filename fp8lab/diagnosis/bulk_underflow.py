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

The same channel can take the range one cast earlier, that of gate's or up's weight, whose row made
it hot: then all other rows become zero there, and so are the product's other channels before its
own cast, which has nothing left to lose. Its row shows no bulk error, and no channel ratio, for the
median is zero: all of the bulk is gone, and the channel that is left is the one.

Or one cast later. A product that is balanced channel by channel hands its range to the columns of
down's weight, and what one scale there loses of them is lost to the output all the same: with
channels 8.5e7 apart 99 % of that weight is zero, while the product's row is perfect. So the bulk
error is read of that weight as well. Its row knows the largest channel of the parameter and not of
what is cast, so the finding names none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from fp8lab.diagnosis.casts import forward_casts
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

# E4M3's own rounding is 0.027. Four times that: two octaves of mantissa are gone.
DAMAGED = 0.11
# Half of the bulk's signal is error; or, of a weight, half of its values.
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

# What down is called in the models at hand; elsewhere its weight is not looked at.
DOWN = r"(?:^|\.)down(?:_proj)?:weight$"

REMEDY = (
    "keep the product in BF16 (HighPrecisionProduct), or SmoothSwiGLU with a scale per block for "
    "down's weight, to which it moves the range"
)
REMEDY_OF_DOWN = (
    "keep the product in BF16 (HighPrecisionProduct) and its channels as they are, or give each "
    "block of down's weight a scale (MXFP8BlockScaling)"
)
REMEDY_OF_WEIGHT = (
    "keep the layer's weights and the product in BF16, or give each row a scale (RowwiseScaling)"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every scaled product, input or weight of down whose bulk error rose above
    `DAMAGED`, and every product whose bulk is gone with a weight's."""
    rows = forward_casts(run)
    own = rows["scale"].notna() & ~rows["cold"] & ~(rows["staleness"] < FRESH)
    is_weight = rows["site"].str.endswith(":weight")
    known = rows["bulk_error"].notna() & rows["hot_channel"].notna()
    fresh = rows[own & known & (~is_weight | rows["site"].str.contains(DOWN))]
    rows, weights = rows[own & ~is_weight], rows[own & is_weight & (rows["flushed"] >= LOST)]
    below_normal = fresh["flushed"] + fresh["subnormal"]
    is_hot = ~(fresh["channel_ratio"] < HOT)  # which is recorded of products
    damaged = fresh[(fresh["bulk_error"] > DAMAGED) & (below_normal > UNDERFLOWN) & is_hot]
    alarm = loss_alarm(run)
    found = _lasting(damaged, fresh, _judge, alarm)
    return found + _lasting(_emptied(rows, weights), rows, _judge_emptied, alarm)


def _lasting(
    damaged: pd.DataFrame,
    every: pd.DataFrame,
    judge: Callable[[str, pd.DataFrame], Finding],
    alarm: int | None,
) -> list[Finding]:
    found = []
    for site, of in damaged.groupby("site", observed=True):
        first = of["step"].iloc[0]
        since = every[(every["site"] == site) & (every["step"] >= first)]
        if len(of) > PERSISTENT * len(since):
            finding = judge(str(site), of)
            blown = alarm is not None and alarm - first <= BLOWN
            found.append(replace(finding, severity="low") if blown else finding)
    return found


def _emptied(rows: pd.DataFrame, weights: pd.DataFrame) -> pd.DataFrame:
    """The products whose median channel is zero (their largest channel has no ratio to it) in steps
    in which a weight that makes them was lost; with that weight as `weight` and its `lost`."""
    left = rows[rows["site"].str.endswith(":product") & rows["token_ratio"].notna()]
    left = left[left["channel_ratio"].isna() & left["hot_channel"].notna()]
    weights = weights.rename(columns={"site": "weight", "flushed": "lost", "depth": "cast"})
    pairs = left.merge(weights[["step", "weight", "lost", "cast"]], on="step")
    block = pairs["site"].str.removesuffix("product").str.replace(":", ".", regex=False)
    inside = [weight.startswith(name) for weight, name in zip(pairs["weight"], block, strict=True)]
    pairs = pairs[np.array(inside, dtype=bool) & (pairs["cast"] < pairs["depth"])]
    return pairs.drop_duplicates(["step", "site"])


def _judge_emptied(site: str, emptied: pd.DataFrame) -> Finding:
    first, channel = emptied.iloc[0], int(emptied["hot_channel"].iloc[0])
    return Finding(
        cause="bulk_underflow",
        summary=(
            f"channel {channel} takes the range already in the cast of {first['weight']}: "
            f"{first['lost']:.0%} of it became zero, and most channels of the product with it"
        ),
        severity="high",
        confidence="high",
        site=site,
        channel=channel,
        since=int(first["step"]),
        evidence=(
            Evidence(
                step=int(first["step"]),
                site=str(first["weight"]),
                quantity="flushed",
                value=float(first["lost"]),
                threshold=LOST,
                source="the majority of a weight; its product's median channel is zero",
            ),
        ),
        remedy=REMEDY_OF_WEIGHT,
        cannot_exclude="that these channels were dead before: the same run in BF16 tells",
    )


def _judge(site: str, damaged: pd.DataFrame) -> Finding:
    first = damaged.iloc[0]
    worst = damaged.nlargest(1, "bulk_error").iloc[0]
    lost = worst["bulk_error"] >= LOST
    ratio, is_weight = worst["channel_ratio"], site.endswith(":weight")
    channel = None if is_weight else int(worst["hot_channel"])
    size = "the largest" if pd.isna(ratio) else f"{ratio:.3g} times the median channel"
    what = "a column of the weight as it is cast" if is_weight else f"channel {channel}"
    return Finding(
        cause="bulk_underflow",
        summary=(
            f"{what} is {size} and takes the range: the others are cast with an error "
            f"of {worst['bulk_error']:.0%}, {worst['flushed']:.0%} of all values became zero"
        ),
        severity="high" if lost else "medium",
        confidence="high",
        site=site,
        channel=channel,
        since=int(first["step"]),
        evidence=(_evidence(first, DAMAGED), _evidence(worst, LOST if lost else DAMAGED)),
        remedy=REMEDY_OF_DOWN if is_weight else REMEDY,
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
