"""Experiments: a question, a prediction written before the run, arms and seeds; run and resumed.

An experiment is a Python value in a file of its own, `EXPERIMENT`. It has parts; a part runs the
same training once for every arm and seed, each in its own process with one thread (two-thread pools
under contention are many times slower on small tensors) and its own run directory,

    OUT/experiment.json                    question, prediction, arms
    OUT/<part>/<arm>/seed-<seed>/          a run, see `store`

Finished runs are kept; what was interrupted or killed is run again, and nothing else is touched.

Rejected: threads (the GIL, and torch's thread pools), and a results file beside the run
directories, which could disagree with them.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from fp8lab.conversion import convert
from fp8lab.recipe import Plan, recipe_to_dict
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


def load_experiment(name_or_path: str) -> tuple[Path, Experiment]:
    """An experiment's file and value, by path or by the name of one that comes with fp8lab.

    Raises ValueError in one line if there is no such file, or no `EXPERIMENT` in it.
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
    except SyntaxError as error:
        raise ValueError(f"experiment {path}, line {error.lineno}: {error.msg}") from None
    return module


@dataclass(frozen=True)
class Report:
    """A worker's word on one job: where it is, or how it ended."""

    index: int
    step: int
    steps: int
    loss: float
    alarms: int


_reports: Any = None  # the queue to the parent, in a worker


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _do(index: int, file: Path, part_name: str, arm_name: str | None, job_args: Any) -> None:
    """In a worker: one job, or a seed's preparation where `arm_name` is None."""
    _, experiment = load_experiment(str(file))
    part = next(p for p in experiment.parts if p.name == part_name)
    last_report = 0.0

    def progress(step: int, steps: int, loss: float, alarms: int) -> None:
        nonlocal last_report
        now = time.monotonic()
        if now - last_report > 0.1 or step == steps:
            last_report = now
            _reports.put(Report(index, step, steps, loss, alarms))

    seed, path, settings = job_args
    if arm_name is None:
        assert part.prepare is not None
        part.prepare(seed, path, settings, progress)
        return
    arm = next(a for a in part.arms if a.name == arm_name)
    part.run(Job(experiment.name, part.name, arm, seed, path, settings), progress)


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
    each.

    The callbacks get a job's index and label when it is submitted, its progress, and its end (with
    the error in one line, None if it went well). Raises ValueError for an unknown arm, and RunError
    if `out` holds something else.
    """
    settings = settings or Settings()
    _claim(out, experiment)
    wanted = set(arms) if arms is not None else None
    known = {arm.name for part in experiment.parts for arm in part.arms}
    if wanted is not None and not wanted <= known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"arm {unknown}: expected some of {', '.join(sorted(known))}")
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    failures: list[str] = []
    with ProcessPoolExecutor(workers, context, _start_worker, (reports,)) as pool:
        try:
            index = 0
            for stage in _stages(experiment, out, wanted, seeds):
                running: dict[Future[None], tuple[int, str]] = {}
                for part, arm, seed, path in stage:
                    label = f"{part.name}/{arm.name if arm else 'prepare'}/seed-{seed}"
                    args = (seed, path, settings)
                    name = None if arm is None else arm.name
                    future = pool.submit(_do, index, file, part.name, name, args)
                    running[future] = (index, label)
                    on_start(index, label)
                    index += 1
                failures += _follow(running, reports, on_report, on_end)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failures


def _follow(
    running: dict[Future[None], tuple[int, str]],
    reports: Any,
    on_report: Callable[[Report], None],
    on_end: Callable[[int, str | None], None],
) -> list[str]:
    failures = []
    while running:
        done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
        while True:
            try:
                on_report(reports.get_nowait())
            except queue.Empty:
                break
        for future in done:
            index, label = running.pop(future)
            error = future.exception()
            line = None
            if error is not None:
                reason = (str(error).strip().splitlines() or [""])[0]
                line = f"{label}: {type(error).__name__}: {reason}"
                failures.append(line)
            on_end(index, line)
    return failures


_Work = tuple[Part, Arm | None, int, Path]


def _stages(
    experiment: Experiment, out: Path, arms: set[str] | None, seeds: Iterable[int] | None
) -> Iterator[list[_Work]]:
    """First what parts prepare, then all runs, without those that are finished."""
    wanted_seeds = None if seeds is None else set(seeds)
    preparations: list[_Work] = []
    runs: list[_Work] = []
    for part in experiment.parts:
        for seed in part.seeds if wanted_seeds is None else sorted(wanted_seeds):
            todo: list[_Work] = []
            for arm in part.arms:
                path = out / part.name / arm.name / f"seed-{seed}"
                if (arms is None or arm.name in arms) and not _finished(path):
                    todo.append((part, arm, seed, path))
            if todo and part.prepare is not None:
                preparations.append((part, None, seed, out / part.name))
            runs += todo
    yield preparations
    yield runs


def _finished(path: Path) -> bool:
    """Whether a run is complete; what was left unfinished is removed, to be done again."""
    if not path.exists():
        return False
    run = open_run(path)
    if run.state == "finished":
        return True
    if run.state == "running":
        raise RunError(f"{path}: is being written by process {run.info.get('pid')}")
    shutil.rmtree(path)
    return False


def _claim(out: Path, experiment: Experiment) -> None:
    """Make `out` this experiment's folder, or check that it is."""
    file = out / "experiment.json"
    if out.exists() and any(out.iterdir()):
        try:
            name = json.loads(file.read_text(encoding="utf-8"))["name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{out}: exists and holds no experiment, expected a new folder"
            ) from None
        if name != experiment.name:
            raise RunError(f"{out}: holds experiment {name!r}, expected {experiment.name!r}")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(experiment.describe(), indent=1) + "\n", encoding="utf-8")
