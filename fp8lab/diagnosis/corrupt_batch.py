"""Cause: a batch that is garbage: other labels, noise, inputs of another size.

The loss jumps from one step to the next, on weights that the step before changed no more than
usual: so it is not the weights that are worse but the batch. In a training that had learnt
something, the jump takes the loss to where it began, but for the loss's noise: data may be hard,
but a model that knows nothing does as well on hard data as on any. Where the recorded steps learnt
little, as after a resume, they do not say where that is, and ten times the start must do. And a
batch does harm by its gradient: one that is smaller than others before it was hard at most.

Then the loss comes down with the next good batch, or the update that the batch made has broken the
model. What contradicts: jumps that come again and again (at a third one they are rare tokens, part
of the data); an update before that was larger than usual, or a weight whose norm is not what the
updates before would make of it; a loss that had begun to rise in the steps before; gradients that
stay beyond Adam's second moment, for it has that of a single batch with the next: then it is the
loss that changed. A gate product that was clipped then, or not long before, may have made the jump:
the finding is low.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.diagnosis.growth import spread
from fp8lab.diagnosis.loss import EXCESS, LEARNT, WINDOW, loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.diagnosis.second_moment_lag import stays
from fp8lab.record import CLIPPED_STALENESS as CLIPPED
from fp8lab.record import Evidence, Finding

JUMP = 8.0  # standard deviations of the loss before: noise of 80 steps does not reach it
SOON = 50  # steps for which a clipped product is suspected, as in delayed_saturation
RECURS = 3  # separate jumps
SUDDEN = 0.1  # of the jump: by so much the loss may have been up in the step before
USUAL_UPDATE = 2.0  # times the median of the updates before
LARGEST = 0.9  # of the largest gradient before: clipped ones are all alike
USUAL_CHANGE = 6.0  # times the median change of a weight's norm: four standard deviations
BEFORE = 2 * WINDOW  # steps that say what is usual

REMEDY = "look at the data of this step; skip batches whose loss jumps (or whose gradient does)"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding for the first step whose batch no weights can explain."""
    columns = ("loss", "grad_norm", "update_ratio", "rms_t")
    steps = run.steps(columns).groupby("step").max()
    steps = steps[steps["loss"].notna()]
    loss = steps["loss"].to_numpy(float)
    jumps = [place for place in range(WINDOW, len(loss)) if _jumps(loss, place)]
    if not jumps or len(jumps) >= RECURS or not _was_usual(steps, jumps[0]):
        return []
    since = int(steps.index[jumps[0]])
    if _other_weights(run, since) or stays(steps["rms_t"].dropna(), since):
        return []
    return _judged(run, steps, jumps[0])


def _jumps(loss: NDArray[np.float64], place: int) -> bool:
    """Whether the loss jumps at this step, and not only is still up."""
    before = loss[max(0, place - BEFORE) : place]
    if not np.isfinite(before).all():
        return False
    up = loss[place - 2 : place + 1] - np.median(before)
    # Whatever the noise is, of which most steps need not know: it takes a fit.
    if not up[2] > JUMP * _least_noise(before) or up[:2].max() > max(2 / JUMP, SUDDEN) * up[2]:
        return False
    noise = _noise(before)
    return bool(up[2] > JUMP * noise and up[:2].max() <= max(2.0 * noise, SUDDEN * up[2]))


def _noise(loss: NDArray[np.float64]) -> float:
    """The standard deviation of a loss around its trend, for a loss comes down."""
    at = np.arange(len(loss))
    trend = np.polynomial.Polynomial.fit(at, loss, 1)(at)
    return max(spread(loss - trend), _least_noise(loss))


def _least_noise(loss: NDArray[np.float64]) -> float:
    return float(1e-3 * abs(np.median(loss)))


def _untrained(before: NDArray[np.float64], start: float) -> float:
    """What a model that knows nothing has for a loss at least."""
    has_learnt = start - np.median(before) >= LEARNT * start
    return start - _noise(before) if has_learnt else EXCESS * start


def _was_usual(steps: pd.DataFrame, place: int) -> bool:
    """Whether the update before changed the weights no more than those before it."""
    updates = steps["update_ratio"].to_numpy(float)[max(0, place - BEFORE) : place]
    updates = updates[np.isfinite(updates)]
    return len(updates) > 1 and bool(updates[-1] <= USUAL_UPDATE * np.median(updates))


def _other_weights(run: Rows, step: int) -> bool:
    """Whether some weight's norm changed before this step by more than it does else."""
    rows = run.tensors("l2_norm", sites="*:weight")
    rows = rows[(rows["rank"] >= 0) & rows["step"].between(step - BEFORE, step)]
    norms = rows.pivot_table(
        index="step", columns="site", values="l2_norm", aggfunc="max", observed=True
    )
    changes = (norms / norms.shift() - 1.0).abs()
    if len(changes) < WINDOW or norms.index[-1] != step:
        return False
    largest = USUAL_CHANGE * changes.iloc[1:-1].median()
    return bool((changes.iloc[-1] > largest.clip(lower=1e-3)).any())


def _judged(run: Rows, steps: pd.DataFrame, place: int) -> list[Finding]:
    loss, since = steps["loss"].to_numpy(float), int(steps.index[place])
    before = loss[max(0, place - BEFORE) : place]
    usual, untrained = float(np.median(before)), _untrained(before, float(np.max(loss[:WINDOW])))
    gradients = steps["grad_norm"].to_numpy(float)[max(0, place - BEFORE) : place + 1]
    after = loss[place + 1 : place + 1 + WINDOW]
    alarm = loss_alarm(run)
    stays = alarm is not None and alarm >= since
    rows = run.tensors("staleness", sites="*:product")
    clipped = rows[(rows["step"].between(since - SOON, since)) & (rows["staleness"] > CLIPPED)]
    # Without the update of the step before nobody knows that the weights were what they had been.
    is_known = bool(np.isfinite(steps["update_ratio"].iloc[place - 1]))
    is_small = bool(gradients[-1] < LARGEST * gradients[:-1].max())
    is_garbage = loss[place] > untrained and not is_small and clipped.empty and is_known
    is_told = usual < untrained < loss[place]
    told = f"the loss jumped from {usual:.3g} to {loss[place]:.3g} in one step"
    told += ", on weights that the step before had changed as usual"
    if not is_known:
        told = f"the loss jumped from {usual:.3g} to {loss[place]:.3g} in one step; what the step "
        told += "before did to the weights was not recorded (every=1 does)"
    if len(after) and not stays:
        told += f"; afterwards it was {np.median(after):.3g}"
    return [
        Finding(
            cause="corrupt_batch",
            summary=told,
            severity=("high" if stays else "medium") if is_garbage else "low",
            confidence="high" if is_garbage else "low",
            since=since,
            evidence=(
                Evidence(
                    step=since,
                    site="",
                    quantity="loss",
                    value=float(loss[place]),
                    threshold=untrained if is_told else None,
                    source="from where the training began" if is_told else "",
                ),
                Evidence(
                    step=since,
                    site="",
                    quantity="grad_norm",
                    value=float(steps["grad_norm"].iloc[place]),
                ),
            ),
            remedy=REMEDY,
            cannot_exclude="that the data are right, rare and hard: look at them",
        )
    ]
