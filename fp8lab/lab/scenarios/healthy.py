"""Healthy controls: trainings of every recipe, architecture and mitigation with nothing wrong.

A rule that finds something above "low" in one of these cries wolf. Half of them are easy (a recipe,
an architecture, a mitigation, as they come), half look like trouble and are none: a loss that
spikes and recovers, rare tokens where scales are taken just in time, a channel 64 times the others,
gradients that clipping has to hold, noise, a run that was resumed, ranks that reduce their amaxes.

Healthy is defined before it is measured: the mean loss of the last tenth of the steps is below that
of the first `START` steps, finite, and at most `TOLERANCE` times what the same training reaches
with every operand in BF16. Each draw does that second training (unwatched, unless the control
records its twin) and writes the three losses into the run's result; `unhealthy` says what a draw
fails of it. So a control is one because of its losses, never because no rule objects.

The dial sets what makes a control hard (the learning rate, the size of an outlier, the height of a
spike), the seed all else: width, depth, weights, batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.ffn import GLU_VARIANTS, FeedForward, GatedFeedForward
from fp8lab.formats import FP16
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import BLOCKS, OPERANDS, Draw, Label, Scenario
from fp8lab.lab.train import NextByte, Schedule, Task, load_checkpoint, save_checkpoint, train
from fp8lab.mitigations import AntiWindup, ClampedSwiGLU, HighPrecisionProduct, SmoothSwiGLU
from fp8lab.monitor import Watch, watch
from fp8lab.plan import Plan
from fp8lab.recipe import (
    Accumulation,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
)

START = 5
TOLERANCE = 1.1

DELAYED = DelayedScaling(amax_history_len=16)
CURRENT = Float8CurrentScaling()
MX = MXFP8BlockScaling()
BF16 = HighPrecision()


def unhealthy(result: dict[str, Any]) -> str | None:
    """Which part of the definition a draw fails, by its run's result; None where it is healthy."""
    start, final, twin = (float(result[key]) for key in ("start", "final", "twin_final"))
    if not final < start:  # nor is NaN
        return f"the loss ends at {final:.4g} and began at {start:.4g}"
    if not final <= TOLERANCE * twin:
        return f"the loss ends at {final:.4g}, that of BF16 at {twin:.4g}"
    return None


# --- how it is trained ----------------------------------------------------------------------------

