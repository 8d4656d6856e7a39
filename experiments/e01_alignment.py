"""Do gate and up of a channel align, and is it weight decay that aligns them?

Fishman et al. (2409.12517, figure 2 and theorem 1) see the two rows of an outlier channel become
parallel late in training, and prove that l2 regularisation makes them so at a stationary point
where the σ of Swish(x) = x·σ(x) no longer changes: gate = A up and up = A gate for one symmetric
matrix A. The proof needs the eigenspace of A² at 1 to have one dimension.

Part `neuron`: single neurons of 16 inputs learn a known function by full-batch gradient descent,
with l2 in the loss as in the theorem (and once AdamW's decoupled decay). The three channels of one
layer are three neurons with nothing in common: their targets are (x·u)², (x·u)(x·m) and (x·u)(x·v),
with u and v orthonormal and m half way between. "bilinear" is the theorem's limit, σ = 1. A is
computed where descent ended.

Part `language`: a byte-level model learns real text under AdamW, by weight decay from 0 to 1, and
once with decay 1 on everything but gate and up, which tells the theorem's own decay from what decay
does elsewhere. Two controls: a gate row with the up rows of 16 other channels, and the start.

Context 32 and 1,400 steps fit into a quarter of an hour; the learning rate of 0.01 is high, so that
alignment shows so soon. Looked at before: seed 100, the neurons for half as long and decay 0, 1 and
1 with gate and up spared for 600 steps.

All of e01, e02, e05, e07 and e10 were run once with --steps 12 on their seeds before the full
run, to see that `conclude` decides; nothing was changed after it.

It cannot decide whether decay aligns at 7 billion parameters and 200 billion tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fp8lab import GatedFeedForward, HighPrecision, Plan, watch
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import BF16, Setup, Trained, train_bytes
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.result import Clause, Picture, Result, Table, judged, runs_of, spread
from fp8lab.lab.train import NextByte
from fp8lab.mitigations.no_decay_on_gate_up import NoDecayOnGateUp
from fp8lab.report import drawing

SEEDS = (0, 1, 2)

# --- part one: single neurons ---------------------------------------------------------------------

INPUTS, SAMPLES, DESCENTS, BETWEEN = 16, 1024, 12_000, 200
TARGETS = ("(x·u)²", "(x·u)(x·m)", "(x·u)(x·v)")


def neurons(job: Job, progress: Progress) -> None:
    """A run of the part `neuron`; a step of it is BETWEEN steps of descent."""
    options = dict(job.arm.options or {})
    records = job.steps(DESCENTS // BETWEEN, quick=3)
    model = GatedFeedForward(INPUTS, len(TARGETS), options["variant"])
    with torch.no_grad():
        for rows in (model.gate.weight, model.up.weight):
            rows.normal_(std=INPUTS**-0.5)
        model.down.weight.copy_(torch.eye(INPUTS, len(TARGETS)))
    x = torch.randn(SAMPLES, INPUTS)
    u, v = torch.linalg.qr(torch.randn(INPUTS, 2))[0].T
    along = x @ torch.stack([u, (u + v) / 2**0.5, v]).T
    y = along[:, :1] * along
    weights, decay = [model.gate.weight, model.up.weight], options["weight_decay"]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, lr=0.05, weight_decay=decay)
    if options.get("optimizer") == "adamw":
        optimizer = torch.optim.AdamW(weights, lr=0.002, weight_decay=decay)
    with watch(model, job.path, optimizer=optimizer, every=1, config=job.config()) as watching:
        for record in range(records):
            for descent in range(BETWEEN):
                gate, up = model.activated(F.linear(x, weights[0]), F.linear(x, weights[1]))
                loss = 0.5 * (gate * up - y).square().mean(dim=0).sum()
                for rows in weights:
                    rows.grad = None
                loss.backward()
                if descent < BETWEEN - 1:
                    optimizer.step()
            model(x)  # which is what the rows are of
            optimizer.step()
            watching.step(record, loss=float(loss.detach()))
            progress(record + 1, records, float(loss.detach()), watching.alarms)
        found = [stationary(model, x, y, channel, decay) for channel in range(len(TARGETS))]
        watching.set_result(neurons=found, diverged_at=None, final_loss=float(loss.detach()))


@torch.no_grad()
def stationary(
    model: GatedFeedForward, x: Tensor, y: Tensor, channel: int, decay: float
) -> dict[str, float]:
    """Where descent of a channel ended: its cosine and norms and, where the theorem has an A, how
    far gate is from A up and how many eigenvalues of A² are 1 (to 0.05)."""
    gate, up, x = (t.double() for t in (model.gate.weight[channel], model.up.weight[channel], x))
    found = {"cosine": float(cosine_similarity(gate, up, dim=0))}
    found |= {"gate_norm": float(gate.norm()), "up_norm": float(up.norm())}
    if model.variant == "bilinear" and decay:
        error = (x @ gate) * (x @ up) - y[:, channel]
        matrix = -(x * error[:, None]).T @ x / len(x) / decay
        off = (gate - matrix @ up).norm() / gate.norm()
        squares = torch.linalg.eigvalsh(matrix).square()
        found |= {"off": float(off), "ones": int(((squares - 1).abs() < 0.05).sum())}
    return found


def neuron_arm(variant: str, decay: float, **options: str) -> Arm:
    name = "-".join([variant, *options.values(), f"{decay:g}"])
    title = f"{variant}, {options.get('optimizer', 'l2').replace('adamw', 'AdamW,')} {decay:g}"
    more = {"variant": variant, "weight_decay": decay} | options
    return Arm(name=name, title=title, plan=Plan(recipe=HighPrecision()), options=more)


NEURON_ARMS = (
    *(neuron_arm("bilinear", decay) for decay in (0.0, 0.01, 0.1)),
    neuron_arm("bilinear", 0.1, optimizer="adamw"),
    *(neuron_arm("swiglu", decay) for decay in (0.0, 0.01, 0.1)),
)

# --- part two: a language model -------------------------------------------------------------------

DECAYS = (0.0, 0.1, 0.5, 1.0)
SHIFTS, LAYERS = range(1, 17), range(2)


def rows_of(model: LanguageModel) -> list[tuple[Tensor, Tensor]]:
    """gate and up, each [hidden, dim], of every layer."""
    return [(layer.mlp.gate.weight, layer.mlp.up.weight) for layer in model.layers]


def alignment(model: LanguageModel, task: NextByte, step: int) -> dict[str, float]:
    """Of each layer the largest |cosine| of a channel, that of its permuted pairs (the mean over
    permutations, so that it is as large by chance), and the norms of the channel that has it."""
    found = {}
    for index, (gate, up) in enumerate(rows_of(model)):
        cosines = cosine_similarity(gate, up).abs()
        top = int(cosines.argmax())
        permuted = [cosine_similarity(gate, up.roll(k, 0)).abs().max() for k in SHIFTS]
        found |= {
            f"aligned_{index}": float(cosines[top]),
            f"permuted_{index}": float(torch.stack(permuted).mean()),
            f"gate_norm_{index}": float(gate[top].norm()),
            f"up_norm_{index}": float(up[top].norm()),
        }
    return found


@torch.no_grad()
def scatter(trained: Trained) -> dict[str, Any]:
    """The rows of the channel that is most aligned in the end, in the beginning and the end, with
    another channel's up row for a control; nothing of a run that diverged."""
    if trained.diverged_at is not None:
        return {}
    first = rows_of(LanguageModel(trained.model.config, trained.job.seed))
    last = rows_of(trained.model)
    cosines = torch.stack([cosine_similarity(gate, up).abs() for gate, up in last])
    layer, channel = divmod(int(cosines.argmax()), cosines.shape[1])
    pairs = {
        "start": (first[layer][0][channel], first[layer][1][channel]),
        "end": (last[layer][0][channel], last[layer][1][channel]),
        "permuted": (last[layer][0][channel], last[layer][1][channel - 1]),
    }
    shown = {name: [side.tolist() for side in pair] for name, pair in pairs.items()}
    return {"layer": layer, "channel": channel, "scatter": shown} | alignment(
        trained.model, trained.task, 0
    )


