"""What do FP8 optimizer states change?

A byte-level language model on real text, its GEMMs in BF16, so that the optimizer's states are the
only thing in FP8. Every arm of a seed starts from the same weights and sees the same bytes.

Part `states`: beta2 = 0.95, what large language models are trained with, and Fishman et al.
(2409.12517) among them. Part `memory`: beta2 = 0.999, torch's default: the second moment then moves
by a thousandth a step, far less than the distance of two codes.

A look behind the first run (on the same seeds, 120 steps, m and v in E4M3 having diverged): only v
in E4M3, m in FP32, diverges in two of three; m and v in E4M3 with eps = 1e-6 instead of 1e-8 in
none. So it is what FP8-LM (2310.18313) saw, and the cause is the range: second moments that became
zero leave eps to divide by. What came of the prediction: reports/e09_adam_moments.md.

About nine minutes of CPU time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fp8lab.formats import FORMATS
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import BF16, Setup, Trained, train_bytes
from fp8lab.lab.model import ModelConfig
from fp8lab.lab.result import Clause, Result, Table, final_losses, judged, runs_of
from fp8lab.optim import Fp8AdamW

SEEDS = (0, 1, 2)
NEAR = 0.03  # nats per byte


def arm(name: str, title: str, first: str | None, second: str | None, **options: object) -> Arm:
    """An arm whose optimizer keeps its moments in formats of these names, None not quantised."""
    moments = {"first_moment": first, "second_moment": second}
    return Arm(name=name, title=title, plan=BF16, predicted="survives", options=moments | options)


FP32_ARM = arm("fp32", "AdamW, FP32 states", None, None)
FP8_ARM = arm("e4m3-e5m2", "m E4M3, v E5M2", "E4M3", "E5M2")
ONLY_FIRST_ARM = arm("e4m3-fp32", "m E4M3, v FP32", "E4M3", None)
COAT_ARM = arm(
    "coat", "m and v E4M3, groups of 128, expanded", "E4M3", "E4M3", group_size=128, expansion=True
)


def optimizer_of(model: nn.Module, setup: Setup, arm: Arm) -> Fp8AdamW:
    """With nothing reduced it is torch.optim.AdamW to the bit."""
    options = dict(arm.options or {})
    for name in ("first_moment", "second_moment", "master_weights"):
        options[name] = FORMATS.get(options.get(name) or "")
    return Fp8AdamW(
        model.parameters(),
        lr=setup.learning_rate,
        betas=(0.9, setup.beta2),
        weight_decay=setup.weight_decay,
        **options,
    )


def states(trained: Trained) -> dict[str, Any]:
    """What the optimizer's states have become."""
    optimizer = trained.optimizer
    assert isinstance(optimizer, Fp8AdamW)
    second = [optimizer.moments(p)[1].flatten() for p in trained.model.parameters()]
    return {
        "second_moment_zero": float((torch.cat(second) == 0).float().mean()),
        "bytes_per_parameter": optimizer.bytes_per_parameter(),
    }


SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=400,
    quick=10,
    learning_rate=3e-3,
    diverged_above=8.0,
    every=20,
    at_least=None,
    held_out_quick=16,
    told=("learning_rate", "beta2"),
    optimizer=optimizer_of,
    ends=states,
)


def learn(job: Job, progress: Progress, *, beta2: float) -> None:
    """One run."""
    setup, options = replace(SETUP, beta2=beta2), dict(job.arm.options or {})
    train_bytes(job, progress, setup=setup, optimizer=options)


# --- what came of it ------------------------------------------------------------------------------


def conclude(out: Path) -> Result:
    lost = divergences(out)
    clauses = [
        Clause("nothing diverges", "; ".join(lost) or "nothing did", not lost),
        *(
            _within(out, "states", name)
            for name in ("e4m3-e5m2", "e4m3-fp32", "e5m2-e5m2", "groups", "coat", "fp16-master")
        ),
        _above(out, "states", "e4m3-e4m3"),
        _above(out, "memory", "e4m3-e5m2"),
        _within(out, "memory", "e4m3-fp32"),
    ]
    verdict, table = judged(clauses)
    farthest = max(float(gaps(out, part).abs().max().max()) for part in ("states", "memory"))
    return Result(
        verdict=verdict,
        sentence=f"Divergence: {'; '.join(lost) or 'none'}. What did not diverge ends within "
        f"{farthest:.3f} nats per byte of FP32 states.",
        parts=(table, *(_ends(out, part) for part in ("states", "memory"))),
    )


