"""What a report is about: runs read once, judged, and put beside what was predicted of them.

`load` turns paths into a `Story`: parts of arms of runs. An experiment's own file, the
`experiment.json` at the top of a given folder, names the parts, the arms and what was predicted;
runs that no experiment knows are each an arm of their own. A run that cannot be read is listed with
the reason and costs the page nothing else.

The twin that a diagnosis asks for is found here: the run of the same part and seed whose settings
differ in nothing but precision, and which has none of FP8. Rejected: leaving that to the caller,
who would have to name one for every run.

What is picked here are rows, by rules that the page states. The only arithmetic is counting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from fp8lab.comparison import lost_at
from fp8lab.diagnosis import Diagnosis, diagnose
from fp8lab.diagnosis.not_fp8 import uses_fp8
from fp8lab.diagnosis.rows import Loaded, facts_of
from fp8lab.record import SEVERITIES, TABLES
from fp8lab.report import longest
from fp8lab.runs import hottest
from fp8lab.store import Run, RunError, find_runs, open_run

# Of two that may be twins: how far apart their first losses lie, and the steps that both recorded.
SAME_START, SAME_STEPS = 0.05, 5
# What differs between the arms of one training; everything else in `config` must be the same.
_ARM_KEYS = ("arm", "recipe", "mitigations", "changes_function", "options")


class Seen:
    """A run as the page shows it: its rows, and what the diagnosis says of them."""

    def __init__(self, label: str, run: Run) -> None:
        self.label = label
        self.run = run
        config = run.info.get("config")
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        result = run.info.get("result")
        self.result = _of_known_types(result) if isinstance(result, dict) else {}
        self.part = str(self.config.get("part", ""))
        self.arm = str(self.config.get("arm", label))
        seed = self.config.get("seed")
        self.seed = seed if isinstance(seed, int) else "" if seed is None else str(seed)
        self.steps = _first_rank(run.steps())
        self.diagnosis = Diagnosis(run=label, findings=(), loss_alarm=None)

    @property
    def state(self) -> str:
        return self.run.state

    @property
    def standing(self) -> str:
        """The state, and of several processes those that have not come to an end."""
        lost = self.run.lost
        return f"{self.state} ({lost})" if lost else self.state

    @cached_property
    def uses_fp8(self) -> bool:
        return bool(uses_fp8(Loaded(self.run)))

    @cached_property
    def products(self) -> pd.DataFrame:
        """Tensor rows of the gate products, without `bins` and `statistics`; of a long run only
        what `longest.extremes` picks has its `histogram`, other rows have None."""
        return longest.products(self.run)

    @cached_property
    def channels(self) -> pd.DataFrame:
        """Channel rows; of a long run those of the rows of `products` that have a histogram, and
        the first and last in which the channel that the run is looked at was the hottest."""
        told = next(_told_places(self), None)
        looked_at = None if told is None else (told.site, told.channel)
        rows = longest.channels(self.run, self.products, looked_at)
        # Tensor parallelism gives each process channels of its own; else all have the same ones.
        return rows.drop_duplicates(["step", "site", "channel"])

    def tensor_columns(
        self, columns: Collection[str], sites: str | Collection[str] | None = None
    ) -> pd.DataFrame:
        """A row a step and site, of the process where its amax is largest, and nothing but these
        columns; text as categories. 10 MB and a twentieth of a second a million rows and column."""
        asked = {*columns, "cur_amax"}
        return hottest(self.run.coded("tensors", asked, sites=sites))

    @cached_property
    def diverged_at(self) -> int | None:
        """As `comparison.lost_at`."""
        return lost_at(self.run)

    @property
    def is_empty(self) -> bool:
        return self.steps.empty and self.products.empty

    @property
    def decided(self) -> bool:
        """Whether no further step could change the outcome."""
        return self.state == "finished" or self.diverged_at is not None

    def not_finite(self, column: str) -> int:
        """In how many steps the number was recorded, and is none."""
        if self.steps.empty:
            return 0
        own = column in TABLES["steps"].names
        rank = int(self.steps["rank"].iloc[0])
        rows = self.run.arrow("steps", column if own else "metrics", ranks=rank)
        if own:
            told = rows[column]
        else:
            told = pa.compute.map_lookup(rows["metrics"], column, "first")
        return int((~np.isfinite(told.drop_null().to_numpy())).sum())

    @property
    def doses(self) -> list[dict[str, float]]:
        """Of a dose-response run: dose, loss, gradient_cosine."""
        return list(self.result.get("doses") or [])

    def when(self, step: int) -> str:
        """A step in words; in a dose-response run, the dose that it was measured at."""
        if "dose" in self.steps:
            doses = self.steps.loc[self.steps["step"] == step, "dose"].dropna()
            if len(doses):
                return f"amplification 2{superscript(int(doses.iloc[0]))}"
        return f"step {step}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, and its runs in the order of their seeds."""

    name: str
    title: str
    predicted: str = "open"
    mitigations: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    runs: tuple[Seen, ...] = ()

    @property
    def diverged(self) -> tuple[Seen, ...]:
        return tuple(run for run in self.runs if run.diverged_at is not None)

    @property
    def uses_fp8(self) -> bool:
        return any(run.uses_fp8 for run in self.runs)

    @property
    def decided(self) -> tuple[Seen, ...]:
        return tuple(run for run in self.runs if run.decided)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The same training in several arms. `seeds` are those planned and any others."""

    name: str
    title: str
    seeds: tuple[Any, ...]
    arms: tuple[Arm, ...]
    missing: int = 0  # runs that were planned and are not here
    cut: str = ""  # as `cut_short` says

    @property
    def runs(self) -> tuple[Seen, ...]:
        return tuple(run for arm in self.arms for run in arm.runs)

    def reference_of(self, arm: Arm) -> Arm | None:
        """The first other arm that trains the same with no FP8, if `arm` has any."""
        for other in self.arms:
            same = "arm" in self.runs[0].config and other.options == arm.options
            if other is not arm and same and arm.uses_fp8 and not other.uses_fp8 and other.runs:
                return other
        return None

    @property
    def is_dose_response(self) -> bool:
        return any(run.doses for run in self.runs)


class Unread(NamedTuple):
    """Something that could not be read, and why."""

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that a report is written from."""

    experiments: tuple[dict[str, Any], ...]
    parts: tuple[Part, ...]
    unread: tuple[Unread, ...]
    given_twin: Seen | None = None  # of runs that are no arms of anything

    @property
    def runs(self) -> tuple[Seen, ...]:
        return tuple(run for part in self.parts for run in part.runs)

    def twin_of(self, run: Seen) -> Seen | None:
        """The same training in high precision, if it is here and the run itself is not that.

        Of runs that are no arms of anything it is the one that was given, or the only one on a
        model of the same layers with the same learning rates.
        """
        if "arm" not in run.config:
            if run is self.given_twin or not run.uses_fp8:
                return None
            alike = [one for one in self.runs if one is not run and _may_be_twin(one, run)]
            return self.given_twin or (alike[0] if len(alike) == 1 else None)
        for part in self.parts:
            for arm in part.arms:
                reference = part.reference_of(arm) if run in arm.runs else None
                for other in () if reference is None else reference.runs:
                    if _setting(other) == _setting(run):
                        return other
        return None

    def worst_first(self) -> list[Seen]:
        """Those that diverged, then those whose loss told, then by severity, then by how far
        beyond its threshold the evidence lies; then dose-response runs, which train nothing, and
        last what recorded nothing and says no more."""
        return sorted(self.runs, key=_badness)