LANGUAGE = Setup(
    config=ModelConfig(dim=64, layers=len(LAYERS), heads=4, context=32),
    steps=1400,
    quick=12,
    learning_rate=0.01,
    looks=alignment,
    ends=scatter,
)
SPARED = "1-spared"


def decay_arm(name: str, title: str, decay: float, *spared: NoDecayOnGateUp) -> Arm:
    options = {"weight_decay": decay}
    return Arm(name=name, title=title, plan=BF16, mitigations=spared, options=options)


LANGUAGE_ARMS = (
    *(decay_arm(f"{decay:g}", f"weight decay {decay:g}", decay) for decay in DECAYS),
    decay_arm(SPARED, "decay 1, gate and up spared", 1.0, NoDecayOnGateUp()),
)

# --- conclusion -----------------------------------------------------------------------------------


def of_neurons(out: Path) -> pd.DataFrame:
    rows = [
        {"arm": arm, "seed": seed, "target": target} | found
        for (arm, seed), run in runs_of(out, "neuron").items()
        for target, found in zip(TARGETS, run.info["result"]["neurons"], strict=True)
    ]
    columns = ["arm", "seed", "target", "cosine", "gate_norm", "up_norm", "off", "ones"]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    return frame.assign(cosine=frame["cosine"].abs())


