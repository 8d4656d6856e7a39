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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fp8lab.failure import in_one_line
from fp8lab.lab.arm import Arm, require_types
from fp8lab.lab.description import description_of, file_hash, write_description
from fp8lab.lab.parallel import Parallel
from fp8lab.lab.processes import do_in_processes, require_parallel
from fp8lab.lab.ray_workers import RayWorkers
from fp8lab.lab.result import Result
from fp8lab.lab.workers import Call, Workers
from fp8lab.monitor.about import command
from fp8lab.plan import named
from fp8lab.recipe import shown
from fp8lab.store import Run, RunError, open_run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a caller may change without touching the experiment's file.

    `quick` is to see that an experiment runs, to its end and its page: the first seed of every
    part, as few steps as the experiment allows, and nothing follows from it. With `parallel` (see
    the module of that name) each run is done by so many `processes` together.
    """

    steps: int | None = None
    text: str | None = None
    quick: bool = False
    processes: int = 1
    parallel: Parallel | None = None


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
    start: Path | None = None  # the checkpoint to go on from, of whatever plan
    stop: tuple[int, Path] | None = None  # end before this step and write its checkpoint there

    def steps(self, steps: int, *, quick: int) -> int:
        """How many, of an experiment that takes so many, and `quick` ones in a hurry."""
        return self.settings.steps or (quick if self.settings.quick else steps)

    def config(self, **more: Any) -> dict[str, Any]:
        """What identifies the run, for run.json; to be asked for once the arm has been applied.

        Raises ValueError if a mitigation of the arm has not been: the row would name what was not
        there.
        """
        self.arm.require_all_asked()
        arm, settings = self.arm.describe(), self.settings
        if settings.parallel is not None:
            more |= {"processes": settings.processes, "parallel": settings.parallel}
        return {
            "experiment": self.experiment,
            "part": self.part,
            "arm": self.arm.name,
            "seed": self.seed,
            "recipe": arm["recipe"],
            "mitigations": arm["mitigations"],
            "changes_function": arm["changes_function"],
            "options": arm["options"],
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
    restarts: bool = False  # whether `run` heeds a job's `start` and `stop`
    parallel: bool = False  # and its settings' `parallel`

    def __post_init__(self) -> None:
        where = f"Part {shown(self.name)}"
        types = {"name": str, "title": str, "arms": tuple, "seeds": tuple}
        require_types(where, self, **types, restarts=bool, parallel=bool)
        _require_folder_names(f"{where}: arms", _all(Arm, where, self.arms))
        _require_seeds(where, self.seeds)
        for name, function in (("run", self.run), ("prepare", self.prepare or print)):
            if not callable(function):
                raise ValueError(f"{where}: {name}={shown(function)}, expected a function")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and how it is put. `prediction` and `refuted_if` are written before the first run;
    `limits` says what does not follow; `conclude` reads the folder of the finished runs."""

    name: str
    question: str
    prediction: str
    refuted_if: str
    limits: tuple[str, ...]
    parts: tuple[Part, ...]
    conclude: Callable[[Path], Result] | None = None

    def __post_init__(self) -> None:
        words = dict.fromkeys(("name", "question", "prediction", "refuted_if"), str)
        require_types("Experiment", self, **words, limits=tuple, parts=tuple)
        _require_folder_names("Experiment: name", [self.name])
        _require_folder_names("Experiment: parts", _all(Part, "Experiment", self.parts))
        if not all(isinstance(one, str) for one in self.limits):
            raise ValueError(f"Experiment: limits={shown(self.limits)}, expected sentences")

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


def _all(kind: type[Arm] | type[Part], where: str, values: tuple[Any, ...]) -> list[str]:
    for value in values:
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {shown(value)}, expected a value of type {kind.__name__}")
    return [value.name for value in values]


