"""Small real trainings in which one operand breaks the run: what a bisection has to name.

A stack of four SwiGLU layers, each with a random teacher of its own, learns in a second with Adam.
All operands are in FP8 and harmless (the worst layer's relative error ends near 0.6, as in BF16),
but for the planted ones, which have a recipe that does not suit them:

- flushed: delayed scaling with a margin of 40 octaves, at which everything rounds to zero. The
  layer outputs nothing and its relative error stays 1.
- flushed gradients: the same for a gradient, in a training without loss scaling whose gradients are
  below FP8's range from the first step. The weight, which starts at zero here, never moves.
- saturated: a margin of -12 octaves, at which all that is larger than a 4096th of the last amax is
  clipped. The gradient passes as if it were not: gate and up grow, the loss leaves for good.
- hot channel: one input channel of 2^24, for which the weights are frozen at zero, under a scale
  for the whole tensor; the others round to zero. All else is in MXFP8, where it has its own block.
  In the GEMM of the weight's gradient this matters to a weight that starts at zero, as here.

A run broke if its worst layer ends above `LIMIT` or went beyond `DIVERGED` on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from fp8lab import (
    DelayedScaling,
    Float8CurrentScaling,
    GatedFeedForward,
    MXFP8BlockScaling,
    Plan,
    Run,
    convert,
    watch,
)

LAYERS, DIM, HIDDEN, BATCH, STEPS = 4, 16, 32, 64, 120
LIMIT, DIVERGED = 0.85, 100.0
HOT = 2.0**24

FLUSHED = DelayedScaling(margin=40, amax_history_len=4)
SATURATED = DelayedScaling(margin=-12, amax_history_len=4)


@dataclass(frozen=True)
class Planted:
    """A training with `guilty` operands, patterns of `Plan.overrides`."""

    fault: str
    guilty: tuple[str, ...]
    seed: int

    @property
    def plan(self) -> Plan:
        """FP8 everywhere, and the planted recipes."""
        if self.fault == "hot channel":
            hot = dict.fromkeys(self.guilty, Float8CurrentScaling())
            return Plan(recipe=MXFP8BlockScaling(), overrides=hot)
        recipe = SATURATED if self.fault == "saturated" else FLUSHED
        return Plan(recipe=Float8CurrentScaling(), overrides=dict.fromkeys(self.guilty, recipe))

    def train(self, plan: Plan, path: Path) -> None:
        """Record the training under a plan."""
        teacher, student = (_Stack(self.seed + k, self._is_hot) for k in (0, 1))
        for site in self.guilty:
            if site.endswith((":grad_output", "@grad_weight")):
                layer = student.get_submodule(site.partition(":")[0])
                assert isinstance(layer, nn.Linear)
                layer.weight.data.zero_()
        convert(student, plan)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02, eps=1e-30)
        scale = 2.0**-30 if self.fault == "flushed gradients" else 1.0
        draw = torch.Generator().manual_seed(self.seed + 2)
        with watch(student, path, every=STEPS, config={"seed": self.seed}) as watching:
            for step in range(STEPS):
                errors = student.errors(torch.randn(BATCH, DIM, generator=draw), teacher)
                optimizer.zero_grad()
                (errors.mean() * scale).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                worst = float(errors.detach().max())
                watching.step(step, loss=worst)
                if not worst < DIVERGED:
                    watching.event(step, "diverged", f"the loss is {worst:.4g}")
                    break

    def _is_hot(self, layer: int) -> bool:
        named = any(site.startswith(f"layers.{layer}.") for site in self.guilty)
        return named and self.fault == "hot channel"


class _Stack(nn.Module):
    """Feed-forwards of random weights; each takes 16 features and, in an MXFP8 block of its own,
    what is hot in some of them."""

    def __init__(self, seed: int, is_hot: Callable[[int], bool]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.is_hot = [is_hot(index) for index in range(LAYERS)]
        self.wide = any(self.is_hot)
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = GatedFeedForward(64 if self.wide else DIM, HIDDEN)
            for linear in (layer.gate, layer.up, layer.down):
                fan_in = HIDDEN if linear is layer.down else DIM
                linear.weight.data.normal_(generator=draw).mul_(1.5 / math.sqrt(fan_in))
                if self.wide and linear is not layer.down:
                    linear.weight.data[:, DIM:] = 0.0
                    linear.weight.register_hook(_of_features_alone)  # type: ignore[no-untyped-call]
            self.layers.append(layer)

    def errors(self, x: Tensor, teacher: _Stack) -> Tensor:
        """Each layer's squared error relative to its target's square, [layers]."""
        errors = []
        for layer, other, is_hot in zip(self.layers, teacher.layers, self.is_hot, strict=True):
            given = x
            if self.wide:
                given = pad(x, (0, 64 - DIM))
                given[:, 32] = HOT if is_hot else 0.0
            output = layer(given)[:, :DIM]
            with torch.no_grad():
                target = other(given)[:, :DIM]
            errors.append((output - target).square().sum() / target.square().sum())
            x = rms_norm(x + output, (DIM,))
        return torch.stack(errors)

    def forward(self, x: Tensor) -> Tensor:
        """For the watch, which runs the layers on a probe."""
        for layer in self.layers:
            x = rms_norm(x + layer(pad(x, (0, 64 - DIM)) if self.wide else x)[:, :DIM], (DIM,))
        return x


def _of_features_alone(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, DIM:] = 0.0
    return gradient


def broke(run: Run) -> int | None:
    """The last step if the run ended above the limit or diverged."""
    loss = run.steps("loss")["loss"]
    last = float(loss.tail(10).mean())
    return None if last < LIMIT else int(run.steps("loss")["step"].max())


def planted(first_seed: int) -> list[Planted]:
    """Twenty trainings with one guilty operand each, their seeds from `first_seed` on."""
    cases = [
        ("flushed", "0.gate:input"),
        ("flushed", "1.up:input"),
        ("flushed", "3.up:input"),
        ("flushed", "0.down:input"),
        ("flushed", "2.down:input"),
        ("flushed", "1.gate:weight"),
        ("flushed", "2.up:weight"),
        ("flushed", "3.down:weight"),
        ("flushed gradients", "0.gate:grad_output"),
        ("flushed gradients", "2.gate:grad_output"),
        ("flushed gradients", "1.up:grad_output"),
        ("flushed gradients", "3.up:grad_output"),
        ("flushed gradients", "1.down:grad_output"),
        ("flushed gradients", "3.down:grad_output"),
        ("saturated", "1.down:input"),
        ("saturated", "2.down:input"),
        ("saturated", "3.down:input"),
        ("hot channel", "0.up:input@output"),
        ("hot channel", "2.gate:input@output"),
        ("hot channel", "1.gate:input@grad_weight"),
    ]
    return [
        Planted(fault, (f"layers.{site}",), first_seed + 10 * index)
        for index, (fault, site) in enumerate(cases)
    ]


def planted_in_twos(first_seed: int) -> list[Planted]:
    """Four trainings with two guilty operands, each of which breaks the run without the other."""
    cases = [
        ("flushed", "0.gate:input", "3.down:weight"),
        ("flushed", "1.up:weight", "1.down:input"),
        ("flushed gradients", "0.up:grad_output", "2.gate:grad_output"),
        ("hot channel", "2.gate:input@output", "2.up:input@output"),
    ]
    return [
        Planted(fault, tuple(f"layers.{site}" for site in sites), first_seed + 10 * index)
        for index, (fault, *sites) in enumerate(cases)
    ]
