"""What a run's directory says now: curves, the products of the newest step, what the rules find.

A look costs what was asked, not what was recorded: where no segment came it reads nothing; else the
steps' table and the products of the last `LOOK_BACK` steps. The rules are those of `diagnose`, and
judge the whole run while it is small: what they no longer find is gone. Of a larger one they see
the last steps, as a guard's do, and what they found stays. They take at most `SHARE` of the time.

Rejected: rows kept from look to look. A run that is resumed takes some back, and reading the ten
thousand rows of steps again is a hundredth of a second.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from fp8lab import segments
from fp8lab.diagnosis import judge
from fp8lab.diagnosis.rows import Loaded
from fp8lab.ending import error_of
from fp8lab.record import CLIPPED_STALENESS, SEVERITIES, Finding, Table
from fp8lab.runs import Excerpt, Names, Numbers, Run, find_runs, hottest, open_run, state_file
from fp8lab.segments import RunError

UNDER_WAY = ("running", "unknown")
CURVES = ("loss", "grad_norm", "seconds")
LOOK_BACK = 1000  # steps; who records in full more rarely sees no casts
JUDGED_ROWS = 100_000  # two seconds
SHARE = 0.1
_OF_CAST = ["saturated", "flushed"]
_OF_PRODUCT = ["cur_amax", "hot_channel", "staleness", "nans", "infs", *_OF_CAST]


class Curve(NamedTuple):
    """A number of each step that has it, also where it is not finite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at one moment.

    `products` has a row a product of the newest step, the worst first, with the `saturated` and
    `flushed` of `cast_step`, the last that was recorded in full. `findings` is None before the
    rules saw anything; `judged` is the first step whose rows they saw, None where that is all.
    `age` is in seconds, since rows came; `lost` names processes that have not come to an end.
    """

    path: Path
    note: str
    state: str
    error: str | None
    planned: int | None
    age: float | None
    curves: dict[str, Curve]
    products: pd.DataFrame
    cast_step: int | None
    events: pd.DataFrame
    lost: str = ""
    findings: tuple[Finding, ...] | None = None
    judged: int | None = None

    @property
    def step(self) -> int | None:
        """The newest step, None before the first."""
        return max((int(c.steps[-1]) for c in self.curves.values() if len(c.steps)), default=None)

    @property
    def speed(self) -> float | None:
        """Steps a second, by the median of the last fifty."""
        seconds = self.curves["seconds"].values[-50:]
        median = float(np.median(seconds)) if len(seconds) else 0.0
        return 1.0 / median if median > 0 else None


class Follower:
    """Looks at one run again and again."""

    def __init__(self, path: Path, note: str = "") -> None:
        self._path, self._note = path, note
        self._stamp: object = None
        self._view: View | None = None
        self._told: dict[tuple[str, str | None], Finding] = {}
        self._judged_stamp: object = None
        self._judged: int | None = None
        self._rest_until = 0.0

    def look(self, *, judging: bool = True) -> View:
        """The run now, by the rules too if they are due. Raises RunError if it is damaged."""
        run = open_run(self._path)
        stamp = stamp_of(run)  # before the rows: whose run has ended then has them all
        if self._view is None or stamp != self._stamp:
            self._stamp, self._view = stamp, _seen(run, self._note, stamp[0])
        if not judging:
            return replace(self._view, age=_age(run))
        over = stamp[0] not in UNDER_WAY
        if stamp != self._judged_stamp and (over or time.monotonic() >= self._rest_until):
            self._judged_stamp = stamp
            self._judge(run, self._view)
        findings = sorted(
            self._told.values(), key=lambda f: (SEVERITIES.index(f.severity), f.since or 0)
        )
        return replace(self._view, findings=tuple(findings), judged=self._judged, age=_age(run))

    def _judge(self, run: Run, view: View) -> None:
        began = time.monotonic()
        window = _window(run, view)
        self._judged = None if window is None else window.start
        if window is None:
            self._told = {}
        for found in judge(Loaded(run if window is None else _Recent(run, window))).findings:
            key = found.cause, found.site
            told = self._told.get(key, found)
            since = [f.since for f in (told, found) if f.since is not None]
            worst = min(found.severity, told.severity, key=SEVERITIES.index)
            self._told[key] = replace(found, since=min(since, default=None), severity=worst)
        now = time.monotonic()
        self._rest_until = now + (now - began) * (1.0 / SHARE - 1.0)


class _Recent(Excerpt):
    """A run of which only the steps' table is older than `window`."""

    def __init__(self, run: Run, window: range) -> None:
        super().__init__(run.path, run.info)
        self._window = window

    def arrow(
        self,
        table: Table,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
        coded: bool = False,
    ) -> pa.Table:
        steps = steps if table == "steps" else self._window
        return super().arrow(table, columns, sites=sites, steps=steps, ranks=ranks, coded=coded)


