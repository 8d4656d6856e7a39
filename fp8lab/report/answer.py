"""The question that a report is opened with, answered in its first line: is it FP8?

Yes, no, or cannot say, of the run in the most trouble: its worst finding above "low" decides. Its
cause is one that low precision brings, or one that it has no part in; where a run went wrong and no
rule says why, where nothing was recorded, or FP8 broke off before there was anything to see, the
answer is that this page cannot say. Not yet, while the loss has told nothing of a cause that low
precision brings; not tried, where all went well and nothing was FP8. How sure is the finding's own
confidence, and what would look the same in these rows is said beside it.

Rejected: an answer over all runs. Of an experiment half are made to fail, and it would be neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8lab.diagnosis import OF_PRECISION
from fp8lab.diagnosis.rows import facts_of
from fp8lab.forecast.not_judged import not_judged, operand_at
from fp8lab.forecast.recorded import low_casts
from fp8lab.record import Finding, Severity
from fp8lab.report.story import Seen, Story
from fp8lab.report.verdict import in_words

QUESTION = "Is it FP8?"
Word = Literal["Yes", "No", "Not yet", "Not tried", "Cannot say"]

_OF_PRECISION = frozenset(rule.__name__.rpartition(".")[2] for rule in OF_PRECISION)
_ASK = "ask what FP8 would have done: `fp8lab replay RUN --recipe R`, and see below"
_RECORD = "record what was not: `fp8lab diagnose RUN` prints the argument of `watch`"
_TWIN = "its twin in high precision"
_LESS: dict[Severity, Severity] = {"high": "medium", "medium": "low", "low": "low"}
ENOUGH_STEPS = 100  # the longest time that the rules look back over is of this order


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer, what it rests on, and how far it goes.

    `because` is a sentence without its full stop; `run` the run that it is about, in words; `site`,
    `channel` and `since` are the finding's, None or empty where it has none; `summary`, `remedy`
    and `cannot_exclude` are clauses, empty where nothing is known.
    """

    word: Word
    because: str
    confidence: Severity = "low"
    cannot_exclude: str = ""
    run: str = ""
    cause: str = ""
    site: str | None = None
    channel: int | None = None
    since: str = ""
    summary: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        told = f"{QUESTION} {self.word} (confidence {self.confidence}): {self.because}."
        return f"{told} Cannot exclude: {self.cannot_exclude}." if self.cannot_exclude else told


def answer_of(story: Story) -> Answer:
    """Of the run in the most trouble."""
    worst = story.worst_first()
    if not worst or (worst[0].is_empty and worst[0].diverged_at is None):
        because = "nothing was recorded" if worst else "no run could be read"
        how = next((run.diagnosis.ended for run in worst if run.diagnosis.ended), "")
        return Answer(word="Cannot say", because=because + (f": {how}" if how else ""))
    run = worst[0]
    found = run.diagnosis.serious
    if found:
        return _found(story, run, found[0])
    ended = _ended(run)
    if ended:
        name = named(story, run)
        because = f"{ended} in {name}, and no rule found a cause in what was recorded"
        left = not_judged(run.run)
        because += f"; not recorded, so not judged: {left.what}" if left.what else ""
        ask = _RECORD if left.select else ""
        return Answer(word="Cannot say", because=because, run=name, remedy=ask)
    return _nothing(story, run)


def _ended_early(story: Story) -> list[Seen]:
    """Runs in FP8, or perhaps in FP8 as nothing was recorded, that broke off and had told of
    nothing wrong: what would have followed, nobody saw."""
    tried = [run for run in story.runs if run.uses_fp8] or [r for r in story.runs if r.is_empty]
    broken = [run for run in tried if run.diagnosis.ended and run.state != "interrupted"]
    return [run for run in broken if not _ended(run)]


def _none_ended(story: Story, early: list[Seen]) -> bool:
    """Whether all of FP8 that there is broke off: of several seeds one may, and the others tell."""
    return bool(early) and all(one in early for one in story.runs if one.uses_fp8)


