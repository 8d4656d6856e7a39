"""Training on rare tokens: the regression whose SwiGLU product breaks delayed FP8.

One SwiGLU layer learns `data.RareToken`: once in forty steps a rare token asks for a large answer,
and the student must grow a channel for it. `regress` is the training of `swiglu_divergence`, which
says how its sizes were chosen. `regress_spaced` is the same with the gap between rare tokens to
choose, random or exact, and with an oracle of what grows behind the clipping: the rare token's
answer as the weights alone would give it, without any cast. That costs a product of one token a
step and nothing of the training: no random number is drawn, no scale moves.

Both are `learn`, and differ in the task, in what it records and in what it says in the end.
Rejected: one kind of end for both. Their means are summed in different orders, and the figures that
stand in the repository are those, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.lab.arm import Arm, Mitigation, Prediction
from fp8lab.lab.data import RareToken
from fp8lab.lab.experiment import Job, Progress
from fp8lab.lab.train import Schedule, load_checkpoint, train
from fp8lab.linear import Fp8Linear
from fp8lab.monitor import watch
from fp8lab.plan import Plan
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision

STEPS = 2000
LEARNING_RATE = 0.025  # of SGD
LEARNING_RATES = {"sgd": LEARNING_RATE, "adam": 0.003}  # an arm may have its own
COMMON_LOSS_LIMIT = 1000.0
LAST, LAST_EVENTS = 100, 5  # steps and rare tokens that final numbers are means of

BF16 = Plan(recipe=HighPrecision())
GRADIENTS_JUST_IN_TIME = {"*:grad_output": Float8CurrentScaling()}


def fp8(history: int) -> Plan:
    """Delayed scaling with such a history; gradients just in time."""
    recipe = DelayedScaling(amax_history_len=history)
    return Plan(recipe=recipe, overrides=GRADIENTS_JUST_IN_TIME)


def arm(
    name: str,
    title: str,
    plan: Plan,
    predicted: Prediction,
    *mitigations: Mitigation,
    **options: Any,
) -> Arm:
    """An arm of `regress_spaced`, which says what the options are."""
    return Arm(
        name=name,
        title=title,
        plan=plan,
        predicted=predicted,
        mitigations=mitigations,
        options=options,
    )


class Student(nn.Module):
    """One SwiGLU layer, twice as wide as the teacher, or with the name of an activation one without
    a gate and with as many weights."""

    def __init__(self, seed: int, activation: str | None = None) -> None:
        super().__init__()
        self.mlp: nn.Module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if activation is None:
                self.mlp = GatedFeedForward(64, 128)
            else:
                self.mlp = FeedForward(64, 192, activation)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x)
        return output


class Punctual:
    """The tokens of a `RareToken`, the rare one at exactly every `gap`-th step."""

    def __init__(self, task: RareToken, gap: int) -> None:
        self.gap = gap
        self.kinds = tuple(replace(task, event_probability=float(rare)) for rare in (False, True))

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.kinds[step % self.gap == self.gap - 1].batch(step)


class Regression:
    """Squared error summed over the outputs, mean over the batch; common and rare tokens are
    recorded apart, and the common ones decide whether a run has diverged."""

    def __init__(self, seed: int) -> None:
        self.asked = RareToken(seed=seed, hidden=64, target_scale=70.0)
        self.task: RareToken | Punctual = self.asked
        self.rare_target = float(self.asked.rare_target.square().sum())
        self.kept: list[dict[str, float]] = []  # the metrics of every step

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        x, y, is_rare = self.task.batch(step)
        errors = (model(x) - y).square().sum(-1)
        metrics = {"common_loss": float(errors.detach()[~is_rare].mean())}
        if is_rare.any():
            metrics["rare_error"] = float(errors.detach()[is_rare].mean()) / self.rare_target
        self.kept.append(metrics)
        return errors.mean(), metrics

    def result(self, diverged_at: int | None, seconds: float) -> dict[str, Any]:
        """What the run came to, after so many seconds of CPU time."""
        common = [metrics["common_loss"] for metrics in self.kept[-LAST:]]
        rare = [of["rare_error"] for of in self.kept if "rare_error" in of][-LAST_EVENTS:]
        lasted = diverged_at is None
        return {
            "final_loss": sum(common) / len(common) if lasted else None,
            "final_rare_error": sum(rare) / len(rare) if rare and lasted else None,
        }


class RareTokens(Regression):
    """That regression, rare tokens `gap` steps apart, with what stands behind the clipping.

    Of steps that have a rare token it records the `product`'s largest element and the `exact_error`
    (see `exact`), and under delayed scaling that element over the largest that is not clipped, the
    `ratio`.
    """

    def __init__(self, seed: int, gap: int, *, punctual: bool) -> None:
        super().__init__(seed)
        spaced = replace(self.asked, event_probability=1 / gap)
        self.task = Punctual(self.asked, gap) if punctual else spaced

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        down = model.get_submodule("mlp.down")
        assert isinstance(down, Fp8Linear)
        scale = getattr(down, "scale", None)  # moves in the forward
        held = math.nan if scale is None else 448.0 / float(scale[0])
        behind = self.exact(model)
        loss, metrics = super().loss(model, step)
        if "rare_error" in metrics:
            metrics |= behind  # in what is kept as well
            if isinstance(down.recipes["input"], DelayedScaling):
                metrics["ratio"] = behind["product"] / held
        return loss, metrics

    @torch.no_grad()
    def exact(self, model: nn.Module) -> dict[str, float]:
        """Of the rare token, without noise and without a cast: its product's largest element, and
        its squared error relative to the answer asked for."""
        weights = []
        for name in ("gate", "up", "down"):
            layer = model.get_submodule(f"mlp.{name}")
            assert isinstance(layer, nn.Linear)
            weights.append(layer.weight.float())
        gate, up, down = weights
        token = self.asked.rare_input
        product = functional.silu(gate @ token) * (up @ token)
        error = (down @ product - self.asked.rare_target).square().sum() / self.rare_target
        return {"product": float(product.abs().max()), "exact_error": float(error)}

    def result(self, diverged_at: int | None, seconds: float) -> dict[str, Any]:
        columns = ["common_loss", "rare_error", "exact_error", "product"]
        rows = pd.DataFrame(self.kept).reindex(columns=columns)
        events = rows.dropna(subset=["rare_error"])
        found: dict[str, float | None] = {
            "final_common_loss": float(rows["common_loss"].tail(LAST).mean())
        }
        for name in columns[1:]:
            last = events[name].tail(LAST_EVENTS)
            found[f"final_{name}"] = float(last.mean()) if len(last) else None
        if diverged_at is not None:
            found = dict.fromkeys(found)
        milliseconds = 1e3 * seconds / len(rows)
        loss = found["final_common_loss"]
        return {"final_loss": loss, "events": len(events), "cpu_ms": milliseconds, **found}


def learning_rate_of(arm: Arm) -> float:
    """As the arm's options say, or that of the optimizer they name, SGD if none."""
    options = arm.options or {}
    if "learning_rate" in options:
        return float(options["learning_rate"])
    return LEARNING_RATES[options.get("optimizer", "sgd")]


