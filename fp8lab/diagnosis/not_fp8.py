"""Not FP8: the run went wrong, and it does so in high precision too.

Either the run itself used no FP8, or its twin (the same training in high precision) went wrong as
well. Learning rate, data and the model itself are then the place to look.
"""

from __future__ import annotations

from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding, Severity

WIDE = ("BF16", "FP16", "FP32")


# A twin that goes wrong later than this is no witness.
SOON = 50


def uses_fp8(run: Rows) -> bool | None:
    """Whether any operand of any recorded layer was cast to less than 16 bits, as layers or rows
    say; None where none does: a plain model, or one that another library made FP8."""
    layers = run.info.get("precision")
    operands = layers.values() if isinstance(layers, dict) else ()
    said = [str(cast) for casts in operands if isinstance(casts, dict) for cast in casts.values()]
    formats = run.tensors("format")["format"].dropna().unique()
    said += [str(name) for name in formats]
    return any(not cast.startswith(WIDE) for cast in said) if said else None


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding if the run went wrong and precision cannot be the reason."""
    alarm = loss_alarm(run)
    if alarm is None:
        return []
    if not uses_fp8(run):
        known = uses_fp8(run) is not None
        summary = "the run went wrong and no operand of it is FP8"
        unsure = "nothing in these rows"
        if not known:
            summary = "the run went wrong and no layer of it says that it is FP8"
            unsure = (
                "that another library made layers FP8; and that the loss is one that may rise, as "
                "of a policy or an adversary"
            )
        return [_finding(summary, alarm, alarm, "high" if known else "medium", unsure)]
    twin_alarm = None if twin is None else loss_alarm(twin)
    if twin is None or twin_alarm is None or uses_fp8(twin) or twin_alarm > alarm + SOON:
        return []
    summary = "the twin in high precision went wrong too"
    unsure = "that FP8 made it earlier or worse: compare the two alarms"
    return [_finding(summary, alarm, twin_alarm, "high", unsure)]


def _finding(
    summary: str, since: int, witness: int, confidence: Severity, cannot_exclude: str
) -> Finding:
    return Finding(
        cause="not_fp8",
        summary=summary,
        severity="high",
        confidence=confidence,
        since=since,
        evidence=(Evidence(step=witness, site="", quantity="loss alarm at step", value=witness),),
        remedy="lower the learning rate, clip gradients, look at the data of these steps",
        cannot_exclude=cannot_exclude,
    )