def chosen(path: Path, *, awaiting: bool = False) -> tuple[Path, str] | None:
    """The run at `path`; below a folder, the newest that is being recorded, and a note of that.

    Raises RunError if there is none; `awaiting` one it is None, while nothing but folders is in its
    way.
    """
    found = list(find_runs(path))
    if awaiting and not found and not state_file(path, 0).exists():
        there = next((place for place in (path, *path.parents) if place.exists()), path)
        if there.is_dir():
            return None
    if found in ([], [path]):
        open_run(path)  # raises with the reason
        return path, ""
    recording = [one for one in found if _is_recorded(one)]
    newest = max(recording or found, key=lambda one: (_started(one), one))
    count = f"{len(recording)} that are being recorded" if recording else f"{len(found)} runs"
    if len(recording) == 1:
        return newest, "the one that is being recorded"
    return newest, f"the newest of {count}{'' if recording else ', none being recorded'}"


def _is_recorded(path: Path) -> bool:
    try:
        return open_run(path).state in UNDER_WAY
    except RunError:
        return False


def _started(path: Path) -> float:
    """When its state was last written: of a run that is being recorded, its start."""
    try:
        return (path / "run.json").stat().st_mtime
    except OSError:
        return 0.0


def stamp_of(run: Run) -> tuple[str, object]:
    """The state, and what changes whenever rows come, are merged or taken back."""
    state = run.state
    return state, [
        (folder, segments.listed(folder), (folder / "steps.parquet").exists())
        for folder in run.folders().values()
    ]


def _age(run: Run) -> float | None:
    """Seconds since rows were written, None before the first."""
    written = []
    for folder in run.folders().values():
        with suppress(OSError):  # not yet there, or merged just now
            written.append((folder / "segments").stat().st_mtime)
    return max(0.0, time.time() - max(written)) if written else None


def _seen(run: Run, note: str, state: str) -> View:
    rows = _steps_of_one(run)
    curves = {}
    for name in CURVES:
        known = rows.filter(pa.compute.is_valid(rows[name]))
        order = np.argsort(known["step"].to_numpy(), kind="stable")
        curves[name] = Curve(known["step"].to_numpy()[order], known[name].to_numpy()[order])
    products, cast_step = _products(run, np.unique(rows["step"].to_numpy()))
    config = run.info.get("config")
    planned = config.get("steps") if isinstance(config, dict) else None
    return View(
        path=run.path,
        note=note,
        state=state,
        error=error_of(run),
        planned=planned if type(planned) is int and planned > 0 else None,
        age=None,
        curves=curves,
        products=products,
        cast_step=cast_step,
        events=run.events(),
        lost=run.lost,
    )


def _steps_of_one(run: Run) -> pa.Table:
    """Of the first process that has rows: who was killed may have written none."""
    tables = (run.arrow("steps", list(CURVES), ranks=rank) for rank in run.folders())
    none = run.arrow("steps", list(CURVES), ranks=())
    return next((rows for rows in tables if len(rows)), none)


def _products(run: Run, steps: NDArray[np.int64]) -> tuple[pd.DataFrame, int | None]:
    """The newest row of each product, the worst first, and the step that its casts are of."""
    recent = steps[-LOOK_BACK:]
    window = range(int(recent[0]), int(recent[-1]) + 1) if len(recent) else range(0)
    rows = run.tensors(_OF_PRODUCT, sites="*:product", steps=window)
    newest = hottest(rows[rows["step"] == rows["step"].max()]).set_index("site")
    cast = rows.dropna(subset=_OF_CAST, how="all")
    cast_step = None if cast.empty else int(cast["step"].max())
    newest[_OF_CAST] = cast[cast["step"] == cast_step].groupby("site")[_OF_CAST].max()
    unbounded = ~np.isfinite(newest["cur_amax"]) | (newest["nans"] > 0) | (newest["infs"] > 0)
    newest["finite"] = ~unbounded
    newest["clipped"] = newest["staleness"].fillna(0.0).clip(lower=CLIPPED_STALENESS)
    order = {"finite": True, "clipped": False, "saturated": False, "cur_amax": False}
    ranked = newest.sort_values(list(order), ascending=list(order.values()), kind="stable")
    return ranked.drop(columns="clipped").reset_index(), cast_step


def _window(run: Run, view: View) -> range | None:
    """The steps whose rows the rules can judge in time, None where these are all."""
    steps = np.unique(np.concatenate([curve.steps for curve in view.curves.values()]))
    if not len(steps):
        return None
    recent = steps[-100:]
    rows = run.arrow("tensors", "step", steps=range(int(recent[0]), int(recent[-1]) + 1)).num_rows
    fitting = max(1, JUDGED_ROWS * len(recent) // max(1, rows))
    return None if fitting >= len(steps) else range(int(steps[-fitting]), int(steps[-1]) + 1)
