"""An experiment of a second: two parts, one of which prepares something, two arms and two seeds.

The environment says what befalls a run: TINY_EXPERIMENT is JSON that maps a run, such as
"second/bf16/seed-0", to "raises", "exits", "terminated" or "killed", or before it watches "raises
early" or "killed early", or how it watches, "elsewhere" or "unnamed"; and "pause" to the seconds
that every step takes. Weights and batches come from torch's global generator: what a run draws is
then its seed's only if nothing else has been drawn before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn

from fp8lab import Float8CurrentScaling, GatedFeedForward, HighPrecision, Plan, watch
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress, Settings
from fp8lab.lab.result import Picture, Result, Table, runs_of
from fp8lab.lab.train import Schedule, load_checkpoint, save_checkpoint, train

STEPS = 4
BEFALLS = json.loads(os.environ.get("TINY_EXPERIMENT", "{}"))


class Reconstruction:
    """Learn the identity; something may befall the third step."""

    def __init__(self, label: str) -> None:
        self.fate = BEFALLS.get(label)
        if self.fate == "raises early":
            raise RuntimeError("it never began\nand said more")
        if self.fate == "killed early":
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        time.sleep(BEFALLS.get("pause", 0.0))
        if step == 2 and self.fate == "raises":
            raise RuntimeError("it raised\nand said more")
        if step == 2 and self.fate == "exits":
            sys.exit(3)
        if step == 2 and self.fate == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 2 and self.fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 8)
        return (model(x) - x).square().mean(), {}


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(GatedFeedForward(8, 16))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def prepare(seed: int, folder: Path, settings: Settings, progress: Progress) -> None:
    if BEFALLS.get(f"first/prepare/seed-{seed}") == "raises":
        raise ValueError("nothing prepared")
    model, optimizer = made()
    save_checkpoint(folder / f"start-{seed}.safetensors", model, optimizer, 0)
    progress(1, 1, 0.0, 0)


def regress(job: Job, progress: Progress) -> None:
    steps = job.steps(STEPS, quick=2)
    model, optimizer = made()
    start = job.path.parents[1] / f"start-{job.seed}.safetensors"
    if job.part == "first":
        load_checkpoint(start, model, optimizer)
    job.arm.prepare(model)
    optimizer.param_groups[0]["lr"] *= (job.arm.options or {}).get("hotter", 1.0)
    task = Reconstruction(f"{job.part}/{job.arm.name}/seed-{job.seed}")
    config = job.config(steps=steps, threads=torch.get_num_threads())
    config = {"steps": steps} if task.fate == "unnamed" else config
    path = job.path.parents[3] / "elsewhere" if task.fate == "elsewhere" else job.path
    with watch(
        model, path, optimizer=optimizer, every=2, config=config, flush_seconds=0.0
    ) as watching:
        losses: list[float] = []

        def told(step: int, loss: float) -> None:
            losses.append(loss)
            progress(step + 1, steps, loss, watching.alarms)

        schedule = Schedule(steps=steps, diverged_above=100.0)
        diverged = train(model, optimizer, task, schedule, watch=watching, progress=told)
        final = losses[-1] if diverged is None else None
        watching.set_result(diverged_at=diverged, final_loss=final)


def losses(out: Path) -> Figure:
    figure, axes = pyplot.subplots()
    for (arm, seed), run in runs_of(out, "second").items():
        steps = run.steps(["step", "loss"])
        axes.plot(steps["step"], steps["loss"], label=f"{arm}, {seed}")
    axes.legend()
    return figure


def conclude(out: Path) -> Result:
    runs = runs_of(out, "second")
    ends = [(arm, seed, run.info["result"]["diverged_at"]) for (arm, seed), run in runs.items()]
    table = pd.DataFrame(ends, columns=["arm", "seed", "diverged at"]).astype(object)
    table = table.where(table.notna(), None)
    lost = [end for arm, _, end in ends if arm == "hot" and end is not None]
    hot = sum(arm == "hot" for arm, _, _ in ends)
    return Result(
        verdict="confirmed" if len(lost) == hot else "refuted",
        sentence=f"{len(lost)} of {hot} hot runs diverged.",
        parts=(
            "A | here is text.",
            Table(title="Ends", rows=table, note="Of part `second`."),
            Picture(name="losses", title="Losses", draw=partial(losses, out)),
        ),
    )


BF16 = Arm(name="bf16", title="BF16", plan=Plan(recipe=HighPrecision()), predicted="survives")

EXPERIMENT = Experiment(
    name="tiny",
    question="Does a learning rate of a million diverge?",
    prediction="It does.",
    refuted_if="it does not",
    limits=("It is tiny.",),
    conclude=conclude,
    parts=(
        Part(
            name="first",
            title="From a common start",
            seeds=(0, 1),
            run=regress,
            prepare=prepare,
            arms=(
                BF16,
                Arm(name="current", title="FP8", plan=Plan(recipe=Float8CurrentScaling())),
            ),
        ),
        Part(
            name="second",
            title="From scratch",
            seeds=(0, 1),
            run=regress,
            arms=(
                BF16,
                Arm(
                    name="hot",
                    title="BF16, too hot",
                    plan=Plan(recipe=HighPrecision()),
                    predicted="diverges",
                    options={"hotter": 1e8},
                ),
            ),
        ),
    ),
)