def optimizer_of(arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    """As the arm's options say: `optimizer` (sgd, adam, adamw), `learning_rate`, SGD's `momentum`,
    AdamW's `beta2`."""
    options, rate = dict(arm.options or {}), learning_rate_of(arm)
    kind = options.get("optimizer", "sgd")
    if kind == "sgd":
        momentum = options.get("momentum", 0.0)
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    betas = (0.9, options.get("beta2", 0.95))
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.1)


def learn(
    job: Job,
    progress: Progress,
    task: Regression,
    *,
    steps: int,
    every: int,
    **about: Any,
) -> None:
    """One run on the task. The arm's options: `activation` of a student without a gate, `clip_norm`
    and those of `optimizer_of`. `about` is what else its config says."""
    options = job.arm.options or {}
    model = job.arm.prepare(Student(job.seed, options.get("activation")))
    optimizer = optimizer_of(job.arm, model)
    schedule = Schedule(
        steps=steps,
        clip_norm=options.get("clip_norm"),
        judged_by="common_loss",
        diverged_above=COMMON_LOSS_LIMIT,
    )
    config = job.config(steps=steps, **about)
    first = 0
    if job.start is not None:
        first = load_checkpoint(job.start, model, optimizer, other_precision=True)
    with watch(model, job.path, optimizer=optimizer, every=every, config=config) as watching:
        began = time.process_time()
        diverged = train(
            model,
            optimizer,
            task,
            schedule,
            watch=watching,
            first_step=first,
            stop=job.stop,
            progress=lambda step, loss: progress(step + 1, steps, loss, watching.alarms),
        )
        seconds = time.process_time() - began
        watching.set_result(diverged_at=diverged, **task.result(diverged, seconds))


def regress(job: Job, progress: Progress) -> None:
    """A run of `swiglu_divergence`: a rare token in one step of forty, at random."""
    steps = job.steps(STEPS, quick=40)
    clip = (job.arm.options or {}).get("clip_norm")
    rate = learning_rate_of(job.arm)
    task = Regression(job.seed)
    learn(job, progress, task, steps=steps, every=10, learning_rate=rate, clip_norm=clip)


def regress_spaced(
    job: Job,
    progress: Progress,
    *,
    steps: int = 1200,
    task: Callable[..., RareTokens] = RareTokens,
) -> None:
    """A run with a chosen gap between rare tokens. The arm's options: `gap`, `punctual`, `steps`
    and those of `learn`."""
    options = dict(job.arm.options or {})
    punctual = options.get("punctual", False)
    # In a hurry one rare token at least where its step is known.
    steps = job.steps(options.pop("steps", steps), quick=45 if punctual else 4)
    on = task(job.seed, options.get("gap", 40), punctual=punctual)
    learn(job, progress, on, steps=steps, every=100, **options)


def table_of_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `result.results` of runs by `regress_spaced` a row an arm: how many diverged, and the
    medians of the others' ends."""
    names = {
        "final_common_loss": "common loss",
        "final_rare_error": "rare error in force",
        "final_exact_error": "rare error, no cast",
        "final_product": "largest product",
    }
    grouped = rows.groupby("arm", sort=False)
    table = grouped[list(names)].median().rename(columns=names).astype(float)
    ended = grouped["diverged_at"].apply(lambda of: f"{of.notna().sum()} of {len(of)}")
    table.insert(0, "diverged", ended)
    return table.reset_index()
