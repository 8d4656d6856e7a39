"""`make bench`: what each mitigation costs and changes, on one model, beside the same without it.

A language model of the lab is trained for a few steps of real text with each; what is given are the
time of a step over that of the same training without it (in turns, in one process, one thread, the
emulation on a CPU), the bytes that model and optimizer keep beyond those without it, and how far
its function moves in FP32 (`change_of_function`; for an architecture the question has no answer,
for its weights are other ones). What a training gains by one is the experiments' matter.
Writes reports/mitigations.md.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_ratio import turn_of
from torch import Tensor

import fp8lab
from fp8lab import DelayedScaling, Float8CurrentScaling, Plan, mitigations
from fp8lab.lab.arm import Arm, Mitigation
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.train import NextByte
from fp8lab.mitigations import SmoothSwiGLU
from fp8lab.recipe import Recipe

REPORT = Path(__file__).resolve().parents[1] / "reports" / "mitigations.md"
CONFIG = ModelConfig(dim=192, layers=2, heads=4, context=128)
DELAYED, CURRENT = DelayedScaling(), Float8CurrentScaling()
TURNS, STEPS = 7, 4


def offered() -> dict[str, tuple[Mitigation, Recipe]]:
    """Every mitigation there is, in every form that has a name, and the recipe it is put on."""
    m = mitigations
    return {
        "Smooth-SwiGLU, per channel": (SmoothSwiGLU(), DELAYED),
        "Smooth-SwiGLU, of up": (SmoothSwiGLU(branch="linear"), DELAYED),
        "Smooth-SwiGLU, delayed": (SmoothSwiGLU(timing="delayed"), DELAYED),
        "Smooth-SwiGLU, per token (its code)": (SmoothSwiGLU.reference_code(), CURRENT),
        "Smooth-SwiGLU, FOG's baseline": (SmoothSwiGLU.fog_baseline(), CURRENT),
        "product in BF16": (m.HighPrecisionProduct(), DELAYED),
        "down's operands in BF16": (m.HighPrecisionOperands(where=("*.mlp.down",)), DELAYED),
        "anti-wind-up": (m.AntiWindup(), DELAYED),
        "clamped, GPT-OSS": (m.ClampedSwiGLU.gpt_oss(), DELAYED),
        "clamped, DeepSeek-V4": (m.ClampedSwiGLU.deepseek_v4(), DELAYED),
        "clamped, Step": (m.ClampedSwiGLU.step(), DELAYED),
        "SiTU-GLU": (m.SiTUGLU(), DELAYED),
        "PowLU": (m.PowLU(), DELAYED),
        "ReGLU": (m.ReplacedActivation(activation="relu"), DELAYED),
        "Hadamard of the product": (m.HadamardProduct(), CURRENT),
        "hot channels patched": (m.HotChannelPatch(channels=8), CURRENT),
        "QK-norm": (m.QKNorm(), DELAYED),
        "FOG": (m.FOG(), DELAYED),
        "outlier-protected block": (m.OutlierProtected(), DELAYED),
        "feed-forward without a gate": (m.PlainFeedForward(), DELAYED),
        "StableAdamW": (m.StableAdamW(), DELAYED),
        "ZClip": (m.ZClip(), DELAYED),
        "SPAM": (m.SPAM(), DELAYED),
        "AdaGC": (m.AdaGC(), DELAYED),
        "QK-clip": (m.QKClip(), DELAYED),
        "no weight decay on gate and up": (m.NoDecayOnGateUp(), DELAYED),
        "TWEO": (m.TWEO(), DELAYED),
        "z-loss": (m.ZLoss(), DELAYED),
    }


class Training(NamedTuple):
    """A model that has learnt a little, one more step of it, and the bytes that it keeps."""

    model: LanguageModel
    step: Callable[[], None]
    kept: Callable[[], int]


def training(recipe: Recipe, given: tuple[Mitigation, ...]) -> Training:
    """With those mitigations, each where its time has come."""
    plan = Plan(recipe=recipe, exclude=("head",))
    arm = Arm(name="priced", title="", plan=plan, mitigations=given)
    model = LanguageModel(arm.configured(CONFIG), 0)
    arm.prepare(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = arm.prepare_optimizer(optimizer, model)
    penalties = arm.penalties(model)
    task = NextByte(None, 0, batch=8, context=CONFIG.context)
    at = iter(range(1 << 30))

    def step() -> None:
        loss, _ = task.loss(model, next(at))
        for penalty in penalties:
            loss = loss + penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def kept() -> int:
        states = [*optimizer.state.values(), *optimizer.param_groups]
        tensors = [one for state in states for one in state.values() if isinstance(one, Tensor)]
        return sum(one.nbytes for one in [*tensors, *model.parameters(), *model.buffers()])

    for _ in range(STEPS):
        step()
    return Training(model, step, kept)


def row_of(name: str, mitigation: Mitigation, recipe: Recipe) -> tuple[str, ...]:
    """Name, kind, function, foldable, bytes, time."""
    bare, with_it = training(recipe, ()), training(recipe, (mitigation,))
    turns = [turn_of(with_it.step, bare.step, turn) for turn in range(TURNS)]
    low, median, high = statistics.quantiles(turns, n=4)
    moved = "the training, not the function"
    if mitigation.changes_function:
        moved = "another network"
    if mitigation.kind in ("model", "recipe"):
        tokens = NextByte(None, 0, batch=8, context=CONFIG.context).held_out(0)[:, :-1]
        change = mitigations.change_of_function(bare.model, mitigation, tokens)
        clamped = f", {100 * change.clamped:.2g} % of elements clamped" if change.clamped else ""
        moved = f"{100 * change.difference:.2g} %{clamped}" if change.difference else "0"
    more = with_it.kept() - bare.kept()
    foldable = {True: "yes", False: "no"}[bool(getattr(mitigation, "foldable", False))]
    ratio = f"{median:.2f} ({low:.2f}–{high:.2f})"
    return (name, mitigation.kind, moved, foldable, f"{more:,}", ratio)


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    size = sum(p.numel() for p in LanguageModel(CONFIG, 0).parameters())
    lines = [
        "# What each mitigation costs and changes",
        "",
        "Written by `make bench`. A byte-level language model of "
        f"{size / 1e6:.2f} million parameters in emulated FP8, each mitigation against the same "
        "training without it: the median of the ratios of a step's time over interleaved turns "
        "and their middle half, one thread of a CPU. An order, no figure for a GPU: there a pass "
        "over a tensor costs another share. The function is compared in FP32 on held-out text.",
        "",
        f"fp8lab {fp8lab.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}.",
        "",
        "| mitigation | kind | function moves by | foldable | bytes kept more | time of a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, (mitigation, recipe) in offered().items():
        lines.append(f"| {' | '.join(row_of(name, mitigation, recipe))} |")
        print(lines[-1], flush=True)
    lines += ["", "| class | what it adds to a step | formula from |", "|---|---|---|"]
    for kind in dict.fromkeys(type(mitigation) for mitigation, _ in offered().values()):
        lines.append(f"| {kind.__name__} | {kind.cost} | {kind.source} |".replace("|w|", "abs(w)"))
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {REPORT.relative_to(REPORT.parents[1])}")


if __name__ == "__main__":
    main()
