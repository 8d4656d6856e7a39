"""Experiments: a question, a prediction written before the run, arms and seeds; run and resumed.

An experiment is a Python value in a file of its own, `EXPERIMENT`. It has parts; a part runs the
same training once for every arm and seed, each in a process with one thread (two-thread pools
under contention are many times slower on small tensors) and its own run directory,

    OUT/experiment.json                    question, prediction, arms, settings
    OUT/<part>/<arm>/seed-<seed>/          a run, see `store`

Finished runs are kept; what was interrupted or killed is run again, and nothing else is touched.

Rejected: threads (the GIL, and torch's thread pools), and a results file beside the run
directories, which could disagree with them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from fp8lab.conversion import convert
from fp8lab.lab.workers import Workers, in_one_line
from fp8lab.plan import Plan, recipe_to_dict
from fp8lab.store import RunError, open_run


class Mitigation(Protocol):
    """What can be put on a converted model."""

    def apply(self, model: nn.Module) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: the precision of every operand, and what is put on top.

    `predicted` is this arm's share of the experiment's prediction.
    """

    name: str
    title: str
    plan: Plan
    mitigations: tuple[Mitigation, ...] = ()
    predicted: Literal["diverges", "survives", "open"] = "open"
    options: Mapping[str, Any] | None = None  # what else the part's training changes for this arm

    def prepare(self, model: nn.Module) -> nn.Module:
        """Convert `model` in place and put the mitigations on it."""
        convert(model, self.plan)
        for mitigation in self.mitigations:
            mitigation.apply(model)
        return model

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "title": self.title,
            "recipe": recipe_to_dict(self.plan),
            "mitigations": [type(m).__name__ for m in self.mitigations],
            "predicted": self.predicted,
            "options": dict(self.options or {}),
        }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a caller may change without touching the experiment's file."""

    steps: int | None = None
    text: str | None = None


Progress = Callable[[int, int, float, int], None]  # steps done, of, loss, alarms


