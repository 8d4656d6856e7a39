"""Shazeer's eight feed-forwards at equal parameters: does their order come out on two cores?

Table 1 of 2002.05202 compares three plain and five gated feed-forwards of equal parameters in T5 on
C4, by held-out log-perplexity after 65,536 steps (four runs each, with standard deviation) and
after 524,288. Here they stand in a byte-level decoder of two layers; a gated feed-forward has width
176 and a plain one 264, which is the same number of parameters to the last. Every variant of a seed
sees the same bytes, so that seeds are pairs; the learning rate falls to zero, so that the last loss
is not the noise of the last batches.

What is compared is the order and nothing else. For every pair of variants: the sign of the
difference in each of five seeds. A pair is *decided here* if all five agree (by chance once in
sixteen, so that of 28 pairs without any difference some two would be: said in the table). Kendall's
tau holds our order against the published one; its interval comes from resampling the seeds, all
3,125 ways, and its chance level from all 40,320 orders of eight.

Length is what fits into 25 minutes; a learning rate of 0.01 was the best of 0.003, 0.005 and 0.01
for SwiGLU on seed 100 over 250 steps, and no larger was tried. Seeds 0 to 4 were not run before
the prediction was written.

All of e01, e02, e05, e07 and e10 were run once with --steps 12 on their seeds before the full
run, to see that `conclude` decides; nothing was changed after it.
"""

from __future__ import annotations

import itertools
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Part
from fp8lab.lab.language import BF16, Setup, train_bytes
from fp8lab.lab.model import ModelConfig
from fp8lab.lab.result import Clause, Picture, Result, Table, final_losses, judged, spread
from fp8lab.report import drawing

SEEDS = (0, 1, 2, 3, 4)
# Table 1 of 2002.05202: at 65,536 steps, its standard deviation over four runs, at 524,288 steps.
PUBLISHED = {
    "relu": (1.997, 0.005, 1.677),
    "gelu": (1.983, 0.005, 1.679),
    "silu": (1.994, 0.003, 1.683),
    "glu": (1.982, 0.006, 1.663),
    "bilinear": (1.960, 0.005, 1.648),
    "geglu": (1.942, 0.004, 1.633),
    "swiglu": (1.944, 0.010, 1.636),
    "reglu": (1.953, 0.003, 1.645),
}
TITLES = {
    "relu": "ReLU",
    "gelu": "GELU",
    "silu": "Swish",
    "glu": "GLU",
    "bilinear": "Bilinear",
    "geglu": "GEGLU",
    "swiglu": "SwiGLU",
    "reglu": "ReGLU",
}
NAMES = tuple(PUBLISHED)
PLAIN, GATED = NAMES[:3], NAMES[3:]
STRONG = ("bilinear", "geglu", "swiglu", "reglu")  # published well below all others
UPPER = np.triu_indices(len(NAMES), 1)

SETUP = Setup(
    config=ModelConfig(dim=64, layers=2, heads=4, context=64),
    steps=900,
    quick=6,
    learning_rate=0.01,
    fades=True,
    held_out=64,
)


def losses(out: Path) -> pd.DataFrame:
    """Held-out loss, a row a seed, a column a variant in the published order of names."""
    return final_losses(out, "training").reindex(columns=list(NAMES))


