"""Cause: a learning rate that is too high, in whatever precision.

Seen: updates that are more than a tenth of the parameters' norm, in two recorded steps running. (A
healthy ratio is about 1e-3; the small trainings of the lab begin at 0.005 to 0.03.) The onset is
the first of them. An update can be large because the gradients are; it is the rate's doing where
the updates are that large from the beginning, or where the rate itself has just become larger.

Harm is shown by the loss while the updates are too large, and until it can tell: an alarm, or a
level above where it was at the onset. What comes when updates have long been ordinary again has
another cause.

What contradicts: a rate that did not change in a training that had been healthy, for then the
gradients came first; updates that moved few of the weights, for then it is those that learn too
fast, or a single layer's trouble; a loss that came down with these updates, as with the first ones
of Adagrad, or of weights that begin small. The finding is then low. A twin in high precision that
makes updates as large says that precision has no part in it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.loss import WINDOW, loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.diagnosis.weights import moved
from fp8lab.record import Evidence, Finding, Severity

TOO_LARGE = 0.1  # of the parameters' norm; the usual rule of thumb is 0.001
JUMPED = 2.0  # times the rate before
MOST = 0.5  # share of the weights
TELLS = 5  # recorded steps: a hard batch does not move their median

REMEDY = "a lower learning rate, a longer warm-up; look for a jump in the schedule"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding if the updates are too large and the rate is why."""
    steps = _by_step(run)
    onset = _onset(steps)
    if onset is None:
        return []
    since, ratio = int(steps.index[onset]), float(steps["update_ratio"].iloc[onset])
    usual = _rate_before(steps["learning_rate"], since)
    jumped = bool(steps["learning_rate"].iloc[onset] >= JUMPED * usual)
    if onset > 1 and not jumped:
        return []
    weights, known = moved(run, since)
    is_general = not known or len(weights) >= MOST * known
    severity = _by_loss(run, steps, onset) if is_general else "low"
    told = f"updates are {ratio:.2g} of the parameters, hundreds of times what is usual"
    if jumped:
        rate = steps["learning_rate"].iloc[onset]
        told += f"; the learning rate rose from {usual:.3g} to {rate:.3g}"
    if twin is not None and _onset(_by_step(twin)) is not None:
        told += "; the twin in high precision does the same"
    if not is_general:
        told += f"; only {len(weights)} of {known} weights moved: {', '.join(weights[:4])}"
    return [
        Finding(
            cause="learning_rate",
            summary=told,
            severity=severity,
            confidence="high" if known and is_general else "medium",
            since=since,
            evidence=(
                Evidence(
                    step=since,
                    site="",
                    quantity="update_ratio",
                    value=ratio,
                    threshold=TOO_LARGE,
                    source="0.001 is the rule of thumb",
                ),
            ),
            remedy=REMEDY,
            cannot_exclude="that the parameters are too small for a rate that is right elsewhere",
        )
    ]


def _by_step(run: Rows) -> pd.DataFrame:
    steps = run.steps(("loss", "learning_rate", "update_ratio")).groupby("step").max()
    # Of weights that begin at zero the first ratio is infinite, and says nothing.
    return steps.replace({"update_ratio": {np.inf: np.nan}}).dropna(subset=["update_ratio"])


def _onset(steps: pd.DataFrame) -> int | None:
    """The first of two recorded steps running in which the updates are too large."""
    large = (steps["update_ratio"] > TOO_LARGE).to_numpy()
    both = np.flatnonzero(large[:-1] & large[1:])
    return int(both[0]) if len(both) else None


def _rate_before(rates: pd.Series, since: int) -> float:
    """The usual rate of the `WINDOW` steps before, of the last recorded one if none was."""
    before = rates.loc[: since - 1]
    recent = before.loc[since - WINDOW :]
    return float((before.tail(1) if recent.empty else recent).median())


def _by_loss(run: Rows, steps: pd.DataFrame, onset: int) -> Severity:
    """ "high" if the loss rose while updates were too large, "low" if it came down with them."""
    loss, since = steps["loss"], steps.index[onset]
    ordinary = np.flatnonzero(steps["update_ratio"].iloc[onset:] <= TOO_LARGE)
    over = int(ordinary[0]) if len(ordinary) else len(steps)
    last = min(onset + max(over, TELLS), len(steps) - 1)
    alarm = loss_alarm(run)
    if alarm is not None and since <= alarm <= steps.index[last] + WINDOW:
        return "high"
    change = (
        loss.iloc[onset + 1 : last + 1].median() - loss.loc[since - WINDOW + 1 : since].median()
    )
    return "high" if change > 0 else "low" if change < 0 else "medium"
