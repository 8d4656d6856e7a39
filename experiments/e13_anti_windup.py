"""Anti-wind-up under attack: where does it save a training, where does it bias, where does it fail?

`AntiWindup` gives elements of the product that saturated no gradient: a bit an element, no pass
over the tensor. It is set against Smooth-SwiGLU, a maximum and a multiplication of the product, and
the product in BF16, on the rare tokens of `e13_wind_up` (history 16, a random gap of 40 unless
said).

Part `equal`: the training that diverges (plain SGD), each remedy from the first step.

Part `optimizers`: what does not diverge: clipping, Adam, and an honest search under AdamW with
gradients clipped at 1, the way large models are trained, for a setting in which delayed FP8 does
and BF16 does not: four learning rates, two beta2, a history of 4. Adam's step is bounded whatever
the gradient, so that an overshoot cannot feed on itself: that none is found is the prediction.

Part `late`: the remedy comes when the bomb is there. 800 steps with a rare token at exactly every
40th, behind the clipping all the while, then the remedy and random gaps. What is clipped has no
gradient under anti-wind-up, so nothing makes it smaller, and the first event that the history
remembers lets it loose; without clipping (Smooth, BF16) the first event does.

Part `text`: a byte-level language model on real text, AdamW, clipped at 1, under three recipes with
anti-wind-up and without: is there a bias where it is not needed? At the end the same gradients are
made with it and without (`cosine`, `norm`, of gate's and up's weights in all layers). Under MXFP8
with exponents rounded down (OCP) the largest element of one block in five saturates at every step,
and loses its gradient. First predicted with a fourth recipe, current scaling, under which nothing
saturates and nothing may differ, to the bit: before that ran, `AntiWindup` came to refuse it.

Settings of SGD are those of `swiglu_divergence`; all else was looked at on seed 100 only. About 20
minutes of CPU time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fp8lab import DelayedScaling, MXFP8BlockScaling, Plan
from fp8lab.lab import rare_tokens
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import BF16, Setup, Trained, train_bytes
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.rare_tokens import RareTokens, arm, fp8, regress_spaced, table_of_ends
from fp8lab.lab.result import Picture, Result, Table, diverged, judged, ratios, results, wilson
from fp8lab.lab.train import NextByte
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations import AntiWindup, HighPrecisionProduct
from fp8lab.mitigations.smooth_swiglu import SmoothSwiGLU
from fp8lab.recipe import Recipe
from fp8lab.report import drawing

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
REMEDIES: dict[str, tuple[Any, ...]] = {
    "none": (),
    "anti-windup": (AntiWindup(),),
    "smooth": (SmoothSwiGLU(),),
    "product-bf16": (HighPrecisionProduct(),),
}

# --- a remedy that comes late ---------------------------------------------------------------------

SWITCH, LATE_STEPS = 800, 1600


class Late(RareTokens):
    """Exact gaps until the remedy comes and is put on the model, random ones from then on."""

    def __init__(self, *arguments: Any, remedy: str, switch: int, punctual: bool) -> None:
        super().__init__(*arguments, punctual=punctual)
        self.remedy, self.switch = REMEDIES[remedy], switch

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == self.switch:
            for mitigation in self.remedy:
                mitigation.apply(model)
            self.task = self.asked  # whose gap is 40, at random
        return super().loss(model, step)


def regress_late(job: Job, progress: Progress) -> None:
    """A run of the part `late`; the arm's own mitigations are none, its option names the remedy."""
    switch = 30 if job.settings.quick else SWITCH
    remedy = str((job.arm.options or {})["remedy"])
    task = partial(Late, remedy=remedy, switch=switch)
    regress_spaced(job, progress, task=task, steps=LATE_STEPS)


# --- real text ------------------------------------------------------------------------------------

RECIPES: dict[str, Recipe] = {
    "delayed-16": DelayedScaling(amax_history_len=16),
    "delayed-1": DelayedScaling(amax_history_len=1, amax_compute_algo="most_recent"),
    "mx-floor": MXFP8BlockScaling(scale_rounding="ocp_floor"),
}


def against_none(trained: Trained) -> dict[str, Any]:
    """What `masking` finds, on a twin of whose forwards the watch knows nothing."""
    twin = LanguageModel(trained.model.config, trained.job.seed)
    trained.job.arm.prepare(twin)
    twin.load_state_dict(trained.model.state_dict())
    cosine, norm = masking(twin, trained.task, trained.steps)
    return {"cosine": cosine, "norm": norm}


