"""When the loss itself says that a run has gone wrong: the clock that every lead time is read on.

The earliest of four: the event `diverged` of an experiment that knows its own criterion, the first
non-finite loss, the first loss above ten times the largest of the run's first twentieth (at
least ten steps), from which on most of ten steps are: a loss that left the place where it started.
And for a divergence that is slow, or ends on a plateau: half of what had been learnt is lost, for
so long that the median of ten steps shows it. A spike that recovers is none, nor are rare tokens,
however high: neither moves a median. Who had learnt less than a quarter of where it started has
nothing to lose, and what is lost must stand out of the loss's own noise.

The last two need a loss that has a zero: one that is negative in any step (a policy's gradient, a
density's logarithm) may rise by any factor and mean nothing. Of several processes the largest loss
of a step counts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.diagnosis.rows import Rows, once

EXCESS = 10.0
WINDOW = 10  # steps; a level is their median
UNLEARNT = 0.5  # share of what had been learnt
LEARNT = 0.25  # share of the start that a training must have come down
BEYOND_NOISE = 5.0  # standard deviations of a single step's loss


@once
def loss_alarm(run: Rows) -> int | None:
    """The first step at which the loss told, None if it never did."""
    events = run.events()
    told = events.loc[events["kind"].isin(["diverged", "nonfinite_loss"]), "step"]
    alarms = [int(step) for step in told]
    losses = run.steps("loss").groupby("step")["loss"].max()
    loss = losses.to_numpy(dtype=float)
    if len(loss):
        start = loss[: max(10, len(loss) // 20)]
        start = start[np.isfinite(start)]
        if len(start) and start.max() > 0 and not (loss < 0).any():
            level = float(np.median(start))
            gone = _lasting(loss > EXCESS * start.max()) | _unlearnt(loss, level)
            alarms += [int(losses.index[i]) for i in np.flatnonzero(gone)[:1]]
    return min(alarms, default=None)


def _lasting(beyond: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [steps]: those from which on most of `WINDOW` steps, or all that are left, are so."""
    share = pd.Series(beyond[::-1].astype(float)).rolling(WINDOW, min_periods=1).mean()
    return np.asarray(beyond & (share.to_numpy()[::-1] > 0.5))


def _unlearnt(loss: NDArray[np.float64], start: float) -> NDArray[np.bool_]:
    """bool [steps]: where half of what the loss had come down from `start` is lost again."""
    window = pd.Series(loss).rolling(WINDOW)
    level, noise = window.median(), window.std().expanding().median()
    best = level.cummin().shift(WINDOW)
    learnt, lost = start - best, level - best
    is_lost = (lost > UNLEARNT * learnt) & (learnt > LEARNT * start)
    return np.asarray(is_lost & (lost > BEYOND_NOISE * noise.shift(WINDOW)))
