"""Where in a transformer do outliers grow, and which architecture keeps them small?

FOG (2505.20524) and OP (2405.19279) change the block so that activations keep no heavy tails, and
each measures that in its own way, which are not the same thing under one name:

    FOG   mean(x⁴) / mean(x²)² over all elements of a sample, mean of the samples: any large
          element counts; 3 for a Gaussian, at most as many as there are elements
    OP    mean(m_j²) / mean(m_j)² with m_j = mean(x_nj²) of channel j: only a channel that is large
          throughout counts; 1 if all are alike, at most the width

Both are measured every 50 steps on one batch of held-out text, where FOG's code measures: input and
output of attention, queries and keys as they meet, gate's or up's output, the product, the
feed-forward's output, the residual stream. Six architectures of equal size, BF16, three seeds.

The learning rate is high (0.01), so that something grows in 1,000 steps; it and the length were
chosen, and the first four architectures looked at, on seed 100 over 360 steps. OP's paper has no
gate, so OP stands here with GELU and with SwiGLU; FOG with xIELU and with SwiGLU, which its paper
reports as stable too. The lab's OP leaves out the scaling of the feed-forward's inputs.

All of e01, e02, e05, e07 and e10 were run once with --steps 12 on their seeds before the full
run, to see that `conclude` decides; nothing was changed after it.

It cannot say what 450 billion tokens do to any of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Part
from fp8lab.lab.language import BF16, Setup, train_bytes
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.result import Clause, Picture, Result, Table, judged, runs_of, spread
from fp8lab.lab.train import NextByte
from fp8lab.mitigations.block_changes import FOG, OutlierProtected, PlainFeedForward
from fp8lab.report import drawing

SEEDS = (0, 1, 2)
LAST = 5  # records that the final number is a mean of
DEFINITIONS = ("FOG", "OP")
SITES = (
    "attention input",
    "query",
    "key",
    "attention output",
    "up",
    "product",
    "feed-forward output",
    "residual",
)


def fog_kurtosis(x: Tensor) -> float:
    """x [samples, length, width]: mean(x^4) / mean(x^2)^2 of each sample, uncentred, mean."""
    squares = x.double().square().flatten(1)
    return float((squares.square().mean(1) / squares.mean(1).square()).mean())


def op_kurtosis(x: Tensor) -> float:
    """x [samples, length, width]: mean_j(m_j^2) / mean_j(m_j)^2 of m_j, the mean of x_nj^2."""
    power = x.double().square().flatten(0, 1).mean(0)
    return float(power.square().mean() / power.mean().square())


def kurtoses(model: LanguageModel, task: NextByte, step: int) -> dict[str, float]:
    """Both, of every site, the largest over layers: `<definition> <site>`."""
    found: dict[str, list[float]] = {f"{d} {site}": [] for d in DEFINITIONS for site in SITES}

    def note(site: str, x: Tensor) -> None:
        x = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x  # heads side by side
        found[f"FOG {site}"].append(fog_kurtosis(x))
        found[f"OP {site}"].append(op_kurtosis(x))

    def before(module: nn.Module, site: str, which: int = 0) -> None:
        hook = module.register_forward_pre_hook(lambda _, given: note(site, given[which]))
        handles.append(hook)

    def after(module: nn.Module, site: str) -> None:
        handles.append(module.register_forward_hook(lambda _, given, result: note(site, result)))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for block in model.layers:
        before(block.attention.query, "attention input")
        before(block.attention.mixing, "query", 0)
        before(block.attention.mixing, "key", 1)
        after(block.attention.output, "attention output")
        after(block.mlp.up, "up")
        before(block.mlp.down, "product")
        after(block.mlp.down, "feed-forward output")
        after(block, "residual")
    model(task.held_out(0)[:, :-1])
    for handle in handles:
        handle.remove()
    return {name: max(values) for name, values in found.items()}


SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=1000,
    quick=6,
    every=50,
    learning_rate=0.01,
    looks=kurtoses,
)


def arm(name: str, title: str, *changes: object) -> Arm:
    return Arm(name=name, title=title, plan=BF16, mitigations=changes, predicted="survives")


GELU = PlainFeedForward(activation="gelu")
ARMS = (
    arm("llama", "Llama-like, SwiGLU"),
    arm("gelu", "Llama-like, GELU", GELU),
    arm("op-gelu", "OP, GELU", GELU, OutlierProtected()),
    arm("op-swiglu", "OP, SwiGLU", OutlierProtected()),
    arm("fog-xielu", "FOG, xIELU", FOG()),
    arm("fog-swiglu", "FOG, SwiGLU", FOG(activation="swiglu")),
)


def final(out: Path) -> pd.DataFrame:
    """A row an arm and seed: the mean of each kurtosis over the last records, and the loss."""
    columns = [f"{definition} {site}" for definition in DEFINITIONS for site in SITES]
    rows = []
    for (name, seed), run in runs_of(out, "training").items():
        steps = run.steps().reindex(columns=columns).dropna(how="all")
        ended = run.info["result"]["final_loss"]
        means = steps.tail(LAST).mean() if ended is not None else steps.mean() * np.nan
        rows.append({"arm": name, "seed": seed, "loss": ended} | means.to_dict())
    return pd.DataFrame(rows)


def _compare(rows: pd.DataFrame, column: str, small: str, large: str, factor: float) -> Clause:
    """Whether `small` times `factor` is at most `large`, in every seed."""
    table = rows.pivot(index="seed", columns="arm", values=column)
    ratio = table[large] / table[small]
    known = len(ratio) >= len(SEEDS) and np.isfinite(ratio).all()
    by = f" {factor:g} times" if factor != 1 else ""
    said = f"{column}: {large} is at least{by} {small}, in every seed"
    held = bool((ratio >= factor).all()) if known else None
    return Clause(said, spread(list(ratio)) + " times", held)


def orders_differ(rows: pd.DataFrame) -> tuple[float, str, str]:
    """At the residual stream: on how many pairs of arms the definitions disagree, and which arm
    each calls worst."""
    means = rows.groupby("arm").mean(numeric_only=True)
    fog, op = means["FOG residual"].to_numpy(), means["OP residual"].to_numpy()
    upper = np.triu_indices(len(means), 1)
    signs = [np.sign(np.subtract.outer(of, of))[upper] for of in (fog, op)]
    share = float((signs[0] != signs[1]).mean()) if np.isfinite([fog, op]).all() else np.nan
    worst = [str(means[f"{name} residual"].fillna(0.0).idxmax()) for name in DEFINITIONS]
    return share, worst[0], worst[1]


def conclude(out: Path) -> Result:
    rows = final(out)
    clauses = [
        _compare(rows, "FOG residual", "fog-xielu", "llama", 1.25),
        _compare(rows, "FOG residual", "fog-xielu", "op-gelu", 1.25),
        _compare(rows, "FOG residual", "llama", "op-swiglu", 1.5),
        _compare(rows, "FOG product", "gelu", "llama", 1.5),
        _compare(rows, "FOG product", "gelu", "fog-xielu", 1.5),
        _compare(rows, "FOG product", "fog-swiglu", "op-swiglu", 1.0),
    ]
    verdict, table = judged(clauses)
    means = rows.groupby("arm").mean(numeric_only=True).reindex([a.name for a in ARMS])
    share, fog_worst, op_worst = orders_differ(rows)
    sentence = (
        "Kurtosis (FOG's) of the residual stream: "
        + ", ".join(f"{a.title} {means.loc[a.name, 'FOG residual']:.3g}" for a in ARMS)
        + f"; the two definitions disagree on {share:.0%} of the pairs of architectures there."
    )
    against = ""
    if clauses[2][2]:
        against = "2405.19279 finds fewer outlier features with OP; here, with a gate, it has more."
    titles = {a.name: a.title for a in ARMS}
    tables = []
    for definition in DEFINITIONS:
        shown = means[[f"{definition} {site}" for site in SITES]].T.rename(columns=titles)
        shown.insert(0, "site", list(SITES))
        tables.append(Table(title=f"Kurtosis at the end, {definition}'s definition", rows=shown))
    losses = means[["loss"]].reset_index().rename(columns={"loss": "held-out loss, nats per byte"})
    return Result(
        verdict=verdict,
        sentence=sentence,
        against=against,
        parts=(
            table,
            *tables,
            f"By FOG's definition {titles.get(fog_worst)} has the heaviest residual stream, by "
            f"OP's {titles.get(op_worst)}.",
            Table(title="What the architectures reach", rows=losses),
            Picture(
                name="training",
                title="Kurtosis along training, by site and architecture",
                draw=partial(draw, out),
                note="Largest of the layers, mean of the seeds, log axis.",
            ),
        ),
    )


def draw(out: Path) -> Figure:
    shown = ("product", "feed-forward output", "residual", "query")
    with drawing.style():
        figure = drawing.new_figure(6.4, 7.4)
        cells = figure.subplots(len(shown), len(DEFINITIONS), sharex=True)
        looks = {a.name: look for a, look in zip(ARMS, drawing.ARM_STYLES, strict=False)}
        columns = [f"{definition} {site}" for site in shown for definition in DEFINITIONS]
        frames = {
            key: run.steps().reindex(columns=["step", *columns]).dropna()
            for key, run in runs_of(out, "training").items()
        }
        for name, (colour, dash, _mark) in looks.items():
            seeds = [frame for (arm, _), frame in frames.items() if arm == name]
            mean = pd.concat(seeds).groupby("step").mean()
            for cell, column in zip(cells.flat, columns, strict=True):
                drawing.line(cell, mean.index, mean[column], color=colour, linestyle=dash)
        for cell, column in zip(cells.flat, columns, strict=True):
            definition, site = column.split(" ", 1)
            cell.set_title(f"{site}, {definition}'s definition")
            drawing.log_axis(cell.yaxis, pd.concat([frame[column] for frame in frames.values()]))
        for cell in cells[-1]:
            cell.set_xlabel("step")
        keys = {a.title: (*looks[a.name][:2], "") for a in ARMS}
        figure.legend(drawing.handles(keys), list(keys), loc="outside upper left", ncols=3)
        return figure


EXPERIMENT = Experiment(
    name="e05_kurtosis",
    question="Where in a transformer do outliers grow, and which architecture keeps them small?",
    prediction=(
        "By FOG's definition, at the end, in every seed: FOG with xIELU has the lightest residual "
        "stream, at least 1.25 times below the Llama-like model with SwiGLU and below OP with "
        "GELU; OP with SwiGLU is worse than Llama-like there, by at least 1.5. The product is "
        "another matter: SwiGLU's and FOG's xIELU have at least 1.5 times the kurtosis of GELU, "
        "and FOG with SwiGLU is not above OP with SwiGLU."
    ),
    refuted_if="any clause fails in some seed",
    limits=(
        "0.13 million parameters and a million bytes: massive activations, attention sinks and "
        "what FOG prevents over 450 billion tokens need more of both.",
        "No architecture was tuned for itself; each has Llama's learning rate and decay. OP's "
        "factor of the residual branches is ours.",
        "A kurtosis is no loss: whether a heavier product costs anything in FP8 is e04's question.",
        "OP's definition is as remembered from the paper, FOG's from its code.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="training",
            title="A byte-level language model by architecture",
            seeds=SEEDS,
            run=partial(train_bytes, setup=SETUP),
            arms=ARMS,
        ),
    ),
)