def of_language(out: Path) -> pd.DataFrame:
    """Of each run the largest over layers, in the end."""
    rows = []
    for (arm, seed), run in runs_of(out, "language").items():
        end = run.info["result"]
        row = {"arm": arm, "seed": seed, "loss": end.get("final_loss")}
        for name in ("aligned", "permuted"):
            row[name] = max((v for k, v in end.items() if k.startswith(f"{name}_")), default=np.nan)
        row["gate norm"] = end.get(f"gate_norm_{end.get('layer')}", np.nan)
        product = run.tensors(["cur_amax"], sites="*:product").tail(len(LAYERS))
        rows.append(row | {"product amax": float(product["cur_amax"].max())})
    return pd.DataFrame(rows)


def _every_seed(rows: pd.DataFrame, one: str, other: str, least: float) -> Clause:
    table = rows.pivot(columns="arm", values="aligned")
    gaps = table[one] - table[other]
    words = f"largest |cos| with decay {one} is at least {least:g} above {other}, in every seed"
    return Clause(words, spread(list(gaps)), _decided(gaps, gaps >= least))


def _decided(known: pd.Series, holds: pd.Series) -> bool | None:
    """None where there are too few seeds, which are the index, or a number is missing."""
    enough = known.index.nunique() >= len(SEEDS) and np.isfinite(known.astype(float)).all()
    return bool(holds.all()) if enough else None


def clauses_of(neurons: pd.DataFrame, language: pd.DataFrame) -> list[Clause]:
    neurons, language = neurons.set_index("seed"), language.set_index("seed")
    square, between, product = (neurons[neurons["target"] == target] for target in TARGETS)
    clauses: list[Clause] = []
    found = square["cosine"]
    said = "(x·u)² aligns without decay and with it: |cos| ≥ 0.95 in every run"
    clauses.append(Clause(said, spread(list(found)), _decided(found, found >= 0.95)))
    limit = product[product["arm"].str.startswith("bilinear")]
    found = limit["cosine"]
    said = "(x·u)(x·v), theorem's limit: |cos| ≤ 0.05 at every decay"
    clauses.append(Clause(said, spread(list(found)), _decided(found, found <= 0.05)))
    decayed = limit[limit["arm"].isin(["bilinear-0.01", "bilinear-0.1"])]
    found = decayed["ones"]
    said = "there gate = A up (to 1 %), and A² has two eigenvalues at 1, not one"
    held = (found == 2) & (decayed["off"] < 0.01)
    clauses.append(Clause(said, f"{sorted(set(found))} eigenvalues", _decided(found, held)))
    for variant in ("bilinear", "swiglu"):
        table = between.pivot(columns="arm", values="cosine")
        gaps = table[f"{variant}-0.1"] - table[f"{variant}-0"]
        said = f"(x·u)(x·m), {variant}: l2 of 0.1 raises |cos| by at least 0.05 in every seed"
        clauses.append(Clause(said, spread(list(gaps)), _decided(gaps, gaps >= 0.05)))
    free = language[language["arm"] == "0"]
    gaps = free["aligned"] - free["permuted"]
    said = "language, decay 0: largest |cos| at least 0.15 above its permuted pairs, in every seed"
    clauses.append(Clause(said, spread(list(gaps)), _decided(gaps, gaps >= 0.15)))
    ratio = language[language["arm"] == "1"]["product amax"] / free["product amax"]
    said = "decay 1: the product's amax is at most half of that at decay 0, in every seed"
    clauses.append(Clause(said, spread(list(ratio)) + " times", _decided(ratio, ratio <= 0.5)))
    clauses.append(_every_seed(language, "1", "0", 0.05))
    clauses.append(_every_seed(language, "1", SPARED, 0.05))
    return clauses


def conclude(out: Path) -> Result:
    neurons, language = of_neurons(out), of_language(out)
    clauses = clauses_of(neurons, language)
    verdict, table = judged(clauses)
    means = language.groupby("arm")["aligned"].mean()
    shown = ", ".join(f"{means[arm.name]:.2f} at {arm.title}" for arm in LANGUAGE_ARMS)
    amax = ", ".join(f"{value:.3g}" for value in language.groupby("arm")["product amax"].mean())
    sentence = f"The largest |cos(gate, up)| is {shown}; the product's amax {amax}, in this order."
    against = ""
    if clauses[1][2]:
        against = (
            "theorem 1 of 2409.12517 does not hold for the target (x·u)(x·v): gate and up stay "
            f"orthogonal at every decay (|cos| {clauses[1][1]}), for A² has two eigenvalues at 1."
        )
    ends = neurons.groupby(["target", "arm"], sort=False).mean(numeric_only=True).reset_index()
    ends = ends.drop(columns="seed").rename(columns={"ones": "eigenvalues of A² at 1"})
    return Result(
        verdict=verdict,
        sentence=sentence,
        against=against,
        parts=(
            table,
            Table(title="Single neurons, mean of the seeds", rows=ends),
            Table(
                title="The language model at its end",
                rows=language.sort_values(["arm", "seed"]),
                note="Largest of both layers; `permuted`: of 16 wrong pairings, their mean.",
            ),
            Picture(
                name="training",
                title="Alignment and norms along training",
                draw=partial(draw_training, out),
                note="Layer 1, every seed a line; thin and dotted below: permuted pairs.",
            ),
            Picture(
                name="scatter",
                title="Weights of the most aligned channel",
                draw=partial(draw_scatter, out),
                note="Figure 2 of 2409.12517 in miniature: a dot is an input of the channel.",
            ),
        ),
    )