def masking(model: LanguageModel, task: NextByte, step: int) -> tuple[float, float]:
    """Cosine and ratio of norms of the gradient without the saturated elements' to the one with, of
    gate's and up's weights, on one further batch of the training."""
    downs = [m for name, m in model.named_modules() if name.endswith("mlp.down")]
    gradients: list[Tensor] = []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for way in ("straight_through", "zero"):
        model.load_state_dict(state)  # a forward moves the scales
        for down in downs:
            assert isinstance(down, Fp8Linear)
            down.gradient_of_saturated = way  # type: ignore[assignment]
        model.zero_grad(set_to_none=True)
        task.loss(model, step)[0].backward()
        pieces = [
            parameter.grad.flatten()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and name.endswith(("mlp.gate.weight", "mlp.up.weight"))
        ]
        gradients.append(torch.cat(pieces))
    whole, masked = gradients
    return float(cosine_similarity(whole, masked, dim=0)), float(masked.norm() / whole.norm())


SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=200,
    quick=2,
    learning_rate=1e-2,
    diverged_above=8.0,
    every=20,
    at_least=None,
    held_out_quick=1,
    told=("learning_rate",),
    ends=against_none,
)

# --- arms -----------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd-clip-10": {"clip_norm": 10.0},
    "adam-0.003": {"optimizer": "adam", "learning_rate": 0.003, "clip_norm": 1.0},
    "adamw-0.003": {"optimizer": "adamw", "learning_rate": 0.003, "clip_norm": 1.0},
    "adamw-0.01": {"optimizer": "adamw", "learning_rate": 0.01, "clip_norm": 1.0},
    "adamw-0.03": {"optimizer": "adamw", "learning_rate": 0.03, "clip_norm": 1.0},
    "adamw-0.1": {"optimizer": "adamw", "learning_rate": 0.1, "clip_norm": 1.0},
    "adamw-beta2-0.999": {
        "optimizer": "adamw", "learning_rate": 0.01, "beta2": 0.999, "clip_norm": 1.0,
    },
    "adamw-short": {"optimizer": "adamw", "learning_rate": 0.01, "clip_norm": 1.0, "gap": 10},
}  # fmt: skip
SEARCHED = tuple(name for name in SETTINGS if name.startswith("adamw"))


def equal_arms() -> tuple[Arm, ...]:
    arms = [arm("bf16", "BF16", rare_tokens.BF16, "survives", steps=1500)]
    more = {**REMEDIES, "smooth-code": (SmoothSwiGLU.reference_code(),)}
    more["both"] = (AntiWindup(), SmoothSwiGLU())
    for name, mitigations in more.items():
        predicted = {"none": "diverges", "smooth-code": "open"}.get(name, "survives")
        arms.append(arm(name, name, fp8(16), predicted, *mitigations, steps=1500))
    return tuple(arms)


def optimizer_arms() -> tuple[Arm, ...]:
    arms = []
    for setting, options in SETTINGS.items():
        plan = fp8(4 if setting == "adamw-short" else 16)
        how = {"steps": 1200, **options}
        arms.append(arm(f"bf16-{setting}", setting, rare_tokens.BF16, "survives", **how))
        for name in ("none", "anti-windup", "smooth"):
            if name == "smooth" and setting in SEARCHED[2:]:
                continue  # what is searched for is a divergence without a remedy
            title = f"{name}, {setting}"
            one = arm(f"{name}-{setting}", title, plan, "survives", *REMEDIES[name], **how)
            arms.append(one)
    return tuple(arms)


def text_arms() -> tuple[Arm, ...]:
    arms = [Arm(name="bf16", title="BF16", plan=BF16)]
    for name, recipe in RECIPES.items():
        plan = Plan(recipe=recipe, exclude=("head",))
        arms += [
            Arm(name=name, title=name, plan=plan, predicted="survives"),
            Arm(
                name=f"{name}-anti",
                title=f"{name}, anti-wind-up",
                plan=plan,
                mitigations=(AntiWindup(),),
                predicted="survives",
            ),
        ]
    return tuple(arms)


# --- what came of it ------------------------------------------------------------------------------


def by_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per setting: by arm, the median rare error and the product's largest element."""
    found = []
    for setting in SETTINGS:
        row: dict[str, Any] = {"setting": setting}
        for name in ("bf16", "none", "anti-windup", "smooth"):
            of = rows[rows["arm"] == f"{name}-{setting}"]
            lost = int(of["diverged_at"].notna().sum())
            row[f"{name}: diverged"] = f"{lost} of {len(of)}"
            row[f"{name}: rare error"] = of["final_rare_error"].astype(float).median()
            row[f"{name}: product"] = of["final_product"].astype(float).median()
        found.append(row)
    return pd.DataFrame(found)


