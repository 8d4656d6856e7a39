"""What does stochastic rounding of gradients change?

Rounded to nearest, a gradient is wrong the same way every time it comes up; rounded stochastically
it is wrong more, but right on average, if nothing is clipped. NVFP4 (2509.25149) rounds gradients
so, and so did Fishman et al. (2409.12517) with E5M2.

Part `training`: a byte-level language model on real text. Every arm of a seed starts from the same
weights and sees the same bytes.

Part `gradient`: the same model, trained for a while in BF16, and one batch. Its backward pass is
drawn again and again, and the mean of the weights' gradients so far is compared with what the same
recipe gives when gradients are not rounded. No training: what stands for the loss is the relative
error of that mean, and a step is a number of draws. What inputs and weights lose is on both sides
and cancels.

A look behind the first run: with NVFP4's block scales rounded up instead of to nearest the slope of
the mean is 1.000 and the mean of 64 draws an eighth as wrong as one. It is the clipped block
maxima, then, that make stochastic rounding biased there. The first run had 400 steps and was
shortened to last three minutes. What came of the prediction: reports/e16_stochastic_rounding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fp8lab import (
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Plan,
    convert,
    watch,
)
from fp8lab.formats import FP32
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import Setup, pretrain, pretrained, train_bytes
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.result import Clause, Result, Table, final_losses, judged, runs_of
from fp8lab.lab.train import NextByte
from fp8lab.recipe import Recipe

SEEDS = (0, 1, 2)
SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=250,
    quick=4,
    learning_rate=3e-3,
    batch=8,
    diverged_above=8.0,
    every=20,
    at_least=None,
    held_out=32,
    held_out_quick=32,
    told=("learning_rate",),
)
PRETRAINING = replace(SETUP, steps=200)
DRAWS = 128

RECIPES: dict[str, tuple[str, Recipe]] = {
    "bf16": ("BF16", HighPrecision()),
    "current-nearest": ("FP8 current, gradients E5M2, nearest", Float8CurrentScaling()),
    "current-stochastic": (
        "FP8 current, gradients E5M2, stochastic",
        Float8CurrentScaling(stochastic_rounding=True),
    ),
    "nvfp4-stochastic": ("NVFP4, stochastic (TE's default)", NVFP4BlockScaling()),
    "nvfp4-nearest": ("NVFP4, nearest", NVFP4BlockScaling(disable_stochastic_rounding=True)),
    "mxfp8": ("MXFP8, nearest", MXFP8BlockScaling()),
}
TRAINED = tuple(
    Arm(name=name, title=title, plan=Plan(recipe=recipe, exclude=("head",)), predicted="survives")
    for name, (title, recipe) in RECIPES.items()
)
DRAWN = tuple(
    Arm(name=arm.name, title=arm.title, plan=arm.plan) for arm in TRAINED if arm.name != "bf16"
)


# --- one batch, its gradient drawn many times -------------------------------------------


def draw_gradients(job: Job, progress: Progress) -> None:
    """A run of the part `gradient`.

    Recorded whenever the number of draws is a power of two: `loss`, |mean - exact| / |exact| over
    the weights of all converted layers, and `slope`, the mean's share along the exact gradient.
    """
    plan = job.arm.plan
    unrounded = Plan(
        recipe=plan.recipe,
        exclude=plan.exclude,
        overrides={"*:grad_output": HighPrecision(format=FP32)},
    )
    task = NextByte(job.settings.text, job.seed, batch=SETUP.batch, context=SETUP.config.context)
    tokens = task.held_out(0)
    exact = gradient_of(as_planned(job, unrounded), tokens)()
    model = as_planned(job, plan)
    draw, total = gradient_of(model, tokens), torch.zeros_like(exact)
    most = 4 if job.settings.quick else DRAWS
    config = job.config(draws=most, **task.origin())
    errors, slope = [], 0.0
    with watch(model, job.path, every=most, config=config) as watching:
        for draws in range(1, most + 1):
            total += draw()
            if draws & (draws - 1):
                continue
            mean = total / draws
            errors.append(float((mean - exact).norm() / exact.norm()))
            slope = float(mean @ exact / (exact @ exact))
            watching.step(draws, loss=errors[-1], slope=slope)
            progress(draws, most, errors[-1], watching.alarms)
        watching.set_result(
            diverged_at=None, final_loss=errors[-1], one_draw=errors[0], slope=slope
        )


def as_planned(job: Job, plan: Plan) -> LanguageModel:
    """A fresh copy of the pretrained model, converted."""
    model = pretrained(job, SETUP)
    convert(model, plan)
    return model


def gradient_of(model: LanguageModel, tokens: Tensor) -> Callable[[], Tensor]:
    """What computes the gradient of the hidden layers' weights on a batch: float64, flat."""

    def draw() -> Tensor:
        model.zero_grad(set_to_none=True)
        model.loss(tokens).backward()  # type: ignore[no-untyped-call]
        pieces = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "head":
                assert module.weight.grad is not None
                pieces.append(module.weight.grad.double().flatten())
        return torch.cat(pieces)

    return draw


# --- what came of it ------------------------------------------------------------------------------


def conclude(out: Path) -> Result:
    clauses = [*_of_training(out), *_of_gradient(out)]
    verdict, table = judged(clauses)
    drawn = gradients(out)
    slope = {arm: drawn.loc[arm, "slope"] for arm in ("current-stochastic", "nvfp4-stochastic")}
    told = " and ".join(
        f"{one.min():.3f} to {one.max():.3f} in {arm.partition('-')[0]}"
        for arm, one in slope.items()
    )
    return Result(
        verdict=verdict,
        sentence=f"The mean of {DRAWS} stochastic gradients has {told} of the exact one's length.",
        parts=(table, _table_of_training(out), _table_of_gradient(out)),
    )


