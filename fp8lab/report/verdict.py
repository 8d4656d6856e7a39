"""What the runs say, in sentences: every cause once, and every prediction beside what was seen.

A cause is told once however many runs show it: where, in which arms, since when, and how long
before the loss itself told. Runs in which the same cause was found with less severity are named
after it, since a page that counts them together would blame what survived. What contradicts a
prediction is said in words and comes first; that is what the prediction was written for.

Rejected: a sentence for each run. Sixty runs would be sixty times the same news.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8lab.record import SEVERITIES, Finding, Severity
from fp8lab.report.story import Arm, Part, Seen, Story, cut_short


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A finding and the run it was made in."""

    part: Part
    arm: Arm
    run: Seen
    finding: Finding

    @property
    def lead(self) -> int | None:
        """Steps from the finding to the loss's own alarm."""
        alarm = self.run.diagnosis.loss_alarm
        return None if alarm is None or self.finding.since is None else alarm - self.finding.since


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A cause in words. `arms` and `milder` are pairs: in which runs, and of which arm.

    `confidence` is the lowest of the findings that it sums up, `cannot_exclude` what would look the
    same in their rows: clauses, of each the first.
    """

    cause: str
    severity: Severity
    confidence: Severity
    sites: tuple[str, ...]
    channels: str
    arms: tuple[tuple[str, str], ...]
    since: str
    lead: str
    remedy: str
    cannot_exclude: str
    milder: tuple[tuple[str, str], ...]


def sightings(story: Story) -> list[Sighting]:
    """Every finding of every run, in the order of parts, arms and seeds."""
    return [
        Sighting(part=part, arm=arm, run=run, finding=finding)
        for part in story.parts
        for arm in part.arms
        for run in arm.runs
        for finding in run.diagnosis.findings
    ]


def verdicts(story: Story) -> list[Verdict]:
    """One for every cause, the worst first."""
    found = sightings(story)
    told = [
        _verdict([one for one in found if one.finding.cause == cause], story)
        for cause in dict.fromkeys(one.finding.cause for one in found)
    ]
    return sorted(told, key=lambda one: SEVERITIES.index(one.severity))


def _verdict(found: list[Sighting], story: Story) -> Verdict:
    severity = min((one.finding.severity for one in found), key=SEVERITIES.index)
    worst = [one for one in found if one.finding.severity == severity]
    hit = {one.run.label for one in worst}
    milder = [one for one in found if one.run.label not in hit]
    return Verdict(
        cause=in_words(worst[0].finding.cause),
        severity=severity,
        confidence=max((one.finding.confidence for one in worst), key=SEVERITIES.index),
        sites=tuple(sorted({one.finding.site for one in worst if one.finding.site is not None})),
        channels=_channels({s.finding.channel for s in worst if s.finding.channel is not None}),
        arms=_by_arm(worst, story),
        since=_since(worst),
        lead=_lead(worst),
        remedy=worst[0].finding.remedy,
        cannot_exclude=worst[0].finding.cannot_exclude,
        milder=_by_arm(milder, story),
    )


def in_words(cause: str) -> str:
    """A cause's name as a sentence begins with it."""
    return cause.replace("_", " ").capitalize().replace("fp8", "FP8")


def _channels(channels: set[int]) -> str:
    if len(channels) > 6:
        return f"{len(channels)} different channels"
    names = [str(channel) for channel in sorted(channels)]
    if len(names) < 2:
        return "".join(f"channel {name}" for name in names)
    return f"channels {', '.join(names[:-1])} and {names[-1]}"


def _by_arm(found: list[Sighting], story: Story) -> tuple[tuple[str, str], ...]:
    counts: dict[tuple[str, str], tuple[str, str]] = {}
    for one in found:
        runs = {s.run.label for s in found if s.arm is one.arm}
        title = one.arm.title if len(story.parts) == 1 else f"{one.arm.title} ({one.part.name})"
        number = f"{len(runs)} of {len(one.arm.runs)} run{'s' * (len(one.arm.runs) > 1)} of"
        counts[one.part.name, one.arm.name] = "run" if title == one.run.label else number, title
    return tuple(counts.values())


