"""Cause: now and then one token is far larger than all others, and takes the range in that step.

One scale has to serve the whole tensor. A hot channel takes the range in every step and is cured by
channels that are treated apart (`bulk_underflow`); a hot token takes it in single steps, in every
channel that it reaches, and is cured by a scale for each row. Under a scale made just in time the
majority of what is not zero becomes zero in that step: the other tokens are gone. Under a delayed
scale the token itself is clipped, and what it leaves behind is a scale that is too small for the
steps after it: that is `stale_scale`.

What must be seen: a majority that is flushed although the scale is that of this very step, while
the ratio of the largest token to the median one stands out, and an amax far above that of most
steps since the first (a hot channel is as hot in most); or an input that a delayed scale clips in
such a step. What is named is what runs first among what happened first: what is behind it gets the
same token.

What contradicts: a token ratio as always (the batch as a whole is larger, or a channel is hot); a
product whose input does not jump and whose delayed scale clips it (`delayed_saturation`). The ratio
is that of the 99.9th percentile: among more than two thousand tokens one alone does not show in it,
and then nothing is said.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.casts import clipped, follows_product, forward_casts
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding

# The majority of what was not zero becomes zero.
FLUSHED = 0.5
# The scale is that of this step, but for three octaves.
FRESH = 1 / 8
# Of the token among tokens, and of its step among steps: what it takes to flush a typical token.
# From amax to the smallest normal number E4M3 has 14.8 octaves, of which the typical token's own
# values take some four.
TOKEN_RATIO = 2.0**10

REMEDY = (
    "a scale for each token (RowwiseScaling) or block (MXFP8BlockScaling); "
    "keep the operand in BF16; look at what the token is"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """At most one finding: where the token is first seen."""
    rows = forward_casts(run)
    rows = rows[~rows["site"].str.endswith(":weight") & rows["hot_channel"].notna()]
    is_product = rows["site"].str.endswith(":product")
    fresh = ~rows["cold"] & ~(rows["staleness"] < FRESH) & ~(rows["staleness"] > CLIPPED_STALENESS)
    # Products alone have a token ratio.
    flushed = rows[fresh & (rows["flushed"] >= FLUSHED) & ~(rows["token_ratio"] < TOKEN_RATIO)]
    flushed = flushed[flushed["by_token"]]
    cut_off = clipped(rows[~is_product & rows["by_token"]])
    found = [_of_single_steps(of, rows) for _, of in flushed.groupby("site", observed=True)]
    cut_off = cut_off[~follows_product(cut_off, rows)]
    found += [of for _, of in cut_off.groupby("site", observed=True)]
    found = [of for of in found if len(of)]
    if not found:
        return []
    first = min(found, key=lambda of: (of["step"].iloc[0], of["depth"].iloc[0]))
    return [_judge(first)]


def _of_single_steps(flushed: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Those whose amax stands out of the steps since the first as the token does of the others."""
    rows = rows[rows["site"] == flushed["site"].iloc[0]]
    usual = rows.loc[rows["step"] >= flushed["step"].iloc[0], "cur_amax"].median()
    single: pd.DataFrame = flushed[flushed["cur_amax"] >= TOKEN_RATIO * usual]
    return single


def _judge(affected: pd.DataFrame) -> Finding:
    first, site = affected.iloc[0], str(affected["site"].iloc[0])
    is_clipped = first["staleness"] > CLIPPED_STALENESS
    what = "clipped by its delayed scale" if is_clipped else "the only one that the scale is for"
    summary = f"in {len(affected)} single steps one token is far larger than all others and {what}"
    if not is_clipped:
        summary += f": {affected['flushed'].max():.0%} of what is not zero became zero"
    lost = (affected["flushed"] >= FLUSHED).sum() > 1
    quantity, threshold = ("staleness", CLIPPED_STALENESS) if is_clipped else ("flushed", FLUSHED)
    evidence = [
        Evidence(
            step=int(row["step"]),
            site=site,
            quantity=quantity,
            value=float(row[quantity]),
            threshold=threshold,
            source="more than an octave" if is_clipped else "the majority",
        )
        for _, row in affected.iloc[[0, -1]].iterrows()
    ]
    if pd.notna(first["token_ratio"]):
        evidence.append(
            Evidence(
                step=int(first["step"]),
                site=site,
                quantity="token_ratio",
                value=float(first["token_ratio"]),
                threshold=TOKEN_RATIO,
                source="E4M3 has 14.8 octaves of normal numbers",
            )
        )
    return Finding(
        cause="token_outlier",
        summary=summary,
        severity="high" if lost else "medium",
        confidence="medium" if is_clipped else "high",
        site=site,
        channel=int(first["hot_channel"]),
        since=int(first["step"]),
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude="that these steps are bad data: look at the token before treating it",
    )
