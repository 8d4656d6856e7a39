"""Arms beside each other: how many runs diverged, the loss, what the casts did, the time of a step.

Numbers are read from rows and from run.json; the arithmetic is medians, maxima and differences of
runs of the same seed. What a run does not say is None, never zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from fp8lab.runs import Run

_OF_WEIGHT = ("weight_flushed", "weight_bulk_error")
_PRODUCT, _DOWN = r":product$", r"(?:^|\.)down(?:_proj)?:weight$"


def side_by_side(runs: Iterable[Run], against: str) -> list[dict[str, Any]]:
    """A row an arm, named part/arm; runs that belong to no experiment are each an arm.

    Losses and times are medians over runs; staleness, saturated, flushed and bulk error are the
    largest that were recorded at a product. Where the weight of a down projection was recorded, to
    which a balanced product hands its range, its largest are `weight_flushed` and
    `weight_bulk_error`; where it was in no arm these are left out. `loss_gap` is the median, over
    the seeds that both have, of the final loss less that of the arm `against` in the same part;
    `step_time_ratio` that of the median times of a step.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = config_of(run)
        named = "part" in config and "arm" in config
        key = f"{config['part']}/{config['arm']}" if named else str(run.path)
        groups.setdefault(key, []).append(run)
    rows = []
    for arm, members in groups.items():
        part = config_of(members[0]).get("part")
        rows.append(_row(arm, members, groups.get(f"{part}/{against}", [])))
    unseen = {name for name in _OF_WEIGHT if all(row[name] is None for row in rows)}
    return [{name: row[name] for name in row if name not in unseen} for row in rows]


def config_of(run: Run) -> dict[str, Any]:
    return told_of(run, "config")


def told_of(run: Run, key: str) -> dict[str, Any]:
    """A part of run.json, empty where a run has none."""
    found = run.info.get(key)
    return found if isinstance(found, dict) else {}


def number_of(value: Any) -> float | None:
    """A number of run.json, None where it has something else."""
    small = type(value) is int and abs(value) < 1 << 1000
    return float(value) if small or isinstance(value, float) else None


def _row(arm: str, runs: list[Run], others: list[Run]) -> dict[str, Any]:
    results = [told_of(run, "result") for run in runs]
    tensors = [run.tensors() for run in runs]

    def largest(column: str, site: str = _PRODUCT) -> float | None:
        found = [one.loc[one["site"].str.contains(site, na=False), column] for one in tensors]
        return max((float(values.max()) for values in found if values.notna().any()), default=None)

    finals, other_finals = _finals(runs), _finals(others)
    gaps = [loss - other_finals[seed] for seed, loss in finals.items() if seed in other_finals]
    seconds, other_seconds = _seconds_a_step(runs), _seconds_a_step(others)
    changes = {config_of(run).get("changes_function") for run in runs}
    return {
        "arm": arm,
        "runs": len(runs),
        "diverged": sum(result.get("diverged_at") is not None for result in results),
        "final_loss": statistics.median(finals.values()) if finals else None,
        "loss_gap": statistics.median(gaps) if gaps else None,
        "staleness": largest("staleness"),
        "saturated": largest("saturated"),
        "flushed": largest("flushed"),
        "bulk_error": largest("bulk_error"),
        "weight_flushed": largest("flushed", _DOWN),
        "weight_bulk_error": largest("bulk_error", _DOWN),
        "steps_per_second": 1.0 / seconds if seconds else None,
        "step_time_ratio": seconds / other_seconds if seconds and other_seconds else None,
        "changes_function": changes.pop() if len(changes) == 1 else None,
    }


def _finals(runs: list[Run]) -> dict[Any, float]:
    """The final losses that there are, by seed, or by run where a run has none."""
    found = {}
    for run in runs:
        final = number_of(told_of(run, "result").get("final_loss"))
        seed = config_of(run).get("seed")
        if final is not None:
            found[seed if isinstance(seed, int) else str(run.path)] = final
    return found


def _seconds_a_step(runs: list[Run]) -> float | None:
    """The median of the runs' medians."""
    measured = [run.steps("seconds")["seconds"].dropna() for run in runs]
    medians = [float(seconds.median()) for seconds in measured if len(seconds)]
    return statistics.median(medians) if medians else None
