"""What other recipes would have done to the tensors of one run, as a table.

`forecast.replay` holds each recipe, with its defaults, against the rows as they were recorded. Per
tensor scales can be replayed from those; scales of blocks and rows only where a run recorded them,
and elsewhere the table says "unknown" and the note what to record. A run in FP8 has already reacted
to its own casts: what is replayed is its tensors, not the training.

It costs a tenth of a second a recipe and a thousand rows, so larger runs are left to `fp8lab
replay`, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.forecast import PRICE, Forecast, replay
from fp8lab.forecast.to_record import select_of
from fp8lab.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
)
from fp8lab.report.blocks import Folded
from fp8lab.report.story import Seen
from fp8lab.report.tables import NOTHING, Cell, Table

RECIPES: tuple[Recipe, ...] = (
    DelayedScaling(),
    Float8CurrentScaling(),
    RowwiseScaling(),
    Float8BlockScaling(),
    MXFP8BlockScaling(),
    NVFP4BlockScaling(),
)
MOST_ROWS = 10_000
HEAD = ("recipe, with its defaults", "trouble foreseen", "worst", "known of it")


def what_if(run: Seen, name: str) -> list[Table | Folded] | str:
    """A row a recipe, and behind a line what a next run has to record for all of them; or why there
    is none."""
    rows = run.run.arrow("tensors", ("step",)).num_rows
    if not rows:
        return f"no tensor of {name} was recorded"
    if rows > MOST_ROWS:
        return (
            f"{name} has {rows} tensor rows, and a page replays at most {MOST_ROWS}: "
            "fp8lab replay RUN --recipe R does it"
        )
    forecasts = [replay(run.run, recipe) for recipe in RECIPES]
    notes = [*dict.fromkeys(note for one in forecasts for note in one.notes)]
    notes += _unknown(forecasts[0].unknown)
    told = f"The tensors of {name} as they were recorded, cast by other recipes"
    rows_of = [_row(recipe, one) for recipe, one in zip(RECIPES, forecasts, strict=True)]
    blocks: list[Table | Folded] = []
    blocks.append(Table(title=told, head=HEAD, rows=rows_of, note="; ".join(notes)))
    common = select_of(missing for forecast in forecasts for missing in forecast.missing)
    if common:
        argument = Table(head=("argument of watch",), rows=[(Cell(common),)], note=PRICE)
        blocks.append(Folded("What a next run has to record for all of them", [argument]))
    return blocks


def _row(recipe: Recipe, forecast: Forecast) -> tuple[Cell, ...]:
    name = Cell(type(recipe).__name__)
    known = _known(forecast)
    if known is None:
        return name, Cell("unknown", "quiet"), NOTHING, Cell(_to_record(forecast.unknown), "quiet")
    worst = Cell(str(forecast.troubles[0])) if forecast.troubles else NOTHING
    if forecast.serious:
        first = min(forecast.serious, key=lambda trouble: trouble.step)
        told = Cell(f"{first.kind}: serious since step {first.step}", "bad")
    elif forecast.troubles:
        told = Cell(f"{forecast.troubles[0].kind}: a warning", "warn")
    else:
        counted = forecast.frame["flushed_low"].notna().any()
        told = Cell("none in what is known", "good") if counted else Cell("none by amax alone")
    return name, told, worst, Cell(known)


def _unknown(unknown: dict[str, str]) -> list[str]:
    """What no recipe could be held against, each reason once."""
    sites: dict[str, list[str]] = {}
    for site, reason in unknown.items():
        sites.setdefault(reason, []).append(site)
    return [
        f"not known, {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in sites.items()
    ]


def _known(forecast: Forecast) -> str | None:
    """Of how many rows something is known, and whether exactly; None if of none."""
    frame = forecast.frame
    counted = frame["flushed_low"].notna()
    known = frame["staleness"].notna() | counted
    if not known.any():
        return None
    counts = frame.loc[counted, ["flushed_low", "flushed_high", "saturated_low", "saturated_high"]]
    exact = counts["flushed_low"].eq(counts["flushed_high"])
    exact &= counts["saturated_low"].eq(counts["saturated_high"])
    told = f"scale in {int(known.sum())} of {len(frame)} rows, counts in {int(counted.sum())}"
    if not len(counts):
        return told
    return f"{told}, {'exact' if exact.all() else f'{int(exact.sum())} exact, else within bounds'}"


def _to_record(unknown: dict[str, str]) -> str:
    """The first reason that says what to record for a product."""
    reasons: Sequence[str] = [why for site, why in unknown.items() if ":product" in site]
    return next(iter([*reasons, *unknown.values()]), "nothing was recorded of its operands")