def tau(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's tau-a of orders in the last axis: concordant less discordant pairs, of all."""
    signs = [np.sign(of[..., UPPER[0]] - of[..., UPPER[1]]) for of in (one, other)]
    return np.asarray((signs[0] * signs[1]).mean(axis=-1))


def resampled(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Means of every choice of as many seeds as there are, with repetition."""
    values = rows.to_numpy()
    chosen = np.array(list(itertools.product(range(len(values)), repeat=len(values))))
    return np.asarray(values[chosen].mean(axis=1))


@cache
def by_chance(found: float) -> float:
    """The share of all orders of eight whose tau is at least as large."""
    orders = np.array(list(itertools.permutations(range(len(NAMES)))), dtype=float)
    return float((tau(orders, np.arange(len(NAMES), dtype=float)) >= found - 1e-9).mean())


def pairs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every pair the difference (first less second), ours and the published."""
    found = []
    for one, other in itertools.combinations(NAMES, 2):
        gaps = rows[one] - rows[other]
        first, second = PUBLISHED[one], PUBLISHED[other]
        noise = 2.0 * float(np.hypot(first[1], second[1])) / 4**0.5  # of means of four runs
        published = first[0] - second[0]
        agree = bool((np.sign(gaps) == np.sign(gaps.iloc[0])).all()) and len(gaps) >= 4
        found.append(
            {
                "pair": f"{TITLES[one]} − {TITLES[other]}",
                "here": float(gaps.mean()),
                "from": float(gaps.min()),
                "to": float(gaps.max()),
                "decided here": agree,
                "published": published,
                "decided there": abs(published) > noise,
                "same sign": bool(np.sign(gaps.mean()) == np.sign(published)),
            }
        )
    return pd.DataFrame(found)


def contrast(rows: pd.DataFrame, low: tuple[str, ...], high: tuple[str, ...]) -> pd.Series:
    """By how much the one group is below the other, a number a seed."""
    return rows[list(high)].mean(axis=1) - rows[list(low)].mean(axis=1)


def clauses_of(rows: pd.DataFrame, pairs: pd.DataFrame, taus: NDArray[np.float64]) -> list[Clause]:
    known = len(rows) >= 4 and bool(np.isfinite(rows.to_numpy()).all())
    strong, all_gated = contrast(rows, STRONG, PLAIN), contrast(rows, GATED, PLAIN)
    decided = pairs[pairs["decided here"]]
    wrong = decided[~decided["same sign"] & decided["decided there"]]
    same = pairs.set_index("pair").loc["GEGLU − SwiGLU", "decided here"]
    worst = rows[list(GATED)].mean().idxmax()
    low = float(np.quantile(taus, 0.05))
    found = [
        (
            "Bilinear, GEGLU, SwiGLU and ReGLU are below ReLU, GELU and Swish (means), every seed",
            spread(list(strong)) + " nats per byte",
            bool((strong > 0).all()),
        ),
        (
            "all five gated are below the three plain (means), every seed",
            spread(list(all_gated)) + " nats per byte",
            bool((all_gated > 0).all()),
        ),
        ("GLU (sigmoid) is the worst of the gated (mean)", TITLES[str(worst)], worst == "glu"),
        (
            "Kendall's tau with the published order is above 0 at 95 % of the resamplings",
            f"{low:.2f} at the 5 % quantile",
            low > 0,
        ),
        ("GEGLU and SwiGLU cannot be told apart", f"decided here: {same}", not same),
        (
            "no pair is decided here against what is decided there",
            ", ".join(wrong["pair"]) or "none",
            wrong.empty,
        ),
    ]
    return [Clause(said, told, bool(held) if known else None) for said, told, held in found]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the published table, best first here."""
    table = pd.DataFrame(
        {
            "feed-forward": [TITLES[name] for name in NAMES],
            "held-out loss, nats per byte": rows.mean().to_numpy(),
            "sd of the seeds": rows.std().to_numpy(),
            "sd, seed's mean taken off": rows.sub(rows.mean(axis=1), axis=0).std().to_numpy(),
            "published, 65,536 steps": [PUBLISHED[name][0] for name in NAMES],
            "its sd (4 runs)": [PUBLISHED[name][1] for name in NAMES],
            "published, 524,288 steps": [PUBLISHED[name][2] for name in NAMES],
        }
    )
    return table.sort_values("held-out loss, nats per byte")


def conclude(out: Path) -> Result:
    rows = losses(out)
    pairs = pairs_of(rows)
    published = np.array([PUBLISHED[name][0] for name in NAMES])
    ours = float(tau(rows.mean().to_numpy(), published))
    taus = tau(resampled(rows), published)
    clauses = clauses_of(rows, pairs, taus)
    verdict, table = judged(clauses)
    decided, there = int(pairs["decided here"].sum()), int(pairs["decided there"].sum())
    low, high = np.quantile(taus, [0.05, 0.95])
    best = rows.mean().sort_values()
    sentence = (
        f"Kendall's tau with the published order is {ours:.2f} (5 to 95 %: {low:.2f} to {high:.2f};"
        f" this or more by chance {by_chance(round(ours, 6)):.1%}); {decided} of {len(pairs)} pairs"
        f" are decided here, {there} there; best {TITLES[str(best.index[0])]}, worst "
        f"{TITLES[str(best.index[-1])]}, {best.iloc[-1] - best.iloc[0]:.3f} nats per byte apart."
    )
    against = ""
    if clauses[-1][2] is False:
        against = f"2002.05202 has {clauses[-1][1]} the other way round."
    open_ones = ", ".join(pairs.loc[~pairs["decided here"], "pair"]) or "none"
    return Result(
        verdict=verdict,
        sentence=sentence,
        against=against,
        parts=(
            table,
            Table(title="Ours, and the published table", rows=summary(rows)),
            Picture(
                name="orders",
                title="Our losses against the published ones",
                draw=partial(draw, rows),
                note="Every dot a seed, with the seed's mean over the eight taken off.",
            ),
            f"What this scale cannot decide, for the seeds do not agree: {open_ones}.",
            Table(
                title="Pairs",
                rows=pairs,
                note=(
                    "Decided here: all seeds have the same sign (of 28 pairs without a difference "
                    f"about {28 * 2.0 ** (1 - len(rows)):.1f} would). Decided there: more than two "
                    "standard errors of the difference apart."
                ),
            ),
        ),
    )


def draw(rows: pd.DataFrame) -> Figure:
    with drawing.style():
        figure = drawing.new_figure(4.6, 7.4)
        axes = figure.subplots()
        centred = rows.sub(rows.mean(axis=1), axis=0)
        for name in NAMES:
            colour = drawing.BLUE if name in GATED else drawing.RED
            marker = "o" if name in GATED else "s"
            x = PUBLISHED[name][0]
            axes.plot([x] * len(rows), centred[name], marker, color=colour, markersize=4, alpha=0.6)
            axes.plot([x], [centred[name].mean()], "_", color=colour, markersize=16)
            above = (0, 7) if name not in ("silu", "swiglu", "gelu") else (0, -14)
            place = (x, float(centred[name].max() if above[1] > 0 else centred[name].min()))
            side = {"geglu": "right", "swiglu": "left"}.get(name, "center")
            look = {"textcoords": "offset points", "ha": side, "fontsize": 8.5}
            axes.annotate(TITLES[name], place, xytext=above, **look)
        axes.set_xlabel("published held-out log-perplexity, 65,536 steps (2002.05202)")
        axes.set_ylabel("held-out loss here, nats per byte,\nless the seed's mean")
        axes.margins(0.08, 0.15)
        keys = {"gated": (drawing.BLUE, "", "o"), "plain": (drawing.RED, "", "s")}
        drawing.legend(axes, keys)
        return figure


ARMS = tuple(
    Arm(
        name=name,
        title=TITLES[name],
        plan=BF16,
        predicted="survives",
        options={"variant": name},
    )
    for name in NAMES
)

EXPERIMENT = Experiment(
    name="e10_eight_feed_forwards",
    question="Does the order of Shazeer's eight feed-forwards come out at equal parameters?",
    prediction=(
        "In part. In every seed Bilinear, GEGLU, SwiGLU and ReGLU together are below ReLU, GELU "
        "and Swish together, and so are all five gated; GLU with a sigmoid is the worst of the "
        "gated; Kendall's tau with the published order is above 0 in 95 % of the resamplings of "
        "the seeds. GEGLU and SwiGLU cannot be told apart, and no pair is decided against what "
        "the published table decides."
    ),
    refuted_if="any clause fails",
    limits=(
        "0.13 million parameters, a byte-level decoder and 0.9 million bytes of Python source: "
        "only the order is compared, and what the seeds do not agree on is left open.",
        "All eight have one learning rate; a variant may like another one better.",
        "A difference that is right here may turn with training: two of the published pairs do "
        "so between 65,536 and 524,288 steps (Swish, GELU and ReLU among themselves).",
        "Five seeds that agree are a sign test at 1 in 16, without a correction for 28 pairs.",
    ),
    conclude=conclude,
    parts=(
        Part(
            name="training",
            title="A byte-level language model by feed-forward",
            seeds=SEEDS,
            run=partial(train_bytes, setup=SETUP),
            arms=ARMS,
        ),
    ),
)
