"""The tables: numbers from run.json and from findings, set in rows.

A cell is text and what it means (bad, warn, good, quiet); how that looks is the template's affair,
and the text alone must say it too. The arithmetic is counting, a median over an arm's runs and,
for doses, a mean over them; each heading says which.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fp8lab.comparison import side_by_side
from fp8lab.diagnosis import in_short
from fp8lab.diagnosis.rows import facts_of
from fp8lab.recipe import GEMMS, gemm_in_words
from fp8lab.record import SEVERITIES, STEPS, TENSORS, Severity
from fp8lab.report.story import Arm, Part, Seen, Story, superscript
from fp8lab.report.verdict import in_words, judged

Meaning = Literal["", "bad", "warn", "good", "quiet"]


class Cell(NamedTuple):
    """What a table says in one place."""

    text: str
    meaning: Meaning = ""


NOTHING = Cell("–", "quiet")
OF = "\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}"  # two numbers that belong on one line


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a heading each; the first column names the row."""

    head: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    title: str = ""
    note: str = ""
    kind: str = field(default="table", init=False)


def number(value: Any) -> str:
    """Four digits; a dash for what is missing."""
    if value is None:
        return NOTHING.text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def meaning_of(statistic: str) -> str:
    """What a column of tensors or steps says, in the schema's own words."""
    columns = (*TENSORS, *STEPS)
    return next((one.meaning for one in columns if one.name == statistic), statistic)


def predictions(part: Part) -> Table:
    """Predicted and seen, arm by arm."""
    meanings: dict[str, Meaning] = {"contradicted": "bad", "as predicted": "good"}
    rows = [
        (
            Cell(arm.title),
            Cell(arm.predicted),
            Cell(_diverged(arm).text, "quiet") if part.cut else _diverged(arm),
            Cell(judged(arm, part.cut), meanings.get(judged(arm, part.cut), "quiet")),
        )
        for arm in part.arms
    ]
    return Table(title=part.title, head=("arm", "predicted", "diverged", "judged"), rows=rows)


def _diverged(arm: Arm) -> Cell:
    if not arm.decided:
        return NOTHING
    lost = len(arm.diverged)
    return Cell(f"{lost} of {len(arm.decided)}", "bad" if lost else "")


def outcomes(part: Part) -> Table:
    """Arms × seeds, or runs where there are no seeds: how each ended."""
    note = "a number is the final loss; “loss alarm”: the step at which the loss itself told"
    if not any(isinstance(run.seed, int) for run in part.runs):
        ends = [
            (Cell(run.label), _outcome(run), Cell(run.standing), _steps(run)) for run in part.runs
        ]
        columns = ("run", "outcome", "state", "steps recorded")
        return Table(title=part.title, head=columns, rows=ends, note=note)
    rows = []
    for arm in part.arms:
        cells = [[_outcome(run) for run in arm.runs if run.seed == seed] for seed in part.seeds]
        rows.append((Cell(arm.title), *map(_one_cell, cells)))
    head = ("arm", *(f"seed {seed}" for seed in part.seeds))
    return Table(title=part.title, head=head, rows=rows, note=f"{note}; –: no run")


def _one_cell(cells: list[Cell]) -> Cell:
    if not cells:
        return NOTHING
    return Cell(" · ".join(cell.text for cell in cells), cells[0].meaning)


def _outcome(run: Seen) -> Cell:
    if run.diverged_at is not None:
        return Cell(f"diverged at {run.diverged_at}", "bad")
    alarm = run.diagnosis.loss_alarm
    told = "" if alarm is None else f", loss alarm at {alarm}"
    if run.steps.empty:
        return Cell(f"{run.state}, no step recorded", "warn")
    final, last = run.result.get("final_loss"), run.steps.iloc[-1]
    if run.state != "finished":
        return Cell(f"{run.state} at step {int(last['step'])}{told}", "warn")
    if final is None:
        final = float(last["loss"])
    return Cell(number(float(final)) + told, "warn" if told else "")


def mitigations(part: Part) -> Table:
    """What each arm came to, and its price: in loss, in time, and whether the model's function is
    another one. Gaps and ratios are to the arm that trains the same with no FP8."""
    has_rare = any(run.result.get("final_rare_error") is not None for run in part.runs)
    prices, references = _prices(part)
    rows = []
    for arm in part.arms:
        row = [
            Cell(arm.title),
            Cell(", ".join(arm.mitigations)) if arm.mitigations else NOTHING,
            _changes_function(prices.get(arm.name, {})),
            _diverged(arm),
            _median(arm, "final_loss"),
            *([_median(arm, "final_rare_error")] if has_rare else []),
            *(_price(prices.get(arm.name, {})) if references else ()),
            _findings(arm),
        ]
        rows.append(tuple(row))
    rare = ["rare error, median"] if has_rare else []
    gaps = ["loss gap", "time of a step"] if references else []
    head = ("arm", "mitigation", "function", "diverged", "final loss, median", *rare, *gaps)
    note = "medians over the runs that finished and did not diverge"
    if references:
        note += (
            f"; gap and time are to {' or '.join(references)}, over the seeds that both have and "
            "over medians of steps. Times are of these runs on their machine: casts that are "
            "emulated say nothing of what they cost in hardware"
        )
    title = "Arms, and the price of each"
    return Table(title=title, head=(*head, "findings"), rows=rows, note=note)