def _badness(run: Seen) -> tuple[int, bool, bool, int, float]:
    findings = run.diagnosis.findings
    severity = min((SEVERITIES.index(f.severity) for f in findings), default=len(SEVERITIES))
    placed = [found.evidence for found in findings if found.site is not None]
    beyond = [one.beyond for told in placed for one in told]
    worst = max((ratio for ratio in beyond if isfinite(ratio)), default=0.0)
    silent = run.diagnosis.loss_alarm is None
    survived = run.diverged_at is None
    order = 1 if run.doses else 2 if survived and run.is_empty else 0
    return (order, survived, silent, severity, -worst)


def _may_be_twin(other: Seen, run: Seen) -> bool:
    """Whether nothing that was recorded tells their trainings apart but the precision: settings,
    layers, learning rates, and the loss from which they began."""
    if "arm" in other.config or other.is_empty or other.uses_fp8:
        return False
    layers = [_sizes(one) for one in (other, run)]
    rates = [
        one.steps.dropna(subset="learning_rate").set_index("step")["learning_rate"]
        for one in (other, run)
    ]
    mine, its = rates[0].align(rates[1], join="inner")
    starts = [one.steps["loss"].dropna().head(1).to_numpy() for one in (other, run)]
    first, other_first = (float(start[0]) if len(start) else np.nan for start in starts)
    if not abs(first - other_first) <= SAME_START * abs(first):
        return False
    precision = facts_of(other.run.info, "precision")
    linears = facts_of(other.run.info, "linears").items()
    if any(facts.get("class") != "Linear" and name not in precision for name, facts in linears):
        return False  # another library's layers, which say nothing
    alike = bool(layers[0]) and layers[0] == layers[1] and _setting(other) == _setting(run)
    return alike and len(mine) >= SAME_STEPS and bool((mine == its).all())


