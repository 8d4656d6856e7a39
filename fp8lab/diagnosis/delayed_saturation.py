"""Cause: a delayed scale clips the gate product, and what grows behind the clipping.

A delayed scale was made by the largest product of the last steps. A rare input that makes the
product jump meets a scale that is too large, and everything beyond the format's largest value is
cut off. That alone costs accuracy, in single steps. What kills is the wind-up: while the product is
clipped the output does not answer to gate and up, the straight-through gradient pushes them on,
and the product of the clipped steps grows, until one of them falls inside the history, is not
clipped, and lets all of it loose. The channel in which that happens has a gate row and an up row
that point the same way, or opposite ways.

Seen first: staleness (amax / the amax that made the scale in force) above 2, in single steps. Then
the amax of the clipped steps runs away from what it was before, while that of the others does not.
What contradicts a wind-up: clipped steps that stay on one level, as with anti-wind-up. The
staleness itself does not tell the two apart: runs at a small learning rate sit at 4 to 14 and
survive. Where little growth is enough, the loss tells soon after a clipped step: then it is as bad,
but less sure. Clipping to less than a quarter is a note.

Not meant, and left to others: products that are clipped because their input jumps in the same step
(`stale_scale`, `token_outlier`), and the first step of a scale (`cold_start`). Here the jump begins
in the multiplication.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.casts import clipped, comes_from_input, forward_casts
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows, of_channels
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding, Severity

# The product is quadratic in the two rows: two octaves are one octave of growth in each. In the
# rare-token experiment, seeds 0 to 9, 14 of the 20 runs that diverged reached 4.2 to 334 and six
# stayed at 2.5 to 3.2; the nine that were clipped and survived, by anti-wind-up, at 1.0 to 2.5.
WOUND_UP_GROWTH = 4.0

# So many steps around a clipped one say what is usual there.
AROUND = 11

# Clipped to a quarter, 30 % of the operand is error (facts of saturation); below, steps like that
# come in healthy trainings, whose product grows fast at the start.
HARMFUL = 4.0

# A loss that tells later than this after a clipped step is not blamed on it. About three times the
# history of the experiment, in which the last clipped event before the end decides.
SOON = 50

# |cos| of a channel's gate row and up row. By chance the largest of 350,000 pairs is 0.08 at width
# 4096, and at width 64 one pair in a million reaches 0.6; the rare-token training reaches 0.9 to 1.
ALIGNED = 0.9

REMEDY = (
    "keep the product in BF16, or scale it just in time (Float8CurrentScaling), or SmoothSwiGLU; "
    "AntiWindup if the scale must stay delayed"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every gate product that was clipped and whose input did not jump."""
    rows = forward_casts(run)
    over = clipped(rows)
    products = over[over["site"].str.endswith(":product")].dropna(subset=["cur_amax"])
    products = products[products["hot_channel"].notna() & ~comes_from_input(products, rows)]
    if products.empty:
        return []
    alarm = loss_alarm(run)
    by_site = products.groupby("site", observed=True)
    peaks = {str(site): of.nlargest(1, "cur_amax").iloc[0] for site, of in by_site}
    places = [(_module(site), int(peak["hot_channel"])) for site, peak in peaks.items()]
    channels = of_channels(run, ("alignment",), places)
    return [
        _judge(peaks[str(site)], of, rows[rows["site"] == site], channels, alarm)
        for site, of in by_site
    ]


def _module(site: str) -> str:
    return site.removesuffix(":product")


def _judge(
    peak: pd.Series,
    clipped: pd.DataFrame,
    rows: pd.DataFrame,
    channels: pd.DataFrame,
    alarm: int | None,
) -> Finding:
    site = str(peak["site"])
    worst = clipped.nlargest(1, "staleness").iloc[0]
    since = int(clipped["step"].iloc[0])
    growth = _growth(clipped, rows)
    wound_up = growth >= WOUND_UP_GROWTH
    harmful = clipped.loc[clipped["staleness"] >= HARMFUL, "step"]
    loss_told = alarm is not None and bool(harmful.between(alarm - SOON, alarm - 1).any())
    alignment = _alignment(channels, site, int(peak["hot_channel"]), int(peak["step"]))
    aligned = alignment is not None and abs(alignment.value) >= ALIGNED
    summary = (
        f"the delayed scale clipped the product in {len(clipped)} step{'s' * (len(clipped) > 1)}, "
        f"at worst to 1/{worst['staleness']:.3g} of its largest value"
    )
    if wound_up:
        summary += f"; behind the clipping the product grew to {growth:.3g} times what it was"
    if aligned:
        summary += "; the channel's gate and up rows are aligned"
    if loss_told:
        summary += f"; the loss told at step {alarm}"
    evidence = list(dict.fromkeys([_evidence(clipped.iloc[0]), _evidence(worst)]))
    if wound_up:
        evidence.append(
            Evidence(
                step=int(peak["step"]),
                site=site,
                quantity="amax of the clipped product / its median over the clipped steps before",
                value=growth,
                threshold=WOUND_UP_GROWTH,
                source="rare-token experiment",
            )
        )
    return Finding(
        cause="delayed_saturation",
        summary=summary,
        severity=_severity(harmful, int(rows["step"].max()), wound_up or loss_told),
        confidence="high" if wound_up or (loss_told and aligned) else "medium",
        site=site,
        channel=int(peak["hot_channel"]),
        since=since,
        evidence=(*evidence, *([] if alignment is None else [alignment])),
        remedy=REMEDY,
        cannot_exclude=(
            "that the product jumps for a reason of its own (bad data, learning rate too high): "
            "the same run with the product in BF16 decides"
        ),
    )


def _severity(harmful: pd.Series, last: int, grows: bool) -> Severity:
    """A single harmful step that nothing has followed for long is a note."""
    is_over = len(harmful) == 1 and last - harmful.iloc[0] > SOON
    return "low" if harmful.empty or (is_over and not grows) else "high" if grows else "medium"


def _growth(clipped: pd.DataFrame, rows: pd.DataFrame) -> float:
    """How the largest of the clipped amaxes compares with those clipped before it (their median),
    each measured by the steps around it: what grows in all steps is the training's growth."""
    level = rows["cur_amax"].where(~rows.index.isin(clipped.index))
    level = level.rolling(AROUND, min_periods=1, center=True).median().reindex(clipped.index)
    sizes = clipped["cur_amax"] / (level if level.notna().all() else 1.0)
    peak = clipped["cur_amax"].to_numpy().argmax()
    before = sizes[clipped["step"] < clipped["step"].iloc[peak]]
    return float(sizes.iloc[peak] / before.median()) if len(before) else 1.0


def _alignment(rows: pd.DataFrame, site: str, channel: int, step: int) -> Evidence | None:
    """Of the channel, as it was last recorded up to that step."""
    rows = rows[(rows["site"] == _module(site)) & (rows["channel"] == channel)]
    rows = rows[rows["step"] <= step].dropna(subset=["alignment"])
    if rows.empty:
        return None
    last = rows.iloc[-1]
    return Evidence(
        step=int(last["step"]),
        site=site,
        quantity=f"alignment of channel {channel}",
        value=float(last["alignment"]),
        threshold=ALIGNED,
        source="beyond chance",
    )


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="staleness",
        value=float(row["staleness"]),
        threshold=CLIPPED_STALENESS,
        source="more than an octave",
    )