def _prices(part: Part) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What `comparison` says of each arm, by name; and the titles of the arms compared with. An arm
    that has none is compared with nothing."""
    runs = [run.run for run in part.runs]
    references = {arm.name: part.reference_of(arm) for arm in part.arms}
    titles = {one.name: one.title for one in references.values() if one is not None}
    told: dict[str, dict[str, Any]] = {}
    for against in titles or ("",):
        found = {row["arm"]: row for row in side_by_side(runs, against)}
        for arm in part.arms:
            row, reference = found.get(f"{part.name}/{arm.name}", {}), references[arm.name]
            if reference is None:
                told[arm.name] = row | {"loss_gap": None, "step_time_ratio": None}
            elif reference.name == against:
                told[arm.name] = row
    return told, list(titles.values())


def _changes_function(price: dict[str, Any]) -> Cell:
    changes = price.get("changes_function")
    if changes is None:
        return NOTHING
    return Cell("changed", "warn") if changes else Cell("kept")


def _price(price: dict[str, Any]) -> tuple[Cell, Cell]:
    gap, ratio = price.get("loss_gap"), price.get("step_time_ratio")
    return (
        NOTHING if gap is None else Cell(f"{gap:+.3g}"),
        NOTHING if ratio is None else Cell(f"×\N{NO-BREAK SPACE}{ratio:.3g}"),
    )


def _median(arm: Arm, name: str) -> Cell:
    whole = [run for run in arm.runs if run.state == "finished"]
    values = [run.result[name] for run in whole if run.result.get(name) is not None]
    return Cell(number(float(statistics.median(values)))) if values else NOTHING


def _findings(arm: Arm) -> Cell:
    meanings: dict[Severity, Meaning] = {"high": "bad", "medium": "warn", "low": "quiet"}
    counts: dict[tuple[str, Severity], set[str]] = {}
    for run in arm.runs:
        for finding in run.diagnosis.findings:
            counts.setdefault((finding.cause, finding.severity), set()).add(run.label)
    if not counts:
        return Cell("nothing found", "quiet") if arm.runs else NOTHING
    told = [
        f"{in_words(cause)}, {severity}: {len(runs)} of {len(arm.runs)}".replace(" of ", OF)
        for (cause, severity), runs in counts.items()
    ]
    worst = min((severity for _, severity in counts), key=SEVERITIES.index)
    return Cell("; ".join(told), meanings[worst])


def dose_numbers(part: Part, quantity: str, title: str) -> Table:
    """Arms × doses: the mean over an arm's runs."""
    doses = sorted({one["dose"] for run in part.runs for one in run.doses})
    rows = []
    for arm in part.arms:
        found: dict[float, list[float]] = {}
        for run in arm.runs:
            for one in run.doses:
                found.setdefault(one["dose"], []).append(float(one[quantity]))
        means = [
            Cell(f"{statistics.fmean(found[d]):.4f}") if d in found else NOTHING for d in doses
        ]
        rows.append((Cell(arm.title), *means))
    head = ("arm", *(f"2{superscript(int(dose))}" for dose in doses))
    return Table(title=title, head=head, rows=rows, note="means over runs")


def precision(arm: Arm, title: str) -> Table:
    """Layer by GEMM, as the layers said it; equal layers share a row."""
    layers: dict[str, Any] = {}
    for run in arm.runs:
        layers |= facts_of(run.run.info, "precision")
    rows: dict[tuple[str, ...], list[str]] = {}
    for layer, casts in layers.items():
        rows.setdefault(tuple(gemm_in_words(casts, gemm) for gemm in GEMMS), []).append(layer)
    return Table(
        title=title,
        head=("layers", *GEMMS),
        rows=[(Cell(_numbered_alike(names)), *map(Cell, casts)) for casts, names in rows.items()],
        note="" if rows else "no layer was converted: the operands are what the model computes in",
    )


def _numbered_alike(layers: list[str]) -> str:
    """Names on one line, those that differ only in numbers once: layers.*.mlp.up (32)."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(re.sub(r"\d+", "*", layer), []).append(layer)
    return ", ".join(
        names[0] if len(names) == 1 else f"{pattern} ({len(names)})"
        for pattern, names in groups.items()
    )


def recorded_runs(story: Story) -> Table:
    """Every run: where it stands and what it was given."""
    rows = [
        (
            Cell(run.label),
            Cell(run.standing, "" if run.standing == "finished" else "warn"),
            Cell(number(run.seed if run.seed != "" else None)),
            _steps(run),
            Cell(number(run.run.info.get("every"))),
            Cell(", ".join(f"{k} {v}" for k, v in _settings(run).items()) or "–"),
        )
        for run in story.runs
    ]
    head = ("run", "state", "seed", "steps recorded", "in full every", "settings")
    return Table(head=head, rows=rows)


def _steps(run: Seen) -> Cell:
    if run.steps.empty:
        return Cell("none", "warn")
    first, last = int(run.steps["step"].min()), int(run.steps["step"].max())
    told = in_short(run.run.not_as_told)
    steps = f"{first} to {last}" if last > first else str(first)
    return Cell("; ".join([steps, *told]), "warn" if told else "")


def _settings(run: Seen) -> dict[str, str]:
    """Plain values of the configuration that no other column shows."""
    shown = ("experiment", "part", "arm", "seed", "text", "text_sha256")
    plain = (str, int, float)
    return {k: str(v) for k, v in run.config.items() if k not in shown and isinstance(v, plain)}