def _in_short(story: Story, early: list[Seen]) -> str:
    more = f" and {len(early) - 1} more" if len(early) > 1 else ""
    return f"{named(story, early[0])}{more}: {early[0].diagnosis.ended}"


def _nothing(story: Story, run: Seen) -> Answer:
    """Nothing went wrong; how far that goes depends on how much there is to see."""
    unfinished = any(not one.decided for one in story.runs)
    lost = [one for one in story.unread if one.label != "experiment.json"]
    whose = ["that could be read"] if lost else []
    if any(one.doses and (one.diagnosis.serious or _ended(one)) for one in story.runs):
        whose.append("that are no dose-response")
    because = f"of the runs {' and '.join(whose)}, none" if whose else "no run"
    because += " diverged, no loss gave an alarm, and no rule found more than a note (severity low)"
    early = _ended_early(story)
    if early:
        because += f"; but not every run came to its end: {_in_short(story, early)}"
    elif unfinished:
        because += " so far"
    is_tried = any(arm.uses_fp8 for part in story.parts for arm in part.arms)
    if not is_tried:
        because += "; no operand says that it is FP8, so that FP8 was not tried here"
    excluded = ["what was not recorded, and what more steps would show"]
    if lost:
        excluded.insert(0, f"what {len(lost)} run{'s' * (len(lost) > 1)} that cannot be read holds")
    missing = sum(part.missing for part in story.parts)
    if missing:
        excluded.append(f"what {missing} planned and not here would show")
    enough = len(run.steps) >= ENOUGH_STEPS and not run.products.empty
    is_open = bool(lost) or _none_ended(story, early)
    return Answer(
        word="Cannot say" if is_open else "No" if is_tried else "Not tried",
        remedy="" if is_tried else _ASK,
        because=because,
        confidence="medium" if enough and not (unfinished or missing or lost or early) else "low",
        cannot_exclude="; ".join(excluded),
    )


def _found(story: Story, run: Seen, finding: Finding) -> Answer:
    name, is_precision = named(story, run), finding.cause in _OF_PRECISION
    word: Word = "Yes" if is_precision else "No"
    if finding.cause == "precision_label":
        word = "Cannot say"  # what is called FP8 is not all FP8, and was not tried
    elif is_precision and not _ended(run):
        word = "Not yet"
    word, confidence, clauses, excluded = _beside_twin(story, run, finding, word)
    early = _ended_early(story)
    if word == "No" and _none_ended(story, early):
        word, confidence = "Cannot say", "low"
        clauses.append(f"no run in FP8 came to its end: {_in_short(story, early)}")
    saved = _saved(story, run) if is_precision else []
    if saved:
        others = f" and {len(saved) - 2} more" if len(saved) > 2 else ""
        clauses.append(f"with the same seed it survives as {', '.join(saved[:2])}{others}")
    tried = _lost_without(story, run, finding) if word == "Yes" else []
    if tried:
        word, confidence = word if story.twin_of(run) else "Cannot say", "low"
        clauses.append(f"a run with it in high precision diverged too ({tried[0]})")
    since = "" if finding.since is None else run.when(finding.since)
    where = "" if finding.site is None else f" at {finding.site}"
    where += "" if finding.channel is None else f", channel {finding.channel},"
    where += f" since {since}," if since else ""
    clauses.insert(0, _ended(run) or "the loss itself never told")
    return Answer(
        word=word,
        because="; ".join([f"{_in_a_sentence(run, finding)}{where} in {name}", *clauses]),
        confidence=confidence,
        cannot_exclude="; ".join(one for one in (finding.cannot_exclude, *excluded) if one),
        run=name,
        cause=in_words(finding.cause),
        site=finding.site,
        channel=finding.channel,
        since=since,
        summary=finding.summary,
        remedy=finding.remedy,
    )


def _in_a_sentence(run: Seen, finding: Finding) -> str:
    """The cause as what is since when: "not FP8 since step 9" would be FP8 that was left at it."""
    if finding.cause != "not_fp8":
        return in_words(finding.cause)
    return "It goes wrong in high precision too," if run.uses_fp8 else "It goes wrong without FP8,"


