"""Cause: the label lies: a run that is called FP8 has layers that compute in high precision.

A layer that was never converted, left out by a pattern that matches too much, overridden, or
replaced in mid-training by one that nobody converted, trains as well as ever. What is wrong is
every conclusion: "FP8 is fine here" was never tried.

What was declared is the plan in the run's config (`config["recipe"]`, as experiments write it).
What was done is in the same run: the precision that each layer says of itself when watching starts,
the linear layers that are there at all, and the format in each step's row of each operand. Seen:
an operand of a GEMM for which the plan says 8 bits or less and the layer 16 or more, or nothing;
later, a row without its cast (a layer turned back), or no row of a layer while others go on (one
replaced: hooks hang on the old one).

What contradicts: the plan's own `exclude` and overrides, which are part of the label; a mitigation
that is declared beside the plan and keeps the product in BF16; layers of a class that fp8lab does
not know (another library's), which say nothing either way; a run without a declared plan.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pandas as pd

from fp8lab.diagnosis.not_fp8 import WIDE
from fp8lab.diagnosis.rows import Rows, facts_of
from fp8lab.plan import Plan, recipe_from_dict
from fp8lab.recipe import GEMMS, OPERANDS, direction_of, operand_format
from fp8lab.record import Evidence, Finding, Severity

NARROW_BITS = 8
# Steps without a cast, or without the layer, up to the run's last one.
STEPS = 3

REMEDY = "convert the layer, or declare it: exclude it in the plan, or give it an override"
_HIDES = (
    "that the layer casts in a way that fp8lab does not see: `fp8lab show` prints what each layer "
    "says of itself"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for all layers that lie from the start, one for each that does so later."""
    plan = _plan(run.info)
    if plan is None:
        return []
    promised = _promised(run.info, plan)
    lying = {layer: found for layer, uses in promised.items() if (found := _broken(run.info, uses))}
    findings = [_from_the_start(lying)] if lying else []
    return findings + _later(run, [layer for layer in promised if layer not in lying])


def _plan(info: dict[str, Any]) -> Plan | None:
    config = info.get("config")
    data = config.get("recipe") if isinstance(config, dict) else None
    try:
        return recipe_from_dict(_without_functions(data), "recipe")
    except ValueError:
        return None


def _without_functions(data: Any) -> Any:
    """A plan's dictionary as far as it can be read back: what a function is, its name cannot say,
    and no function changes a format."""
    if not isinstance(data, dict):
        return data
    return {
        key: _without_functions(value)
        for key, value in data.items()
        if not (isinstance(value, str) and value.startswith("function "))
    }


def _promised(info: dict[str, Any], plan: Plan) -> dict[str, list[tuple[str, str, str]]]:
    """Layer -> (layer, operand@gemm, format) of what the plan has in 8 bits or less."""
    balanced = "HighPrecision" in str(info["config"].get("mitigations"))
    precision = facts_of(info, "precision")
    promised = {}
    for layer, facts in facts_of(info, "linears").items():
        unknown = facts.get("class") != "Linear" and layer not in precision
        if unknown or not plan.covers(layer):
            continue
        uses = []
        for gemm, operands in GEMMS.items():
            for operand in operands:
                recipe = plan.recipe_for(layer, operand, gemm)
                fmt = operand_format(recipe, operand, direction_of(operand, gemm))
                if fmt.bits <= NARROW_BITS and not (balanced and operand == "input"):
                    uses.append((layer, f"{operand}@{gemm}", fmt.name))
        if uses:
            promised[layer] = uses
    return promised


def _broken(
    info: dict[str, Any], uses: list[tuple[str, str, str]]
) -> list[tuple[str, str, str, str]]:
    """The promises that a layer does not keep, with what it does instead."""
    precision = facts_of(info, "precision")
    said = [(*use, str(precision.get(use[0], {}).get(use[1], "no cast"))) for use in uses]
    return [use for use in said if use[3].startswith((*WIDE, "no cast"))]


