"""Arms beside each other: how many runs diverged, the loss, what the casts did, the time of a step.

Numbers are read from rows and from run.json; the arithmetic is medians, maxima and differences of
runs of the same seed. What a run does not say is None, never zero.

Losses are laid beside each other by step, or by tokens seen where a step has not the same number of
them in every run. From where a run diverged its loss counts as infinite: were it left out, an arm
would look the better the more of its runs are lost. A run that merely ends tells nothing beyond.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fp8lab.runs import Run

By = Literal["step", "tokens"]

_OF_WEIGHT = ("weight_flushed", "weight_bulk_error")
AGAINST = "bf16"  # the arm that others are held against, if there is one
_PRODUCT, _DOWN = r":product$", r"(?:^|\.)down(?:_proj)?:weight$"
_WHERE = ("*:product", "*down:weight", "*down_proj:weight")  # what these two are found among
_IN_FULL = ("saturated", "flushed", "bulk_error")  # not in the rows of every step, as staleness is
_WORST = ("staleness", *_IN_FULL)


def side_by_side(runs: Iterable[Run], against: str, by: By | None = None) -> list[dict[str, Any]]:
    """A row an arm, as `arms_of` has them.

    Losses and times are medians over runs; staleness, saturated, flushed and bulk error are the
    largest that were recorded at a product: staleness of every step, the others of those that were
    recorded in full, which `in_full` counts in words ("20 of 200", steps of all runs of the arm).
    It is left out where every step of every arm was. Where the weight of a down projection was
    recorded, to which a balanced product hands its range, its largest are `weight_flushed` and
    `weight_bulk_error`; where it was in no arm these are left out. Final losses are of finished
    runs: what others came to is `unfinished`, in words ("2 failed"), left out where there are none.
    `steps` are those that the finished runs took which did not diverge, in words ("5 to 100"), left
    out where all took as many. `loss_gap` is the median, over the seeds that both have, of the
    final loss less that of the arm `against` in the same part; `step_time_ratio` that of the median
    times of a step.

    With `by`, `aligned_loss` is the median of the losses that the arm's runs recorded last at or
    before `aligned_at`: the furthest step, or number of tokens seen, that every arm of the part
    reached with a run that did not diverge. Raises ValueError as `curve_of` does.
    """
    groups = _grouped(runs)
    others = (groups.get((*key[:-1], against), []) for key in groups)
    rows = [
        _row(name, members, other)
        for (name, members), other in zip(_named(groups), others, strict=True)
    ]
    if by is not None:
        rows = _aligned(rows, list(groups.values()), by)
    is_partial = any(told < steps for told, steps in (row["in_full"] for row in rows))
    for row in rows:
        told, steps = row["in_full"]
        row["in_full"] = f"{told} of {steps}" if is_partial and steps else None
    differ = len(set().union(*(row["steps"] for row in rows))) > 1
    for row in rows:
        ends = sorted(row["steps"]) if differ else []
        row["steps"] = " to ".join(map(str, dict.fromkeys((*ends[:1], *ends[-1:])))) or None
    optional = ("unfinished", "steps", "in_full", *_OF_WEIGHT)
    unseen = {name for name in optional if all(row[name] is None for row in rows)}
    return [{name: row[name] for name in row if name not in unseen} for row in rows]


def require_arm(runs: Iterable[Run], against: str) -> None:
    """Raises ValueError if no run is of that arm, unless it is the usual one."""
    arms = dict.fromkeys(key[-1] for key in _grouped(runs))
    if against not in (AGAINST, *arms):
        raise ValueError(f"--against {against!r:.80}: expected one of {', '.join(arms)}")


def arms_of(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each arm, in the order of `side_by_side`'s rows, and its name: part/arm, after
    the experiment's where several have one; runs that belong to no experiment are each an arm."""
    return _named(_grouped(runs))


