"""Cause: gradients are clipped, again and again, by a scale that has no room for them.

A gradient's scale may be too large for it because it was made by smaller gradients (a history
that has forgotten the last large batch), or because it was meant to be (a negative margin). Then
the largest gradients are cut off: their direction is kept in part, their size is not, and the
optimizer is told little about the very batches that say most. Nothing in the forward pass shows it.

Seen: in the row of a `grad_output` elements beyond the format's largest value, so many and so far
that half of it is lost in a quarter of the steps, or most of it in one of twenty; in `STEPS` steps
at least, the run's first one not counted, for a first scale of 1 is another cause. Less is enough
where the scale was made for an amax as large or larger: with any room at all nothing saturates
then, so the margin is negative, and what exceeds is cut off in every step, not in the rare ones.

What contradicts: operands of the forward pass that were cast as badly in the same step or shortly
before. The backward pass comes after them: their error makes the gradient jump, and they are the
cause; what is left is a note. So it is where most of the steps in which a delayed scale clips the
forward pass clip this gradient too, and others seldom: then the inputs of these steps are rare, and
the forward pass, which meets them first, is the place. Nor is it this if single elements exceed by
little: a gradient varies by half an octave from step to step, so under delayed scaling some are
clipped in most healthy steps, which costs no more than rounding does; and single steps, far apart,
are every training's.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.diagnosis.casts import clipped as clipped_forward
from fp8lab.diagnosis.casts import forward_casts
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding
from fp8lab.runs import hottest

# FP8-LM's rule (2310.18313): beyond 0.001 % saturated the scale is halved.
SATURATED = 1e-5
# Relative error of the cast. E5M2's own rounding is 0.053; an amax that is stale by 4 gives 0.30.
# Sound language models under delayed scaling, while gradients of query and key find their size,
# exceed 0.5 in up to five steps of 40 (at a history of one) and 0.7 in up to two.
DAMAGED, LOST = 0.5, 0.7
# Four times E5M2's own rounding. Of scales made just in time, FP4's costs 0.17 where it saturates;
# of margins, -3 costs 0.28 and more.
NO_ROOM = 0.21
STEPS = 3
# Share of the steps from the first of them on: so many damaged, or so many lost.
LASTING, RECURRING = 0.25, 0.05
# Share of the forward pass's clipped steps that clip the gradient too. Measured: 0.7 to 1 where
# rare inputs do both; where gradients alone are at fault the forward pass clips nothing.
# So many times as large as that share of the other steps: a negative margin clips in every step.
TOGETHER, OFTENER = 0.5, 2.0
# Steps in which what the forward pass did to the weights still shows in gradients.
LEAD = 20
# A loss that tells later than this after a clipped step is not blamed on it, as for products.
SOON = 50

REMEDY = (
    "scale gradients just in time (an override '*:grad_output': Float8CurrentScaling), a longer "
    "history, or a margin of 1 or 2"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every gradient that was clipped in `STEPS` steps or more of its own."""
    columns = ("cur_amax", "saturated", "sqnr_db", "staleness", "format")
    rows = hottest(run.tensors(columns, sites="*:grad_output"))
    later = rows[rows["step"] > rows.groupby("site", observed=True)["step"].transform("min")]
    clipped = _with_error(later[later["saturated"] > SATURATED])
    no_room = (clipped["staleness"] <= 1.0) & (clipped["error"] >= NO_ROOM)
    clipped = clipped[(clipped["error"] >= DAMAGED) | no_room]
    if clipped.empty:
        return []
    forward = run.tensors("sqnr_db", sites=("*:input", "*:weight", "*:product"))
    forward = _with_error(forward[forward["step"] > forward["step"].min()])
    bad = np.sort(forward.loc[forward["error"] >= DAMAGED, "step"].unique())
    own = clipped[~clipped["step"].isin(bad)]
    before = clipped_forward(forward_casts(run))["step"].unique()
    alarm = loss_alarm(run)
    found = []
    for site, of in own.groupby("site", observed=True):
        every = later[later["site"] == site]
        if len(of) >= STEPS and _lasts(of, every):
            is_clipped = every["step"].isin(clipped.loc[clipped["site"] == site, "step"])
            together = _together(is_clipped, every["step"].isin(before))
            found.append(_judge(str(site), of, every, bad, together, alarm))
    return found


def _together(gradient: pd.Series, forward: pd.Series) -> bool:
    """Whether a gradient is clipped in the steps that clip the forward pass, bool [steps] each, and
    not as much in the others."""
    share, others = gradient[forward].mean(), gradient[~forward].mean()
    is_chance = (gradient & forward).sum() < STEPS or share < OFTENER * others
    return not is_chance and bool(share >= TOGETHER)


def _lasts(clipped: pd.DataFrame, rows: pd.DataFrame) -> bool:
    steps = int((rows["step"] >= clipped["step"].iloc[0]).sum())
    lost = int((clipped["error"] >= LOST).sum())
    return len(clipped) >= LASTING * steps or lost >= max(STEPS, RECURRING * steps)


def _with_error(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(error=10.0 ** (-rows["sqnr_db"] / 20.0))


def _set_in(damaged: int, rows: pd.DataFrame) -> int:
    """The first of the recorded steps without a break in which elements saturated, up to this."""
    sound = rows.loc[(rows["saturated"] <= SATURATED) & (rows["step"] < damaged), "step"]
    since = sound.max() if len(sound) else -1
    return int(rows.loc[rows["step"] > since, "step"].min())


def _judge(
    site: str,
    clipped: pd.DataFrame,
    rows: pd.DataFrame,
    bad: NDArray[np.int64],
    together: bool,
    alarm: int | None,
) -> Finding:
    first, worst = clipped.iloc[0], clipped.nlargest(1, "error").iloc[0]
    led = bool(((bad <= first["step"]) & (bad >= first["step"] - LEAD)).any())
    told = alarm is not None and bool(clipped["step"].between(alarm - SOON, alarm - 1).any())
    summary = (
        f"this gradient was clipped in {len(clipped)} steps, at worst {worst['saturated']:.2%} of "
        f"its values, with an error of {worst['error']:.0%}"
    )
    if worst["staleness"] > CLIPPED_STALENESS:
        summary += f"; its scale was made for 1/{worst['staleness']:.3g} of it"
    elif pd.notna(worst["staleness"]):
        summary += "; its scale leaves no room for the amax that it was made by: a negative margin"
    if led:
        summary += "; the forward pass had been cast as badly shortly before"
    elif together:
        summary += "; most steps that clip the forward pass clip it too: their inputs are rare"
    elif told:
        summary += f"; the loss told at step {alarm}"
    return Finding(
        cause="gradient_overflow",
        summary=summary,
        severity="low" if led or together else "high" if told else "medium",
        confidence="low" if led or together else "high",
        site=site,
        since=_set_in(int(first["step"]), rows),
        evidence=(_evidence(first), _evidence(worst)),
        remedy=REMEDY,
        cannot_exclude=(
            "that the gradient jumps for a reason of its own (bad data, learning rate too high), "
            "and that the optimizer's clipping would have cut it anyway"
        ),
    )


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="relative error of a cast that saturates",
        value=float(row["error"]),
        threshold=DAMAGED,
        source="half of the gradient; a stale amax of 4 gives 0.30",
    )