def _from_the_start(lying: dict[str, list[tuple[str, str, str, str]]]) -> Finding:
    layer, broken = next(iter(lying.items()))
    _, use, promised, instead = broken[0]
    named = ", ".join(list(lying)[:4]) + (", …" if len(lying) > 4 else "")
    return _finding(
        f"{layer}:{use.partition('@')[0]}",
        0,
        f"{len(lying)} layers ({named}) are not what the plan says: {use} is to be {promised} and "
        f"is {instead}",
        Evidence(
            step=0,
            site=layer,
            quantity="operands of GEMMs in high precision against the plan",
            value=float(len(broken)),
            threshold=0.0,
            source="the run's config",
        ),
        "high",
    )


def _later(run: Rows, layers: list[str]) -> list[Finding]:
    sites = tuple(f"{layer}:{operand}" for layer in layers for operand in OPERANDS)
    if not sites:
        return []
    # "count" is there whether or not a cast was.
    rows = run.tensors(("count", "format"), sites="*:input")
    rows = rows[rows["rank"] >= 0]
    if rows.empty:
        return []
    events = run.events()
    failed = set(events.loc[events["kind"] == "not_recorded", "site"])
    lasts = rows.groupby("rank")["step"].max()  # one process may be ahead of another
    rows = rows[rows["site"].isin(sites)]
    found = []
    for site, of_site in rows.groupby("site", observed=True):
        last = int(lasts[of_site["rank"].unique()].min())
        layer = str(site).rpartition(":")[0]
        if layer not in failed:
            found += _turned(layer, of_site, last) or _vanished(layer, of_site, last)
    return found


def _turned(layer: str, rows: pd.DataFrame, last: int) -> list[Finding]:
    """A layer whose input was cast to FP8 and from some step on is not."""
    narrow = rows["format"].notna() & ~rows["format"].isin(WIDE)
    after = rows[rows["step"] > rows.loc[narrow, "step"].max()] if narrow.any() else rows[:0]
    if after["step"].nunique() < STEPS:
        return []
    first = after.iloc[0]
    kind = "not cast at all" if pd.isna(first["format"]) else f"cast to {first['format']}"
    summary = f"its input was {rows.loc[narrow, 'format'].iloc[0]} and is {kind} in the last "
    since, steps = int(first["step"]), after["step"].nunique()
    evidence = _steps_without(layer, since, steps, "its input without its cast")
    return [_finding(f"{layer}:input", since, f"{summary}{steps} steps", evidence, "high")]


def _vanished(layer: str, rows: pd.DataFrame, last: int) -> list[Finding]:
    """A layer that no hook saw any more while others went on."""
    seen = sorted(rows["step"].unique())
    if not rows["format"].notna().any() or len(seen) < 2:
        return []
    pace = max(after - before for before, after in pairwise(seen))
    missing = (last - seen[-1]) // pace
    if missing < STEPS:
        return []
    since = int(seen[-1] + pace)
    summary = f"nothing ran through this layer in the last {missing} steps: was it replaced?"
    evidence = _steps_without(layer, since, int(missing), "the layer")
    return [_finding(f"{layer}:input", since, summary, evidence, "medium")]


def _steps_without(layer: str, since: int, steps: int, what: str) -> Evidence:
    return Evidence(
        step=since,
        site=f"{layer}:input",
        quantity=f"recorded steps without {what}",
        value=float(steps),
        threshold=float(STEPS),
        source="up to the last one",
    )


def _finding(
    site: str, since: int, summary: str, evidence: Evidence, confidence: Severity
) -> Finding:
    return Finding(
        cause="precision_label",
        summary=summary,
        severity="medium",
        confidence=confidence,
        site=site,
        since=since,
        evidence=(evidence,),
        remedy=REMEDY,
        cannot_exclude=_HIDES,
    )