def text_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per recipe: what anti-wind-up changes of the held-out loss, seed by seed."""
    table = rows.pivot(index="seed", columns="arm", values="final_loss").astype(float)
    found = []
    for name in RECIPES:
        gap = table[f"{name}-anti"] - table[name]
        of = rows[rows["arm"] == name]
        found.append(
            {
                "recipe": name,
                "loss without": table[name].mean(),
                "with minus without, mean": gap.mean(),
                "least": gap.min(),
                "most": gap.max(),
                "FP8 minus BF16": (table[name] - table["bf16"]).mean(),
                "cosine of the gradients": of["cosine"].min(),
                "ratio of their norms": of["norm"].min(),
            }
        )
    return pd.DataFrame(found)


def clauses_of(
    equal: pd.DataFrame, late: pd.DataFrame, others: pd.DataFrame, text: pd.DataFrame
) -> tuple[list[tuple[str, str, bool | None]], bool | None]:
    """The clauses, and whether what would refute them has come."""
    lost = {name: diverged(equal, name) for name in equal["arm"].unique()}
    told = lost["none"][1] >= 3 or None  # one seed in a hurry tells nothing
    rare = ratios(equal, "final_rare_error", "anti-windup", "smooth").median()
    search = diverged(others, *(f"none-{name}" for name in SEARCHED))
    anti = diverged(others, *(f"anti-windup-{name}" for name in SETTINGS))
    settings = by_setting(others).set_index("setting").loc[["sgd-clip-10", "adam-0.003"]]
    better = (settings["anti-windup: rare error"] < settings["none: rare error"]).all()
    loose = {name: diverged(late, f"late-{name}") for name in REMEDIES}
    bias = text.set_index("recipe")
    delayed = bias.loc[["delayed-16", "delayed-1"]]
    gap = max(delayed["most"].max(), -delayed["least"].min())
    floor = bias.loc["mx-floor"]
    more = lost["anti-windup"][0] > lost["smooth"][0]
    killed = told and bool(more or rare > 2 or delayed["most"].max() > 0.03)
    clauses = [
        ("equal: without a remedy at least 6 of 8 diverge", "{} of {}".format(*lost["none"]),
         told and lost["none"][0] >= 6),
        ("equal: with anti-wind-up, Smooth, both, and the product in BF16 none does",
         ", ".join("{}: {} of {}".format(n, *lost[n])
                   for n in ("anti-windup", "smooth", "both", "product-bf16")),
         told and not any(lost[n][0] for n in ("anti-windup", "smooth", "both", "product-bf16"))),
        ("equal: rare error no more than 1.5 times Smooth's", f"{rare:.2f} times",
         told and bool(rare <= 1.5)),
        ("optimizers: no FP8 run under AdamW diverges", "{} of {}".format(*search),
         told and search[0] == 0),
        ("optimizers: no anti-wind-up run diverges", "{} of {}".format(*anti),
         told and anti[0] == 0),
        ("optimizers: clipped SGD and Adam have a lower rare error with it than without",
         ", ".join(f"{a:.3g} to {b:.3g}" for a, b in zip(
             settings["anti-windup: rare error"], settings["none: rare error"], strict=True)),
         told and bool(better)),
        ("late: no remedy disarms, each diverges in at least 3 of 4",
         ", ".join("{}: {} of {}".format(n, *loose[n]) for n in REMEDIES),
         told and all(of[0] >= 3 for of in loose.values())),
        ("text: under delayed scaling within 0.03 nats of without", f"{gap:.4f} at most",
         told and bool(gap <= 0.03)),
        ("text: under MX rounded down the gradient is another, cosine 0.8 to 0.99",
         f"{floor['cosine of the gradients']:.4f}",
         told and bool(0.8 <= floor["cosine of the gradients"] <= 0.99)),
    ]  # fmt: skip
    return clauses, killed


def conclude(out: Path) -> Result:
    equal, late = results(out, "equal"), results(out, "late")
    others, text = results(out, "optimizers"), text_table(results(out, "text"))
    clauses, killed = clauses_of(equal, late, others, text)
    verdict, checked = judged(clauses, killed=killed)
    saved, lost = diverged(equal, "anti-windup"), diverged(equal, "none")
    loose = diverged(late, "late-anti-windup")
    search = diverged(others, *(f"none-{name}" for name in SEARCHED))
    bands = pd.DataFrame(
        [
            {"arm": name, "diverged": f"{k} of {n}",
             "95 % (Wilson)": "{:.2f} to {:.2f}".format(*wilson(k, n))}
            for name in equal["arm"].unique()
            for k, n in [diverged(equal, name)]
        ]
    )  # fmt: skip
    table = table_of_ends(equal).merge(bands[["arm", "95 % (Wilson)"]], on="arm")
    cost = equal.groupby("arm")["cpu_ms"].median()
    table["CPU time of a step, of none's"] = (cost / cost["none"]).reindex(table["arm"]).tolist()
    return Result(
        verdict=verdict,
        sentence=(
            f"From the first step anti-wind-up leaves {saved[0]} of {saved[1]} runs diverging "
            f"({lost[0]} of {lost[1]} without), brought late {loose[0]} of {loose[1]}; under AdamW "
            f"clipped at 1 {search[0]} of {search[1]} FP8 runs diverge."
        ),
        parts=(
            checked,
            Table(title="At equal terms, plain SGD", rows=table,
                  note="Medians; what saves a training may cost it the rare token."),
            Table(title="Other optimizers, medians", rows=by_setting(others)),
            Table(title="A remedy after 800 steps of winding up", rows=table_of_ends(late)),
            Table(title="Real text", rows=text, note="Nats per byte, held out."),
            Picture(name="settings", title="Rare error", draw=partial(drawn, by_setting(others))),
        ),
    )  # fmt: skip


@drawing.style(cycle=True)
def drawn(table: pd.DataFrame) -> Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    at = np.arange(len(table))
    shown = {"rare error": "rare error in force, relative", "product": "largest product"}
    for one, (what, words) in zip(axes, shown.items(), strict=True):
        for index, name in enumerate(("bf16", "none", "anti-windup", "smooth")):
            marker = drawing.ARM_STYLES[index][2]
            values = table[f"{name}: {what}"]
            one.plot(values, at + 0.12 * (index - 1.5), marker=marker, linestyle="", label=name)
        columns = [name for name in table if name.endswith(f": {what}")]
        drawing.log_axis(one.xaxis, table[columns].to_numpy(float))
        one.set(xlabel=words)
    axes[0].set_yticks(at, table["setting"])
    axes[1].legend(loc="upper right", bbox_to_anchor=(1.0, 1.12), ncols=4)
    return figure


EXPERIMENT = Experiment(
    name="e13_anti_windup",
    question="What is anti-wind-up worth, and where does it fail?",
    prediction=(
        "From the first step it saves every run that delayed FP8 loses (at least 6 of 8), as "
        "Smooth-SwiGLU and the product in BF16 do, with a rare error of no more than 1.5 times "
        "Smooth's. Under AdamW clipped at 1 no FP8 run diverges in any of six settings; with "
        "clipped SGD and Adam it lowers the rare error. It does not disarm: brought after 800 "
        "steps of winding up, it and every other remedy diverge in at least 3 of 4 runs. On real "
        "text it changes the loss by no more than 0.03 nats under delayed scaling, and under MX "
        "with exponents rounded down it changes the gradient of gate and up (cosine 0.8 to 0.99)."
    ),
    refuted_if=(
        "a run with anti-wind-up from the first step diverges where Smooth-SwiGLU's does not, its "
        "rare error is more than twice Smooth's, or the text model under delayed scaling ends "
        "more than 0.03 nats worse with it"
    ),
    limits=(
        "One synthetic task for what it saves; the text model needs no saving.",
        "A search that finds nothing is six settings of one task, not a proof about AdamW.",
        "What a step costs is measured of an emulation on a CPU.",
    ),
    parts=(
        Part(name="equal", title="Each remedy from the first step", seeds=SEEDS,
             run=regress_spaced, arms=equal_arms()),
        Part(name="optimizers", title="Clipping, Adam, and a search under AdamW", seeds=SEEDS[:3],
             run=regress_spaced, arms=optimizer_arms()),
        Part(
            name="late", title="A remedy after 800 steps of winding up", seeds=SEEDS[:4],
            run=regress_late,
            arms=tuple(
                arm(f"late-{name}", f"{name}, late", fp8(16), "diverges",
                           remedy=name, punctual=True)
                for name in REMEDIES
            ),
        ),
        Part(name="text", title="Real text", seeds=SEEDS[:3],
             run=partial(train_bytes, setup=SETUP), arms=text_arms()),
    ),
    conclude=conclude,
)  # fmt: skip