def divergences(out: Path) -> list[str]:
    """Every arm that diverged in some seed, and at which steps."""
    found: dict[str, list[int]] = {}
    for part in ("states", "memory"):
        for (name, _), run in runs_of(out, part).items():
            diverged = run.info["result"]["diverged_at"]
            if diverged is not None:
                found.setdefault(f"{name} of part {part}", []).append(diverged)
    return [f"{name} at steps {', '.join(map(str, steps))}" for name, steps in found.items()]


def gaps(out: Path, part: str) -> pd.DataFrame:
    """Final held-out losses less those of FP32 states of the same seed."""
    finals = final_losses(out, part)
    return finals.drop(columns="fp32").sub(finals["fp32"], axis=0)


def _within(out: Path, part: str, name: str) -> Clause:
    gap = gaps(out, part)[name]
    told = f"{gap.min():+.4f} to {gap.max():+.4f}" if gap.notna().all() else "diverged"
    holds = bool(gap.notna().all() and gap.abs().max() <= NEAR)
    return Clause(f"{part}: {name} ends within {NEAR} of FP32 states", told, holds)


def _above(out: Path, part: str, name: str) -> Clause:
    gap = gaps(out, part)[name]
    told = f"{gap.min():+.4f} to {gap.max():+.4f}" if gap.notna().all() else "diverged"
    holds = bool((gap > NEAR).all())
    return Clause(f"{part}: {name} ends more than {NEAR} above FP32 states", told, holds)


def _ends(out: Path, part: str) -> Table:
    rows = []
    finals = final_losses(out, part)
    for name in finals.columns:
        results = [
            run.info["result"] for (arm, _), run in runs_of(out, part).items() if arm == name
        ]
        zero = max(result["second_moment_zero"] for result in results)
        size = results[0]["bytes_per_parameter"]["total"]
        rows.append((name, *finals[name], f"{100 * zero:.2g} %", size))
    columns = ["arm", *(f"seed {seed}" for seed in finals.index)]
    columns += ["second moments that are zero", "bytes a parameter"]
    table = pd.DataFrame(rows, columns=pd.Index(columns)).astype(object)
    note = "Held-out loss in nats per byte; a dash: diverged. Zeros: the largest of the seeds."
    return Table(title=f"Part {part}", rows=table, note=note)


EXPERIMENT = Experiment(
    name="e09_adam_moments",
    question="What do FP8 optimizer states change?",
    prediction=(
        "Nothing diverges. With beta2 = 0.95 the held-out loss stays within 0.03 nats per byte of "
        "FP32 states in every seed for m E4M3 with v E5M2 or FP32, for m and v E5M2, for both E4M3 "
        "in groups of 128, expanded or not, and with FP16 master weights; with m and v E4M3 per "
        "tensor it ends more than 0.03 worse in every seed, because small second moments become "
        "zero. With beta2 = 0.999 the second moment hardly moves from code to code: m E4M3, v E5M2 "
        "ends more than 0.03 worse than FP32 states in every seed, and m E4M3 with v FP32 within "
        "0.03."
    ),
    refuted_if=(
        "any run diverges; m and v E4M3 per tensor at beta2 = 0.95, or m E4M3, v E5M2 at beta2 = "
        "0.999, ends no more than 0.03 nats per byte above FP32 states in some seed; or another "
        "arm differs from FP32 states by more than 0.03 in some seed (COAT at beta2 = 0.999 is "
        "left open)"
    ),
    limits=(
        "0.13 million parameters and 400 steps: what accumulates over many thousand steps is not "
        "seen. FP8-LM (2310.18313) reports divergence with FP8 second moments at 125 million.",
        "A constant learning rate, no warm-up: late training, where updates become smaller than "
        "half a unit of an FP16 master weight, is not reached.",
        "Scales are those of a tensor of this model, of at most 16 thousand elements; the range "
        "within a tensor grows with its size.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="states",
            title="beta2 = 0.95",
            seeds=SEEDS,
            run=partial(learn, beta2=0.95),
            arms=(
                FP32_ARM,
                FP8_ARM,
                arm("e4m3-e4m3", "m and v E4M3", "E4M3", "E4M3"),
                arm("e5m2-e5m2", "m and v E5M2", "E5M2", "E5M2"),
                ONLY_FIRST_ARM,
                arm("groups", "m and v E4M3, groups of 128", "E4M3", "E4M3", group_size=128),
                COAT_ARM,
                arm(
                    "fp16-master",
                    "m E4M3, v E5M2, FP16 master weights",
                    "E4M3",
                    "E5M2",
                    master_weights="FP16",
                ),
            ),
        ),
        Part(
            name="memory",
            title="beta2 = 0.999",
            seeds=SEEDS,
            run=partial(learn, beta2=0.999),
            arms=(FP32_ARM, FP8_ARM, ONLY_FIRST_ARM, COAT_ARM),
        ),
    ),
)
