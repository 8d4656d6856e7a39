"""Cause: processes that share a layer scale its operands apart, for nobody reduces their amaxes.

Under delayed scaling the history is to hold the largest amax of all processes. Where that reduction
is missing each process has a scale of its own: the same weights give other outputs on other
processes, and the process that meets a rare large value clips it at a scale that its neighbour
would not have had. The replicas then no longer compute one model.

Seen: rows of one site and step, of several processes, whose delayed scales differ. Reduced amaxes
make them equal to the last bit, so any difference is proof that these were not. The harm: a
process clips (staleness above 2) what the smallest of the scales in force would have held.

What contradicts: scales that are made just in time, which differ with the data as they should; only
`DelayedScaling` counts. Scales that are equal while amaxes differ are what the reduction does.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding

# Of reduced amaxes, on every process: the same float32, divided once.
SAME = 1.0

REMEDY = "reduce_amax=True, in the group of all processes that hold the layer"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for the run, at the site whose scales differ most."""
    columns = ("recipe", "scale", "staleness")
    sites = ("*:input", "*:weight", "*:grad_output", "*:product")
    rows = run.tensors(columns, sites=sites)
    rows = rows[(rows["rank"] >= 0) & (rows["recipe"] == "DelayedScaling") & (rows["scale"] > 0)]
    if rows["rank"].nunique() < 2:
        return []
    scales = rows.groupby(["step", "site"])["scale"]
    smallest = scales.transform("min")
    rows = rows.assign(ratio=scales.transform("max") / smallest)
    rows = rows.assign(reduced=rows["staleness"] * smallest / rows["scale"])
    apart = rows[rows["ratio"] > SAME]
    if apart.empty:
        return []
    avoidable = apart[
        (apart["staleness"] > CLIPPED_STALENESS) & (apart["reduced"] <= CLIPPED_STALENESS)
    ]
    return [_judge(apart, avoidable)]


def _judge(apart: pd.DataFrame, avoidable: pd.DataFrame) -> Finding:
    first, worst = apart.iloc[0], apart.nlargest(1, "ratio").iloc[0]
    sites = apart["site"].nunique()
    summary = (
        f"{apart['rank'].nunique()} processes scale {sites} operands apart, by up to "
        f"{worst['ratio']:.3g} times"
    )
    evidence = [_evidence(first), _evidence(worst)]
    if len(avoidable):
        clipped = avoidable.nlargest(1, "staleness").iloc[0]
        summary += (
            f"; in {avoidable['step'].nunique()} steps one clipped what another's scale would have "
            f"held, at worst process {int(clipped['rank'])} to 1/{clipped['staleness']:.3g}"
        )
        evidence.append(
            Evidence(
                step=int(clipped["step"]),
                site=str(clipped["site"]),
                quantity=f"staleness in process {int(clipped['rank'])}",
                value=float(clipped["staleness"]),
                threshold=CLIPPED_STALENESS,
                source="more than an octave",
            )
        )
        worst = clipped
    return Finding(
        cause="rank_local_amax",
        summary=summary,
        severity="high" if len(avoidable) else "medium",
        confidence="high",
        site=str(worst["site"]),
        since=int(first["step"]),
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude=(
            "that the processes hold different layers under one name (experts, pipeline stages): "
            "then each has its own amax by right"
        ),
    )


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="largest scale / smallest, of all processes",
        value=float(row["ratio"]),
        threshold=SAME,
        source="reduced amaxes give equal scales",
    )
