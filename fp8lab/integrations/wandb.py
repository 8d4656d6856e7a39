"""What is watched, as W&B curves: `watch(..., listeners=[Writer(run)])`.

The run is the caller's: made and finished by the caller. W&B drops whatever is logged for a step
below the highest so far, so a writer must never be the one that moves that step past the caller's.
Ours logs at the step of `watch.step`, or at the run's own where that is further: rows then merge
with those that the caller logs with the same `step=`, and callers that log without one lose nothing
either. The curves are drawn over `fp8lab/step`, which is right in both cases, and after a resume.
A caller who counts slower than `watch` does (epochs) must log with a `define_metric` of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

try:
    import wandb
except ImportError as error:
    raise ImportError(f"fp8lab.integrations.wandb: {error}: pip install 'fp8lab[wandb]'") from None

from fp8lab.integrations.headlines import HEADLINES, checked, chosen


class Writer:
    """Logs each recorded step's scalars to `run`.

    `statistics` are those to show of each site, columns and what `select` names; what belongs to
    the whole step is always shown. Raises ValueError for one that does not exist.
    """

    def __init__(self, run: wandb.Run, statistics: Collection[str] = HEADLINES) -> None:
        self._run = run
        self._statistics = checked(statistics)
        run.define_metric("fp8lab/step", hidden=True)
        run.define_metric("fp8lab/*", step_metric="fp8lab/step")

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the scalars of one step."""
        row = {"fp8lab/step": step, **chosen(scalars, self._statistics)}
        self._run.log(row, step=max(step, self._run.step))
