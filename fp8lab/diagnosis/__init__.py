"""From a recorded run to causes: which tensor, which channel, since when, and what speaks for it.

One file a cause. A rule reads rows and returns findings; each says the thresholds it held the rows
against, where they come from, and what would look the same. Nothing here measures anything: if a
number was not recorded, the rule that needs it is silent. "Nothing found" is an answer.

Rules read one run. What a run alone cannot tell (would BF16 have failed too?) takes the `twin`, a
run of the same training in high precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from fp8lab.diagnosis import (
    attention_logits,
    bulk_underflow,
    cold_start,
    corrupt_batch,
    delayed_saturation,
    floor_saturation,
    gradient_overflow,
    gradient_underflow,
    learning_rate,
    massive_activation,
    missing_clamp,
    not_fp8,
    output_logits,
    precision_label,
    rank_local_amax,
    second_moment_lag,
    shared_exponent,
    short_accumulator,
    stale_scale,
    token_outlier,
)
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Loaded, Rows
from fp8lab.diagnosis.twin import Divergence, first_divergence
from fp8lab.ending import error_of
from fp8lab.record import SEVERITIES, Finding
from fp8lab.runs import UNTOLD, often_in_words
from fp8lab.store import Run, open_run

# Causes that low precision brings, and those that it has no part in.
OF_PRECISION = (
    delayed_saturation,
    bulk_underflow,
    cold_start,
    stale_scale,
    token_outlier,
    floor_saturation,
    gradient_overflow,
    gradient_underflow,
    rank_local_amax,
    shared_exponent,
    short_accumulator,
)
OF_TRAINING: tuple[Any, ...] = (
    massive_activation,
    attention_logits,
    output_logits,
    precision_label,
    learning_rate,
    second_moment_lag,
    corrupt_batch,
    missing_clamp,
)
MOST_TOLD = 5  # of events that make rows other than they seem
# What is wrong with the set-up itself: rows prove it, whatever data and weights do.
OF_SETUP = frozenset(
    ("rank_local_amax", "short_accumulator", "floor_saturation", "precision_label", "missing_clamp")
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings on one run, worst first; `loss_alarm` is the step at which its loss or a
    recorded event said by itself that something is wrong, None if it never did; `divergence` is
    where the run first parted from its twin, None without one or if it never did; `lost` names, of
    several processes, those whose rows may end early (see `Run.lost`), `incomplete` those that may
    have had more rows than are on disk; `not_as_told` the events after which rows are not what they
    seem (see `Run.not_as_told`); `is_empty` where no step was recorded, and nothing can be said;
    `ended` how the run came to its end, if that was no good one."""

    run: str
    findings: tuple[Finding, ...]
    loss_alarm: int | None
    divergence: Divergence | None = None
    is_empty: bool = False
    lost: str = ""
    incomplete: str = ""
    ended: str = ""
    not_as_told: tuple[str, ...] = ()

    @property
    def serious(self) -> tuple[Finding, ...]:
        """The findings that are more than a note."""
        return tuple(finding for finding in self.findings if finding.severity != "low")

    @property
    def first_alarm(self) -> int | None:
        """The earliest step that a finding above "low" names."""
        steps = [found.since for found in self.serious if found.since is not None]
        return min(steps, default=None)

    @property
    def is_unexplained(self) -> bool:
        """Whether the loss told of trouble, and no finding is more than a note."""
        return self.loss_alarm is not None and not self.serious

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "run": self.run,
            "is_empty": self.is_empty,
            "loss_alarm": self.loss_alarm,
            "first_alarm": self.first_alarm,
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
            "lost": self.lost,
            "incomplete": self.incomplete,
            "ended": self.ended,
            "not_as_told": list(self.not_as_told),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        parted = "" if self.divergence is None else f"\n{self.divergence}"
        if self.lost:
            ended = self.lost if self.is_empty else self.ended or self.lost
            parted += f"\n{ended}: rows end there"
            parted += f", the last of {self.incomplete} may be missing" if self.incomplete else ""
        elif self.ended and not self.is_empty:
            parted += f"\n{self.ended}: rows end there"
        parted += "".join(f"\n{line}" for line in in_short(self.not_as_told))
        if self.is_empty:
            told = f"nothing was recorded: {self.ended or 'is watch.step called in the loop?'}"
            return f"{self.run}: {told}{parted}"
        if not self.findings:
            told = "" if self.loss_alarm is None else f"; the loss told at step {self.loss_alarm}"
            return f"{self.run}: nothing found{told}{parted}"
        text = "\n".join(str(finding) for finding in self.findings)
        if self.loss_alarm is not None:
            text += f"\nthe loss told at step {self.loss_alarm}"
            if self.first_alarm is not None and self.first_alarm < self.loss_alarm:
                text += f", {self.loss_alarm - self.first_alarm} steps after the first alarm"
        return f"{self.run}:\n{text}{parted}"