# What is done to a model, its gradients and its optimizer before the optimizer's step.
Disturb = Callable[[nn.Module, torch.optim.Optimizer, int], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training before it is converted, and what happens in it."""

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    recipe: Recipe | Plan = DELAYED
    mitigations: tuple[Any, ...] = ()
    steps: int = 60
    clip_norm: float | None = None
    disturb: Disturb | None = None
    records_twin: bool = False
    resume_at: int | None = None

    def twin(self) -> Training:
        """The same in BF16, with those mitigations that are part of the function."""
        kept = tuple(one for one in self.mitigations if one.changes_function)
        return replace(self, recipe=BF16, mitigations=kept)

    def convert(self) -> None:
        """In place. A language model's head stays out of FP8, as FP8 training has it."""
        head = ("head",) if isinstance(self.model, LanguageModel) else ()
        plan = self.recipe
        convert(self.model, plan if isinstance(plan, Plan) else Plan(recipe=plan, exclude=head))
        for mitigation in self.mitigations:
            mitigation.apply(self.model)

    def losses(
        self, watching: Watch | None, first: int = 0, last: int | None = None
    ) -> list[float]:
        """Train from step `first` to `last`: the loss of each step."""
        step, losses = first, []

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if self.disturb is not None:
                self.disturb(self.model, optimizer, step)

        def after(done: int, loss: float) -> None:
            nonlocal step
            step = done + 1
            losses.append(loss)

        handle = self.optimizer.register_step_pre_hook(before)
        schedule = Schedule(steps=last or self.steps, clip_norm=self.clip_norm)
        args = self.model, self.optimizer, self.task, schedule
        train(*args, watch=watching, first_step=first, progress=after)
        handle.remove()
        return losses


Make = Callable[[Draw, np.random.Generator], Training]


def run_control(make: Make, name: str, draw: Draw) -> Label:
    """Do a draw and its twin; the losses go into the run's result."""

    def made() -> Training:
        # Made anew, all is as it was: weights, batches, disturbances.
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        return make(draw, np.random.default_rng([draw.seed, key]))

    twin = made().twin()
    twin.convert()
    if twin.records_twin:
        with draw.watch(twin.model, twin.optimizer, twin=True) as watching:
            reached = twin.losses(watching)
    else:
        reached = twin.losses(None)
    training = made()
    training.convert()
    losses: list[float] = []
    if (pause := training.resume_at) is not None:
        with draw.watch(training.model, training.optimizer) as watching:
            losses = training.losses(watching, last=pause)
        path = draw.folder / "paused.safetensors"
        save_checkpoint(path, training.model, training.optimizer, pause)
        training = made()
        training.convert()
        load_checkpoint(path, training.model, training.optimizer)
    with _recording(training, draw) as watching:
        losses += training.losses(watching, first=pause or 0)
        watching.set_result(
            start=float(np.mean(losses[:START])),
            final=_last_tenth(losses),
            twin_final=_last_tenth(reached),
        )
    return Label(cause=None)


def _recording(training: Training, draw: Draw) -> Watch:
    if training.resume_at is None:
        return draw.watch(training.model, training.optimizer)
    select = [OPERANDS, BLOCKS] if isinstance(training.model, LanguageModel) else [OPERANDS]
    return watch(
        training.model,
        draw.folder / "run",
        optimizer=training.optimizer,
        every=1,
        select=select,
        resume_at=training.resume_at,
    )


def _last_tenth(losses: list[float]) -> float:
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


# --- what is trained ------------------------------------------------------------------------------


def language(
    variant: str = "swiglu", rate: float = 3e-3, depth: int | None = None, **more: Any
) -> Make:
    """A small language model on real text, AdamW, gradients clipped at 1; the dial turns the
    learning rate by up to a factor of two."""

    def make(draw: Draw, rng: np.random.Generator) -> Training:
        config = ModelConfig(
            dim=8 * int(rng.integers(4, 7)),
            layers=depth or int(rng.integers(1, 3)),
            heads=2,
            context=32,
            variant=variant,
        )
        model = LanguageModel(config, draw.seed)
        task = NextByte(None, draw.seed, batch=int(rng.integers(4, 9)), context=32)
        rates = rate * draw.between(1.0, 2.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rates, weight_decay=0.1)
        given = {"clip_norm": 1.0, "steps": 40} | more
        return Training(model=model, task=task, optimizer=optimizer, **given)

    return make


class Stack(nn.Module):
    """Feed-forwards one after another, with a residual path around each or without; x [.., dim]."""

    def __init__(self, parts: list[nn.Module], dim: int, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Residual(part, dim) if residual else part for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Residual(nn.Module):
    def __init__(self, mlp: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class Imitation:
    """Squared error against a random two-layer network, whose targets have variance 1 and a noise
    that nobody can learn. In the steps `hard` the inputs are `height` times as large, and so are
    the targets, for the network is homogeneous: batches that are right, and hard."""

    hard: frozenset[int] = frozenset()
    height = 1.0
    weight = 1.0

    def __init__(self, seed: int, dim: int, batch: int, noise: float = 0.3) -> None:
        self._seed, self._shape, self._noise = seed, (batch, dim), noise
        generator = torch.Generator().manual_seed(seed)
        self._inner = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
        self._outer = torch.randn(dim, dim, generator=generator) / math.sqrt(dim / 2)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(self._seed * 100_000 + step)
        x, noise = torch.randn(2, *self._shape, generator=generator)
        x = x * (self.height if step in self.hard else 1.0)
        y = (x @ self._inner).relu() @ self._outer + self._noise * noise
        error = (model(x) - y).square().mean()
        return self.weight * error, {}


def stack(
    variant: str = "swiglu",
    residual: bool = True,
    layers: int | None = None,
    rate: float = 3e-3,
    sgd: dict[str, Any] | None = None,
    **more: Any,
) -> Make:
    """A stack of feed-forwards that imitates a network; AdamW, or SGD with these options."""

    def make(draw: Draw, rng: np.random.Generator) -> Training:
        dim, hidden = 8 * int(rng.integers(4, 9)), 16 * int(rng.integers(4, 9))
        depth = layers or int(rng.integers(1, 4))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.seed)
            kind = GatedFeedForward if variant in GLU_VARIANTS else FeedForward
            model = Stack([kind(dim, hidden, variant) for _ in range(depth)], dim, residual)
        task = Imitation(draw.seed, dim, batch=int(rng.integers(32, 129)))
        rates = rate * draw.between(1.0, 2.0)
        optimizer: torch.optim.Optimizer
        if sgd is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=rates)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=rates, **sgd)
        return Training(model=model, task=task, optimizer=optimizer, **more)

    return make


# --- the controls ---------------------------------------------------------------------------------

PROMOTED = Plan(recipe=CURRENT, exclude=("head",), accumulation=Accumulation(promote_every=128))
GAUDI = DelayedScaling(amax_history_len=16, fp8_format=Format.GAUDI2)
GRADIENTS_JUST_IN_TIME = Plan(
    recipe=DELAYED, exclude=("head",), overrides={"*:grad_output": CURRENT}
)

