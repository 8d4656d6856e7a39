"""What `bisect` trains: an arm of an experiment, or a function of a user's own script.

Each rerun is a job of a worker process with one thread, as the runs of an experiment are, so that
a rerun that dies takes nothing along and what one leaves in memory cannot change the next: an
experiment's runs are functions of arm and seed, and a script is loaded anew, with the global random
generators at 0, for each of its reruns. A plan travels as bytes, for its recipes may hold functions
of the experiment's own file, which the worker has to load first.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fp8lab.failure import TRACEBACK, left_in
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import (
    Experiment,
    Job,
    Part,
    Report,
    Settings,
    load_experiment,
    load_module,
    reporting,
)
from fp8lab.lab.workers import Workers
from fp8lab.plan import Plan, load_recipe, named

OnEnd = Callable[[Path, str | None], None]
OnReport = Callable[[Report], None]


def training_of(
    training: str,
    folder: Path,
    pool: Workers,
    on_report: OnReport,
    *,
    of_arm: tuple[str | None, int, str | None, int | None, int | None] = (
        None,
        0,
        None,
        None,
        None,
    ),
    of_script: tuple[str | None, Path | None] = (None, None),
) -> ArmReruns | ScriptReruns:
    """What to bisect: an experiment's name or file with `of_arm` (arm, seed, part, steps, step of
    the checkpoint), or SCRIPT.py:FUNCTION with `of_script` (recipe, as a YAML file or a recipe's
    name, and checkpoint).

    Raises ValueError in one line for what is unknown, missing or belongs to the other kind.
    """
    arm, seed, part, steps, start_at = of_arm
    recipe, checkpoint = of_script
    script, colon, function = training.rpartition(":")
    is_script = bool(colon) and script.endswith(".py")
    if colon and not is_script:
        raise ValueError(f"bisect: {named(training)}: expected a file, SCRIPT.py:FUNCTION")
    mine = {"--arm": arm, "--part": part, "--steps": steps, "--from": start_at}
    theirs = {"--recipe": recipe, "--checkpoint": checkpoint}
    for option, value in (mine if is_script else theirs).items():
        if value is not None:
            kind = "an experiment" if is_script else "SCRIPT.py:FUNCTION"
            raise ValueError(f"bisect: {option} is for {kind}, {named(training)} is none")
    if is_script:
        return _script(Path(script), function, pool, recipe, checkpoint)
    file, experiment = load_experiment(training)
    if arm is None:
        known = ", ".join(dict.fromkeys(one.name for of in experiment.parts for one in of.arms))
        expected = f"expected --arm with the arm that breaks, of {known}"
        raise ValueError(f"bisect: {named(training)}: {expected}")
    of, one = arm_of(experiment, arm, part)
    return ArmReruns(
        pool=pool,
        experiment=experiment.name,
        file=file,
        part=of,
        arm=one,
        seed=seed,
        folder=folder,
        settings=Settings(steps=steps),
        start_at=start_at,
        on_report=on_report,
    )


def _script(
    file: Path, function: str, pool: Workers, recipe: str | None, checkpoint: Path | None
) -> ScriptReruns:
    if recipe is None:
        told = named(f"{file}:{function}")
        raise ValueError(f"bisect: {told}: expected --recipe with the plan that breaks")
    if checkpoint is not None and not checkpoint.exists():
        raise ValueError(f"checkpoint {named(str(checkpoint))}: no such file")
    if not file.is_file():
        raise ValueError(f"script {named(str(file))}: no such file")
    plan = load_recipe(recipe)
    return ScriptReruns(pool=pool, file=file, function=function, plan=plan, checkpoint=checkpoint)


def arm_of(experiment: Experiment, arm: str, part: str | None) -> tuple[Part, Arm]:
    """An arm by name, in the part named or the only one that has it.

    Raises ValueError for a name that is unknown or stands in several parts.
    """
    parts = [one for one in experiment.parts if part in (None, one.name)]
    if not parts:
        known = ", ".join(one.name for one in experiment.parts)
        raise ValueError(f"part {named(part)}: expected one of {known}")
    found = [(of, one) for of in parts for one in of.arms if one.name == arm]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(of.name for of, _ in found)
        raise ValueError(f"arm {named(arm)}: is in parts {names}, expected one of them with --part")
    known = ", ".join(dict.fromkeys(one.name for of in parts for one in of.arms))
    raise ValueError(f"arm {named(arm)}: expected one of {known}")


@dataclass(kw_only=True)
class ArmReruns:
    """An arm's training with one seed, under other plans. With `start_at` reruns begin from a
    checkpoint of that step, which the arm's own plan makes first.

    Raises ValueError where the part's training cannot start from one.
    """

    pool: Workers
    experiment: str
    file: Path
    part: Part
    arm: Arm
    seed: int
    folder: Path
    settings: Settings
    start_at: int | None
    on_report: OnReport
    _prepared: bool = False

    def __post_init__(self) -> None:
        if self.start_at is not None and not self.part.restarts:
            expected = "expected a part whose training can start from a checkpoint"
            raise ValueError(f"part {named(self.part.name)}: {expected} (Part.restarts)")

    @property
    def plan(self) -> Plan:
        """What the arm trains under."""
        return self.arm.plan

    @property
    def about(self) -> dict[str, Any]:
        """What tells this training from others."""
        names = {"experiment": self.experiment, "part": self.part.name, "arm": self.arm.name}
        return {**names, "seed": self.seed, "steps": self.settings.steps}

    @property
    def checkpoint(self) -> Path | None:
        """Where reruns begin."""
        if self.start_at is None:
            return None
        return self.folder / f"step-{self.start_at}.safetensors"

    def rerun_all(self, plans: Mapping[Path, Plan], on_end: OnEnd) -> None:
        """See `bisection.reruns.Batch`. Before the first, what part and start need is made."""
        error = None if self._prepared else self._prepare()
        self._prepared = error is None
        if error is not None:
            for path in plans:
                on_end(path, error)
            return
        jobs, paths = {}, {}
        for path, plan in plans.items():
            index = number_of(path)
            paths[index] = path
            jobs[index] = (_rerun_arm, (index, *self._what(path, plan), self.checkpoint, None))
        self.pool.do(jobs, self.on_report, lambda index, error: on_end(paths[index], error))

    def _what(self, path: Path, plan: Plan | None) -> tuple[Any, ...]:
        names = self.part.name, self.arm.name
        return (self.file, *names, self.seed, path, self.settings, pickle.dumps(plan))

    def _prepare(self) -> str | None:
        errors: list[str | None] = []

        def done(job: Any) -> str | None:
            self.pool.do({0: job}, lambda report: None, lambda index, error: errors.append(error))
            return errors[-1]

        if self.part.prepare is not None:
            about = self.seed, self.folder, self.settings
            if error := done((_prepare_part, (self.file, self.part.name, *about))):
                return f"prepare: {error}"
        place = self.checkpoint
        if place is None or place.exists():
            return None
        path = self.folder / "before-the-checkpoint" / "run"
        path = path.with_name(f"run-{len([*path.parent.glob('*')])}")
        job = (_rerun_arm, (0, *self._what(path, self.arm.plan), None, (self.start_at, place)))
        if error := done(job):
            return f"up to step {self.start_at}: {error}"
        return None if place.exists() else f"the arm ended before step {self.start_at}"


@dataclass(kw_only=True)
class ScriptReruns:
    """A function of a script, `train(plan, path)` or `train(plan, path, checkpoint)`."""

    pool: Workers
    file: Path
    function: str
    plan: Plan
    checkpoint: Path | None

    @property
    def about(self) -> dict[str, Any]:
        """What tells this training from others."""
        return {"script": self.file.name, "function": self.function}

    def rerun_all(self, plans: Mapping[Path, Plan], on_end: OnEnd) -> None:
        """See `fp8lab.bisection.reruns.Batch`."""
        paths = {number_of(path): path for path in plans}
        jobs = {}
        for index, path in paths.items():
            plan = pickle.dumps(plans[path])
            jobs[index] = (_rerun_script, (self.file, self.function, path, plan, self.checkpoint))
        self.pool.do(jobs, lambda report: None, lambda index, error: on_end(paths[index], error))


def number_of(rerun: Path) -> int:
    """7 of a path that ends in rerun-007."""
    return int(rerun.name.rpartition("-")[2])


def function_of(file: Path, name: str) -> Callable[..., object]:
    """Raises ValueError in one line if the script does not run or has no such function."""
    if not file.is_file():
        raise ValueError(f"script {named(str(file))}: no such file")
    function = getattr(load_module(file, "script"), name, None)
    if not callable(function):
        raise ValueError(f"script {file}: expected a function {named(name)}(plan, path)")
    return function  # type: ignore[no-any-return]


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - a script may draw from numpy's global state
    torch.manual_seed(0)


def _rerun_script(
    send: Callable[[Report], None],
    file: Path,
    name: str,
    path: Path,
    plan: bytes,
    checkpoint: Path | None,
) -> None:
    """In a worker."""
    _seed()
    with left_in(path / TRACEBACK):
        train = function_of(file, name)
        _seed()  # again, for what it imports may have drawn, the first time alone
        train(pickle.loads(plan), path, *(() if checkpoint is None else (checkpoint,)))


def _prepare_part(
    send: Callable[[Report], None],
    file: Path,
    name: str,
    seed: int,
    folder: Path,
    settings: Settings,
) -> None:
    """In a worker."""
    _, experiment = load_experiment(str(file))
    part = next(one for one in experiment.parts if one.name == name)
    torch.manual_seed(seed)
    assert part.prepare is not None
    part.prepare(seed, folder, settings, lambda *_: None)


def _rerun_arm(
    send: Callable[[Report], None],
    index: int,
    file: Path,
    part_name: str,
    arm_name: str,
    seed: int,
    path: Path,
    settings: Settings,
    plan: bytes,
    start: Path | None,
    stop: tuple[int, Path] | None,
) -> None:
    """In a worker: the arm's training, under another plan."""
    _, experiment = load_experiment(str(file))
    part, arm = arm_of(experiment, arm_name, part_name)
    torch.manual_seed(seed)
    switched = replace(arm, plan=pickle.loads(plan))
    job = Job(experiment.name, part.name, switched, seed, path, settings, start, stop)
    with left_in(path / TRACEBACK):
        part.run(job, reporting(send, index))
