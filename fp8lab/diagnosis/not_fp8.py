"""Not FP8: the run went wrong, and it does so in high precision too.

Either the run itself used no FP8, or its twin (the same training in high precision) went wrong as
well. Learning rate, data and the model itself are then the place to look.

That it went wrong is certain where the run says so (`diverged`, a loss that is not finite). A loss
that only rose may be one that is to rise, as an adversary's: this is no more than medium, and a
note where not even the precision is known.
"""

from __future__ import annotations

from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding, Severity

WIDE = ("BF16", "FP16", "FP32")

# A twin that goes wrong later than this is no witness.
SOON = 50

MAY_RISE = "that the loss is one that may rise, as of a policy or an adversary"


def uses_fp8(run: Rows) -> bool | None:
    """Whether any operand of any recorded layer was cast to less than 16 bits, as layers or rows
    say; None where none does: a plain model, or one that another library made FP8."""
    layers = run.info.get("precision")
    operands = layers.values() if isinstance(layers, dict) else ()
    said = [str(cast) for casts in operands if isinstance(casts, dict) for cast in casts.values()]
    if any(not cast.startswith(WIDE) for cast in said):
        return True
    said += [str(name) for name in run.tensors("format")["format"].dropna().unique()]
    return any(not cast.startswith(WIDE) for cast in said) if said else None


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """A finding if the run went wrong and precision cannot be the reason."""
    alarm = loss_alarm(run)
    if alarm is None:
        return []
    says_so = bool(run.events()["kind"].isin(["diverged", "nonfinite_loss"]).any())
    is_fp8 = uses_fp8(run)
    if not is_fp8:
        summary = "the run went wrong and no operand of it is FP8"
        if is_fp8 is None:
            summary = "the run went wrong and no layer of it says that it is FP8"
            unsure = f"that another library made layers FP8; {MAY_RISE}"
            return [_finding(summary, alarm, alarm, "high" if says_so else "low", "medium", unsure)]
        severity: Severity = "high" if says_so else "medium"
        return [_finding(summary, alarm, alarm, severity, "high", MAY_RISE)]
    twin_alarm = None if twin is None else loss_alarm(twin)
    if twin is None or twin_alarm is None or uses_fp8(twin) or twin_alarm > alarm + SOON:
        return []
    summary = "the twin in high precision went wrong too"
    unsure = f"that FP8 made it earlier or worse: compare the two alarms; {MAY_RISE}"
    severity = "high" if says_so else "medium"
    return [_finding(summary, alarm, twin_alarm, severity, "high", unsure)]


def _finding(
    summary: str,
    since: int,
    witness: int,
    severity: Severity,
    confidence: Severity,
    cannot_exclude: str,
) -> Finding:
    return Finding(
        cause="not_fp8",
        summary=summary,
        severity=severity,
        confidence=confidence,
        since=since,
        evidence=(Evidence(step=witness, site="", quantity="loss alarm at step", value=witness),),
        remedy="lower the learning rate, clip gradients, look at the data of these steps",
        cannot_exclude=cannot_exclude,
    )
