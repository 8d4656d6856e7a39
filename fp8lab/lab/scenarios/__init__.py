"""Scenarios: small real trainings in which one thing is wrong, and which say what it is.

Each has a dial for its strength and a seed, and returns its label: the cause (the name of a rule in
`diagnosis`), the sites that may be named, and the step of its onset, defined before it is measured.
A scenario computes its onset from its own tensors or injects it; it reads nothing that `watch` has
recorded, and no rule reads a label. Without a cause it is a healthy control.

Draws come in two splits. The rules were made on `development`: seeds 0 to 9, the dial in ten equal
steps. `evaluation` has seeds from 2000 on and its dials are drawn; it was run to be reported and
not to be looked at while rules were made.

    OUT/<split>/<scenario>/<seed>/run[, twin]      what was recorded
    OUT/<split>/<scenario>/<seed>/label.json       written last: a draw without it is done again

A draw is kept as long as the file that holds its scenario is what it was.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from fp8lab.lab.workers import Workers
from fp8lab.monitor import Watch, watch
from fp8lab.monitor.selection import Selection
from fp8lab.plan import Plan, recipe_to_dict
from fp8lab.recipe import shown

Split = Literal["development", "evaluation"]
DRAWS = 10
FIRST_SEED: dict[Split, int] = {"development": 0, "evaluation": 2000}

OPERANDS = Selection(tensors=("input", "weight", "grad_output", "grad_weight"))
BLOCKS = Selection(tensors=("residual", "attention_logits"))


@dataclass(frozen=True, kw_only=True)
class Label:
    """The truth about a draw: `cause` None for a healthy one; `sites` any of which is right, none
    where the cause has no place; `onset` the step at which it sets in."""

    cause: str | None
    sites: tuple[str, ...] = ()
    onset: int | None = None


@dataclass(frozen=True)
class Draw:
    """One training to do: the seed, the strength in [0, 1] (at 0 the cause is there already, at 1
    it is extreme), and the folder for what is recorded."""

    seed: int
    strength: float
    folder: Path

    def between(self, weakest: float, strongest: float) -> float:
        """The strength on a logarithmic scale between two positive numbers."""
        return float(weakest * (strongest / weakest) ** self.strength)

    def watch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        twin: bool = False,
        plan: Plan | None = None,
    ) -> Watch:
        """Record everything that rules may want of a training: feed-forwards, operands with what
        their casts do, gradients, weights, residual stream, attention logits; every step. `plan`
        is what the training says of its precision."""
        select = [OPERANDS] if optimizer is not None else []
        if any(isinstance(module, nn.ModuleList) for module in model.modules()):
            attends = any(re.search("att(entio)?n", name) for name, _ in model.named_modules())
            select.append(BLOCKS if attends else Selection(tensors=("residual",)))
        path = self.folder / ("twin" if twin else "run")
        config = None if plan is None else {"recipe": recipe_to_dict(plan)}
        return watch(model, path, optimizer=optimizer, every=1, select=select, config=config)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A training with one thing wrong. `run` does a draw, records it with `Draw.watch` and returns
    the label; `onset` says in words how its step is defined, `cause` is None for a control."""

    name: str
    cause: str | None
    title: str
    onset: str
    run: Callable[[Draw], Label]


def scenarios() -> dict[str, Scenario]:
    """All scenarios by name: those in `SCENARIOS` of each module of this package."""
    found: dict[str, Scenario] = {}
    for module in sorted(iter_modules(__path__), key=lambda module: module.name):
        for scenario in import_module(f"{__name__}.{module.name}").SCENARIOS:
            if scenario.name in found:
                raise ValueError(f"scenario {scenario.name}: there are two")
            found[scenario.name] = scenario
    return found


def draw_of(split: Split, name: str, number: int, out: Path) -> Draw:
    """Draw `number` of a scenario; evaluation dials follow from the seed and the name."""
    seed = FIRST_SEED[split] + number
    strength = number / (DRAWS - 1)
    if split == "evaluation":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        strength = float(np.random.default_rng([seed, key]).random())
    return Draw(seed, strength, out / split / name / str(seed))


@dataclass(frozen=True)
class Drawn:
    """A draw that has been done."""

    scenario: Scenario
    draw: Draw
    label: Label

    @property
    def run(self) -> Path:
        """What was recorded."""
        return self.draw.folder / "run"

    @property
    def twin(self) -> Path | None:
        """The same training in high precision, where the scenario recorded one."""
        path = self.draw.folder / "twin"
        return path if path.exists() else None


def generate(
    split: Split,
    out: Path,
    *,
    names: Iterable[str] | None = None,
    draws: int = DRAWS,
    workers: int = 2,
    on_end: Callable[[str, str | None], None] = lambda label, error: None,
) -> Iterator[Drawn]:
    """Do what is missing of the first `draws` draws of each scenario, then yield all of them.

    `on_end` gets each draw's name when it is done, and its error in one line or None. Raises
    ValueError for an unknown split or scenario, and RuntimeError at the end if a draw failed.
    """
    known = scenarios()
    if split not in get_args(Split):
        raise ValueError(f"split {shown(split)}: expected one of {', '.join(get_args(Split))}")
    wanted = list(known) if names is None else list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"scenario {shown(name)}: expected some of {', '.join(known)}")
    todo = [(name, draw_of(split, name, number, out)) for name in wanted for number in range(draws)]
    missing = [(name, draw) for name, draw in todo if _label_of(known[name], draw) is None]
    failures: list[str] = []

    def ended(index: int, error: str | None) -> None:
        name, draw = missing[index]
        if error is not None:
            failures.append(f"{name}, seed {draw.seed}: {error}")
        on_end(f"{name}, seed {draw.seed}", error)

    with Workers(workers) as pool:
        jobs = {index: (_do, pair) for index, pair in enumerate(missing)}
        pool.do(jobs, lambda report: None, ended)
    if failures:
        raise RuntimeError("; ".join(failures))
    for name, draw in todo:
        label = _label_of(known[name], draw)
        assert label is not None
        yield Drawn(known[name], draw, label)


def _do(send: Callable[[Any], None], name: str, draw: Draw) -> None:
    scenario = scenarios()[name]
    if draw.folder.exists():
        shutil.rmtree(draw.folder)
    draw.folder.mkdir(parents=True)
    torch.manual_seed(draw.seed)
    label = scenario.run(draw)
    if label.cause != scenario.cause:
        raise ValueError(f"label {label.cause}, expected {scenario.cause}")
    text = json.dumps({"made_by": _source(scenario), "label": asdict(label)})
    (draw.folder / "label.json").write_text(text)


def _label_of(scenario: Scenario, draw: Draw) -> Label | None:
    """What a draw came to, None if it is still to be done, or the scenario's file has changed."""
    try:
        found = json.loads((draw.folder / "label.json").read_text())
        if found["made_by"] != _source(scenario):
            return None
        return Label(**found["label"] | {"sites": tuple(found["label"]["sites"])})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _source(scenario: Scenario) -> str:
    return hashlib.sha256(Path(inspect.getfile(scenario.run)).read_bytes()).hexdigest()[:16]
