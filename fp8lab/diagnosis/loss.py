"""When the loss itself says that a run has gone wrong: the clock that every lead time is read on.

The earliest of three: the event `diverged` of an experiment that knows its own criterion, the first
non-finite loss, and the first loss above ten times the largest of the run's first twentieth (at
least ten steps): a loss that left the place where it started. The last needs a loss that starts
above zero. Of several processes the largest loss of a step counts.
"""

from __future__ import annotations

import numpy as np

from fp8lab.diagnosis.rows import Rows

EXCESS = 10.0


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
        if len(start) and start.max() > 0:
            beyond = np.flatnonzero(loss > EXCESS * start.max())
            alarms += [int(losses.index[i]) for i in beyond[:1]]
    return min(alarms, default=None)
