"""From a recorded run to causes: which tensor, which channel, since when, and what speaks for it.

One file a cause. A rule reads rows and returns findings; each says the thresholds it held the rows
against, where they come from, and what would look the same. Nothing here measures anything: if a
number was not recorded, the rule that needs it is silent. "Nothing found" is an answer.

Rules read one run. What a run alone cannot tell (would BF16 have failed too?) takes the `twin`, a
run of the same training in high precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp8lab.diagnosis import bulk_underflow, delayed_saturation, not_fp8
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.record import SEVERITIES, Finding
from fp8lab.store import Run, open_run


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings on one run, worst first; `loss_alarm` is the step at which its loss or a
    recorded event said by itself that something is wrong, None if it never did."""

    run: str
    findings: tuple[Finding, ...]
    loss_alarm: int | None

    @property
    def first_alarm(self) -> int | None:
        """The earliest step that a finding above "low" names."""
        steps = [f.since for f in self.findings if f.severity != "low" and f.since is not None]
        return min(steps, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "run": self.run,
            "loss_alarm": self.loss_alarm,
            "first_alarm": self.first_alarm,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        if not self.findings:
            told = "" if self.loss_alarm is None else f"; the loss told at step {self.loss_alarm}"
            return f"{self.run}: nothing found{told}"
        text = "\n".join(str(finding) for finding in self.findings)
        if self.loss_alarm is not None:
            text += f"\nthe loss told at step {self.loss_alarm}"
            if self.first_alarm is not None and self.first_alarm < self.loss_alarm:
                text += f", {self.loss_alarm - self.first_alarm} steps after the first alarm"
        return f"{self.run}:\n{text}"


def diagnose(run: Run | str | Path, twin: Run | str | Path | None = None) -> Diagnosis:
    """Judge a recorded run; `twin` is the same training in high precision, if there is one.

    Raises RunError if a path is no run.
    """
    run = run if isinstance(run, Run) else open_run(run)
    twin = twin if twin is None or isinstance(twin, Run) else open_run(twin)
    findings = [*delayed_saturation.find(run), *bulk_underflow.find(run)]
    excluded = not_fp8.find(run, twin)
    if excluded:
        # What precision cannot have caused, it can only have accompanied.
        findings = [replace(f, severity="medium", confidence="low") for f in findings]
    findings += excluded
    # Among equally bad ones the earliest first: a cause precedes its effects.
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), f.since or 0))
    return Diagnosis(run=str(run.path), findings=tuple(findings), loss_alarm=loss_alarm(run))
