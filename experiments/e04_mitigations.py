"""What does each mitigation do about one planted outlier, and what does it cost?

A byte-level language model is trained in FP32 on real text. Then one channel of one product is made
2^14 times larger, up's row by the factor and down's column by its inverse, so that the function is
what it was (`lab.model.amplify`), and two batches later another 4 times, as a channel grows whose
gate and up both double. Only the products are in FP8, for a tiny column of down would have an
error of its own; nothing is trained any more. Asked at the jump, and when histories have seen it:

- bulk error: how far down's output is off where the hot channel adds nothing to it (its column of
  down set to zero, in the layer and in its reference), relative to the output. The reference is the
  same layer in FP32, with the mitigation where that changes the function.
- hot error: the same of what the hot channel adds, all other channels of the product set to zero.
  Neither changes a scale: the hot channel makes the product's, the other columns make down's.
- saturated and flushed shares of the product, as recorded.
- the price: forward and backward of the feed-forward against the same without the mitigation, in
  turns, in one process; extra state; and how far the function of the model is another, in FP32.

The bulk error of a cast that turns or splits channels cannot be read off single channels; taken at
the output it is the same question for all.

The sizes were looked at on seed 100, after the prediction was written; it was left as it was, and
what was changed is that weights had been in FP8 too.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fp8lab import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Plan,
    RowwiseScaling,
    watch,
)
from fp8lab.formats import FP32
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import Setup, pretrain, pretrained
from fp8lab.lab.model import ModelConfig, amplify
from fp8lab.lab.result import Clause, Result, Table, judged, runs_of
from fp8lab.lab.train import NextByte
from fp8lab.mitigations import (
    AntiWindup,
    ClampedSwiGLU,
    HadamardProduct,
    HighPrecisionProduct,
    HotChannelPatch,
    PowLU,
    ReplacedActivation,
    SiTUGLU,
    SmoothSwiGLU,
    change_of_function,
)
from fp8lab.recipe import Recipe

SEEDS = (0, 1, 2)
SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=400,
    quick=8,
    learning_rate=3e-3,
    beta2=0.999,
)
LAYER, CHANNEL = 1, 7
DOSES = (2.0**14, 2.0**16)
STEPS, JUMP = 8, 4  # batches, and the one before which the channel grows
TURNS = 15  # of timing

DELAYED, CURRENT = DelayedScaling(amax_history_len=4), Float8CurrentScaling()


def arm(name: str, title: str, recipe: Recipe, *mitigations: Any) -> Arm:
    others = dict.fromkeys(("*:weight", "*:grad_output"), HighPrecision())
    plan = Plan(recipe=recipe, include=("*.mlp.down",), overrides=others)
    return Arm(name=name, title=title, plan=plan, mitigations=mitigations)


ARMS = (
    arm("fp32", "FP32", HighPrecision(format=FP32)),
    arm("delayed", "FP8 delayed", DELAYED),
    arm("current", "FP8 current", CURRENT),
    arm("product-bf16", "product in BF16", DELAYED, HighPrecisionProduct()),
    arm("smooth", "Smooth-SwiGLU", DELAYED, SmoothSwiGLU()),
    arm("smooth-up", "Smooth-SwiGLU, of up", DELAYED, SmoothSwiGLU(branch="linear")),
    arm("smooth-late", "Smooth-SwiGLU, delayed", DELAYED, SmoothSwiGLU(timing="delayed")),
    arm("per-token", "Smooth-SwiGLU, its code", CURRENT, SmoothSwiGLU.reference_code()),
    arm("fog-smooth", "Smooth-SwiGLU, FOG's", CURRENT, SmoothSwiGLU.fog_baseline()),
    arm("hadamard", "Hadamard, 16", CURRENT, HadamardProduct(block=16)),
    arm("patch", "hot channels patched, 8", CURRENT, HotChannelPatch(channels=8)),
    arm("anti-windup", "anti-wind-up", DELAYED, AntiWindup()),
    arm("clamp", "clamped at 10", CURRENT, ClampedSwiGLU.deepseek_v4()),
    arm("clamp-after", "clamped at 7 after SiLU", CURRENT, ClampedSwiGLU.step()),
    arm("situ", "SiTU-GLU", CURRENT, SiTUGLU()),
    arm("powlu", "PowLU", CURRENT, PowLU()),
    arm("reglu", "ReGLU", CURRENT, ReplacedActivation(activation="relu")),
    arm("rows", "a scale per row", RowwiseScaling()),
    arm("blocks", "blocks of 128", Float8BlockScaling()),
    arm("mx", "MXFP8", MXFP8BlockScaling()),
    arm("nvfp4", "NVFP4", NVFP4BlockScaling()),
)
PLAIN = {"delayed", "current", "rows", "blocks", "mx", "nvfp4", "fp32"}


def measure(job: Job, progress: Progress) -> None:
    """A run: eight batches, before the fifth of which the channel grows."""
    text = NextByte(job.settings.text, job.seed, batch=SETUP.batch, context=SETUP.config.context)
    model, exact = pretrained(job, SETUP), pretrained(job, SETUP)
    changes = [m for m in job.arm.mitigations if m.changes_function]
    change = change_of_function(model, changes[0], text.held_out(0)[:, :-1]) if changes else None
    job.arm.prepare(model)
    for mitigation in changes:
        mitigation.apply(exact)
    for one in (model, exact):
        amplify(one, LAYER, CHANNEL, DOSES[0])
    found: dict[str, float] = {}
    with watch(model, job.path, every=1, config=job.config(**text.origin())) as watching:
        for step in range(STEPS):
            if step == JUMP:
                for one in (model, exact):
                    amplify(one, LAYER, CHANNEL, DOSES[1] / DOSES[0])
            tokens = text.held_out(step)
            when = {JUMP: "jump", STEPS - 1: "settled"}.get(step)
            if when:
                found |= {f"{k}_{when}": v for k, v in errors(model, exact, tokens).items()}
            loss = model.loss(tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            watching.step(step, loss=float(loss.detach()))
            progress(step + 1, STEPS, float(loss.detach()), watching.alarms)
        watching.set_result(
            diverged_at=None,
            final_loss=float(loss.detach()),
            time_ratio=time_ratio(model, job),
            function_change=0.0 if change is None else change.difference,
            clamped=0.0 if change is None else change.clamped,
            **found,
        )


@torch.no_grad()
def errors(model: nn.Module, exact: nn.Module, tokens: Tensor) -> dict[str, float]:
    """Relative errors of down's output, for the hot channel alone and for all the others.

    Both layers get the same input: what the exact model has before the feed-forward.
    """
    inputs: list[Tensor] = []
    layer = exact.get_submodule(f"layers.{LAYER}.mlp")
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    exact(tokens[:, :-1])
    handle.remove()
    found = {}
    for name in ("bulk_error", "hot_error"):
        outputs = []
        for one in (model, exact):
            feed_forward = copy.deepcopy(one.get_submodule(f"layers.{LAYER}.mlp"))
            if name == "bulk_error":
                feed_forward.get_parameter("down.weight")[:, CHANNEL] = 0.0
            else:
                feed_forward.get_submodule("down").register_forward_pre_hook(_only_hot)
            outputs.append(feed_forward.eval()(inputs[0]).double())
        difference = outputs[0] - outputs[1]
        found[name] = float(difference.norm() / outputs[1].norm())
    return found


def _only_hot(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    hot = torch.arange(args[0].shape[-1]) == CHANNEL
    return args[0] * hot


def time_ratio(model: nn.Module, job: Job) -> float | None:
    """Forward and backward of the feed-forward over that without the mitigations, the median of
    turns; None where there are none."""
    if job.arm.name in PLAIN:
        return None
    bare = Arm(name="bare", title="", plan=job.arm.plan).prepare(pretrained(job, SETUP))
    with_it, without = (
        timed(copy.deepcopy(one.get_submodule(f"layers.{LAYER}.mlp"))) for one in (model, bare)
    )
    x = torch.randn(SETUP.batch, SETUP.config.context, SETUP.config.dim)
    ratios = []
    for _ in range(2 if job.settings.quick else TURNS):
        ratios.append(with_it(x) / without(x))
    return statistics.median(ratios)


def timed(module: nn.Module) -> Callable[[Tensor], float]:
    def run(x: Tensor) -> float:
        begin = time.perf_counter()
        for _ in range(4):
            module(x).sum().backward()
        return time.perf_counter() - begin

    return run


# --- what came of it ------------------------------------------------------------------------------

_RESULTS = ("bulk_error_jump", "hot_error_jump", "bulk_error_settled", "hot_error_settled")


def results(out: Path) -> pd.DataFrame:
    """A row an arm, medians over the seeds; saturated and flushed are the largest recorded."""
    rows: dict[str, list[dict[str, float | None]]] = {}
    for (name, _), run in runs_of(out, "dose").items():
        told = run.info["result"]
        row = {key: told[key] for key in (*_RESULTS, "time_ratio", "function_change", "clamped")}
        tensors = run.tensors(["saturated", "flushed"], sites=f"*{LAYER}.mlp:product")
        for what in ("saturated", "flushed"):
            seen = tensors[what].dropna()
            row[what] = float(seen.max()) if len(seen) else None
        rows.setdefault(name, []).append(row)
    return pd.DataFrame({n: pd.DataFrame(of).astype(float).median() for n, of in rows.items()}).T


def conclude(out: Path) -> Result:
    found = results(out)
    verdict, clauses = judged([*clauses_of(found)])
    best = found.drop(index="fp32")
    best = best[best["function_change"] == 0]
    bulk = best[["bulk_error_jump", "hot_error_jump"]].max(axis=1)
    titles = {arm.name: arm.title for arm in ARMS}
    least = bulk.sort_values().head(3)
    told = ", ".join(f"{titles[name]} {100 * error:.1f} %" for name, error in least.items())
    plain = 100 * bulk["delayed"]
    return Result(
        verdict=verdict,
        sentence=f"At the jump the worse of bulk and hot error is {plain:.0f} % in plain FP8 "
        f"delayed; the least, of those that leave the function alone: {told}.",
        parts=(clauses, table(found)),
    )


def clauses_of(found: pd.DataFrame) -> Iterator[Clause]:
    def below(arm: str, column: str, bound: float, says: str) -> Clause:
        value = float(found.loc[arm, column])
        return Clause(f"{arm}: {says}", f"{100 * value:.2f} %", value <= bound)

    yield Clause(
        "delayed: at the jump the hot channel is off by 60 to 90 %",
        f"{100 * found.loc['delayed', 'hot_error_jump']:.1f} %",
        bool(0.6 <= found.loc["delayed", "hot_error_jump"] <= 0.9),
    )
    for name in ("current", "delayed"):
        value = float(found.loc[name, "bulk_error_settled"])
        says = f"{name}: settled, the bulk is off by more than 15 %"
        yield Clause(says, f"{100 * value:.1f} %", value > 0.15)
    for name in ("smooth", "product-bf16", "smooth-up"):
        for column in ("bulk_error_jump", "bulk_error_settled"):
            yield below(name, column, 0.05, f"{column.replace('_', ' ')} at most 5 %")
    yield below("smooth", "hot_error_jump", 0.05, "hot error at the jump at most 5 %")
    late = float(found.loc["smooth-late", "hot_error_jump"])
    yield Clause(
        "smooth-late: a delayed channel scale leaves the hot channel off by more than 40 %",
        f"{100 * late:.1f} %",
        late > 0.4,
    )
    same = float((found.loc["anti-windup"] - found.loc["delayed"])[list(_RESULTS)].abs().max())
    yield Clause("anti-windup: every error that of delayed", f"{same:.2g} apart", same == 0.0)
    order = [float(found.loc[name, "bulk_error_settled"]) for name in ("blocks", "current")]
    yield Clause(
        "blocks of 128 have less bulk error than one scale, but more than 5 %",
        f"{100 * order[0]:.1f} against {100 * order[1]:.1f} %",
        0.05 < order[0] < order[1],
    )


def table(found: pd.DataFrame) -> Table:
    titles = {arm.name: arm.title for arm in ARMS}
    percent = {
        "bulk, jump": "bulk_error_jump",
        "hot, jump": "hot_error_jump",
        "bulk, settled": "bulk_error_settled",
        "hot, settled": "hot_error_settled",
        "saturated": "saturated",
        "flushed": "flushed",
        "function changed by": "function_change",
    }
    rows = []
    for name in [arm.name for arm in ARMS if arm.name in found.index]:
        row = found.loc[name]
        cells = [
            f"{100 * row[key]:.3g} %" if row[key] == row[key] else None for key in percent.values()
        ]
        ratio = None if row["time_ratio"] != row["time_ratio"] else f"{row['time_ratio']:.2f}"
        rows.append((titles[name], *cells, ratio))
    columns = pd.Index(["arm", *percent, "time of the feed-forward"])
    note = (
        "Medians over seeds; saturated and flushed: the largest share of the product in a batch. "
        "The time is forward and backward of the feed-forward over the same without the "
        "mitigation, emulated on a CPU."
    )
    return Table(title="Arm by arm", rows=pd.DataFrame(rows, columns=columns), note=note)


EXPERIMENT = Experiment(
    name="e04_mitigations",
    question="What does each mitigation do about one planted outlier, and what does it cost?",
    prediction=(
        "With the channel at 2^14 and then 2^16 times its size: in FP8 delayed the hot channel "
        "is off by 60 to 90 % when it jumps, for the old scale holds a quarter of it; when the "
        "history has caught up, one scale for all, delayed or current, leaves the bulk off by "
        "more than 15 %. Smooth-SwiGLU per channel, of the product or of up, and the product in "
        "BF16 keep the bulk within 5 % always, and Smooth-SwiGLU of the product the hot channel "
        "too; with a delayed channel scale the hot channel is off by more than 40 % at the jump. "
        "Anti-wind-up changes no forward error at all. Blocks of 128 are better than one scale "
        "and still off by more than 5 %, since the hot channel's block pays."
    ),
    refuted_if="one of these figures, in the median of three seeds, is outside what is said of it",
    limits=(
        "The outlier is planted in an unamplified function: what a real one would carry is not "
        "asked, and the clamped or replaced functions are judged on weights that never learnt "
        "them. How far the function moves is what they cost at once, not after training.",
        "Times are those of the emulation on a CPU; on a GPU a maximum per channel costs another "
        "share. Order them, do not quote them.",
        "One channel of one layer, two sizes.",
        "The Hadamard transform fares badly because a small column of down balances the outlier, "
        "whose error is handed to channels with columns that are not small; and BF16 loses the "
        "small column once it is mixed with fifteen others (with weights in FP32 the hot error is "
        "2.9 %, seed 0; the bulk's stays). An outlier that down does not balance is another case.",
        "Down's column shrinks here as the product grows, and down is in BF16. Where a channel "
        "grows by itself, balancing channels moves its range into down's weight: with one FP8 "
        "scale for that, its other columns are flushed instead of the product's.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="dose",
            title="One channel grows, nothing else is in FP8",
            seeds=SEEDS,
            run=measure,
            prepare=partial(pretrain, setup=SETUP, plan=None),
            arms=ARMS,
        ),
    ),
)
