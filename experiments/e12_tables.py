"""Do two tables that a design rests on come out again?

Both were measured once, by throw-away code in numpy, and are quoted since: `bulk`, what one hot
channel costs all the others under seven ways to scale the product; and `growth`, what a channel
that has grown k-fold in gate and in up costs where the scale is a step old, or just in time and of
the wrong tensor. Here fp8lab's own layers, casts and mitigations compute them, from tensors: one
SwiGLU layer, random weights and tokens, one channel (gate and up not aligned) made hot by a factor.

Part `bulk`: up's row of the hot channel is multiplied until amax / median of |product| is what the
table says; the bulk error is |cast - exact| / |exact| over all other channels.

Part `growth`: FP8 for down's input (E4M3, delayed, history 16) and weight (E4M3, just in time), all
else FP32. A forward calibrates the scale; then both rows grow by k, and the error is that of the
output of the same tokens. What was delayed has not moved; what is just in time has.

The throw-away code is lost, and with it sizes and draws. A search on seeds 0 and 100, which are not
among the seeds (64 and 128 by 1024 and 2048, 128 to 2048 tokens, aligned or not, float or power-of-
two scales) settled this: one float scale for the tensor loses 3.0 % and 15.9 % where the table has
3.7 % and 21.7 %; rounded down to a power of two it loses 3.7 % and 21.1 %. With the reference
code's scale per token it is the other way round: 20 % with powers of two, 8.1 to 8.7 % with float
scales where the table has 8.7 %. And a delayed Smooth-SwiGLU of powers of two protects by what its
rounding leaves (k = 1.25: 4 % instead of 11 %); that it equals none, as the table says, is true of
float scales. So the table's scale per tensor was a power of two and its smoothed scales were not,
and the arms are so; `tensor-float` says what TE's own scale does. Where a cell depends on how hot
tokens are spread, the printed digit cannot be expected.

No training, nothing diverges: what stands for the loss is the error. Seconds of CPU time.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from fp8lab import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    GatedFeedForward,
    HighPrecision,
    Plan,
    RowwiseScaling,
    watch,
)
from fp8lab.formats import FP32
from fp8lab.lab.arm import Arm, Mitigation
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.result import Picture, Result, Table, judged, runs_of
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations.smooth_swiglu import SmoothSwiGLU
from fp8lab.recipe import Recipe
from fp8lab.report import drawing

SEEDS = (1, 2, 3, 4, 5)
DIM, HIDDEN, TOKENS = 64, 1024, 1024
HOT = 7
RATIOS = (5.7e4, 5.5e5, 8.5e7)
GROWTHS = (1.25, 1.5, 2.0, 3.0, 4.0)
HISTORY = 16
GAIN = 10.0  # of the hot channel's rows in part `growth`, when the scale is made

# As printed, in per cent: what is to be found again.
PRINTED_BULK = {
    "tensor": (3.7, 21.7, 100.0),
    "token": (2.7, 8.7, 95.0),
    "row": (2.7, 4.1, 48.0),
    "block": (2.7, 2.9, 17.0),
    "linear": (2.7, 2.7, 3.8),
    "product": (2.7, 2.7, 2.7),
}
PRINTED_GROWTH = {
    "raw": (14.0, 24.0, 43.0, 66.0, 78.0),
    "smooth-delayed": (14.0, 24.0, 43.0, 66.0, 78.0),
    "linear": (3.4, 3.8, 21.0, 24.0, 43.0),
    "token": (3.3, 3.6, 3.4, 17.0, 30.0),
    "product": (3.4, 3.6, 3.6, 3.6, 3.8),  # "3.4 to 3.8 at every k"
}


def layer_and_tokens(seed: int) -> tuple[GatedFeedForward, Tensor]:
    """A layer whose products are silu(N(0, 1)) · N(0, 1), and tokens float32 [TOKENS, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    layer = GatedFeedForward(DIM, HIDDEN)
    with torch.no_grad():
        for one in (layer.gate, layer.up, layer.down):
            one.weight.normal_(std=1 / math.sqrt(one.in_features), generator=generator)
    return layer, torch.randn(TOKENS, DIM, generator=generator)


def exact_product(layer: GatedFeedForward, tokens: Tensor) -> Tensor:
    """float64 [TOKENS, HIDDEN], of the weights as they are."""
    gate, up = (
        functional.linear(tokens.double(), one.weight.double()) for one in (layer.gate, layer.up)
    )
    return functional.silu(gate) * up


@torch.no_grad()
def bulk(job: Job, progress: Progress) -> None:
    """A run of the part `bulk`: a step is a ratio, `loss` the bulk error."""
    layer, tokens = layer_and_tokens(job.seed)
    job.arm.prepare(layer)
    down = layer.down
    assert isinstance(down, Fp8Linear)
    cold = layer.up.weight[HOT].clone()
    others = torch.arange(HIDDEN) != HOT
    error = 0.0
    with watch(layer, job.path, config=job.config(tokens=TOKENS)) as watching:
        for step, ratio in enumerate(RATIOS):
            layer.up.weight[HOT] = cold
            product = exact_product(layer, tokens).abs()
            hotter = ratio * product[:, others].median() / product[:, HOT].amax()
            layer.up.weight[HOT] = cold * hotter
            layer(tokens)  # a scale by the linear branch is made of what up gives
            product = layer.product(tokens)
            how = down.cast_in_force("input", product)
            values = how.fake_quantized()
            if how.channel_scale is not None:
                values = values / how.channel_scale
            of = product[:, others]
            error = float((values[:, others] - of).norm() / of.norm())
            watching.step(step, loss=error, ratio=ratio)
            progress(step + 1, len(RATIOS), error, watching.alarms)
        watching.set_result(diverged_at=None, final_loss=error)


@torch.no_grad()
def growth(job: Job, progress: Progress) -> None:
    """A run of the part `growth`: a step is a growth, `loss` the output's error."""
    layer, tokens = layer_and_tokens(job.seed)
    layer.gate.weight[HOT] *= GAIN
    layer.up.weight[HOT] *= GAIN
    job.arm.prepare(layer)
    rows = layer.gate.weight[HOT].clone(), layer.up.weight[HOT].clone()
    with torch.enable_grad():
        for _ in range(HISTORY + 2):  # Smooth's own scale first, then the history without it
            layer(tokens)
    calibrated = {name: value.clone() for name, value in layer.state_dict().items()}
    error = 0.0
    with watch(layer, job.path, config=job.config(tokens=TOKENS)) as watching:
        for step, factor in enumerate(GROWTHS):
            layer.load_state_dict(calibrated)
            layer.gate.weight[HOT] = rows[0] * factor
            layer.up.weight[HOT] = rows[1] * factor
            output = layer(tokens).double()  # without gradients: no step, no scale moves
            exact = exact_product(layer, tokens) @ layer.down.weight.double().t()
            error = float((output - exact).norm() / exact.norm())
            watching.step(step, loss=error, growth=factor)
            progress(step + 1, len(GROWTHS), error, watching.alarms)
        watching.set_result(diverged_at=None, final_loss=error)


def arm(name: str, title: str, plan: Plan, *mitigations: Mitigation) -> Arm:
    return Arm(name=name, title=title, plan=plan, mitigations=mitigations, predicted="survives")


def product_as(recipe: Recipe, **overrides: Recipe) -> Plan:
    """FP32, but for the product, and for down's weight if given."""
    further = {f"down:{operand}": given for operand, given in overrides.items()}
    return Plan(recipe=HighPrecision(format=FP32), overrides={"down:input": recipe, **further})


POWER_OF_TWO = product_as(Float8CurrentScaling(use_power_2_scales=True))
FLOAT = product_as(Float8CurrentScaling())
LATE = SmoothSwiGLU(timing="delayed", power_of_two=False)
BY_UP = SmoothSwiGLU(branch="linear", power_of_two=False)
DELAYED = product_as(DelayedScaling(amax_history_len=HISTORY), weight=Float8CurrentScaling())
JUST_IN_TIME = product_as(Float8CurrentScaling(), weight=Float8CurrentScaling())

BULK_ARMS = (
    arm("tensor", "per tensor", POWER_OF_TWO),
    arm("tensor-float", "per tensor, float scale", FLOAT),
    arm("token", "Smooth, reference code", FLOAT, SmoothSwiGLU.reference_code()),
    arm("row", "row-wise", product_as(RowwiseScaling())),
    arm("block", "blocks of 1 × 128", product_as(Float8BlockScaling())),
    arm("linear", "Smooth, channels by up", FLOAT, BY_UP),
    arm("product", "Smooth, channels by product", FLOAT, SmoothSwiGLU(power_of_two=False)),
)
GROWTH_ARMS = (
    arm("raw", "delayed", DELAYED),
    arm("smooth-delayed", "Smooth, delayed too", DELAYED, LATE),
    arm(
        "smooth-delayed-binary",
        "Smooth, delayed too, powers of two",
        DELAYED,
        SmoothSwiGLU(timing="delayed"),
    ),
    arm("linear", "Smooth just in time, by up", DELAYED, SmoothSwiGLU(branch="linear")),
    arm("token", "Smooth, reference code", DELAYED, SmoothSwiGLU.reference_code()),
    arm("product", "Smooth just in time, by product", DELAYED, SmoothSwiGLU()),
    arm("current", "no Smooth, all just in time", JUST_IN_TIME),
)


# --- what came of it ----------------------------------------------------------------------------


def cells(
    out: Path, part: str, arms: tuple[Arm, ...], columns: tuple[float, ...]
) -> dict[str, pd.DataFrame]:
    """By arm: a row per seed, a column per ratio or growth, errors in per cent."""
    found: dict[str, dict[int, list[float]]] = {one.name: {} for one in arms}
    for (name, seed), run in runs_of(out, part).items():
        found[name][seed] = (100 * run.steps(["loss"])["loss"]).tolist()
    return {
        name: pd.DataFrame.from_dict(of, orient="index", columns=list(columns))
        for name, of in found.items()
    }


def table(
    found: dict[str, pd.DataFrame], arms: tuple[Arm, ...], printed: dict[str, tuple[float, ...]]
) -> pd.DataFrame:
    """A row per arm and column: printed, found (mean, least, most), to the digit or how far off."""
    rows = []
    for one in arms:
        for index, column in enumerate(found[one.name]):
            of = found[one.name][column]
            was = printed.get(one.name, (None,) * len(found[one.name].columns))[index]
            digits = 1 if was is not None and was % 1 else 0
            same = None if was is None else round(of.mean(), digits) == was
            within = None if was is None else bool(of.min() <= was <= of.max())
            rows.append(
                {
                    "scaling": one.title,
                    "at": f"{column:g}",
                    "printed %": was,
                    "found %": of.mean(),
                    "seeds %": f"{of.min():.3g} to {of.max():.3g}",
                    "to the digit": None if same is None else "yes" if same else "no",
                    "among the seeds": None if within is None else "yes" if within else "no",
                }
            )
    return pd.DataFrame(rows)


def off_print(mean: dict[str, pd.Series]) -> list[float]:
    """By ratio: how far off what was printed the farthest cell of part `bulk` is, relative."""
    return [
        max(abs(mean[name].iloc[i] / was[i] - 1) for name, was in PRINTED_BULK.items())
        for i in range(len(RATIOS))
    ]


NOTE = (
    "Means of the seeds; 'to the digit': rounded as printed, the mean is the same. What was "
    "printed is one draw of unknown sizes: where it is among the seeds here, draw and size "
    "explain the difference; elsewhere its scales or sizes were others."
)


def conclude(out: Path) -> Result:
    bulks = cells(out, "bulk", BULK_ARMS, RATIOS)
    grown = cells(out, "growth", GROWTH_ARMS, GROWTHS)
    bulk_table = table(bulks, BULK_ARMS, PRINTED_BULK)
    growth_table = table(grown, GROWTH_ARMS, PRINTED_GROWTH)
    mean = {name: of.mean() for name, of in bulks.items()}
    by_k = {name: of.mean() for name, of in grown.items()}
    off_by = off_print(mean)
    far = max(off_by)
    order = ("tensor", "token", "row", "block", "linear")
    delayed = max(float((grown["smooth-delayed"] - grown["raw"]).abs().max(axis=None)), 0.0)
    off = max(abs(by_k["raw"].iloc[i] - was) for i, was in enumerate(PRINTED_GROWTH["raw"]))
    between = by_k["linear"].iloc[2:]
    clauses = [
        ("bulk: cells within 25 % of what was printed, at the largest ratio within 50 %",
         ", ".join(f"{100 * one:.0f} %" for one in off_by),
         max(off_by[:2]) <= 0.25 and off_by[2] <= 0.5),
        ("bulk: per tensor 3.7, 21.7, 100 to 0.7 points",
         ", ".join(f"{v:.2f}" for v in mean["tensor"]),
         max(abs(v - w) for v, w in zip(mean["tensor"], PRINTED_BULK["tensor"], strict=True)) < .7),
        ("bulk: tensor > token > row > block > Smooth by up, at the two larger ratios",
         " / ".join(", ".join(f"{mean[n].iloc[i]:.2f}" for n in order) for i in (1, 2)),
         all(mean[a].iloc[i] > mean[b].iloc[i]
             for a, b in pairwise(order) for i in (1, 2))),
        ("bulk: Smooth by product 2.4 to 2.8 % at every ratio, every seed",
         f"{bulks['product'].min(axis=None):.2f} to {bulks['product'].max(axis=None):.2f}",
         bool(bulks["product"].min(axis=None) > 2.4 and bulks["product"].max(axis=None) < 2.8)),
        ("growth: delayed Smooth is no better than none, to 3 points", f"{delayed:.2f}",
         delayed <= 3),
        ("growth: rounded to powers of two it has headroom left, of a factor 2 at most: above 40 % "
         "at k = 4", f"{by_k['smooth-delayed-binary'].iloc[-1]:.1f}",
         bool(by_k["smooth-delayed-binary"].iloc[-1] > 40)),
        ("growth: raw within 10 points of what was printed", f"{off:.1f}", off <= 10),
        ("growth: by product at most 4.2 % at every k, every seed",
         f"{grown['product'].max(axis=None):.2f}", bool(grown["product"].max(axis=None) <= 4.2)),
        ("growth: from k = 2 on by up less than raw and more than 1.5 times by product",
         ", ".join(f"{v:.1f}" for v in by_k["linear"]),
         bool((between < by_k["raw"].iloc[2:]).all()
              and (between > 1.5 * by_k["product"].iloc[2:]).all())),
        ("growth: the reference code's is above 10 % at k = 4 and below raw",
         f"{by_k['token'].iloc[-1]:.1f}", bool(10 < by_k["token"].iloc[-1] < by_k["raw"].iloc[-1])),
    ]  # fmt: skip
    killed = not (clauses[2][2] and clauses[4][2] and clauses[7][2])
    verdict, checked = judged(clauses, killed=killed)
    both = pd.concat([bulk_table, growth_table])["to the digit"]
    same, of = int((both == "yes").sum()), int(both.notna().sum())
    return Result(
        verdict=verdict,
        sentence=(
            f"{same} of {of} printed cells come out to the digit, the bulk errors within "
            f"{100 * far:.0f} %, delayed errors within {off:.0f} points; a delayed Smooth-SwiGLU "
            f"differs from none by {delayed:.1f} points at most."
        ),
        parts=(
            checked,
            Table(title="Bulk error, by amax / median", rows=bulk_table, note=NOTE),
            Table(title="Output error, by growth of both rows", rows=growth_table, note=NOTE),
            Picture(name="growth", title="Output error by growth", draw=partial(drawn, grown)),
        ),
    )


@drawing.style(cycle=True)
def drawn(grown: dict[str, pd.DataFrame]) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for one in GROWTH_ARMS:
        of, color = grown[one.name], axes._get_lines.get_next_color()
        style = ":" if one.name.startswith("smooth-delayed") else "-"
        axes.plot(of.columns, of.mean(), style, color=color, label=one.title, linewidth=2)
        if one.name in PRINTED_GROWTH:
            axes.plot(of.columns, PRINTED_GROWTH[one.name], "x", color=color)
    axes.set(xlabel="growth k of gate's and up's row", ylabel="error of the output, %")
    axes.set_title("Lines: here; crosses: as printed", fontsize=10)
    axes.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="e12_tables",
    question="Do the table of just-in-time scales and the table of bulk errors come out again?",
    prediction=(
        "Bulk errors: cells within 25 % of what was printed, at the largest ratio within 50 %, per "
        "tensor within 0.7 points, the order tensor > token > row > block > Smooth by up at the "
        "two larger ratios, and Smooth by product at the format's floor (2.4 to 2.8 %) at every "
        "ratio. Growth: a delayed Smooth-SwiGLU protects no more than none, to 3 points; of powers "
        "of two it has headroom, a factor 2 at most, and loses more than 40 % at k = 4; without "
        "protection within 10 points of what was printed; by product at most 4.2 % at every k; "
        "from k = 2 on by up less than raw and more than 1.5 times by product; the reference "
        "code's scale above 10 % at k = 4 and below raw."
    ),
    refuted_if=(
        "a delayed Smooth-SwiGLU protects by more than 3 points, Smooth by product loses more "
        "than 4.2 % at any growth, or the order of the bulk errors is another"
    ),
    limits=(
        "Random weights and Gaussian tokens, one hot channel: nothing about how often that is.",
        "The code that made the printed tables is lost; sizes and draws here are guesses.",
        "Emulated casts; the GEMMs sum in FP32.",
    ),
    parts=(
        Part(
            name="bulk",
            title="What one hot channel costs the others",
            seeds=SEEDS,
            run=bulk,
            arms=BULK_ARMS,
        ),
        Part(
            name="growth",
            title="A channel that has grown since the scale was made",
            seeds=SEEDS,
            run=growth,
            arms=GROWTH_ARMS,
        ),
    ),
    conclude=conclude,
)