@dataclass(frozen=True)
class Job:
    """One run to do; what a part's `run` is given."""

    experiment: str
    part: str
    arm: Arm
    seed: int
    path: Path
    settings: Settings

    def config(self, **more: Any) -> dict[str, Any]:
        """What identifies the run, for run.json."""
        arm = self.arm.describe()
        return {
            "experiment": self.experiment,
            "part": self.part,
            "arm": self.arm.name,
            "seed": self.seed,
            "recipe": arm["recipe"],
            "mitigations": arm["mitigations"],
            **more,
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """The same training for every arm and seed. `prepare(seed, folder, settings)` runs once a seed
    before its arms, for what they share; it writes into the part's folder."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    run: Callable[[Job, Progress], None]
    prepare: Callable[[int, Path, Settings, Progress], None] | None = None

    def __post_init__(self) -> None:
        _require_folder_names(f"Part {self.name}: arms", [arm.name for arm in self.arms])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and how it is put. `prediction` and `refuted_if` are written before the first run;
    `limits` says what does not follow."""

    name: str
    question: str
    prediction: str
    refuted_if: str
    limits: tuple[str, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        _require_folder_names("Experiment: name", [self.name])
        _require_folder_names("Experiment: parts", [part.name for part in self.parts])

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything but the code."""
        return {
            "name": self.name,
            "question": self.question,
            "prediction": self.prediction,
            "refuted_if": self.refuted_if,
            "limits": list(self.limits),
            "parts": [
                {
                    "name": part.name,
                    "title": part.title,
                    "seeds": list(part.seeds),
                    "arms": [arm.describe() for arm in part.arms],
                }
                for part in self.parts
            ],
        }


def _require_folder_names(where: str, names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
            expected = "distinct names of letters, digits, dots, underscores and hyphens"
            raise ValueError(f"{where}: {name!r}, expected {expected}")


def load_experiment(name_or_path: str) -> tuple[Path, Experiment]:
    """An experiment's file and value, by path or by the name of one that comes with fp8lab.

    Raises ValueError in one line if there is no such file, it does not run, or it has no
    `EXPERIMENT`.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        known = {file.stem: file for file in _own_experiments()}
        if name_or_path not in known:
            names = ", ".join(sorted(known)) or "none here"
            raise ValueError(f"experiment {name_or_path!r}: expected a .py file or one of: {names}")
        path = known[name_or_path]
    if not path.is_file():
        raise ValueError(f"experiment {path}: no such file")
    experiment = getattr(_load_module(path), "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment {path}: expected a value EXPERIMENT of type Experiment")
    return path, experiment


def _own_experiments() -> Iterator[Path]:
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_experiments", package.parent / "experiments"):
        if folder.is_dir():
            yield from folder.glob("*.py")


def _load_module(path: Path) -> ModuleType:
    name = f"fp8lab_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"experiment {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        places = [
            (frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
        ]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        lines = [f", line {line}" for file, line in places if file == spec.origin]
        where = "".join([str(path), *lines[-1:]])
        raise ValueError(f"experiment {where}: {in_one_line(error)}") from None
    return module


@dataclass(frozen=True)
class Report:
    """A worker's word on a job that is under way."""

    index: int
    step: int
    steps: int
    loss: float
    alarms: int


def _do(
    send: Callable[[Report], None],
    index: int,
    file: Path,
    part_name: str,
    arm_name: str | None,
    about: tuple[int, Path, Settings],
) -> None:
    """In a worker: one job, or a seed's preparation where `arm_name` is None."""
    _, experiment = load_experiment(str(file))
    part = next(p for p in experiment.parts if p.name == part_name)
    last_report = 0.0

    def progress(step: int, steps: int, loss: float, alarms: int) -> None:
        nonlocal last_report
        now = time.monotonic()
        if now - last_report > 0.1 or step == steps:
            last_report = now
            send(Report(index, step, steps, loss, alarms))

    seed, path, settings = about
    torch.manual_seed(seed)  # or what a run draws would depend on the runs before it in the process
    if arm_name is None:
        assert part.prepare is not None
        part.prepare(seed, path, settings, progress)
        return
    arm = next(a for a in part.arms if a.name == arm_name)
    part.run(Job(experiment.name, part.name, arm, seed, path, settings), progress)


class _Work(NamedTuple):
    """A run, or without an arm what is prepared for a part's runs of one seed."""

    part: Part
    arm: Arm | None
    seed: int
    path: Path

    @property
    def label(self) -> str:
        return f"{self.part.name}/{self.arm.name if self.arm else 'prepare'}/seed-{self.seed}"


def run_experiment(
    file: Path,
    experiment: Experiment,
    out: Path,
    *,
    workers: int = 2,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    settings: Settings | None = None,
    on_start: Callable[[int, str], None] = lambda index, label: None,
    on_report: Callable[[Report], None] = lambda report: None,
    on_end: Callable[[int, str | None], None] = lambda index, error: None,
) -> list[str]:
    """Do every run of the experiment that is not finished in `out`; returns what failed, one line
    each. Runs whose preparation failed are not done.

    The callbacks get a job's index and label when it is known, its progress, and its end (with the
    error in one line, None if it went well). Raises ValueError for an unknown arm or fewer than one
    worker, and RunError if `out` holds something else, runs with other settings among it.
    """
    settings = settings or Settings()
    wanted = set(arms) if arms is not None else None
    known = {arm.name for part in experiment.parts for arm in part.arms}
    if wanted is not None and not wanted <= known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"arm {unknown}: expected some of {', '.join(sorted(known))}")
    begun: list[_Work] = []
    failures: dict[int, str] = {}

    def ended(index: int, error: str | None) -> None:
        if error is not None:
            failures[index] = f"{begun[index].label}: {error}"
        on_end(index, failures.get(index))

    def do(stage: list[_Work]) -> None:
        jobs: dict[int, Any] = {}
        for index, (part, arm, seed, path) in enumerate(stage, len(begun)):
            name = None if arm is None else arm.name
            jobs[index] = (_do, (index, file, part.name, name, (seed, path, settings)))
        begun.extend(stage)
        for index in jobs:
            on_start(index, begun[index].label)
        pool.do(jobs, on_report, ended)

    with Workers(workers) as pool:
        _claim(out, experiment, settings)
        preparations, runs = _stages(experiment, out, wanted, seeds)
        do(preparations)
        unprepared = {(begun[index].part.name, begun[index].seed) for index in failures}
        do([work for work in runs if (work.part.name, work.seed) not in unprepared])
    return list(failures.values())


def _stages(
    experiment: Experiment, out: Path, arms: set[str] | None, seeds: Iterable[int] | None
) -> tuple[list[_Work], list[_Work]]:
    """What parts prepare, and all runs without those that are finished."""
    wanted_seeds = None if seeds is None else set(seeds)
    preparations: list[_Work] = []
    runs: list[_Work] = []
    for part in experiment.parts:
        for seed in part.seeds if wanted_seeds is None else sorted(wanted_seeds):
            todo: list[_Work] = []
            for arm in part.arms:
                path = out / part.name / arm.name / f"seed-{seed}"
                if (arms is None or arm.name in arms) and not _finished(path):
                    todo.append(_Work(part, arm, seed, path))
            if todo and part.prepare is not None:
                preparations.append(_Work(part, None, seed, out / part.name))
            runs += todo
    return preparations, runs


def _finished(path: Path) -> bool:
    """Whether a run is complete; what was left unfinished is removed, to be done again."""
    if not path.exists():
        return False
    # Without a run.json: its process was killed between two lines of `RunWriter.create`.
    if {child.name for child in path.iterdir()} - {"segments", ".run.json"}:
        run = open_run(path)
        if run.state == "finished":
            return True
        if run.state == "running":
            raise RunError(f"{path}: is being written by process {run.info.get('pid')}")
    shutil.rmtree(path)
    return False


def _claim(out: Path, experiment: Experiment, settings: Settings) -> None:
    """Make `out` this experiment's folder, or check that it is."""
    file = out / "experiment.json"
    wanted = asdict(settings)
    if settings.text is not None:  # where it lies on this machine is nobody's business
        wanted["text"] = Path(settings.text).name
    description = experiment.describe() | {"settings": wanted}
    if out.exists() and any(out.iterdir()):
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            name, earlier = known["name"], known["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{out}: exists and holds no experiment, expected a new folder"
            ) from None
        if name != experiment.name:
            raise RunError(f"{out}: holds experiment {name!r}, expected {experiment.name!r}")
        if earlier != wanted:
            raise RunError(f"{out}: holds runs with {earlier}, expected {wanted}")
        if known == description:
            return
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".experiment.json"
    temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