def _since(found: list[Sighting]) -> str:
    trained = [s.finding.since for s in found if s.finding.since is not None and not s.run.doses]
    words = [_span(trained, "step ")] if trained else []
    dosed = [s.run.when(s.finding.since) for s in found if s.finding.since is not None]
    words += dict.fromkeys(word for word in dosed if not word.startswith("step "))
    return " and ".join(words)


def _lead(found: list[Sighting]) -> str:
    trained = [one for one in found if one.finding.site is not None and not one.run.doses]
    leads = [one.lead for one in trained if one.lead is not None]
    if not trained:
        return ""
    if not leads:
        return "the loss itself never told"
    if max(leads) <= 0:
        return "not before the loss's own alarm"
    return f"{_span(leads)} steps before the loss's own alarm"


def _span(numbers: list[int], unit: str = "") -> str:
    low, high = min(numbers), max(numbers)
    return f"{unit}{low}" if low == high else f"{unit}{low} to {high}"


def contradictions(part: Part) -> list[str]:
    """Arms whose runs ended otherwise than predicted, one sentence each; none of runs that were
    cut, which what was predicted is not about."""
    if part.cut:
        return []
    sentences = []
    for arm in part.arms:
        against = _against(arm)
        if against:
            did = "diverged" if arm.predicted == "survives" else "survived"
            seeds = ", ".join(str(run.seed) for run in against)
            sentences.append(
                f"{arm.title} ({part.name}) was predicted to {arm.predicted.removesuffix('s')}, "
                f"and {len(against)} of {len(arm.decided)} runs {did} (seed {seeds})"
            )
    return sentences


def _against(arm: Arm) -> list[Seen]:
    if arm.predicted == "survives":
        return list(arm.diverged)
    if arm.predicted == "diverges":
        return [run for run in arm.decided if run.diverged_at is None]
    return []


def judged(arm: Arm, cut: str = "") -> str:
    """An arm's prediction against what was seen; `cut` is its part's."""
    if not arm.decided:
        return "no finished run"
    if arm.predicted == "open":
        return "nothing predicted"
    if cut:
        return "not judged: cut short"
    return "contradicted" if _against(arm) else "as predicted"


def not_judged(experiment: Mapping[str, Any]) -> str:
    """Why an experiment's prediction is not held against its runs, a sentence without its full
    stop; empty where it is."""
    cut = cut_short(experiment)
    told = f"these runs were cut ({cut}): nothing follows from them for the prediction"
    return told if cut else ""


def counts(story: Story) -> str:
    """How many runs, and how they ended."""
    trained = [run for run in story.runs if not run.doses]
    lost = sum(run.diverged_at is not None for run in trained)
    dosed = len(story.runs) - len(trained)
    told_by_loss = [run for run in trained if run.diagnosis.loss_alarm is not None]
    spiked = sum(run.diverged_at is None for run in told_by_loss)
    told = f"{len(trained)} training run{'s' * (len(trained) != 1)}, {lost or 'none'} diverged"
    if spiked:
        told += f", the loss of {spiked} more gave an alarm"
    if dosed:
        told += f"; {dosed} dose-response run{'s' * (dosed != 1)}"
    causes = len({one.finding.cause for one in sightings(story)})
    found = f"{causes} cause{'s' * (causes != 1)} found" if causes else "nothing found"
    return f"{told}. {found.capitalize()}."


def unfinished(story: Story) -> str:
    """Runs that are not finished, in one sentence; empty if there is none."""
    states = [run.state for run in story.runs if run.state != "finished"]
    told = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    missing = sum(part.missing for part in story.parts)
    told += [f"{missing} planned and not here"] if missing else []
    lost = "".join(f" Of {run.label} {run.run.lost}." for run in story.runs if run.run.lost)
    return f"Runs that are not finished: {', '.join(told)}.{lost}" if told else ""
