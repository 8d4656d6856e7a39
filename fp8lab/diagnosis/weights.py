"""Which weights a training moved, and when: what a learning rate that is too high moves all of.

A weight's norm changes slowly: by a few parts in a thousand a step. Where an optimizer is wrong the
norms of many weights change by a tenth within a few steps; where one layer is, only its own do.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.rows import Rows

MOVED = 0.1  # of the norm
WITHIN = 10  # steps


def moved(run: Rows, since: int) -> tuple[list[str], int]:
    """The weights whose norm changed by more than `MOVED` within `WITHIN` steps from step `since`
    on, and of how many it is known."""
    rows = run.tensors("l2_norm", sites="*:weight")
    rows = rows[(rows["rank"] >= 0) & rows["step"].between(since, since + WITHIN)]
    by_site = rows.dropna(subset=["l2_norm"]).groupby("site", observed=True)
    norms = by_site["l2_norm"].agg(["first", "min", "max"])
    norms = norms[norms["first"] > 0]
    changed = pd.concat([norms["max"] / norms["first"], norms["first"] / norms["min"]], axis=1)
    far = norms.index[(changed > 1.0 + MOVED).any(axis=1)]
    return [str(site) for site in far], len(norms)