def _require_folder_names(where: str, names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or names.count(name) > 1:
            expected = "distinct names of letters, digits, dots, underscores and hyphens"
            raise ValueError(f"{where}: {shown(name)}, expected {expected}")


def _require_seeds(where: str, seeds: Iterable[Any]) -> None:
    seeds = list(seeds)
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**32 or seeds.count(seed) > 1:
            expected = "distinct whole numbers in [0, 2^32)"
            raise ValueError(f"{where}: seed {shown(seed)}, expected {expected}")


def load_experiment(name_or_path: str) -> tuple[Path, Experiment]:
    """An experiment's file and value, by path or by the name of one that comes with fp8lab.

    Raises ValueError in one line if there is no such file, it does not run, or it has no
    `EXPERIMENT`.
    """
    path = Path(name_or_path)
    called = named(name_or_path)
    if path.suffix != ".py":
        known = {file.stem: file for file in _own_experiments()}
        if name_or_path not in known:
            names = ", ".join(sorted(known)) or "none here"
            called = shown(name_or_path)
            raise ValueError(f"experiment {called}: expected a .py file or one of: {names}")
        path = known[name_or_path]
    if not path.is_file():
        raise ValueError(f"experiment {called}: no such file")
    experiment = getattr(load_module(path, "experiment"), "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment {called}: expected a value EXPERIMENT of type Experiment")
    return path, experiment


def _own_experiments() -> Iterator[Path]:
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_experiments", package.parent / "experiments"):
        if folder.is_dir():
            yield from folder.glob("*.py")


def load_module(path: Path, what: str) -> ModuleType:
    """A Python file run anew as a module; `what` it is opens every error message.

    Raises ValueError in one line if it does not run.
    """
    name = f"fp8lab_{what}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{what} {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # as `python FILE` does: what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() in an experiment's file is no end that goes well
        raise ValueError(f"{what} {path}: {in_one_line(error)}") from None
    return module


@dataclass(frozen=True)
class Report:
    """A worker's word on a job that is under way."""

    index: int
    step: int
    steps: int
    loss: float
    alarms: int


def reporting(send: Callable[[Report], None], index: int) -> Progress:
    """In a worker: what a job tells of its progress, ten times a second at most."""
    last_report = 0.0

    def progress(step: int, steps: int, loss: float, alarms: int) -> None:
        nonlocal last_report
        now = time.monotonic()
        if now - last_report > 0.1 or step == steps:
            last_report = now
            send(Report(index, step, steps, loss, alarms))

    return progress


def do_job(
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
    progress = reporting(send, index)
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


def _call(index: int, file: Path, work: _Work, settings: Settings) -> Call:
    name = None if work.arm is None else work.arm.name
    several = settings.parallel is not None and name is not None
    about = work.seed, work.path, settings
    function = do_in_processes if several else do_job
    return function, (index, file, work.part.name, name, about)


def run_experiment(
    file: Path,
    experiment: Experiment,
    out: Path,
    *,
    workers: int = 2,
    ray: str | None = None,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    settings: Settings | None = None,
    on_plan: Callable[[int], None] = lambda total: None,
    on_start: Callable[[int, str], None] = lambda index, label: None,
    on_report: Callable[[Report], None] = lambda report: None,
    on_end: Callable[[int, str | None], None] = lambda index, error: None,
) -> list[str]:
    """Do every run of the experiment that is not finished in `out`; returns what failed, one line
    each. Runs whose preparation failed are not done. With `ray`, a cluster's address, they are its
    tasks, as many at a time as it has cores; `out` has to be a folder that all its machines share.

    The callbacks get a job's index and label when it is known, its progress, and its end (with the
    error in one line, None if it went well). Raises ValueError for an arm or a seed that is not the
    experiment's, fewer than one worker, what several processes cannot do; RunError if `out` holds
    other runs than these.
    """
    settings = settings or Settings()
    require_parallel(settings, experiment.parts, ray)
    seeds = None if seeds is None else list(dict.fromkeys(seeds))
    _require_seeds("run_experiment", seeds or ())
    _require_known(experiment, seeds or ())
    wanted = None if arms is None else _known_arms(experiment, arms)
    begun: list[_Work] = []
    failures: dict[int, str] = {}

    def ended(index: int, error: str | None) -> None:
        if error is not None:
            failures[index] = f"{begun[index].label}: {error}"
        on_end(index, failures.get(index))

    def do(stage: list[_Work]) -> None:
        jobs = {n: _call(n, file, work, settings) for n, work in enumerate(stage, len(begun))}
        begun.extend(stage)
        for index in jobs:
            on_start(index, begun[index].label)
        pool.do(jobs, on_report, ended)

    with Workers(workers) if ray is None else RayWorkers(ray) as pool:
        description = description_of(out, experiment, settings)
        preparations, runs = _stages(experiment, out, wanted, seeds, settings.quick)
        made_by = {"files": file_hash(file), "commands": command()} if preparations or runs else {}
        for name, told in made_by.items():
            description[name] = list(dict.fromkeys([*description[name], told]))
        write_description(out, description)  # all that could be refused has been
        for work in runs:
            if work.path.exists():
                shutil.rmtree(work.path)
        on_plan(len(preparations) + len(runs))
        do(preparations)
        unprepared = {(begun[index].part.name, begun[index].seed) for index in failures}
        do([work for work in runs if (work.part.name, work.seed) not in unprepared])
    return list(failures.values())


def _known_arms(experiment: Experiment, arms: Iterable[str]) -> set[str]:
    wanted, known = set(arms), {arm.name for part in experiment.parts for arm in part.arms}
    if not wanted <= known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"arm {named(unknown)}: expected some of {', '.join(sorted(known))}")
    return wanted


def _require_known(experiment: Experiment, seeds: Iterable[int]) -> None:
    """A prediction is about the seeds that the file names, and its page about their runs."""
    known = list(dict.fromkeys(seed for part in experiment.parts for seed in part.seeds))
    for seed in seeds:
        if seed not in known:
            expected = ", ".join(map(str, known))
            raise ValueError(
                f"seed {seed}: expected some of {expected}, as the experiment has them"
            )


def _stages(
    experiment: Experiment,
    out: Path,
    arms: set[str] | None,
    seeds: Iterable[int] | None,
    quick: bool,
) -> tuple[list[_Work], list[_Work]]:
    """What parts prepare, and all runs without those that are finished."""
    wanted_seeds = None if seeds is None else set(seeds)
    preparations: list[_Work] = []
    runs: list[_Work] = []
    for part in experiment.parts:
        seeds_of_part = part.seeds[:1] if quick else part.seeds
        for seed in seeds_of_part if wanted_seeds is None else sorted(wanted_seeds & {*part.seeds}):
            todo: list[_Work] = []
            for arm in part.arms:
                path = out / part.name / arm.name / f"seed-{seed}"
                if (arms is None or arm.name in arms) and not _finished(path, arm):
                    todo.append(_Work(part, arm, seed, path))
            if todo and part.prepare is not None:
                preparations.append(_Work(part, None, seed, out / part.name))
            runs += todo
    return preparations, runs


_OF_A_RUN = ("run.json", "segments", "ranks")  # and its tables: what is removed with it


def _finished(path: Path, arm: Arm) -> bool:
    """Whether a run is complete. What was left unfinished will be removed, to be done again.

    Raises RunError if it must not be: somebody is writing it, or it holds what no run writes. So it
    does for a finished run that was another arm's.
    """
    if not path.exists() and not path.is_symlink():
        return False
    if not path.is_dir():
        raise RunError(f"{path}: is no folder, expected a run directory or nothing")
    # Without a run.json: its process was killed between two lines of `RunWriter.create`.
    if {child.name for child in path.iterdir()} - {"segments", ".run.json"}:
        run = open_run(path)
        if run.state == "finished":
            _require_same(run, arm)
            return True
        if run.state == "running":
            raise RunError(f"{path}: is being written by process {run.info.get('pid')}")
    for child in sorted(path.iterdir()):
        name = child.name
        if name not in _OF_A_RUN and not name.startswith(".") and child.suffix != ".parquet":
            expected = "expected nothing but the run, which is to be done again"
            raise RunError(f"{path}: holds {shown(name)}, {expected}")
    if path.is_symlink():
        raise RunError(f"{path}: is a link to a run that has to be done again, expected the run")
    return False


def _require_same(run: Run, arm: Arm) -> None:
    config, described = run.info.get("config"), arm.describe()
    for key in ("recipe", "mitigations", "options"):
        if not isinstance(config, dict) or key not in config:
            continue  # from before it was said, or by another's hand
        found, wanted = config[key], described[key]
        if key == "mitigations" and isinstance(found, list) and set(map(type, found)) == {str}:
            wanted = [one["name"] for one in wanted]  # so it was said before
        if found != json.loads(json.dumps(wanted)):
            got, expected = (json.dumps(one)[:300] for one in (found, wanted))
            told = f"a finished run with {key}={got}, expected {expected}, or a new folder"
            raise RunError(f"{run.path}: {told}")
