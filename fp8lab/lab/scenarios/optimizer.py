"""What the optimizer does wrong, in any precision: a learning rate too high, a second moment too
slow.

A learning rate that is too high from the first step, or from a jump of the schedule on. Where the
training is in FP8, its twin in high precision is recorded too, and fails as well.

Adam's second moment, with a beta2 of 0.999, remembers a thousand steps. Where the gradients of a
training become larger at once (a loss that is summed and no longer averaged, after a resume say),
it lags, and for a while every update is up to 1/sqrt(1 - beta2) = 32 times what it should be. The
loss itself is not changed by that: its value stays, and its gradient is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.training import (
    RECIPES,
    Regression,
    Stack,
    converted,
    language_model,
    pick,
)
from fp8lab.lab.train import Schedule, train
from fp8lab.recipe import HighPrecision

STEPS = 60


def _bed(draw: Draw) -> tuple[nn.Module, Any]:
    """A model, not converted, and its task; a pure function of the draw."""
    activation = pick(draw, "activation", ("gelu", "swiglu", "language", "language"))
    layers = pick(draw, "layers", (1, 2))
    if activation == "language":
        return language_model(draw, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.seed)
        model = Stack(draw, activation, layers)
    return model, Regression(draw, model.dim)


class _Injected:
    """A task whose optimizer gets another learning rate, and whose gradients get a factor, from a
    step on."""

    def __init__(
        self, task: Any, optimizer: torch.optim.Optimizer, start: int, rate: float, factor: float
    ) -> None:
        self._task, self._optimizer, self._start = task, optimizer, start
        self._rate, self._factor = rate, factor

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == self._start:
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate
        loss, metrics = self._task.loss(model, step)
        if step >= self._start:
            loss = loss + (self._factor - 1.0) * (loss - loss.detach())
        return loss, metrics


def _rate_too_high(draw: Draw, start: int, healthy: float, high: float) -> Label:
    recipe = pick(draw, "recipe", RECIPES)
    kinds = [False] if isinstance(recipe, HighPrecision) else [False, True]
    for twin in kinds:
        model, task = _bed(draw)
        converted(draw, model, HighPrecision() if twin else recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=healthy)
        injected = _Injected(task, optimizer, start, high, 1.0)
        with draw.watch(model, optimizer, twin=twin) as watching:
            train(model, optimizer, injected, Schedule(steps=STEPS, clip_norm=1.0), watch=watching)
    return Label(cause="learning_rate", onset=start)


def rate_from_start(draw: Draw) -> Label:
    """Far too high from the first step."""
    return _rate_too_high(draw, 0, 3e-3, draw.between(0.2, 2.0))


def rate_jump(draw: Draw) -> Label:
    """A schedule that jumps."""
    start = pick(draw, "start", range(15, 40))
    return _rate_too_high(draw, start, 3e-3, draw.between(0.2, 2.0))


def second_moment(draw: Draw) -> Label:
    """Gradients that become larger at once under Adam with a beta2 of 0.999, in a training that is
    watched from a checkpoint on."""
    model = Stack(draw, pick(draw, "activation", ("gelu", "relu", "swiglu")), 2)
    task = Regression(draw, model.dim)
    converted(draw, model)
    resumed = pick(draw, "resumed", range(200, 300))
    start = resumed + pick(draw, "start", range(25, 40))
    betas = (pick(draw, "beta", (0.9, 0.8, 0.5)), 0.999)
    rate = 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas)
    injected = _Injected(task, optimizer, start, rate, draw.between(20.0, 300.0))
    train(model, optimizer, injected, Schedule(steps=resumed))
    with draw.watch(model, optimizer) as watching:
        schedule = Schedule(steps=resumed + 70)
        train(model, optimizer, injected, schedule, watch=watching, first_step=resumed)
    return Label(cause="second_moment_lag", onset=start)


SCENARIOS = (
    Scenario(
        name="rate_from_start",
        cause="learning_rate",
        title="a learning rate far too high from the first step",
        onset="the first step",
        run=rate_from_start,
    ),
    Scenario(
        name="rate_jump",
        cause="learning_rate",
        title="a schedule that jumps",
        onset="the step of the jump",
        run=rate_jump,
    ),
    Scenario(
        name="second_moment",
        cause="second_moment_lag",
        title="gradients that become larger at once under a slow second moment",
        onset="the step from which on the gradients are larger",
        run=second_moment,
    ),
)
