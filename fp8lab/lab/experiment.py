"""Experiments: a question, a prediction written before the run, arms and seeds; run and resumed.

An experiment is a Python value in a file of its own, `EXPERIMENT`. It has parts; a part runs the
same training once for every arm and seed, each in a process with one thread (two-thread pools
under contention are many times slower on small tensors) and its own run directory,

    OUT/experiment.json                    question, prediction, arms, settings
    OUT/<part>/<arm>/seed-<seed>/          a run, see `store`

Finished runs are kept; what was interrupted or killed is run again, and nothing else is touched.
A training that fails leaves all of its error in `traceback.txt` of its run's folder; where it never
began to watch, there is still a run, which has failed and has no rows.

Rejected: threads (the GIL, and torch's thread pools), and a results file beside the run
directories, which could disagree with them.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fp8lab.agreement import rank_of, world_size
from fp8lab.failure import and_where, in_one_line, left_in
from fp8lab.lab.arm import Arm, require_types
from fp8lab.lab.description import (
    add_maker,
    description_of,
    other_versions,
    write_description,
)
from fp8lab.lab.parallel import Parallel
from fp8lab.lab.processes import do_in_processes, require_parallel
from fp8lab.lab.ray_workers import RayWorkers
from fp8lab.lab.result import Result
from fp8lab.lab.work import Chosen, Work, stages, whole_error
from fp8lab.lab.workers import Call, Workers
from fp8lab.monitor.about import command
from fp8lab.plan import named
from fp8lab.recipe import shown
from fp8lab.store import RunError, RunWriter, find_runs, open_run


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
        return self.asked() | more

    def asked(self) -> dict[str, Any]:
        """What of the run's config is known before it has begun."""
        arm, settings = self.arm.describe(), self.settings
        how = settings.parallel
        several = {} if how is None else {"processes": settings.processes, "parallel": how}
        return {
            "experiment": self.experiment,
            "part": self.part,
            "arm": self.arm.name,
            "seed": self.seed,
            "recipe": arm["recipe"],
            "mitigations": arm["mitigations"],
            "changes_function": arm["changes_function"],
            "options": arm["options"],
            **several,
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
    heading = f"rank {rank_of()}: " if world_size() > 1 else ""
    with left_in(whole_error(arm_name, seed, path), heading):
        if arm_name is None:
            assert part.prepare is not None
            part.prepare(seed, path, settings, progress)
            return
        arm = next(a for a in part.arms if a.name == arm_name)
        job = Job(experiment.name, part.name, arm, seed, path, settings)
        part.run(job, progress)
        if rank_of() == 0:
            _require_recorded(job)


def _require_recorded(job: Job) -> None:
    """Raises ValueError for a training that has left no run, or one that nobody could find again
    by its part, its arm and its seed."""
    try:
        config = open_run(job.path).info.get("config")
    except RunError:
        raise ValueError(f"no run at {job.path}: expected watch(model, job.path, …)") from None
    asked = job.asked()
    for key in ("experiment", "part", "arm", "seed"):
        found = config.get(key) if isinstance(config, dict) else None
        if found != asked[key]:
            told = f"its run was recorded with config {key}={shown(found)}, not {asked[key]!r}"
            raise ValueError(f"{told}: expected watch(…, config=job.config(…))")


def _call(index: int, file: Path, work: Work, settings: Settings) -> Call:
    name = None if work.arm is None else work.arm.name
    several = settings.parallel is not None and name is not None
    about = work.seed, work.path, settings
    function = do_in_processes if several else do_job
    return function, (index, file, work.part.name, name, about)


def _record_failure(experiment: Experiment, work: Work, settings: Settings, error: str) -> str:
    """In one line; and as a run, where the training failed or died before it had begun one."""
    if work.arm is not None and next(find_runs(work.path), None) is None:
        job = Job(experiment.name, work.part.name, work.arm, work.seed, work.path, settings)
        about = {"created": time.time(), "command": command(), "config": job.asked()}
        with suppress(RunError, OSError):  # of a full disk; the line is told in any case
            RunWriter.create(work.path, about).close("failed", error=error)
    return f"{work.label}: {and_where(error, work.whole_error)}"


@contextmanager
def _telling(on_interrupt: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        on_interrupt()
        raise


def run_experiment(
    file: Path,
    experiment: Experiment,
    out: Path,
    *,
    workers: int = 2,
    ray: str | None = None,
    parts: Iterable[str] | None = None,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    settings: Settings | None = None,
    on_note: Callable[[str], None] = lambda line: None,
    on_plan: Callable[[int], None] = lambda total: None,
    on_start: Callable[[int, str], None] = lambda index, label: None,
    on_report: Callable[[Report], None] = lambda report: None,
    on_end: Callable[[int, str | None], None] = lambda index, error: None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> list[str]:
    """Do every run of the experiment that is not finished in `out`; returns what failed, one line
    each. Runs whose preparation failed are not done. With `ray`, a cluster's address, they are its
    tasks, as many at a time as it has cores; `out` has to be a folder that all its machines share.

    The callbacks get a line on finished runs of another version of the file; the number of jobs; a
    job's index and label, its progress, its end (and the error in one line, or None); word of a
    Ctrl-C before runs are closed. Raises ValueError for a part, an arm or a seed that no run has,
    or not together, and for what several processes cannot do; RunError if `out` holds other runs.
    """
    settings = settings or Settings()
    chosen = Chosen.of(parts, arms, seeds).known_to(experiment)
    require_parallel(settings, experiment.parts, chosen, ray)
    begun: list[Work] = []
    failures: dict[int, str] = {}

    def ended(index: int, error: str | None) -> None:
        if error is not None:
            failures[index] = _record_failure(experiment, begun[index], settings, error)
        on_end(index, failures.get(index))

    def do(stage: list[Work]) -> None:
        jobs = {n: _call(n, file, work, settings) for n, work in enumerate(stage, len(begun))}
        begun.extend(stage)
        for index in jobs:
            on_start(index, begun[index].label)
        pool.do(jobs, on_report, ended)

    with Workers(workers) if ray is None else RayWorkers(ray) as pool, _telling(on_interrupt):
        description = description_of(out, experiment, settings)
        preparations, runs, kept = stages(experiment, out, chosen, settings.quick)
        if kept and (line := other_versions(description, file)) is not None:
            on_note(f"{out}: {kept} finished runs are kept, {line}")
        if preparations or runs:
            add_maker(description, file, command())
        write_description(out, description)  # all that could be refused has been
        for work in preparations + runs:
            work.clear()
        on_plan(len(preparations) + len(runs))
        do(preparations)
        unprepared = {(begun[index].part.name, begun[index].seed) for index in failures}
        do([work for work in runs if (work.part.name, work.seed) not in unprepared])
    return list(failures.values())