# Name, title, training.
CONTROLS: tuple[tuple[str, str, Make], ...] = (
    (
        "delayed-1",
        "Delayed scaling, history 1",
        language(recipe=DelayedScaling(amax_history_len=1)),
    ),
    (
        "delayed-4",
        "Delayed scaling, history 4",
        language(recipe=DelayedScaling(amax_history_len=4)),
    ),
    ("delayed-16", "Delayed scaling, history 16", language(recipe=DELAYED)),
    ("delayed-1024", "Delayed scaling, TE's defaults", language(recipe=DelayedScaling())),
    (
        "delayed-recent",
        "Delayed scaling by the most recent amax",
        language(recipe=DelayedScaling(amax_compute_algo="most_recent")),
    ),
    ("delayed-margin", "Delayed scaling, margin 2", language(recipe=DelayedScaling(margin=2))),
    ("delayed-gaudi", "Delayed scaling in Gaudi2's formats", language(recipe=GAUDI)),
    ("delayed-hybrid", "Gradients just in time", language(recipe=GRADIENTS_JUST_IN_TIME)),
    ("delayed-twin", "Delayed scaling, with a twin", language(recipe=DELAYED, records_twin=True)),
    ("current", "Current scaling", language(recipe=CURRENT)),
    (
        "current-powers",
        "Current scaling by powers of two",
        language(recipe=Float8CurrentScaling(use_power_2_scales=True)),
    ),
    (
        "current-stochastic",
        "Gradients rounded stochastically",
        language(recipe=Float8CurrentScaling(stochastic_rounding=True)),
    ),
    ("current-twin", "Current scaling, with a twin", language(recipe=CURRENT, records_twin=True)),
    ("current-promoted", "A short accumulator, promoted every 128", language(recipe=PROMOTED)),
    ("block", "Block scaling", language(recipe=Float8BlockScaling())),
    (
        "block-f32",
        "Block scaling by any factor",
        language(recipe=Float8BlockScaling(use_f32_scales=True)),
    ),
    ("mx", "MXFP8", language(recipe=MX)),
    (
        "mx-even",
        "MXFP8, amax rounded first",
        language(recipe=MXFP8BlockScaling(scale_rounding="even")),
    ),
    (
        "mx-2d",
        "MXFP8, weights in squares",
        language(recipe=MXFP8BlockScaling(enable_2d_quantization=True)),
    ),
    ("mx-twin", "MXFP8, with a twin", language(recipe=MX, records_twin=True)),
    ("nvfp4", "NVFP4", language(recipe=NVFP4BlockScaling())),
    ("rowwise", "A scale per row", language(recipe=RowwiseScaling())),
    (
        "rowwise-wide",
        "A scale per row, weight gradients in FP32",
        language(recipe=RowwiseScaling(high_precision_grad_weight=True)),
    ),
    ("bf16", "BF16", language(recipe=BF16)),
    ("fp16", "FP16", language(recipe=HighPrecision(format=FP16))),
    ("smooth-delayed", "Smooth-SwiGLU, delayed", language(mitigations=(SmoothSwiGLU(),))),
    (
        "smooth-current",
        "Smooth-SwiGLU, current",
        stack(recipe=CURRENT, mitigations=(SmoothSwiGLU(),)),
    ),
    (
        "clamped-current",
        "Clamped SwiGLU, current",
        language(recipe=CURRENT, mitigations=(ClampedSwiGLU(),)),
    ),
    (
        "clamped-bf16",
        "Clamped SwiGLU, BF16",
        stack(recipe=BF16, mitigations=(ClampedSwiGLU(limit=7.0),)),
    ),
    ("anti-windup", "Anti-wind-up, delayed", language(mitigations=(AntiWindup(),))),
    ("product-bf16", "The product in BF16", language(mitigations=(HighPrecisionProduct(),))),
    (
        "smooth-clamped",
        "Smooth and clamped, delayed",
        stack(mitigations=(SmoothSwiGLU(), ClampedSwiGLU())),
    ),
    ("geglu", "GEGLU language model, current", language("geglu", recipe=CURRENT)),
    ("reglu", "ReGLU language model, delayed", language("reglu")),
    ("bilinear", "Bilinear residual stack, current", stack("bilinear", recipe=CURRENT)),
    ("glu", "GLU residual stack, MXFP8", stack("glu", recipe=MX)),
    ("swiglu-bare", "SwiGLU stack without residuals", stack(residual=False, layers=2)),
    ("plain-gelu", "Plain GELU stack, delayed", stack("gelu")),
    ("plain-relu2", "Plain squared-ReLU stack, current", stack("relu_squared", recipe=CURRENT)),
    ("plain-bare", "Plain stack without residuals, MXFP8", stack("silu", False, 2, recipe=MX)),
    ("deep", "Five residual SwiGLU blocks, delayed", stack(layers=5, steps=40)),
    ("sgd", "SGD, delayed", stack(rate=0.5, sgd={}, steps=80)),
    (
        "momentum",
        "SGD with momentum, current",
        stack(rate=0.1, sgd={"momentum": 0.9}, recipe=CURRENT),
    ),
)


def _scenario(name: str, title: str, make: Make) -> Scenario:
    def run(draw: Draw) -> Label:
        return run_control(make, name, draw)

    return Scenario(name=f"healthy-{name}", cause=None, title=title, onset="none", run=run)


SCENARIOS = tuple(_scenario(*control) for control in CONTROLS)