def _sizes(run: Seen) -> dict[str, Any]:
    """Linear layer -> its sizes, whatever class it has become."""
    layers = facts_of(run.run.info, "linears")
    return {name: (facts.get("in"), facts.get("out")) for name, facts in layers.items()}


def _setting(run: Seen) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in _ARM_KEYS}


def _of_known_types(result: dict[str, Any]) -> dict[str, Any]:
    """Without what is no number: a run may say anything of itself, and the page goes on."""
    kept = {key: value for key, value in result.items() if value is None or _is_number(value)}
    doses = result.get("doses")
    keys = ("dose", "loss", "gradient_cosine")
    kept["doses"] = [
        one
        for one in (doses if isinstance(doses, list) else ())
        if isinstance(one, dict) and all(_is_number(one.get(key)) for key in keys)
        if isfinite(one["dose"])
    ]
    return kept


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _first_rank(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["rank"] == rows["rank"].min()] if len(rows) else rows


def superscript(number: int) -> str:
    """An exponent in plain text."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def load(paths: Iterable[str | Path], twin: str | Path | None = None) -> Story:
    """Read and judge every run at or below `paths`, and `twin`: that in high precision of those
    which are no arms of an experiment.

    Raises RunError if a path holds neither a run nor an experiment, or `twin` cannot be read.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"runs: {str(paths)!r}, expected a list of paths")
    paths = [*paths] if twin is None else [*paths, open_run(twin).path]
    experiments: list[dict[str, Any]] = []
    found: dict[Path, None] = {}
    unread: list[Unread] = []
    for path in map(Path, paths):
        below = [run.resolve() for run in find_runs(path)]
        experiment = _experiment(path, unread)
        if experiment is not None and experiment not in experiments:
            experiments.append(experiment)
        if not below and not (path / "experiment.json").is_file():
            raise RunError(f"{path}: no run here, expected run directories or a folder of them")
        found |= dict.fromkeys(below)
    runs = list(_read(list(found), unread))
    parts = tuple(_arranged(experiments, runs))
    given = None
    if twin is not None:
        given = next((one for one in runs if one.run.path == Path(twin).resolve()), None)
        if given is not None and given.uses_fp8:
            raise RunError(f"{twin}: operands of it are FP8, expected a twin in high precision")
    story = Story(
        experiments=tuple(experiments), parts=parts, unread=tuple(unread), given_twin=given
    )
    for run in runs:
        its = story.twin_of(run)
        judged = diagnose(run.run, None if its is None else its.run)
        run.diagnosis = replace(judged, run=run.label)
    return story


def _experiment(path: Path, unread: list[Unread]) -> dict[str, Any] | None:
    file = path / "experiment.json"
    if not file.is_file():
        return None
    try:
        experiment = json.loads(file.read_text(encoding="utf-8"))
        _demand(experiment, "name", "question", "prediction", "refuted_if", "limits", "parts")
        for part in experiment["parts"]:
            _demand(part, "name", "title", "seeds", "arms")
            for arm in part["arms"]:
                _demand(arm, "name")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        unread.append(Unread(file.name, f"damaged: {error}"))
        return None
    return dict(experiment)


def cut_short(experiment: Mapping[str, Any]) -> str:
    """By which settings an experiment's runs were cut; empty where they ran as it has them."""
    told = experiment.get("settings")
    settings = told if isinstance(told, dict) else {}
    steps = settings.get("steps")
    by_steps = f"--steps {steps}" if steps else ""
    if not settings.get("quick"):
        return by_steps
    return f"--quick: one seed, {by_steps}" if by_steps else "--quick: few steps of one seed"


