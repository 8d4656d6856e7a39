"""Cause: a delayed scale clips the gate product, and what grows behind the clipping.

A delayed scale was made by the largest product of the last steps. A rare input that makes the
product jump meets a scale that is too large, and everything beyond the format's largest value is
cut off. That alone costs accuracy, in single steps. What kills is the wind-up: while the product is
clipped the output does not answer to gate and up, the straight-through gradient pushes them on,
and the product of the clipped steps grows, until one of them falls inside the history, is not
clipped, and lets all of it loose.

Seen first: staleness (amax / the amax that made the scale in force) above 2, in single steps. Then
the amax of the clipped steps runs away from what it was before. What contradicts a wind-up: clipped
steps that stay on one level, as with anti-wind-up. The staleness itself does not tell the two
apart: runs at a small learning rate sit at 4 to 14 and survive. Where little growth is enough, the
loss tells soon after a clipped step: then it is as bad, but less sure.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding
from fp8lab.runs import hottest

# The product is quadratic in the two rows: two octaves are one octave of growth in each. In the
# rare-token experiment, seeds 0 to 9, 14 of the 20 runs that diverged reached 4.2 to 334 and six
# stayed at 2.5 to 3.2; the nine that were clipped and survived, by anti-wind-up, at 1.0 to 2.5.
WOUND_UP_GROWTH = 4.0

# A loss that tells later than this after a clipped step is not blamed on it. About three times the
# history of the experiment, in which the last clipped event before the end decides.
SOON = 50

REMEDY = (
    "keep the product in BF16, or scale it just in time (Float8CurrentScaling), or SmoothSwiGLU; "
    "AntiWindup if the scale must stay delayed"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every gate product that was clipped."""
    tensors = run.tensors()
    products = tensors[tensors["site"].str.endswith(":product", na=False)]
    clipped = products[products["staleness"] > CLIPPED_STALENESS]
    clipped = hottest(clipped.dropna(subset=["cur_amax", "hot_channel"]))
    alarm = loss_alarm(run)
    return [_judge(str(site), rows, alarm) for site, rows in clipped.groupby("site")]


def _judge(site: str, clipped: pd.DataFrame, alarm: int | None) -> Finding:
    peak = clipped.nlargest(1, "cur_amax").iloc[0]
    worst = clipped.nlargest(1, "staleness").iloc[0]
    since = int(clipped["step"].iloc[0])
    before = clipped.loc[clipped["step"] < peak["step"], "cur_amax"]
    growth = float(peak["cur_amax"] / before.median()) if len(before) else 1.0
    wound_up = growth >= WOUND_UP_GROWTH
    loss_told = alarm is not None and bool(clipped["step"].between(alarm - SOON, alarm - 1).any())
    summary = (
        f"the delayed scale clipped the product in {len(clipped)} steps, "
        f"at worst to 1/{worst['staleness']:.3g} of its largest value"
    )
    if wound_up:
        summary += f"; behind the clipping the product grew to {growth:.3g} times what it was"
    if loss_told:
        summary += f"; the loss told at step {alarm}"
    evidence = [_evidence(clipped.iloc[0]), _evidence(worst)]
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
        severity="high" if wound_up or loss_told else "medium",
        confidence="high" if wound_up else "medium",
        site=site,
        channel=int(peak["hot_channel"]),
        since=since,
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude=(
            "that the product jumps for a reason of its own (bad data, learning rate too high): "
            "the same run with the product in BF16 decides"
        ),
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
