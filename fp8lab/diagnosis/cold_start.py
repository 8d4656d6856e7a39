"""Cause: a delayed scale is 1 because nothing has been measured yet.

Transformer Engine's delayed scaling starts with a scale of 1 and an empty history, and so does a
run that goes on from a checkpoint without them. E4M3 then takes what lies between 2^-9 and 448 as
it is: an operand beyond is clipped, one below becomes zero. The next step has a scale.

A healthy run begins like that too, and mostly nothing is lost. So more than a note needs two
things: an operand whose cast is mostly error, and a sign that the step suffered: at the start a
gradient far from those of the steps after it, in mid-run a loss or a gradient far from those
before. (The loss of a first step has nothing to be held against.) Gradients are no witness: their
scale is 1 in the first step as well, and they are mostly flushed in healthy runs; the rule reads
inputs and weights. Of several that were lost in the step the one that runs first is named: the
others were computed from what it had become.

What contradicts: the operand is cast as badly by the first scale that was measured; then the cause
is another one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.casts import forward_casts
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding, Severity

# A quarter of the power, half of the norm, is error: as `bulk_underflow`.
DAMAGED_DB = 6.0
# A loss or gradient norm so many times those around it, or so many times smaller.
FAR_LOSS, FAR_GRADIENT = 1.5, 4.0
# How many steps around are looked at, and how soon the loss must tell to be blamed on it.
AROUND, SOON = 10, 50

REMEDY = (
    "calibrate before the first step (forwards without an update), start with "
    "Float8CurrentScaling; save amax_history and scale in checkpoints"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every time that scales began anew and an operand was lost by it."""
    rows = forward_casts(run)
    cold = rows[rows["cold"]]
    damaged = cold[cold["sqnr_db"] < DAMAGED_DB]
    is_warm = ~rows["cold"] & rows["site"].isin(damaged["site"].unique())
    warm = rows[is_warm].groupby("site", observed=True)
    keep = [
        not _as_bad(warm.get_group(site), int(step)) if site in warm.groups else True
        for site, step in zip(damaged["site"], damaged["step"], strict=True)
    ]
    damaged = damaged[np.array(keep, dtype=bool)]
    if damaged.empty:
        return []
    # Steps of one start follow each other, as far as steps are recorded.
    recorded = pd.Series(np.sort(rows["step"].unique()))
    number = damaged["step"].map(pd.Series(recorded.index, index=recorded))
    start = (number.drop_duplicates().diff() > 1).cumsum().reindex(number.index).ffill()
    return [_judge(run, of) for _, of in damaged.groupby(start)]


def _as_bad(warm: pd.DataFrame, step: int) -> bool:
    """Whether the first measured scale does not do better."""
    after = warm.loc[warm["step"] > step, "sqnr_db"].dropna()
    return len(after) > 0 and bool(after.iloc[0] < DAMAGED_DB)


def _judge(run: Rows, damaged: pd.DataFrame) -> Finding:
    since = int(damaged["step"].iloc[0])
    of_start = damaged[damaged["step"] == since]
    first = of_start.sort_values("depth", kind="stable").iloc[0]
    alarm = loss_alarm(run)
    told = alarm is not None and since <= alarm <= since + SOON
    signs, mid_run = _signs(run, since)
    severity: Severity = "high" if told or (signs and mid_run) else "medium" if signs else "low"
    happened = "clipped" if first["staleness"] > 1 else "flushed"
    summary = (
        f"{of_start['site'].nunique()} operands were cast with a scale of 1, before any was "
        f"measured; the first of them was {happened}"
    )
    if told:
        summary += f"; the loss told at step {alarm}"
    return Finding(
        cause="cold_start",
        summary=summary,
        severity=severity,
        confidence="high" if signs else "medium",
        site=str(first["site"]),
        since=since,
        evidence=(
            Evidence(
                step=since,
                site=str(first["site"]),
                quantity="sqnr_db",
                value=float(first["sqnr_db"]),
                threshold=DAMAGED_DB,
                at_most=True,
                source="half of the norm is error",
            ),
            *signs,
        ),
        remedy=REMEDY,
        cannot_exclude="that the data or the weights of this step are themselves out of the way",
    )


def _signs(run: Rows, step: int) -> tuple[list[Evidence], bool]:
    """What says that the step suffered, and whether steps came before it."""
    steps = run.steps(("loss", "grad_norm")).groupby("step")[["loss", "grad_norm"]].max()
    before = steps[steps.index < step].tail(AROUND)
    mid_run = len(before) >= AROUND // 2
    around = before if mid_run else steps[steps.index > step].head(AROUND)
    found = []
    for name, far in (("loss", FAR_LOSS), ("grad_norm", FAR_GRADIENT)):
        usual, here = around[name].median(), steps.loc[steps.index == step, name]
        if len(here) and usual > 0 and (mid_run or name == "grad_norm"):
            ratio = float(here.iloc[0] / usual)
            if ratio >= far or (name == "grad_norm" and ratio <= 1 / far):
                quantity = f"{name} / its median over the steps {'before' if mid_run else 'after'}"
                fell = ratio < far
                found.append(
                    Evidence(
                        step=step,
                        site="",
                        quantity=quantity,
                        value=ratio,
                        threshold=1 / far if fell else far,
                        at_most=fell,
                    )
                )
    return found, mid_run