def _demand(described: Any, *keys: str) -> None:
    missing = [key for key in keys if key not in described]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")


def _read(paths: list[Path], unread: list[Unread]) -> Iterator[Seen]:
    """Runs named by what their paths do not share, so that a page says nothing of the machine."""
    shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
    for path in paths:
        label = path.relative_to(shared).as_posix()
        try:
            opened = open_run(path)
            opened.check()
            run = Seen(label, opened)
        except (RunError, ValueError) as error:
            reason = str(error).replace(f"{path}{os.sep}", "").replace(f"{path}: ", "")
            unread.append(Unread(label, reason.splitlines()[0]))
        else:
            yield run


def _arranged(experiments: list[dict[str, Any]], runs: list[Seen]) -> Iterator[Part]:
    """What experiments planned, in their order; then every run that none of them knows."""
    left = dict.fromkeys(runs)
    for experiment in experiments:
        for planned in experiment["parts"]:
            arms = []
            for arm in planned["arms"]:
                mine = [
                    run
                    for run in left
                    if run.config.get("experiment") == experiment.get("name")
                    and (run.part, run.arm) == (planned["name"], arm["name"])
                ]
                for run in mine:
                    del left[run]
                arms.append(_arm(arm, mine))
            part = _part(planned["name"], planned["title"], planned["seeds"], arms)
            yield replace(part, cut=cut_short(experiment))
    unplanned: dict[tuple[str, str], dict[str, list[Seen]]] = {}
    for run in left:
        key = run.part, str(run.config.get("experiment", ""))
        unplanned.setdefault(key, {}).setdefault(run.arm, []).append(run)
    for (name, above), groups in unplanned.items():
        arms = [
            _arm({"name": arm, "mitigations": group[0].config.get("mitigations")}, group)
            for arm, group in groups.items()
        ]
        is_shared = [one for one, _ in unplanned].count(name) > 1
        title = f"{above}: {name or 'Runs'}" if is_shared and above else name or "Runs"
        yield _part(name, title, (), arms)


def _arm(described: Mapping[str, Any], runs: list[Seen]) -> Arm:
    return Arm(
        name=str(described["name"]),
        title=str(described.get("title", described["name"])),
        predicted=str(described.get("predicted", "open")),
        mitigations=tuple(_name_of(one) for one in described.get("mitigations") or ()),
        options=described.get("options"),
        runs=tuple(sorted(runs, key=lambda run: _by_number(run.seed))),
    )


def _name_of(mitigation: Any) -> str:
    """Which it is, of its description; older runs have nothing but the name."""
    return str(mitigation.get("name") if isinstance(mitigation, Mapping) else mitigation)


def _part(name: str, title: str, planned: Iterable[Any], arms: list[Arm]) -> Part:
    planned = list(planned)
    seeds = {*planned, *(run.seed for arm in arms for run in arm.runs)}
    here = [{run.seed for run in arm.runs} for arm in arms]
    return Part(
        name=str(name),
        title=str(title),
        seeds=tuple(sorted(seeds, key=_by_number)),
        arms=tuple(arms),
        missing=sum(seed not in seen for seen in here for seed in planned),
    )


def _by_number(seed: int | str) -> tuple[int, str]:
    return len(str(seed)), str(seed)


# --- what to show of a run ------------------------------------------------------------------------


class Place(NamedTuple):
    """The gate product and the channel that a run is looked at."""

    site: str
    channel: int

    @property
    def module(self) -> str:
        return self.site.removesuffix(":product")


def place_of(run: Seen) -> Place | None:
    """Where the worst finding points; without one, the largest product whose weights were kept."""
    for place in _told_places(run):
        return place
    kept = run.channels[run.channels["gate_weights"].notna()].dropna(subset="product_amax")
    if kept.empty:
        return None
    row = kept.nlargest(1, "product_amax").iloc[0]
    return Place(f"{row['site']}:product", int(row["channel"]))


def _told_places(run: Seen) -> Iterator[Place]:
    for finding in run.diagnosis.findings:
        if finding.site is not None and finding.channel is not None:
            yield Place(finding.site, finding.channel)
