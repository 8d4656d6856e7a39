"""Training byte-level language models, as many experiments do it.

A `Setup` is how the runs of a part are trained, an arm's options may replace fields of it, and
`train_bytes` is one run: convert, train, the loss on held-out text. What a training has of its own
comes in as functions: another optimizer or task, what is looked at on the way (`looks`) and in the
end (`ends`). `pretrain` and `pretrained` are for parts whose arms start from one trained model.

Rejected: a class to inherit from. What an experiment changes would then stand in methods whose
order its reader has to look up here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fp8lab.conversion import convert
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Job, Progress, Settings
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.parallel import parallelize
from fp8lab.lab.train import NextByte, Schedule, load_checkpoint, save_checkpoint, train
from fp8lab.monitor import watch
from fp8lab.monitor.ranks import unwrapped
from fp8lab.plan import Plan
from fp8lab.recipe import HighPrecision

BF16 = Plan(recipe=HighPrecision(), exclude=("head",))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has just ended, diverged or not, for `Setup.ends`."""

    job: Job
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    task: NextByte
    steps: int
    diverged_at: int | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a byte-level language model is trained; losses are in nats per byte.

    `looks` are measured at the steps that are recorded in full, without gradients, `ends` after the
    last one and the held-out loss.
    """

    config: ModelConfig
    steps: int
    quick: int
    learning_rate: float
    batch: int = 16
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    fades: bool = False  # the learning rate falls to 0 along a line
    diverged_above: float = 16.0  # a model that knows nothing has 5.55
    every: int = 50
    at_least: int | None = 3  # so often is recorded in full, however short the run
    held_out: int = 16  # batches
    held_out_quick: int = 2
    told: tuple[str, ...] = ("learning_rate", "weight_decay")  # fields for the run's config
    task: Callable[..., NextByte] = NextByte
    optimizer: Callable[[nn.Module, Setup, Arm], torch.optim.Optimizer] | None = None
    select: Callable[[int], Any] | None = None  # of the number of steps, as is what follows
    windows: Callable[[int], list[tuple[int, int]]] | None = None  # recorded in full, every step
    looks: Callable[[LanguageModel, NextByte, int], dict[str, float]] | None = None
    ends: Callable[[Trained], dict[str, Any]] | None = None


class _Looking:
    """A task whose model is looked at every so many steps, and whose loss may be added to."""

    def __init__(self, task: NextByte, setup: Setup, penalties: list[Callable[[], Tensor]]) -> None:
        self.task, self.setup, self.penalties = task, setup, penalties

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = self.task.loss(model, step)
        if self.penalties:
            penalty = torch.stack([penalty() for penalty in self.penalties]).sum()
            loss, metrics = loss + penalty, metrics | {"penalty": float(penalty.detach())}
        if self.setup.looks is not None and step % self.setup.every == 0:
            inner = unwrapped(model)
            assert isinstance(inner, LanguageModel)
            with torch.no_grad():
                metrics = metrics | self.setup.looks(inner, self.task, step)
        return loss, metrics


def adamw(model: nn.Module, setup: Setup) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr=setup.learning_rate,
        betas=(0.9, setup.beta2),
        weight_decay=setup.weight_decay,
    )


def setup_of(job: Job, setup: Setup) -> Setup:
    """With what the arm's options say otherwise, and for the number of steps of this run."""
    options = dict(job.arm.options or {})
    own = {name: value for name, value in options.items() if name in Setup.__dataclass_fields__}
    config = replace(setup.config, variant=options.get("variant", setup.config.variant))
    setup = replace(setup, **own, config=job.arm.configured(config))
    steps, every = job.steps(setup.steps, quick=setup.quick), setup.every
    if setup.at_least is not None:
        every = min(every, 1 + steps // setup.at_least)
    return replace(setup, steps=steps, every=every)


def train_bytes(job: Job, progress: Progress, *, setup: Setup, **about: Any) -> None:
    """One run of a byte-level language model; `about` is what else its config says.

    With the settings' `parallel` this is one of several processes of that run, see `parallel`.
    What the arm's mitigations add to the loss is in the recorded `loss`, and by itself in
    `penalty`; the held-out loss is without.
    """
    setup = setup_of(job, setup)
    steps, quick = setup.steps, job.settings.quick
    model = LanguageModel(setup.config, job.seed)
    job.arm.prepare(model)
    how = job.settings.parallel
    together = model if how is None else parallelize(model, how)
    optimizer = _optimizer_of(job, model, setup)
    penalties = job.arm.penalties(model)
    task = setup.task(job.settings.text, job.seed, batch=setup.batch, context=setup.config.context)
    windows = [] if setup.windows is None else setup.windows(steps)
    told = {name: getattr(setup, name) for name in setup.told}
    size = {"batch": setup.batch, "context": setup.config.context}
    config = job.config(steps=steps, **size, **told, **about, **task.origin())
    select = () if setup.select is None else setup.select(steps)
    group = None if how is None else dist.group.WORLD
    watching = watch(
        together,
        job.path,
        optimizer=optimizer,
        every=setup.every,
        select=select,
        group=group,
        config=config,
    )
    with watching:

        def report(step: int, loss: float) -> None:
            progress(step + 1, steps, loss, watching.alarms)
            for first, last in windows:
                if step + 1 == first:
                    watching.record_in_full(last - first)

        schedule = Schedule(
            steps=steps, clip_norm=setup.clip_norm, diverged_above=setup.diverged_above
        )
        looking = _Looking(task, setup, penalties)
        end = train(together, optimizer, looking, schedule, watch=watching, progress=report)
        batches = setup.held_out_quick if quick else setup.held_out
        loss = task.held_out_loss(model, batches) if end is None else None
        ended = Trained(
            job=job, model=model, optimizer=optimizer, task=task, steps=steps, diverged_at=end
        )
        more = {} if setup.ends is None else setup.ends(ended)
        if watching.rank == 0:
            watching.set_result(diverged_at=end, final_loss=loss, **more)


def _optimizer_of(job: Job, model: LanguageModel, setup: Setup) -> torch.optim.Optimizer:
    make = setup.optimizer
    optimizer = adamw(model, setup) if make is None else make(model, setup, job.arm)
    job.arm.prepare_optimizer(optimizer, model)
    if setup.fades:
        fading = LambdaLR(optimizer, lambda step: 1.0 - step / setup.steps)
        optimizer.register_step_post_hook(lambda *_: fading.step())
    return optimizer


def pretrain(
    seed: int,
    folder: Path,
    settings: Settings,
    progress: Progress,
    *,
    setup: Setup,
    plan: Plan | None = BF16,
) -> None:
    """A part's `prepare`: the model that all arms of a seed start from, in FP32 without a plan."""
    steps = settings.steps or (setup.quick if settings.quick else setup.steps)
    model = LanguageModel(setup.config, seed)
    if plan is not None:
        convert(model, plan)
    optimizer = adamw(model, setup)
    train(
        model,
        optimizer,
        NextByte(settings.text, seed, batch=setup.batch, context=setup.config.context),
        Schedule(steps=steps, clip_norm=setup.clip_norm),
        progress=lambda step, loss: progress(step + 1, steps, loss, 0),
    )
    save_checkpoint(folder / f"pretrained-{seed}.safetensors", model, optimizer, steps)


def pretrained(job: Job, setup: Setup) -> LanguageModel:
    """A fresh copy of that model, not converted."""
    model = LanguageModel(setup.config, job.seed)
    file = job.path.parents[1] / f"pretrained-{job.seed}.safetensors"
    load_checkpoint(file, model, adamw(model, setup))
    return model