def draw_training(out: Path) -> Figure:
    with drawing.style():
        figure = drawing.new_figure(5.6, 7.4)
        axes = figure.subplots(2, 1, sharex=True)
        looks = {
            arm.name: look for arm, look in zip(LANGUAGE_ARMS, drawing.ARM_STYLES, strict=False)
        }
        for (arm, _), run in runs_of(out, "language").items():
            rows = run.steps().reindex(columns=["step", "aligned_1", "permuted_1", "gate_norm_1"])
            rows = rows.dropna(subset="aligned_1")
            colour, dash, _mark = looks[arm]
            axes[0].plot(rows["step"], rows["aligned_1"], color=colour, linestyle=dash)
            axes[0].plot(rows["step"], rows["permuted_1"], color=colour, linestyle=":", lw=0.8)
            axes[1].plot(rows["step"], rows["gate_norm_1"], color=colour, linestyle=dash)
        axes[0].set(ylabel="largest |cos(gate, up)|", ylim=(0, 1))
        axes[1].set(ylabel="norm of that gate row", xlabel="step", ylim=(0, None))
        keys = {arm.title: (*looks[arm.name][:2], "") for arm in LANGUAGE_ARMS}
        figure.legend(drawing.handles(keys), list(keys), loc="outside upper left", ncols=3)
        return figure


def draw_scatter(out: Path) -> Figure:
    with drawing.style():
        figure = drawing.new_figure(5.4, 7.4)
        axes = figure.subplots(2, 3)
        runs = runs_of(out, "language")
        for row, arm in zip(axes, ("0", "1"), strict=True):
            end = next(run for key, run in runs.items() if key[0] == arm).info["result"]
            for cell, name in zip(row, ("start", "end", "permuted"), strict=True):
                gate, up = end.get("scatter", {}).get(name, ([], []))
                cell.plot(gate, up, "o", markersize=3, color=drawing.BLUE, alpha=0.7)
                cosine = float(cosine_similarity(torch.tensor(gate), torch.tensor(up), dim=0))
                cell.set_title(f"{name}: cos {cosine:.2f}")
                cell.set(xlabel="gate weight", ylabel=f"up weight, decay {arm}")
                drawing.say_if_empty(cell, gate)
        return figure


EXPERIMENT = Experiment(
    name="e01_alignment",
    question="Do gate and up of a channel align, and is it weight decay that aligns them?",
    prediction=(
        "Single neurons: (x·u)² aligns whatever the decay (|cos| ≥ 0.95); (x·u)(x·v) in the "
        "theorem's limit does not at any (|cos| ≤ 0.05), because A² has two eigenvalues at 1; "
        "(x·u)(x·m) aligns the more the more decay, by at least 0.05 from 0 to 0.1. Language "
        "model: with no decay at all the most aligned channel is at least 0.15 above its permuted "
        "pairs in every seed; decay 1 raises it by at least 0.05 in every seed, and sparing gate "
        "and up takes at least 0.05 of that away in every seed. What decay aligns it shrinks as "
        "well: the product's amax at decay 1 is at most half of that at 0, in every seed."
    ),
    refuted_if="any clause fails in some seed",
    limits=(
        "0.1 million parameters, 1,400 steps, a constant and high learning rate: how fast decay "
        "works is learning rate times decay times steps, here 14 at most.",
        "AdamW's decay is not the theorem's l2; part `neuron` has both, the language model one.",
        "Decay also makes weights smaller and so the learning rate larger in effect: of that the "
        "arm that spares gate and up takes only their share away.",
        "The largest of 352 channels is not the channel whose product is largest.",
        "The eigenvalues are of a sample of 1,024 inputs, which splits what is equal a little.",
    ),
    conclude=conclude,
    parts=(
        Part(name="neuron", title="Single neurons", seeds=SEEDS, run=neurons, arms=NEURON_ARMS),
        Part(
            name="language",
            title="A byte-level language model, by weight decay",
            seeds=SEEDS,
            run=partial(train_bytes, setup=LANGUAGE),
            arms=LANGUAGE_ARMS,
        ),
    ),
)
