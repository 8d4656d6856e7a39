"""Cause: output logits that drift away from zero.

The loss does not change when all logits of a token are shifted alike, so nothing but a z-loss
(1e-4 logsumexp^2, 2309.14322) holds their size; a head that learns too fast, or a z-loss of the
wrong sign, lets them drift. From 128 on two neighbouring BF16 numbers lie a whole nat apart: the
probabilities of a BF16 head are then off by a factor of e, whatever the model knows.

A drift takes steps: beyond the threshold for at least five recorded steps. What blows up within
three or four has another cause, of which this is an effect. And only what was an ordinary logit
before can drift: a model whose outputs begin beyond 16, one part in ten million, is no classifier
near its start. The onset is the step after the last one at which the logits were at most that, or
not more than in a healthy growth (see `growth`).

What contradicts: a head that is handed more. Logits are its weights times its input; where the
input accounts for more than half of the growth, as powers, the stream before the head grew and the
head did not. Outputs of a regression may of course grow; the rule looks at models that attend,
whose blocks have attention logits, or whose last layer is a head.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.growth import departure
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows, facts_of
from fp8lab.record import Evidence, Finding

COARSE = 128.0  # spacing of BF16 (8 significant bits) from here on: 1 nat
UNCALIBRATED = 16.0  # e^-16 = 1e-7: rarer than what a training of this size has seen
HEADS = ("head", "lm_head", "output_layer")  # GPT, Llama, Megatron; `output` in torchtitan
DRIFTS = 5  # steps; what FP8 breaks is NaN three or four steps later, see experiments

REMEDY = "a z-loss of 1e-4; a lower learning rate for the head; logits in FP32"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding if the logits of a classifier drifted."""
    logits = run.steps("logit_max").groupby("step")["logit_max"].max().dropna()
    head = _head(run)
    if logits.empty or head is None:
        return []
    values = logits.to_numpy(float)
    beyond = np.flatnonzero(values > COARSE)
    last = len(values) - DRIFTS
    stays = [c for c in beyond if c <= last and min(values[c : c + DRIFTS]) > COARSE]
    if not stays or values[0] > UNCALIBRATED:
        return []
    if head and _was_handed_more(run, head, logits.iloc[: int(stays[0]) + 1]):
        return []
    crossed = int(stays[0])
    since = int(logits.index[departure(values, crossed, UNCALIBRATED)])
    alarm = loss_alarm(run)
    return [
        Finding(
            cause="output_logits",
            summary=(
                f"the model's logits drifted from {values[0]:.3g} to {values.max():.3g}; in BF16 "
                f"they are then {values.max() / COARSE:.3g} nats apart"
            ),
            severity="medium" if alarm is None else "high",
            confidence="high",
            site=f"{head}:output" if head else None,
            since=since,
            evidence=(
                Evidence(
                    step=int(logits.index[crossed]),
                    site="",
                    quantity="logit_max",
                    value=float(values[crossed]),
                    threshold=COARSE,
                    source="BF16's spacing is one nat",
                ),
            ),
            remedy=REMEDY,
            cannot_exclude="that the stream before the head grew, where its input was not recorded",
        )
    ]


def _was_handed_more(run: Rows, head: str, logits: pd.Series) -> bool:
    """Whether the head's input grew by more than the root of what `logits` [steps] grew by."""
    rows = run.tensors("cur_amax", sites=f"{head}:input")
    handed = rows.groupby("step")["cur_amax"].max().reindex(logits.index).dropna()
    if handed.empty or not handed.iloc[0] > 0:
        return False
    return bool(handed.iloc[-1] / handed.iloc[0] > (logits.iloc[-1] / logits.iloc[0]) ** 0.5)


def _head(run: Rows) -> str | None:
    """The layer that makes logits, as far as run.json tells; None where nothing says that the
    model's output are logits."""
    layers = [*facts_of(run.info, "linears"), *facts_of(run.info, "precision")]
    heads = [name for name in layers if name.rpartition(".")[2] in HEADS or name == "output"]
    if heads or run.tensors("cur_amax", sites="*:attention_logits").empty:
        return heads[-1] if heads else None
    return ""
