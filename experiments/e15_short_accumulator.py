"""What does Hopper's short accumulator change?

Its FP8 tensor cores keep about 14 bits of a running sum; DeepSeek-V3 (2412.19437, section 3.3.2)
promotes it to FP32 after every 128 products, Transformer Engine does so with
`use_split_accumulator` and leaves it out in the forward pass of current and delayed scaling.

Part `error`: one GEMM of random operands, 256 × K by K × 256. No training: what stands for the loss
is the relative error, and a step is K. What the operands lost when they were cast is on both sides.

Part `training`: a byte-level language model on real text. Its sums are of 128 elements (attention,
gate and up), 344 (down) and 1024 (gradients of weights). Every arm of a seed starts from the same
weights and sees the same bytes.

What to expect of a sum of K random terms that is cut off N = K / 32 times, to b bits: a cut takes
0.36 · 2^(1-b) of the sum so far, always towards zero, and the sums so far of a random walk add up
to N / √3 of its end. So e = 0.21 · N · 2^(1-b), or 0.33 % at 14 bits and K = 4096.

A look behind the first run, on the same seeds: 5 bits, never promoted, end 0.004 to 0.032 nats per
byte above FP32 accumulation, 4 bits 0.023 to 0.038, 3 bits 0.065 to 0.107, 2 bits 0.15 to 0.21.
Sums as short as this model's forgive nearly everything. Where the terms of a sum do not cancel,
what casting does averages out and what cutting does adds up: of positive operands, from K = 2048
on, the accumulator and not FP8 makes the error. What came of the prediction: the page in reports/.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from fp8lab import Accumulation, Float8CurrentScaling, GatedFeedForward, Plan, watch
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import BF16, Setup, train_bytes
from fp8lab.lab.model import ModelConfig
from fp8lab.lab.result import Clause, Result, Table, final_losses, judged, runs_of
from fp8lab.linear import Fp8Linear

SEEDS = (0, 1, 2)
FP32_ACCUMULATION = None
PROMOTED = Accumulation(bits=14, promote_every=128)
TE_DEFAULT = Accumulation(bits=14, promote_every=None, gemms=("output",))


def never(bits: int) -> Accumulation:
    """Never promoted, in all three GEMMs."""
    return Accumulation(bits=bits, promote_every=None)


# --- part one: a GEMM by itself -------------------------------------------------------------------

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROWS = 256


def measure_error(job: Job, progress: Progress) -> None:
    """A run of the part `error`.

    `loss` is |C - exact| / |exact|, `largest` the largest error of an element over the root mean
    square of `exact`, and over its own exact value if all operands are `positive`; `cast_error` is
    what casting the operands did, relative like `loss`.
    """
    positive = bool((job.arm.options or {}).get("positive"))
    # The gates of these are what is measured: the monitor wants something gated.
    layers = nn.ModuleDict({str(k): GatedFeedForward(k, ROWS) for k in LENGTHS})
    job.arm.prepare(layers)
    results = []
    config = job.config(rows=ROWS, operands="uniform in [0, 1)" if positive else "normal")
    with watch(layers, job.path, config=config) as watching, torch.no_grad():
        for index, k in enumerate(LENGTHS):
            draw = torch.rand if positive else torch.randn
            layer, operand = layers[str(k)], draw(ROWS, k)
            assert isinstance(layer, GatedFeedForward) and isinstance(layer.gate, Fp8Linear)
            gate = layer.gate
            gate.weight.copy_(draw(ROWS, k))
            left = gate.cast_in_force("input", operand).fake_quantized().double()
            right = gate.cast_in_force("weight", gate.weight).fake_quantized().double()
            exact = left @ right.t()
            uncast = operand.double() @ gate.weight.double().t()
            error = gate(operand).double() - exact
            size = exact if positive else exact.square().mean().sqrt()
            found = {
                "loss": float(error.norm() / exact.norm()),
                "largest": float((error / size).abs().max()),
                "cast_error": float((exact - uncast).norm() / uncast.norm()),
            }
            watching.step(k, **found)
            results.append({"k": k, **found})
            progress(index + 1, len(LENGTHS), found["loss"], watching.alarms)
        watching.set_result(lengths=results, diverged_at=None, final_loss=results[-1]["loss"])


# --- part two: training ---------------------------------------------------------------------------

SETUP = Setup(
    config=ModelConfig(dim=128, layers=1, heads=4, context=64),
    steps=300,
    quick=4,
    learning_rate=3e-3,
    diverged_above=8.0,
    every=20,
    at_least=None,
    held_out_quick=16,
    told=("learning_rate",),
)


def trained(name: str, title: str, accumulation: Accumulation | None) -> Arm:
    """An arm of the part `training`."""
    plan = Plan(recipe=Float8CurrentScaling(), exclude=("head",), accumulation=accumulation)
    return Arm(name=name, title=title, plan=plan, predicted="survives")


def measured(
    name: str, title: str, accumulation: Accumulation | None, positive: bool = False
) -> Arm:
    """An arm of the part `error`."""
    plan = Plan(recipe=Float8CurrentScaling(), accumulation=accumulation)
    return Arm(name=name, title=title, plan=plan, options={"positive": positive})


# --- what came of it ------------------------------------------------------------------------------


def conclude(out: Path) -> Result:
    clauses = [*_of_error(out), *_of_training(out)]
    verdict, table = judged(clauses)
    at = errors(out)
    never, promoted = at["never-14"].xs(4096, level="k"), at["promoted-14"].xs(4096, level="k")
    gap = gaps(out)["never-6"]
    return Result(
        verdict=verdict,
        sentence=f"At K = 4096, 14 bits lose {_percent(never)}, promoted every 128 "
        f"{_percent(promoted)}; 6 bits, never promoted, end {gap.min():+.3f} to {gap.max():+.3f} "
        f"nats per byte from FP32 accumulation.",
        parts=(table, _table_of_errors(out), _table_of_training(out)),
    )


def errors(out: Path, what: str = "loss") -> pd.DataFrame:
    """A row a seed and K, a column an arm."""
    found = {}
    for (arm, seed), run in runs_of(out, "error").items():
        for one in run.info["result"]["lengths"]:
            found[arm, (seed, one["k"])] = one[what]
    frame = pd.Series(found).unstack(0)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["seed", "k"])
    return frame


def gaps(out: Path) -> pd.DataFrame:
    """Final held-out losses less those with FP32 accumulation of the same seed."""
    finals = final_losses(out, "training")
    return finals.drop(columns=["fp32", "bf16"]).sub(finals["fp32"], axis=0)


def _percent(values: pd.Series) -> str:
    return f"{100 * values.min():.2g} to {100 * values.max():.2g} %"


def _between(says: str, values: pd.Series, low: float, high: float, percent: bool = True) -> Clause:
    found = _percent(values) if percent else f"{values.min():.2f} to {values.max():.2f}"
    return Clause(says, found, bool(values.between(low, high).all()))


def _of_error(out: Path) -> Iterator[Clause]:
    error, largest, cast = errors(out), errors(out, "largest"), errors(out, "cast_error")
    at, worst = error.xs(4096, level="k"), largest.xs(4096, level="k")
    growth = error["never-14"].xs(8192, level="k") / error["never-14"].xs(1024, level="k")
    promoted = error["promoted-14"]
    yield _between("14 bits, never promoted, K = 4096: 0.2 to 0.5 %", at["never-14"], 2e-3, 5e-3)
    yield _between("their worst element: 1 to 3 % of the rms", worst["never-14"], 0.01, 0.03)
    yield _between("K = 8192 over K = 1024: 6 to 10", growth, 6, 10, False)
    yield _between("14 bits, promoted, every K: 0.008 to 0.02 %", promoted, 8e-5, 2e-4)
    for kind in ("never", "promoted"):
        for bits in (14, 12):
            ratio = at[f"{kind}-{bits - 2}"] / at[f"{kind}-{bits}"]
            says = f"{bits - 2} bits over {bits}, {kind}: 3 to 5"
            yield _between(says, ratio, 3, 5, False)
    says = "positive operands, worst element: 0.2 to 0.5 %"
    yield _between(says, worst["positive-14"], 2e-3, 5e-3)
    normal = [arm for arm in error.columns if arm not in ("positive-14", "fp32")]
    above = (error[normal] > cast[normal]).stack()
    lost = sorted({(arm, k) for (_, k, arm), more in above.items() if more})
    expected = [("never-10", k) for k in LENGTHS if k >= 4096]
    told = ", ".join(f"{arm} at {k}" for arm, k in lost) or "never"
    says = "more than casting only for 10 bits, never promoted, from K = 4096 on"
    yield Clause(says, told, lost == expected)


def _of_training(out: Path) -> Iterator[Clause]:
    finals, gap = final_losses(out, "training"), gaps(out)
    lost = finals.columns[finals.isna().any()].tolist()
    yield Clause("nothing diverges", ", ".join(lost) or "nothing did", not lost)
    for arm in ("promoted-14", "te-default", "never-14", "never-10"):
        says = f"{arm} within 0.03 of FP32 accumulation"
        found = f"{gap[arm].min():+.4f} to {gap[arm].max():+.4f}"
        yield Clause(says, found, bool((gap[arm].abs() <= 0.03).all()))
    found = f"{gap['never-6'].min():+.4f} to {gap['never-6'].max():+.4f}"
    yield Clause("never-6 more than 0.01 above", found, bool((gap["never-6"] > 0.01).all()))


def _table_of_errors(out: Path) -> Table:
    error = 100 * errors(out).groupby(level="k").mean().T
    cast = 100 * errors(out, "cast_error").groupby(level="k").mean().T
    error.loc["casting normal operands"] = cast.loc["never-14"]
    error.loc["casting positive operands"] = cast.loc["positive-14"]
    error.columns = [f"K = {k}" for k in error.columns]
    rows = error.rename_axis("operands and accumulator").reset_index()
    return Table(title="Relative error of one GEMM, %", rows=rows, note="Means over the seeds.")


def _table_of_training(out: Path) -> Table:
    rows = final_losses(out, "training").T.reset_index().astype(object)
    return Table(title="Held-out loss after training", rows=rows, note="Nats per byte.")


EXPERIMENT = Experiment(
    name="e15_short_accumulator",
    question="What does Hopper's short accumulator change?",
    prediction=(
        "Error: of normal operands 14 bits, never promoted, lose 0.2 to 0.5 % at K = 4096, the "
        "worst of 65 thousand elements 1 to 3 % of the root mean square (DeepSeek-V3 says nearly "
        "2 %), and six to ten times as much at K = 8192 as at K = 1024. Promoted every 128 they "
        "lose 0.008 to 0.02 % at every K. Two bits fewer lose 3 to 5 times as much, promoted or "
        "not, at K = 4096. Of positive operands the worst element loses 0.2 to 0.5 % at K = 4096, "
        "and not 2 %. Normal operands lose less than casting them did, but for 10 bits never "
        "promoted from K = 4096 on. Training: nothing diverges; 14 bits, promoted, never promoted "
        "in the forward pass, or never at all, and 10 bits never promoted end within 0.03 nats "
        "per byte of FP32 accumulation in every seed; 6 bits never promoted end more than 0.01 "
        "above it in every seed."
    ),
    refuted_if=(
        "in some seed a figure of part `error` is outside what was predicted, or a run diverges; "
        "an arm of 14 or 10 bits ends more than 0.03 nats per byte from FP32 accumulation; or 6 "
        "bits end no more than 0.01 above it"
    ),
    limits=(
        "The sums of this model are short, at most 1024 elements, where those of large models "
        "have 4 to 16 thousand and more tokens in the gradients of weights: part `error` says how "
        "the error grows, the training does not.",
        "The emulation sums 32 products in FP32 before it cuts; hardware aligns them to the "
        "largest and cuts first. DeepSeek-V3 does not say what its random matrices were.",
        "Adam forgives a gradient that is too small by a constant factor, which is most of what "
        "cutting towards zero does.",
        "300 steps: what adds up over many thousand is not seen.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="error",
            title="No training: relative error of one GEMM, by K",
            seeds=SEEDS,
            run=measure_error,
            arms=(
                measured("fp32", "FP32", FP32_ACCUMULATION),
                measured("promoted-14", "14 bits, promoted every 128", PROMOTED),
                measured("promoted-12", "12 bits, promoted every 128", Accumulation(bits=12)),
                measured("promoted-10", "10 bits, promoted every 128", Accumulation(bits=10)),
                measured("never-14", "14 bits, never promoted", never(14)),
                measured("never-12", "12 bits, never promoted", never(12)),
                measured("never-10", "10 bits, never promoted", never(10)),
                measured(
                    "positive-14", "14 bits, never promoted, operands positive", never(14), True
                ),
            ),
        ),
        Part(
            name="training",
            title="A language model, trained in FP8 (current scaling)",
            seeds=SEEDS,
            run=partial(train_bytes, setup=SETUP),
            arms=(
                Arm(
                    name="bf16",
                    title="BF16",
                    plan=BF16,
                    predicted="survives",
                ),
                trained("fp32", "FP8, FP32 accumulation", FP32_ACCUMULATION),
                trained("promoted-14", "14 bits, promoted every 128", PROMOTED),
                trained("te-default", "14 bits, never promoted in the forward pass", TE_DEFAULT),
                trained("never-14", "14 bits, never promoted", never(14)),
                trained("never-10", "10 bits, never promoted", never(10)),
                trained("never-6", "6 bits, never promoted", never(6)),
            ),
        ),
    ),
)