def diagnose(run: Run | str | Path, twin: Run | str | Path | None = None) -> Diagnosis:
    """Judge a recorded run; `twin` is the same training in high precision, if there is one.

    Raises RunError if a path is no run, TypeError for what is no path.
    """
    run = run if isinstance(run, Run) else open_run(run)
    twin = twin if twin is None or isinstance(twin, Run) else open_run(twin)
    judged = judge(Loaded(run), None if twin is None else Loaded(twin))
    ended = _end_of(run, judged.is_empty)
    told = replace(judged, ended=ended, not_as_told=tuple(run.not_as_told))
    return replace(told, lost=run.lost, incomplete=run.incomplete)


def in_short(told: Sequence[str]) -> list[str]:
    """Of what `Run.not_as_told` tells, the first, and how many more there are."""
    more = [f"{len(told) - MOST_TOLD} more, see fp8lab show"] if len(told) > MOST_TOLD else []
    return [*told[:MOST_TOLD], *more]


def _end_of(run: Run, is_empty: bool) -> str:
    state = run.state
    if state in ("running", "finished"):
        return ""
    error = error_of(run)
    steps = run.arrow("steps", ("step",))["step"]
    if is_empty or not len(steps):
        told = f"{state} before its first step"
        if state in UNTOLD:
            often = max(run.writes_every(rank) for rank in run.folders())
            told = f"{state}, no step on disk ({often_in_words(often)})"
    else:
        when = ", last step on disk" if state in UNTOLD else " after step"
        told = f"{run.lost or state}{when} {pc.max(steps).as_py()}"
    return told + ("" if error is None else f": {error}")


def judge(rows: Rows, twin: Rows | None = None) -> Diagnosis:
    """What all rules find in these rows, ranked."""
    findings = [finding for rule in OF_PRECISION for finding in rule.find(rows, twin)]
    others = [finding for rule in OF_TRAINING for finding in rule.find(rows, twin)]
    excluded = not_fp8.find(rows, twin)
    if any(found.confidence == "high" for found in excluded):
        # What precision cannot have caused, it can only have accompanied.
        findings = [
            replace(f, severity="low" if f.severity == "low" else "medium", confidence="low")
            for f in findings
        ]
    for rate in (f for f in others if f.cause == "learning_rate"):
        findings = [_behind(found, rate) for found in findings]
    if not any(found.severity == "high" for found in others):
        others += excluded  # it says of no cause which
    alarm = loss_alarm(rows)
    parted = None if twin is None else first_divergence(rows, twin)
    told = bool(findings or others or parted) or alarm is not None
    return Diagnosis(
        run=str(rows.path),
        findings=ranked([*findings, *others], alarm),
        loss_alarm=alarm,
        divergence=parted,
        is_empty=not told and rows.steps(("loss",)).empty,
    )


def _behind(found: Finding, rate: Finding) -> Finding:
    """A rate that throws all weights out of place throws operands out of their scales: what follows
    it is no worse than it, unless the rate is but a note."""
    if rate.severity == "low" or found.cause in OF_SETUP or (found.since or 0) < (rate.since or 0):
        return found
    worst = max(SEVERITIES.index(found.severity), SEVERITIES.index(rate.severity))
    return replace(found, severity=SEVERITIES[worst])


def ranked(findings: list[Finding], alarm: int | None) -> tuple[Finding, ...]:
    """Worst first, then surest, then faults of the set-up, then earliest: a cause precedes its
    effects, and what is proven is repaired before the rest can be judged.

    What begins after the loss has told is an effect of what the loss told of: low.
    """
    ordered = [
        replace(found, severity="low", confidence="low")
        if alarm is not None and found.since is not None and found.since > alarm
        else found
        for found in findings
    ]
    ordered.sort(
        key=lambda f: (
            SEVERITIES.index(f.severity),
            SEVERITIES.index(f.confidence),
            f.cause not in OF_SETUP,
            f.since or 0,
            (f.site or "").endswith(":grad_output"),  # in one step the forward pass precedes it
        )
    )
    return tuple(ordered)
