"""Cause: Adam's second moment lags behind gradients that became larger.

With a beta2 of 0.999 it remembers a thousand steps. When gradients grow at once, updates are too
large for as long as it takes to notice: up to 1/sqrt(1 - beta2) times. RMS_t =
sqrt(mean(g^2 / max(v, eps^2))), 1 where the moment fits, tells it directly; 2.3 is a spike
(StableAdamW, 2304.13013).

RMS_t is the largest over all tensors, and the embedding of rare tokens alone takes it to 4 in a
healthy language model. So it must also be 1.5 times the largest of the steps before, and stay: the
gradient of one batch is in the moment with the next, whose RMS_t is then below 1, and three bad
batches in a row are over after three steps. And updates must become larger with it, for it is they
that do the harm. Whether they do is the loss's to say: by the same paper it spikes (the running
mean and 3.2 standard deviations) one to eight steps later. Without that the finding is less sure.

What contradicts: a learning rate that rose; updates that were larger before the gradients were, or
stayed what they were.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.loss import WINDOW, loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

RMS_SPIKE = 2.3  # 2304.13013
STANDS_OUT = 1.5  # times the largest RMS_t of the steps before
LASTS = 4  # steps: more than the three bad batches that there may be in a row
LOSS_SPIKE = 3.2  # standard deviations above the running mean, 2304.13013
WITHIN = 8  # steps, the same
TWICE = 2  # of these steps
RUNNING = 2 * WINDOW  # steps of the running mean
RATE_ROSE = 1.5
UPDATE_ROSE = 1.5

REMEDY = "StableAdamW (divide the rate by RMS_t), or a beta2 of 0.95"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding for the first spike of RMS_t that lasts and makes updates larger."""
    columns = ("loss", "rms_t", "learning_rate", "update_ratio")
    steps = run.steps(columns).groupby("step").max().dropna(subset=["rms_t"])
    rms = steps["rms_t"]
    spikes = rms.index[(rms >= RMS_SPIKE) & (rms >= STANDS_OUT * rms.cummax().shift())]
    for since in spikes:
        if since - rms.index[0] >= WINDOW and stays(rms, since) and _by_lag(steps, since):
            return [_finding(run, steps, int(since))]
    return []


def stays(rms: pd.Series, since: int) -> bool:
    """Whether the gradients of `LASTS` steps from `since` on are beyond the second moment; `rms` is
    RMS_t by step."""
    usual = rms.loc[since - RUNNING : since - 1].median()
    after = rms.loc[since:]
    ordinary = np.flatnonzero(after < max(RMS_SPIKE, STANDS_OUT * usual))
    over = int(ordinary[0]) if len(ordinary) else len(after)
    return over > 0 and int(after.index[over - 1]) - since >= LASTS - 1


def _by_lag(steps: pd.DataFrame, since: int) -> bool:
    """Whether updates rose with RMS_t, and no rate did."""
    before = steps.loc[since - RUNNING : since - 1]
    if before.empty:
        return False
    updates, rates = before["update_ratio"], before["learning_rate"]
    rose = UPDATE_ROSE * updates.median()
    return bool(
        steps["learning_rate"].loc[since] < RATE_ROSE * rates.median()
        and updates.iloc[-1] < rose
        and steps["update_ratio"].loc[since : since + WITHIN - 1].max() >= rose
    )


def _spike(loss: pd.Series, since: int) -> int | None:
    """The step of the loss spike that followed, None if none did, or none that came after."""
    before = loss.loc[since - RUNNING : since - 1].to_numpy(float)
    if not np.isfinite(before).all():
        return None
    soon = loss.loc[since : since + WITHIN]
    beyond = soon.index[~(soon <= before.mean() + LOSS_SPIKE * before.std())]
    return int(beyond[0]) if len(beyond) >= TWICE and beyond[0] != since else None


def _finding(run: Rows, steps: pd.DataFrame, since: int) -> Finding:
    alarm, spike = loss_alarm(run), _spike(steps["loss"], since)
    rms, before = float(steps["rms_t"].loc[since]), steps.loc[since - RUNNING : since - 1]
    larger = steps["update_ratio"].loc[since : since + WITHIN - 1].max()
    told = (
        f"gradients were {rms:.3g} times what Adam's second moment knew, and updates became "
        f"{larger / before['update_ratio'].median():.3g} times as large"
    )
    evidence = [
        Evidence(
            step=since,
            site="",
            quantity="rms_t",
            value=rms,
            threshold=RMS_SPIKE,
            source="2304.13013",
        )
    ]
    if spike is not None:
        usual, loss = float(before["loss"].mean()), float(steps["loss"].loc[spike])
        told += f"; {spike - since} steps later the loss rose from {usual:.3g} to {loss:.3g}"
        evidence.append(
            Evidence(
                step=spike,
                site="",
                quantity="loss",
                value=loss,
                source="running mean and 3.2 standard deviations, 2304.13013",
            )
        )
    return Finding(
        cause="second_moment_lag",
        summary=told,
        severity="high" if alarm is not None and alarm >= since else "medium",
        confidence="medium" if spike is None else "high",
        since=since,
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude="what made the gradients grow: the loss's scale, the data, or a layer",
    )
