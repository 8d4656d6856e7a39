"""When the loss itself says that a run has gone wrong: the clock that every lead time is read on.

An experiment that knows its own criterion writes the event `diverged`, and that is taken. Otherwise
it is the first non-finite loss, or the first loss above ten times the largest of the run's first
twentieth (at least ten steps): a loss that left the place where it started.
"""

from __future__ import annotations

import numpy as np

from fp8lab.store import Run

EXCESS = 10.0


def loss_alarm(run: Run) -> int | None:
    """The first step at which the loss told, None if it never did."""
    events = run.events()
    told = events.loc[events["kind"].isin(["diverged", "nonfinite_loss"]), "step"]
    alarms = [int(step) for step in told]
    steps = run.steps()
    loss = steps["loss"].to_numpy(dtype=float)
    if len(loss):
        start = loss[: max(10, len(loss) // 20)]
        start = start[np.isfinite(start)]
        if len(start):
            beyond = np.flatnonzero(loss > EXCESS * start.max())
            alarms += [int(steps["step"].iloc[i]) for i in beyond[:1]]
    return min(alarms, default=None)
