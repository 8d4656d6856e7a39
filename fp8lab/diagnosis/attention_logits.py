"""Cause: attention logits that grow until the softmax is a choice of one.

Queries and keys grow, and their product with them, quadratically: a learning rate that is too high
for them, or nothing that holds them (no query-key normalisation). Attention is gone long before the
run is: a key whose logit is below the largest by more than the logarithm of the context's length,
14 for a million tokens, gets nothing. QK-clip begins to act at 100 (Kimi), far above what logits
are in the healthy trainings of the lab (30 at most); every run of Wortsman et al. (2309.14322)
whose largest exceeded 10,000 diverged.

Seen: a logit that was ordinary, passes 100 and stays beyond for five recorded steps, or reaches
10,000. The onset is where it passed 100. Several layers may be beyond; the one that was first is
the place. What contradicts: logits that began beyond 100, for a model may be used to them and only
10,000 is then too much; logits that grew after the loss had told: an effect, `ranked` makes it low.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

DIVERGES = 1e4  # 2309.14322: every run beyond it diverged
CLIPPED = 100.0  # QK-clip's tau
LASTS = 5  # recorded steps

REMEDY = "normalise queries and keys (QK-norm), or QK-clip; a lower learning rate for their weights"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding, for the layer whose logits were too large first."""
    rows = run.tensors("cur_amax", sites="*:attention_logits").dropna(subset=["cur_amax"])
    found = {}
    for site, of in rows.groupby("site", sort=False, observed=True):
        logits = of.groupby("step")["cur_amax"].max()
        onset = _onset(logits.to_numpy(float))
        if onset is not None:
            found[str(site)] = int(logits.index[onset])
    if not found:
        return []
    site = min(found, key=lambda name: found[name])  # the first of several in the model's order
    since, others = found[site], len(found) - 1
    logits = rows[rows["site"] == site].groupby("step")["cur_amax"].max().loc[since:]
    also = f"; so do {others} other layers, later" if others else ""
    diverges = bool(logits.max() > DIVERGES)
    return [
        Finding(
            cause="attention_logits",
            summary=(
                f"the largest attention logit grew to {logits.max():.3g}: each query attends to "
                f"one key, and nothing is learnt from the others{also}"
            ),
            severity="high" if diverges and loss_alarm(run) is not None else "medium",
            confidence="high" if diverges and not others else "medium",
            site=site,
            since=since,
            evidence=tuple(
                Evidence(
                    step=int(logits.index[logits.to_numpy() > threshold][0]),
                    site=site,
                    quantity="largest attention logit",
                    value=float(logits[logits > threshold].iloc[0]),
                    threshold=threshold,
                    source=source,
                )
                for threshold, source in ((CLIPPED, "QK-clip"), (DIVERGES, "2309.14322"))
                if logits.max() > threshold
            ),
            remedy=REMEDY,
            cannot_exclude=(
                "that the learning rate is too high for all weights: the update ratio of the "
                "other layers, or the same run with QK-norm, decides"
            ),
        )
    ]


def _onset(logits: NDArray[np.float64]) -> int | None:
    """Position [steps] from which on the logits stay too large, None if they never do."""
    beyond = logits > CLIPPED
    starts = np.flatnonzero(beyond & ~np.append(False, beyond[:-1]))
    ends = np.flatnonzero(beyond & ~np.append(beyond[1:], False)) + 1
    for start, end in zip(starts, ends, strict=True):
        if (start and end - start >= LASTS) or logits[start:end].max() > DIVERGES:
            return int(start)
    return None
