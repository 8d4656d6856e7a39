"""Cause: Adam's second moment lags behind gradients that became larger.

With a beta2 of 0.999 it remembers a thousand steps. When gradients grow at once, updates are too
large for as long as it takes to notice: up to 1/sqrt(1 - beta2) times. RMS_t =
sqrt(mean(g^2 / max(v, eps^2))), 1 where the moment fits, tells it; a loss spike (the running mean
and 3.2 standard deviations) follows a spike of RMS_t (2.3) by one to eight steps (StableAdamW,
2304.13013). The order is the argument: at the step of the RMS_t spike itself the loss is still what
it was, for it was computed with the weights of before.

RMS_t is the largest over all tensors, and the embedding of rare tokens alone takes it to 4 in a
healthy language model. So it must also be 1.5 times the largest of the steps before, updates must
become larger with it, for it is they that do the harm, and the loss must be beyond in two of the
eight steps. What contradicts: a loss that jumps in the same step (then it is the batch), a learning
rate that rose, updates that stayed what they were.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.loss import WINDOW, loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

RMS_SPIKE = 2.3  # 2304.13013
STANDS_OUT = 1.5  # times the largest RMS_t of the steps before
LOSS_SPIKE = 3.2  # standard deviations above the running mean, 2304.13013
WITHIN = 8  # steps, the same
TWICE = 2  # of these steps
RUNNING = 2 * WINDOW  # steps of the running mean
RATE_ROSE = 1.5
UPDATE_ROSE = 1.5

REMEDY = "StableAdamW (divide the rate by RMS_t), or a beta2 of 0.95"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding for the first spike of RMS_t that a loss spike followed."""
    columns = ("loss", "rms_t", "learning_rate", "update_ratio")
    steps = run.steps(columns).groupby("step").max().dropna(subset=["loss", "rms_t"])
    rms = steps["rms_t"].to_numpy(float)
    highest = pd.Series(rms).cummax().shift().to_numpy()
    spikes = np.flatnonzero((rms >= RMS_SPIKE) & (rms >= STANDS_OUT * highest))
    for place in spikes[spikes >= WINDOW]:
        followed = _followed(steps, int(place))
        if followed is not None:
            return [_finding(run, steps, int(place), followed)]
    return []


def _followed(steps: pd.DataFrame, place: int) -> int | None:
    """The position of the loss spike that followed, None if none did or what else is why."""
    loss, rates = steps["loss"].to_numpy(float), steps["learning_rate"].to_numpy(float)
    before = slice(max(0, place - RUNNING), place)
    updates = steps["update_ratio"].to_numpy(float)
    if rates[place] >= RATE_ROSE * np.median(rates[before]):
        return None
    if not updates[place : place + WITHIN].max() >= UPDATE_ROSE * np.median(updates[before]):
        return None
    limit = loss[before].mean() + LOSS_SPIKE * loss[before].std()
    beyond = np.flatnonzero(~(loss[place : place + WITHIN + 1] <= limit))
    if len(beyond) < TWICE or beyond[0] == 0:
        return None
    return place + int(beyond[0])


def _finding(run: Rows, steps: pd.DataFrame, place: int, followed: int) -> Finding:
    since, spike = int(steps.index[place]), int(steps.index[followed])
    alarm, rms = loss_alarm(run), float(steps["rms_t"].iloc[place])
    usual = float(steps["loss"].iloc[max(0, place - RUNNING) : place].mean())
    return Finding(
        cause="second_moment_lag",
        summary=(
            f"gradients were {rms:.3g} times what Adam's second moment knew, and {spike - since} "
            f"steps later the loss rose from {usual:.3g} to {steps['loss'].iloc[followed]:.3g}"
        ),
        severity="high" if alarm is not None and alarm >= since else "medium",
        confidence="high",
        since=since,
        evidence=(
            Evidence(
                step=since,
                site="",
                quantity="rms_t",
                value=rms,
                threshold=RMS_SPIKE,
                source="2304.13013",
            ),
            Evidence(
                step=spike,
                site="",
                quantity="loss",
                value=float(steps["loss"].iloc[followed]),
                source="running mean and 3.2 standard deviations, 2304.13013",
            ),
        ),
        remedy=REMEDY,
        cannot_exclude="what made the gradients grow: the loss's scale, the data, or a layer",
    )