def _grouped(runs: Iterable[Run]) -> dict[tuple[str, ...], list[Run]]:
    """By experiment, part and arm, or by path."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        config = config_of(run)
        named = "part" in config and "arm" in config
        key = (*_part_of(run), str(config["arm"])) if named else (str(run.path),)
        groups.setdefault(key, []).append(run)
    return groups


def _part_of(run: Run) -> tuple[str, str]:
    config = config_of(run)
    return str(config.get("experiment", "")), str(config.get("part"))


def _named(groups: dict[tuple[str, ...], list[Run]]) -> list[tuple[str, list[Run]]]:
    sharing = Counter(key[1:] for key in groups)
    named = []
    for key, members in groups.items():
        is_told = len(key) == 1 or (key[0] and sharing[key[1:]] > 1)
        named.append(("/".join(key if is_told else key[1:]), members))
    return named


class Curve(NamedTuple):
    """The finite losses of a run, float64 [points], at rising positions, and how it ended."""

    positions: NDArray[np.float64]
    losses: NDArray[np.float64]
    lost: bool

    def at(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """The loss recorded last; NaN before the first and after the end, infinite if lost."""
        if not len(self.positions):
            return np.full(len(positions), np.nan)
        last = np.searchsorted(self.positions, positions, side="right") - 1
        found = np.where(last >= 0, self.losses[last], np.nan)
        beyond = math.inf if self.lost else math.nan
        return np.where(positions > self.positions[-1], beyond, found)


class Band(NamedTuple):
    """Of several curves at every position, float64 [points]: their median, and what most of them
    lie between."""

    positions: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


QUARTILES_FROM = 5  # runs; a band of fewer reaches from the lowest to the highest


def curve_of(run: Run, by: By, loss: str = "loss") -> Curve:
    """The loss of a run's first process, or another number of its step rows, by step or by tokens.

    It is lost if `lost_at` says so.

    The tokens of a step are the number `tokens` given to `watch.step`; without it `batch` times
    `context` of the run's config. Raises ValueError if a run with steps says neither.
    """
    rows = run.steps()
    rows = rows[rows["rank"] == rows["rank"].min()].drop_duplicates("step")
    if rows.empty or loss not in rows:
        return Curve(np.array([]), np.array([]), False)
    positions = (rows["step"] if by == "step" else _tokens_seen(run, rows)).to_numpy(float)
    losses = rows[loss].to_numpy(float)
    told = np.isfinite(losses)
    return Curve(positions[told], losses[told], lost_at(run) is not None)


def _tokens_seen(run: Run, rows: pd.DataFrame) -> pd.Series:
    expected = "expected a number `tokens` at every step, or `batch` and `context` in its config"
    if "tokens" in rows:
        if not (np.isfinite(rows["tokens"]) & (rows["tokens"] > 0)).all():
            raise ValueError(f"{run.path}: tokens missing at some of its steps, {expected}")
        return rows["tokens"].cumsum()
    sizes = [number_of(config_of(run).get(name)) for name in ("batch", "context")]
    if not all(size is not None and 0 < size < math.inf for size in sizes):
        raise ValueError(f"{run.path}: says no tokens of a step, {expected}")
    return (rows["step"] + 1) * math.prod(size for size in sizes if size is not None)


def band_of(curves: Sequence[Curve]) -> Band | None:
    """The curves' median at every position of any of them, and the range between the lowest and
    the highest, or from QUARTILES_FROM curves on between the quartiles; None without a point."""
    curves = [curve for curve in curves if len(curve.positions)]
    if not curves:
        return None
    positions = np.unique(np.concatenate([curve.positions for curve in curves]))
    losses = np.stack([curve.at(positions) for curve in curves])
    outside = 0.25 if len(curves) >= QUARTILES_FROM else 0.0
    # Nothing is interpolated: between a number and infinity there is none.
    low = np.nanquantile(losses, outside, axis=0, method="lower")
    high = np.nanquantile(losses, 1.0 - outside, axis=0, method="higher")
    return Band(positions, np.nanmedian(losses, axis=0), low, high)


def loss_name(step_rows: Iterable[pd.DataFrame]) -> str:
    """Of runs beside each other, by their step rows: `common_loss`, which a rare token does not
    disturb, where every run with steps has it."""
    told = [set(rows.columns) for rows in step_rows if len(rows)]
    return "common_loss" if told and all("common_loss" in names for names in told) else "loss"


def furthest_common(arms: Iterable[Sequence[Curve]]) -> float | None:
    """The furthest position that every arm reached with a run that was not lost; of arms that
    have none, if there is no other, the nearest of their ends. None without a point."""
    ends: dict[bool, list[float]] = {False: [], True: []}
    for curves in arms:
        lost = all(curve.lost for curve in curves if len(curve.positions))
        told = [curve for curve in curves if len(curve.positions) and curve.lost == lost]
        if told:
            ends[lost].append(max(float(curve.positions[-1]) for curve in told))
    return min(ends[False] or ends[True], default=None)


def _aligned(rows: list[dict[str, Any]], groups: list[list[Run]], by: By) -> list[dict[str, Any]]:
    """The rows, in their order, which is that of their runs, with two columns after the final
    loss."""
    parts: dict[tuple[str, str], list[int]] = {}
    for arm, runs in enumerate(groups):
        parts.setdefault(_part_of(runs[0]), []).append(arm)
    found: dict[int, dict[str, float | None]] = {}
    for arms in parts.values():
        name = loss_name(run.steps() for arm in arms for run in groups[arm])
        curves = {arm: [curve_of(run, by, name) for run in groups[arm]] for arm in arms}
        common = furthest_common(curves.values())
        for arm in arms:
            place = np.array([math.nan if common is None else common])
            losses = [float(curve.at(place)[0]) for curve in curves[arm]]
            told = [loss for loss in losses if not math.isnan(loss)]
            median = statistics.median(told) if told else None
            found[arm] = {"aligned_at": common, "aligned_loss": median}
    aligned = []
    for arm, row in enumerate(rows):
        head = {name: row[name] for name in ("arm", "runs", "diverged", "unfinished", "final_loss")}
        aligned.append(head | found[arm] | row)
    return aligned


def lost_at(run: Run) -> int | None:
    """The step from which a run's loss is lost, None where it is not.

    By its own result, where that says anything of it; else the first `diverged` event; else where
    the loss became not finite for good, by the rows that have one: a loss that was not recorded in
    the last step tells nothing.
    """
    told = told_of(run, "result").get("diverged_at", math.nan)
    if told is None:
        return None
    number = number_of(told)
    if number is not None and abs(number) < 1 << 63:  # also neither NaN nor infinite
        return int(told)
    events = run.arrow("events", ("kind",))
    diverged = events.filter(pa.compute.equal(events["kind"], "diverged"))["step"]
    if len(diverged):
        return int(pa.compute.min(diverged).as_py())
    rows = told_losses(run.arrow("steps", ("loss",)))
    finite = np.flatnonzero(np.isfinite(rows["loss"].to_numpy()))
    first = int(finite[-1]) + 1 if len(finite) else 0
    return int(rows["step"][first].as_py()) if first < len(rows) else None


def told_losses(step_rows: pa.Table) -> pa.Table:
    """The rows of the first process that tells a loss, by step: one that was not recorded is null,
    one that is NaN was."""
    rows = step_rows.filter(pa.compute.is_valid(step_rows["loss"])).sort_by("step")
    return rows.filter(pa.compute.equal(rows["rank"], pa.compute.min(rows["rank"])))


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
    tensors = [run.coded("tensors", (*_WORST, "count"), sites=_WHERE) for run in runs]

    def largest(column: str, site: str = _PRODUCT) -> float | None:
        found = [one.loc[one["site"].str.contains(site, na=False), column] for one in tensors]
        return max((float(values.max()) for values in found if values.notna().any()), default=None)

    finals, other_finals = _finals(runs), _finals(others)
    gaps = [
        loss - statistics.median(other_finals[seed])
        for seed, losses in finals.items()
        for loss in losses
        if seed in other_finals
    ]
    all_finals = [loss for losses in finals.values() for loss in losses]
    seconds, other_seconds = _seconds_a_step(runs), _seconds_a_step(others)
    changes = {config_of(run).get("changes_function") for run in runs}
    return {
        "arm": arm,
        "runs": len(runs),
        "diverged": sum(lost_at(run) is not None for run in runs),
        "unfinished": _unfinished(runs),
        "final_loss": statistics.median(all_finals) if all_finals else None,
        "loss_gap": statistics.median(gaps) if gaps else None,
        "steps": _steps_taken(runs),
        "staleness": largest("staleness"),
        "saturated": largest("saturated"),
        "flushed": largest("flushed"),
        "bulk_error": largest("bulk_error"),
        "in_full": _in_full(tensors),
        "weight_flushed": largest("flushed", _DOWN),
        "weight_bulk_error": largest("bulk_error", _DOWN),
        "steps_per_second": 1.0 / seconds if seconds else None,
        "step_time_ratio": seconds / other_seconds if seconds and other_seconds else None,
        "changes_function": changes.pop() if len(changes) == 1 else None,
    }


def _in_full(tensors: list[pd.DataFrame]) -> tuple[int, int]:
    """Of the products' steps those in which each product says more than a staleness, and all. In
    full has a count of its elements, also of a product that nothing casts."""
    products = [one[one["site"].str.contains(_PRODUCT, na=False)] for one in tensors]
    told = [one["count"].notna().groupby(one["step"]).all() for one in products]
    return sum(int(steps.sum()) for steps in told), sum(len(steps) for steps in told)


def _unfinished(runs: list[Run]) -> str | None:
    """Of the runs that are not finished how many there are of each state."""
    states = Counter(run.state for run in runs)
    told = [f"{count} {state}" for state, count in states.items() if state != "finished"]
    return ", ".join(told) or None


def _steps_taken(runs: list[Run]) -> set[int]:
    """How many steps the finished runs took that did not diverge."""
    whole = (run for run in runs if run.state == "finished" and lost_at(run) is None)
    return {len(pa.compute.unique(run.arrow("steps", "step")["step"])) for run in whole}


def _finals(runs: list[Run]) -> dict[Any, list[float]]:
    """The final losses that there are, by seed, None for runs that say none: those of the results
    of finished runs, and of one without a result its last one, unless it is lost."""
    found: dict[Any, list[float]] = {}
    for run in (one for one in runs if one.state == "finished"):
        result = told_of(run, "result")
        final = number_of(result.get("final_loss")) if result else _last_loss(run)
        seed = config_of(run).get("seed")
        if final is not None:
            found.setdefault(seed if isinstance(seed, int) else None, []).append(final)
    return found


def _last_loss(run: Run) -> float | None:
    if lost_at(run) is not None:
        return None
    losses = curve_of(run, "step").losses
    return float(losses[-1]) if len(losses) else None


def _seconds_a_step(runs: list[Run]) -> float | None:
    """The median of the runs' medians."""
    measured = [run.steps("seconds")["seconds"].dropna() for run in runs]
    medians = [float(seconds.median()) for seconds in measured if len(seconds)]
    return statistics.median(medians) if medians else None
