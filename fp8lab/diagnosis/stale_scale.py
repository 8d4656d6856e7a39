"""Cause: a delayed scale is that of another time, because its history is too long or too short.

Too long: the history remembers one large step, or weights that have become smaller since, and until
it ends the scale is too small: the operand lies far below the format's largest value (a staleness,
amax / the amax that made the scale, far below 1) and becomes zero or subnormal, for many steps. It
began where the history's value was last seen. What contradicts: the same operand flushed just as
much in steps whose scale is fresh (`bulk_underflow`, or values of which many are next to nothing);
a scale of 1 (`cold_start`).

Too short: what comes back now and then has been forgotten each time, and is clipped each time. The
operand had been as large before: a longer history would have held it. What contradicts: a jump to
where the operand has never been (no history holds that); a single token that stands out
(`token_outlier`); a product that jumps without its input, which begins in the multiplication
(`delayed_saturation`: what makes that harmful is what grows behind the clipping).

Of several operands the one that runs first among those that began first is named.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from fp8lab.diagnosis.casts import clipped, comes_from_input, forward_casts
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding, Severity

# Of E4M3's 17.8 octaves above zero six are unused: beyond what amaxes do from step to step.
STALE = 2.0**-6
# Share of the non-zero values that became zero: real, and so many that the operand is lost.
FLUSHED, LOST = 0.25, 0.5
# Or an error of 8 %, three times E4M3's own rounding: fewer are zero, and nearly all subnormal.
WORN_DB = 21.9
# So many steps make it the scale's, not a step's.
STEPS = 3
# At the amax that made it the scale flushes so much less.
FRESH, RATIO = 0.5, 0.5

# The error of clipping to a quarter, 30 % of the operand: facts of the saturation of outliers.
BAD_DB = 10.0
# So many times it was clipped at what it had been at before.
FORGOTTEN = 2

TOO_LONG = "a shorter amax_history_len, or a scale made just in time (Float8CurrentScaling)"
TOO_SHORT = "a longer amax_history_len, a margin, or a scale made just in time"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """At most one finding of either kind."""
    rows = forward_casts(run)
    delayed = rows[rows["staleness"].notna() & ~rows["cold"]]
    stale = delayed["site"].where(_is_stale(delayed)).value_counts()
    suspects = delayed[delayed["site"].isin(stale.index[stale >= STEPS])]
    long = [_remembered(of) for _, of in suspects.groupby("site", observed=True)]
    over = clipped(rows)
    products = over[over["site"].str.endswith(":product")]
    own = products.index[~comes_from_input(products, rows)]
    over = over[~over["by_token"]].drop(own, errors="ignore")
    short = [_forgotten(of, delayed) for _, of in over.groupby("site", observed=True)]
    return _first(long, _judge_long) + _first(short, _judge_short)


def _is_stale(rows: pd.DataFrame) -> pd.Series:
    is_worn = (rows["flushed"] >= FLUSHED) | (rows["sqnr_db"] <= WORN_DB)
    return (rows["staleness"] <= STALE) & is_worn


def _remembered(rows: pd.DataFrame) -> pd.DataFrame:
    stale = rows[_is_stale(rows)]
    usual = rows.loc[rows["staleness"] > FRESH, "flushed"].median()
    if usual > RATIO * stale["flushed"].median():
        return stale.iloc[:0]
    # The last step before that was as large as the scale says: there the scale became another's.
    first = stale.iloc[0]
    remembered = first["cur_amax"] / first["staleness"]
    before = rows[(rows["step"] < first["step"]) & (rows["cur_amax"] >= remembered / 2)]
    since: pd.DataFrame = pd.concat([before.tail(1), stale])
    return since


def _forgotten(over: pd.DataFrame, delayed: pd.DataFrame) -> pd.DataFrame:
    rows = delayed[delayed["site"] == over["site"].iloc[0]]
    known = rows["cur_amax"].cummax().shift()
    again = over["cur_amax"] <= CLIPPED_STALENESS * known.reindex(over.index)
    return over if again.sum() >= FORGOTTEN else over.iloc[:0]


def _first(sites: list[pd.DataFrame], judge: Callable[[pd.DataFrame], Finding]) -> list[Finding]:
    found = [rows for rows in sites if len(rows)]
    found.sort(key=lambda rows: (rows["step"].iloc[0], rows["depth"].iloc[0]))
    return [judge(rows) for rows in found[:1]]


def _judge_long(stale: pd.DataFrame) -> Finding:
    first, worst = stale.iloc[0], stale.nlargest(1, "flushed").iloc[0]
    stale = stale[stale["staleness"] <= STALE]
    lost = (stale["flushed"] >= LOST).sum() >= STEPS
    return _finding(
        summary=(
            f"in {len(stale)} steps the scale is that of a value {1 / worst['staleness']:.3g} "
            f"times larger than any there: {worst['flushed']:.0%} of what is not zero became zero"
        ),
        severity="high" if lost else "medium",
        rows=(first, worst),
        quantities=(
            ("staleness", STALE, "six octaves"),
            ("flushed", LOST, "the majority") if lost else ("flushed", FLUSHED, "a quarter"),
        ),
        at_most=("staleness",),
        remedy=TOO_LONG,
        cannot_exclude="that what the history remembers is itself the fault: look at that step",
    )


def _judge_short(over: pd.DataFrame) -> Finding:
    bad = over[over["sqnr_db"] <= BAD_DB]
    is_bad = len(bad) > FORGOTTEN
    # Heavy tails are a little beyond the last steps' amax now and then: that is not when it began.
    first, worst = (bad if is_bad else over).iloc[0], over.nlargest(1, "staleness").iloc[0]
    return _finding(
        summary=(
            f"in {len(over)} steps the operand was clipped, at worst to 1/{worst['staleness']:.3g} "
            "of a size that it had had before: the history had forgotten it"
        ),
        severity="high" if is_bad else "low",
        rows=(first, worst),
        at_most=("sqnr_db",),
        quantities=(
            ("staleness", CLIPPED_STALENESS, "more than an octave"),
            ("sqnr_db", BAD_DB, "clipped to a quarter"),
        ),
        remedy=TOO_SHORT,
        cannot_exclude="that the steps that come back are bad data: look at their batches",
    )


def _finding(
    summary: str,
    severity: Severity,
    rows: tuple[pd.Series, pd.Series],
    quantities: tuple[tuple[str, float, str], ...],
    at_most: tuple[str, ...],
    remedy: str,
    cannot_exclude: str,
) -> Finding:
    return Finding(
        cause="stale_scale",
        summary=summary,
        severity=severity,
        confidence="high" if severity == "high" else "medium",
        site=str(rows[0]["site"]),
        since=int(rows[0]["step"]),
        evidence=tuple(
            _evidence(row, *quantity, at_most=quantity[0] in at_most)
            for row in rows
            for quantity in quantities
            if pd.notna(row[quantity[0]])
        ),
        remedy=remedy,
        cannot_exclude=cannot_exclude,
    )


def _evidence(row: pd.Series, name: str, threshold: float, source: str, at_most: bool) -> Evidence:
    """The first row may be where the scale is from: what it reaches no threshold with has none."""
    value = float(row[name])
    reached = value <= threshold if at_most else value >= threshold
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity=name,
        value=value,
        threshold=threshold if reached else None,
        source=source if reached else "the scale is from here" if name == "staleness" else "",
        at_most=at_most,
    )