def gradients(out: Path) -> pd.DataFrame:
    """A row an arm and seed: one draw's error, the mean's, and its slope."""
    found = {}
    for key, run in runs_of(out, "gradient").items():
        result = run.info["result"]
        found[key] = (result["one_draw"], result["final_loss"], result["slope"])
    index = pd.MultiIndex.from_tuples(found, names=["arm", "seed"])
    return pd.DataFrame(list(found.values()), index, pd.Index(["one draw", "mean", "slope"]))


def _spread(values: pd.Series) -> str:
    return f"{values.min():+.4f} to {values.max():+.4f}"


def _of_training(out: Path) -> Iterator[Clause]:
    finals = final_losses(out, "training")
    lost = finals.columns[finals.isna().any()].tolist()
    yield Clause("nothing diverges", ", ".join(lost) or "nothing did", not lost)
    for recipe in ("current", "nvfp4"):
        gap = finals[f"{recipe}-stochastic"] - finals[f"{recipe}-nearest"]
        says = f"{recipe}: stochastic and nearest within 0.03"
        yield Clause(says, _spread(gap), bool((gap.abs() <= 0.03).all()))
    for arm in ("current-nearest", "current-stochastic", "mxfp8"):
        gap = finals[arm] - finals["bf16"]
        yield Clause(f"{arm} within 0.03 of BF16", _spread(gap), bool((gap.abs() <= 0.03).all()))
    for arm in ("nvfp4-stochastic", "nvfp4-nearest"):
        gap = finals[arm] - finals["bf16"]
        yield Clause(f"{arm} above BF16", _spread(gap), bool((gap > 0).all()))


def _of_gradient(out: Path) -> Iterator[Clause]:
    drawn = gradients(out)
    for recipe in ("current", "nvfp4"):
        stochastic = drawn.loc[f"{recipe}-stochastic"]
        nearest = drawn.loc[f"{recipe}-nearest", "one draw"]
        ratio = stochastic["one draw"] / nearest
        says = f"{recipe}: one draw 1.1 to 2 times as wrong as nearest"
        yield Clause(says, _spread(ratio), bool(ratio.between(1.1, 2).all()))
        ratio = stochastic["mean"] / nearest
        says = f"{recipe}: the mean of {DRAWS} draws nearer than nearest"
        yield Clause(says, f"{_spread(ratio)} of it", bool((ratio < 1).all()))
        ratio = stochastic["mean"] / stochastic["one draw"]
        fits = ratio.between(0.07, 0.11) if recipe == "current" else ratio > 0.11
        bound = "0.07 to 0.11" if recipe == "current" else "above 0.11"
        yield Clause(f"{recipe}: the mean over one draw: {bound}", _spread(ratio), bool(fits.all()))


def _table_of_training(out: Path) -> Table:
    rows = final_losses(out, "training").T.reset_index().astype(object)
    return Table(title="Held-out loss after training", rows=rows, note="Nats per byte.")


def _table_of_gradient(out: Path) -> Table:
    rows = gradients(out).reset_index()
    note = "Errors relative to the exact gradient's norm; slope: the mean's share along it."
    return Table(title="One batch's gradient", rows=rows, note=note)


EXPERIMENT = Experiment(
    name="e16_stochastic_rounding",
    question="What does stochastic rounding of gradients change?",
    prediction=(
        "Of one gradient, its error; of a training this short, nothing that shows. Training: "
        "nothing diverges; in every seed the held-out losses of stochastic and nearest rounding "
        "are within 0.03 nats per byte of each other, in FP8 and in NVFP4; FP8 and MXFP8 end "
        "within 0.03 of BF16, NVFP4 above BF16. Gradient: a single draw is further off than "
        "nearest rounding, by a factor of 1.1 to 2 in E5M2 and in NVFP4. The mean of 128 draws is "
        "nearer than nearest rounding. In E5M2, where nothing is clipped, the error falls as the "
        "root of the number of draws, to between 0.07 and 0.11 of one draw's; in NVFP4 it stays "
        "above 0.11 of it, because block scales, rounded to E4M3, clip the largest of a block."
    ),
    refuted_if=(
        "a run diverges; stochastic and nearest rounding of one recipe differ by more than 0.03 "
        "nats per byte in some seed; FP8 or MXFP8 differs from BF16 by more than 0.03 in some "
        "seed; NVFP4 ends below BF16 in some seed; or in some seed of part `gradient` one "
        "stochastic draw's error is not 1.1 to 2 times that of nearest rounding, the mean's after "
        "128 draws is not below that of nearest rounding, its ratio to one draw's is outside 0.07 "
        "to 0.11 in E5M2, or at most 0.11 in NVFP4"
    ),
    limits=(
        "0.1 million parameters, 250 steps, 512 bytes a batch: the noise of the batch is far "
        "larger than that of the rounding. Stochastic rounding is said to matter late in long "
        "trainings (2509.25149), when gradients are small against what rounding does to them.",
        "Unbiased on one batch is not better on average over batches: nearest rounding errs "
        "differently on each, and what of that cancels is not measured here.",
        "The emulation draws 53 random bits for every element; hardware has fewer.",
        "All hidden layers are in NVFP4; 2509.25149 keeps some of them in BF16.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="training",
            title="Trained with gradients rounded either way",
            seeds=SEEDS,
            run=partial(train_bytes, setup=SETUP),
            arms=TRAINED,
        ),
        Part(
            name="gradient",
            title="No training: relative error of one batch's mean gradient, by number of draws",
            seeds=SEEDS,
            run=draw_gradients,
            prepare=partial(pretrain, setup=PRETRAINING),
            arms=DRAWN,
        ),
    ),
)
