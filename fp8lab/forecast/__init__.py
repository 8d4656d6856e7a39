"""`replay`: may this run be switched to FP8, what must stay in BF16, what breaks when?

`what_if` turns a recorded run, a plain BF16 one too, and a plan into numbers: of every recorded
operand at every step scale, staleness, what saturates, what is flushed, what the cast costs. Here
they are held against thresholds, and a decision is printed. What the rows cannot tell is "not
known", with what to record; it is never taken for harmless.

Four kinds of trouble, each with its source:

    breaks      The product winds up: it was clipped by `WOUND_UP` octaves in all within
                `WINDOW` steps, and then, while the clipped step is still in the history, comes
                to `RELEASED` of it again: unclipped, so that what grew behind the clipping is let
                loose. Delayed scaling of a gate product only.
    overflows   FP16 has no room for the largest value: infinity.
    underflows  The bulk loses its digits: an error above `DAMAGED` while a fifth of all elements is
                below the format's normal range; or most of what is not zero becomes zero.
    clips       Beyond the format's largest value by more than an octave, or in more than 10^-5 of
                the elements. A warning: a clipped run need not diverge, and most do not.

What a forecast is not: the run in FP8. The rows are those of the run as it was, whose tensors do
not react to the casts. In a BF16 run a product that would have been clipped does not grow behind
the clipping, so "breaks" reads from the jumps that were there what they would have led to. The rule
was made on one family of trainings, the rare-token regression under plain SGD (seeds 100 to 123,
histories 4 to 1024; 54 of 96 delayed runs diverged): with Adam or gradient clipping that same
training does not diverge, and "breaks" is then a false alarm. How often it is right on fresh seeds
is printed by the benchmark.

Rejected: "staleness above 2" as a forecast of divergence. Of the runs that survived most were
clipped too.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from fp8lab.forecast.not_judged import in_short
from fp8lab.forecast.recorded import (
    is_watchable,
    layers_of,
    layers_of_feed_forwards,
    low_casts,
    recorded_sites,
    same_as,
)
from fp8lab.forecast.to_record import Missing, missing_of, select_of
from fp8lab.forecast.what_if import (
    Use,
    Uses,
    replayed,
    statistics_of,
    uses_in,
    uses_of,
)
from fp8lab.formats import FP16, FloatFormat
from fp8lab.plan import Plan, as_recipe, nearest_layers, recipe_to_dict
from fp8lab.recipe import OPERANDS, DelayedScaling, HighPrecision, Operand, shown
from fp8lab.record import CLIPPED_STALENESS, NOTHING_BETWEEN
from fp8lab.runs import Run, open_run

# Chosen on seeds 100 to 123 of the rare-token regression, see above.
WOUND_UP, WINDOW, RELEASED = 4.0, 1000, 0.4
# Share of the elements. FP8-LM's rule halves the scale above it (2310.18313); 6e-5 of them clipped
# by two octaves made an output error of 30 %.
SATURATED = 1e-5
# Relative error of the bulk, as in the diagnosis: E4M3's own rounding is 0.027, and four times that
# says that two octaves of mantissa are gone; and the share below the format's normal numbers.
DAMAGED, UNDERFLOWN = 0.11, 0.2
# Of the elements that are not zero.
MOST = 0.5

PRICE = (
    "freq=1 measures that in every step, and makes each of them slower; a larger freq knows fewer "
    "steps, and nothing of an operand but a product under a delayed scale"
)

Kind = Literal["breaks", "overflows", "underflows", "clips"]
KINDS: tuple[Kind, ...] = ("breaks", "overflows", "underflows", "clips")


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a plan would do to one operand: since which step, in how many of those that are known,
    and the worst number beside the threshold it was held against. `site` has the GEMM behind it
    (`mlp:product@grad_weight`) where its columns are cast apart from its rows."""

    kind: Kind
    site: str
    layer: str
    operand: str
    step: int
    steps: int
    known_steps: int
    quantity: str
    worst: float
    threshold: float
    source: str

    @property
    def is_serious(self) -> bool:
        """Whether the operand must stay in high precision; clipping alone is a warning."""
        return self.kind != "clips"

    def __str__(self) -> str:
        since = f"{self.kind} at step {self.step}"
        often = "" if self.kind == "breaks" else f" ({self.steps} of {self.known_steps} steps)"
        return (
            f"{self.site} ({self.layer}, {self.operand}): {since}{often}: {self.quantity} "
            f"{self.worst:.3g}, threshold {self.threshold:g} ({self.source})"
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a recorded run would have met under a plan.

    `frame` has a row per operand and step, see `what_if.COLUMNS`: a number is exact where its `low`
    and `high` agree, lies between them, or is missing, and `reason` says why. `troubles` come worst
    first; `unknown` says of what nothing or not all is known, and why, and `missing` what a run has
    to record to know it; `left_out` are the operands that the plan leaves in high precision.
    """

    run: str
    plan: Plan
    frame: pd.DataFrame
    troubles: tuple[Trouble, ...]
    unknown: dict[str, str]
    missing: tuple[Missing, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def select(self) -> str:
        """The argument of `watch` with which a next run knows what this one does not, as Python;
        empty where there is none."""
        return select_of(self.missing)

    @property
    def serious(self) -> tuple[Trouble, ...]:
        """The troubles that are more than a warning."""
        return tuple(trouble for trouble in self.troubles if trouble.is_serious)

    @property
    def is_high_precision(self) -> bool:
        """Whether the plan has all in BF16 or FP32, so that nothing need be known of the run: FP16
        has a range that may be left."""
        recipes = (self.plan.recipe, *self.plan.overrides.values())
        return all(isinstance(r, HighPrecision) and r.format is not FP16 for r in recipes)

    @property
    def is_told(self) -> bool:
        """Whether of any operand that the plan casts to FP8 or less something is known."""
        rows = self.frame[self.frame["recipe"] != "HighPrecision"]
        return bool(rows["scale"].notna().any() or rows["flushed_low"].notna().any())

    @property
    def breaks_at(self) -> int | None:
        """The first step at which the run is expected to break, None if it is not."""
        steps = [t.step for t in self.troubles if t.kind in ("breaks", "overflows")]
        return min(steps, default=None)

    @property
    def safer_plan(self) -> Plan:
        """The plan with the operands in serious trouble left in BF16."""
        kept = {f"{glob.escape(t.layer)}:{t.operand}": HighPrecision() for t in self.serious}
        # Of overrides the last one wins: one that is there already moves to the end.
        others = {key: recipe for key, recipe in self.plan.overrides.items() if key not in kept}
        return replace(self.plan, overrides={**others, **kept})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: all but the frame, of which each operand's extremes are told."""
        return {
            "run": self.run,
            "plan": recipe_to_dict(self.plan),
            "verdict": self._verdict(),
            "breaks_at": self.breaks_at,
            "troubles": [asdict(trouble) for trouble in self.troubles],
            "safer_plan": recipe_to_dict(self.safer_plan) if self.serious else None,
            "operands": list(_extremes(self.frame)),
            "unknown": self.unknown,
            "select": self.select,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    def _verdict(self) -> str:
        if self.serious:
            first = min(trouble.step for trouble in self.serious)
            return f"expected trouble at step {first}; switch to FP8 only with these in BF16"
        if self.is_high_precision:
            return "nothing to forecast: this plan has no operand in FP8"
        if not self.is_told:
            return "cannot tell: of no operand that the plan has in FP8 is enough recorded"
        if self.troubles:
            return (
                "nothing found that breaks it, but what FP8 would have lost: see the warnings, "
                "and let a short run in FP8 decide"
            )
        return "no trouble found in what was recorded: you may switch to FP8 as far as that goes"

    def __str__(self) -> str:
        told = {k: v for k, v in recipe_to_dict(self.plan.recipe).items() if k != "recipe"}
        options = ", ".join(f"{name}={value}" for name, value in told.items())
        recipe = f"{type(self.plan.recipe).__name__}({options})"
        if self.plan.overrides:
            recipe += f" and {len(self.plan.overrides)} overrides"
        steps, sites = self.frame["step"].nunique(), self.frame["site"].nunique()
        lines = [f"{self.run} × {recipe}, {steps} steps of {sites} tensors:", self._verdict()]
        lines += [f"  {trouble}" for trouble in self.serious]
        warnings = [trouble for trouble in self.troubles if not trouble.is_serious]
        lines += ["warnings:"] * bool(warnings) + [f"  {trouble}" for trouble in warnings]
        lines += [f"left in high precision: {', '.join(self.left_out)}"] * bool(self.left_out)
        lines += ["not known:"] * bool(self.unknown)
        lines += [f"  {site}: {reason}" for site, reason in self.unknown.items()]
        if self.select:
            lines += [f"to know it, watch the next run with {self.select}"]
            lines += [f"{PRICE}; fp8lab report has one select for all recipes"]
        return "\n".join([*lines, *self.notes])


def replay(run: Run | str | Path, recipe: Any) -> Forecast:
    """What a recorded run, in whatever precision, would have met under `recipe`.

    `recipe` is a recipe, a `Plan`, or one of Transformer Engine's recipes. Per-tensor scales are
    replayed step by step: exact where they are powers of two, else within bounds. Scales of blocks
    and rows come from recorded what-if statistics. Raises RunError if a path is no run or a run is
    damaged, ValueError for what is no recipe or what `convert` would refuse.
    """
    run = run if isinstance(run, Run) else open_run(run)
    plan = recipe if isinstance(recipe, Plan) else Plan(recipe=as_recipe(recipe, "replay"))
    _require_layers(run, plan)
    sites = recorded_sites(run)
    same = same_as(run, sites)
    uses = uses_of(run, [site for site in sites if site not in same], plan)
    frame = replayed(run, uses.cast, same)
    troubles: list[Trouble] = []
    notes = [*_own_casts(run), *_events_told(run)]
    left = _not_recorded(run, plan, uses)
    unknown, missing = uses.unknown | _in_words(plan, left), list(_missing(run, plan, left))
    by_use = dict(tuple(frame.groupby(["site", "gemms"], sort=False)))
    for use in uses.cast:
        rows = by_use.get((use.site, ", ".join(use.gemms)), frame[:0]).reset_index(drop=True)
        unknown |= _unknown(use, rows)
        missing += missing_of(use, rows)
        if isinstance(use.recipe, DelayedScaling) and len(rows):
            notes += _cold_start(use, rows.iloc[0])
            rows = rows[1:]
        troubles += _troubles(use, rows)
    troubles.sort(key=lambda t: (KINDS.index(t.kind), t.step, t.site))
    return Forecast(
        run=str(run.path),
        plan=plan,
        frame=frame,
        troubles=tuple(troubles),
        unknown=unknown,
        missing=tuple(missing),
        left_out=tuple(uses.left_out),
        notes=tuple(notes),
    )


def _require_layers(run: Run, plan: Plan) -> None:
    """Raises ValueError for a plan that `convert` would refuse."""
    layers = layers_of(run)
    unmatched = plan.patterns_without_match(layers) if layers else []
    if unmatched:
        told = f"replay: pattern {shown(unmatched[0])} matches no linear layer"
        raise ValueError(f"{told}, expected one of {nearest_layers(unmatched[0], layers)}")
    for layer in layers:
        plan.recipes_of(layer, "replay")


def _troubles(use: Use, rows: pd.DataFrame) -> Iterator[Trouble]:
    """What these steps of one operand are held against."""
    clipped, flushed = rows["clipped"].fillna(False).astype(bool), rows["flushed_low"]
    if isinstance(use.recipe, HighPrecision):
        source = f"the largest {use.format.name}"
        told = rows["clipped"].notna()
        largest = use.format.max
        yield from _found("overflows", use, rows, clipped, told, "cur_amax", largest, source)
        return
    if isinstance(use.recipe, DelayedScaling) and use.site.endswith(":product"):
        yield from _wind_up(use, rows, use.recipe)
    below = flushed + rows["subnormal_low"] > UNDERFLOWN
    source = "E4M3's own rounding is 0.027"
    worn, told = below & (rows["bulk_error"] > DAMAGED), rows["bulk_error"].notna()
    yield from _found("underflows", use, rows, worn, told, "bulk_error", DAMAGED, source)
    if not worn.any():
        lost, told = flushed > MOST, flushed.notna()
        source = "the majority"
        yield from _found("underflows", use, rows, lost, told, "flushed_low", MOST, source)
    stale, told = rows["staleness"] > CLIPPED_STALENESS, rows["staleness"].notna()
    if stale.any():
        limit, source = CLIPPED_STALENESS, "an octave"
        yield from _found("clips", use, rows, stale, told, "staleness", limit, source)
    else:
        margin = use.recipe.margin if isinstance(use.recipe, DelayedScaling) else 0
        # Up to half a step above the largest value, to saturate is to round.
        lost = ~(rows["staleness"] * 2.0**-margin <= 1.0 + _half_a_step(use.format))
        many, told = (rows["saturated_low"] > SATURATED) & lost, rows["saturated_low"].notna()
        source = "FP8-LM, 2310.18313"
        yield from _found("clips", use, rows, many, told, "saturated_low", SATURATED, source)


def _half_a_step(fmt: FloatFormat) -> float:
    """Half the distance of the format's two largest values, over the largest."""
    return float(2.0 ** (math.floor(math.log2(fmt.max)) - fmt.mantissa_bits - 1) / fmt.max)


def _found(
    kind: Kind,
    use: Use,
    rows: pd.DataFrame,
    where: Any,
    known: Any,
    quantity: str,
    threshold: float,
    source: str,
) -> Iterator[Trouble]:
    """One trouble if it is anywhere."""
    if where.any():
        yield Trouble(
            kind=kind,
            site=use.name,
            layer=use.layer,
            operand=use.operand,
            step=int(rows.loc[where, "step"].iloc[0]),
            steps=int(where.sum()),
            known_steps=int(known.sum()),
            quantity=quantity.removesuffix("_low"),
            worst=float(rows.loc[where, quantity].max()),
            threshold=threshold,
            source=source,
        )


def _wind_up(use: Use, rows: pd.DataFrame, recipe: DelayedScaling) -> Iterator[Trouble]:
    """The first step at which what grew behind the clipping would be let loose."""
    staleness, amax = rows["staleness"].to_numpy(float), rows["cur_amax"].to_numpy(float)
    length = 1 if recipe.amax_compute_algo == "most_recent" else recipe.amax_history_len
    clipped = np.flatnonzero(staleness > CLIPPED_STALENESS)
    octaves = np.concatenate([[0.0], np.cumsum(np.log2(staleness[clipped]))])
    since = np.searchsorted(clipped, clipped - WINDOW, side="right")
    wound_up = octaves[1:] - octaves[since]
    for place in np.flatnonzero(wound_up >= WOUND_UP):
        step = int(clipped[place])
        later = amax[step + 1 : step + length]
        again = np.flatnonzero(later >= RELEASED * amax[step])
        if len(again):
            yield Trouble(
                kind="breaks",
                site=use.name,
                layer=use.layer,
                operand=use.operand,
                step=int(rows["step"].iloc[step + 1 + int(again[0])]),
                steps=len(clipped),
                known_steps=int(np.isfinite(staleness).sum()),
                quantity=f"octaves clipped within {WINDOW} steps before it jumps unclipped",
                worst=float(wound_up[place]),
                threshold=WOUND_UP,
                source="rare-token regression, seeds 100 to 123",
            )
            return


def _cold_start(use: Use, first: pd.Series) -> Iterator[str]:
    if first["staleness"] > CLIPPED_STALENESS:
        told = f"clips to 1/{first['staleness']:.3g} of its largest value"
    elif first["flushed_low"] > MOST:
        told = f"makes zeros of {first['flushed_low']:.0%} of what is not zero"
    else:
        return
    yield f"cold start: scale 1 {told}: {use.site} in step {int(first['step'])}"


def _not_recorded(run: Run, plan: Plan, uses: Uses) -> dict[Operand, list[str]]:
    """By operand the layers of which the plan casts it and no row is about it."""
    names = layers_of_feed_forwards(run).values()
    own = dict.fromkeys(layer for parts in names for layer in parts.values())
    layers = layers_of(run) or list(own)
    known = {(use.layer, use.operand) for use in uses.cast}
    return {
        operand: [
            layer
            for layer in layers
            if plan.covers(layer)
            and (layer, operand) not in known
            and not isinstance(plan.recipe_for(layer, operand), HighPrecision)
        ]
        for operand in OPERANDS
    }


def _in_words(plan: Plan, left: dict[Operand, list[str]]) -> dict[str, str]:
    told = {}
    for operand, layers in left.items():
        if layers:
            uses = (use for layer in layers for use in uses_in("", layer, operand, plan))
            whys = {statistics_of(use)[1]: None for use in uses if not use.is_scaled_whole}
            why = "; ".join(["not recorded", *filter(None, whys)])
            told[f"{operand} of {in_short(layers)}"] = why
    return told


def _missing(run: Run, plan: Plan, left: dict[Operand, list[str]]) -> Iterator[Missing]:
    """What to record of them, as far as they can be asked for."""
    for operand, layers in left.items():
        for layer in layers:
            if is_watchable(run, layer):
                for use in uses_in(f"{layer}:{operand}", layer, operand, plan):
                    yield from missing_of(use, None)


def _unknown(use: Use, rows: pd.DataFrame) -> dict[str, str]:
    """Each reason with the number of its steps."""
    counts = rows.loc[rows["reason"] != "", "reason"].value_counts()
    told = [
        str(reason) if count == len(rows) else f"{reason} ({count} of {len(rows)} steps)"
        for reason, count in counts.items()
    ]
    return {use.name: "; ".join(told)} if told else {}


def _own_casts(run: Run) -> Iterator[str]:
    """Whether the run was itself in FP8, or less, by what its layers say."""
    own = next(iter(low_casts(run).values()), None)
    if own is not None:
        yield (
            f"the run itself has operands in {own}: its tensors have been through its own casts "
            "already, so this tells less than a run in BF16 would"
        )


def _events_told(run: Run) -> Iterator[str]:
    events = run.events(["kind", "detail"])
    twice = "rows of one step stand twice: the last of each are taken, the others are not"
    otherwise = "rows are of layers that cast otherwise than before"
    for kind, told in {
        "repeated": twice,
        "rewound": twice,
        "converted": otherwise,
        "unconverted": otherwise,
        "nonfinite_loss": "the run's own loss is not finite",
        "nonfinite_product": "a product of the run itself is not finite",
        "diverged": "the run itself diverged",
        "rows_dropped": "rows are missing, and amaxes of delayed scales among them",
    }.items():
        steps = events.loc[events["kind"] == kind, "step"]
        if len(steps):
            yield f"from step {int(steps.min())} on {told}"
    resumed = events[events["kind"] == "resumed"]
    for step in resumed.loc[resumed["detail"].str.endswith(NOTHING_BETWEEN), "step"].unique():
        yield f"before step {step} steps are missing, and amaxes of delayed scales among them"


def _extremes(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """An operand a row: what was worst, and in how many steps it is known."""
    for (site, gemms), rows in frame.groupby(["site", "gemms"], sort=False):
        first = rows.iloc[0]
        told = {"site": site, "gemms": gemms} | {
            name: first[name] for name in ("layer", "operand", "recipe", "format")
        }
        told |= {"steps": len(rows), "known_steps": int(rows["flushed_low"].notna().sum())}
        told |= {"clipped_steps": int(rows["clipped"].fillna(False).sum())}
        names = ("staleness", "saturated_high", "flushed_high", "subnormal_high", "error")
        for name in (*names, "bulk_error"):
            worst = rows[name].max()
            told[f"largest_{name.removesuffix('_high')}"] = (
                None if np.isnan(worst) else float(worst)
            )
        yield told