def _beside_twin(
    story: Story, run: Seen, finding: Finding, word: Word
) -> tuple[Word, Severity, list[str], list[str]]:
    """What the twin makes of the word and of its confidence; what it tells, and what it leaves
    open."""
    twin, is_precision = story.twin_of(run), finding.cause in _OF_PRECISION
    confidence, told, excluded = finding.confidence, "", ""
    if twin is None:
        if is_precision:
            excluded = f"that it goes wrong in high precision too: {_no_twin(story, run)}"
    elif _ended(twin):
        how, step = _end_of(twin)
        told = f"{_TWIN} {how}{' too,' if _ended(run) else ''} at step {step}"
        if is_precision and _no_later(twin, run):
            word, confidence = "Cannot say", "low"
            told += ", so that FP8 need not have been what did it"
        elif is_precision:
            confidence = _LESS[confidence]
            excluded = "that FP8 did but hasten what high precision does as well"
    elif not _reached_its_end(twin, run):
        what = "it goes wrong in high precision too" if is_precision else "FP8 has a part in it"
        excluded = f"that {what}: {_TWIN} ended before it did"
    else:
        told = f"{_TWIN} neither diverged nor gave an alarm"
        if not is_precision and _ended(run):
            word, confidence = "Cannot say", "low"
            told += ", and nothing but precision tells the two apart"
    return word, confidence, [told] if told else [], [excluded] if excluded else []


def _saved(story: Story, run: Seen) -> list[str]:
    """Of a run that diverged, the other arms with FP8 in which its seed did not."""
    if run.seed == "":
        return []
    return [
        arm.title
        for part in story.parts
        if run.diverged_at is not None and run in part.runs
        for arm in part.arms
        if arm.uses_fp8 and run not in arm.runs
        if any(one.seed == run.seed and one.decided for one in arm.runs)
        if all(one.diverged_at is None for one in arm.runs if one.seed == run.seed)
    ]


def _lost_without(story: Story, run: Seen, finding: Finding) -> list[str]:
    """Of a cause in FP8, the runs of its seed that diverged in FP8 too, but with that operand in
    high precision."""
    operand = operand_at(run.run, finding.site or "")
    casts = low_casts(run.run)
    return [
        named(story, one)
        for part in story.parts
        if run in part.runs and operand in casts
        for one in part.runs
        if one.seed == run.seed and one.diverged_at is not None and one.uses_fp8
        if operand[0] in facts_of(one.run.info, "precision") and operand not in low_casts(one.run)
    ]


def _no_twin(story: Story, run: Seen) -> str:
    others = [one for one in story.runs if one is not run and not one.is_empty]
    if any(not one.uses_fp8 for one in others):
        return "no run in high precision that is here is known to be its twin"
    return "no such run is here"


def _ended(run: Seen) -> str:
    """How the run went wrong by its own account; empty if it did not."""
    how, step = _end_of(run)
    whose = "run" if how == "diverged" else "loss"
    return "" if step is None else f"the {whose} {how} at step {step}"


def _end_of(run: Seen) -> tuple[str, int | None]:
    if run.diverged_at is not None:
        return "diverged", run.diverged_at
    return "gave an alarm", run.diagnosis.loss_alarm


def _no_later(twin: Seen, run: Seen) -> bool:
    """Whether the twin went wrong before the run did, with it, or instead of it."""
    (_, first), (_, end) = _end_of(twin), _end_of(run)
    return end is None or (first is not None and first <= end)


def _reached_its_end(twin: Seen, run: Seen) -> bool:
    """Whether the twin was recorded to where the run went wrong, or else was recorded to."""
    _, end = _end_of(run)
    reached, last = (one.steps["step"].max() for one in (twin, run))  # NaN without steps
    return bool(reached >= (last if end is None else end))


def named(story: Story, run: Seen) -> str:
    """A run as a sentence names it: its arm's title and its seed, if it has them."""
    for part in story.parts:
        for arm in part.arms:
            if run in arm.runs and arm.title != run.label:
                return f"{arm.title}, seed {run.seed}" if run.seed != "" else arm.title
    return f"run {run.label}"
