"""Cause: attention logits that grow until the softmax is a choice of one.

Queries and keys grow, and their product with them, quadratically: a learning rate that is too high
for them, or nothing that holds them (no query-key normalisation). Every run of Wortsman et al.
(2309.14322) whose largest attention logit exceeded 10,000 diverged. What grows before is seen as
well: QK-clip begins to act at 100 (Kimi), so the onset is where the logit left the ordinary, at
the latest where it passed 100.

Several layers may be beyond the threshold; the one that was first is the place. What contradicts:
logits that grew only after the loss had told: then they are an effect, and `ranked` makes them low.
"""

from __future__ import annotations

import numpy as np

from fp8lab.diagnosis.growth import departure
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

DIVERGES = 1e4  # 2309.14322: every run beyond it diverged
CLIPPED = 100.0  # QK-clip's tau

REMEDY = "normalise queries and keys (QK-norm), or QK-clip; a lower learning rate for their weights"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding, for the layer whose logits were too large first."""
    rows = run.tensors("cur_amax", sites="*:attention_logits")
    beyond = rows[rows["cur_amax"] > DIVERGES]
    if beyond.empty:
        return []
    crossed = beyond.iloc[0]
    site = str(crossed["site"])
    logits = rows[rows["site"] == site].groupby("step")["cur_amax"].max().dropna()
    place = int(np.searchsorted(logits.index.to_numpy(), crossed["step"]))
    since = int(logits.index[departure(logits.to_numpy(float), place, CLIPPED)])
    others = sorted(set(beyond["site"]) - {site})
    also = f"; so do {len(others)} other layers, later" if others else ""
    alarm = loss_alarm(run)
    return [
        Finding(
            cause="attention_logits",
            summary=(
                f"the largest attention logit grew to {logits.max():.3g}: each query attends to "
                f"one key, and nothing is learnt from the others{also}"
            ),
            severity="medium" if alarm is None else "high",
            confidence="medium" if others else "high",
            site=site,
            since=since,
            evidence=(
                Evidence(
                    step=int(crossed["step"]),
                    site=site,
                    quantity="largest attention logit",
                    value=float(crossed["cur_amax"]),
                    threshold=DIVERGES,
                    source="2309.14322",
                ),
            ),
            remedy=REMEDY,
            cannot_exclude=(
                "that the learning rate is too high for all weights: the update ratio of the "
                "other layers, or the same run with QK-norm, decides"
            ),
        )
    ]
