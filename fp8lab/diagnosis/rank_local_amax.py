"""Cause: processes that share a layer scale its operands apart, for nobody reduces their amaxes.

Under delayed scaling the history is to hold the largest amax of all processes. Where that reduction
is missing each process has a scale of its own: the same weights give other outputs on other
processes, and the process that meets a rare large value clips it at a scale that its neighbour
would not have had. The replicas then no longer compute one model.

Seen: rows of one site and step, of several processes, whose delayed scales differ. Reduced amaxes
make them equal to the last bit, so any difference is proof that these were not. Equal scales are no
proof that they were: data parallelism that copies the first process's buffers to the others makes
them equal, of its own amaxes alone. So each scale is also held against what it leaves out. It was
made by an amax that some process met in some step; whatever any process has met since is younger,
and a history of all that still holds the one holds the other. A larger one was missed.

It sets in with the first scales that are two octaves apart, or the first amax that was missed by as
much: heavy tails alone make an octave, and E4M3 casts as well within it. Where neither is, with the
first difference of all. The site that runs first is named. Gradients come last: each process
restores its own with its own scale before they are added, so the replicas stay one model, and
gradients of different data differ by more anyway. The harm: a process clips (staleness above 2)
what a scale of all would hold.

What contradicts: scales that are made just in time, which differ with the data as they should; only
`DelayedScaling` counts. Weights whose own amaxes differ between the processes: then each holds
another layer under the name (an expert, a pipeline stage, a shard), and has its scale by right.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.rows import Rows
from fp8lab.record import CLIPPED_STALENESS, Evidence, Finding

# Of reduced amaxes, on every process: the same float32, divided once.
SAME = 1.0
# What lies between an amax and what a row tells of it: a few roundings of float32.
ROUNDING = 2.0**-16
# Clipped to a quarter, 30 % of the operand is error (facts of saturation). Measured: heavy-tailed
# inputs of two processes are up to 2.2 apart, those of which one has an outlier 5.6 and more.
HARMFUL = 4.0

REMEDY = "reduce_amax=True, in the group of all processes that hold the layer"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for the run, at the site that runs first of those that first were apart."""
    columns = ("cur_amax", "recipe", "scale", "staleness")
    sites = ("*:input", "*:weight", "*:grad_output", "*:product")
    rows = run.tensors(columns, sites=sites)
    rows = rows[(rows["rank"] >= 0) & (rows["recipe"] == "DelayedScaling") & (rows["scale"] > 0)]
    if rows["rank"].nunique() < 2:
        return []
    rows = rows[~_of_other_layers(rows)]
    if rows.empty:
        return []
    smallest = rows.groupby(["step", "site"], observed=True)["scale"].transform("min")
    largest = rows.groupby(["step", "site"], observed=True)["scale"].transform("max")
    rows = rows.assign(ratio=largest / smallest, held=rows["scale"] / smallest)
    by_site = rows.groupby("site", observed=True)
    rows = pd.concat([_with_missed(of) for _, of in by_site]).sort_index()
    rows["apart"] = rows[["ratio", "missed"]].max(axis=1)
    is_gradient = rows["site"].str.endswith(":grad_output")
    for part in (rows[~is_gradient], rows[is_gradient]):
        if (part["apart"] > SAME).any():
            return [_judge(part)]
    return []


def _of_other_layers(rows: pd.DataFrame) -> pd.Series:
    """Of each row, whether the processes have different weights in its layer."""
    weights = rows[rows["site"].str.endswith(":weight")]
    amaxes = weights.groupby(["site", "step"], observed=True)["cur_amax"].nunique()
    other = {site.removesuffix(":weight") for site, _ in amaxes.index[amaxes > 1]}
    layers = rows["site"].str.rpartition(":")[0]
    found = {
        layer: any(name == layer or name.startswith(f"{layer}.") for name in other)
        for layer in layers.unique()
    }
    return layers.map(found).astype(bool)


def _with_missed(rows: pd.DataFrame) -> pd.DataFrame:
    """A site's rows, with `made_in`, the last step before in which a process met the amax that made
    the scale (NaN if none is recorded), and `missed`, the largest amax that any process has met
    from then on, to that amax; 1 where none is larger."""
    rows = rows.assign(made_by=(rows["cur_amax"] / rows["staleness"]).where(rows["staleness"] > 0))
    met = rows.loc[rows["cur_amax"] > 0, ["step", "cur_amax"]]
    met = met.assign(made_in=met["step"], size=_rounded(met["cur_amax"]))
    wanted = rows.assign(size=_rounded(rows["made_by"])).reset_index()
    columns = ["step", "size", "made_in"]
    found = pd.merge_asof(
        wanted.sort_values("step"),
        met[columns].sort_values("step"),
        on="step",
        by="size",
        allow_exact_matches=False,
    ).set_index("index")
    rows["made_in"] = found["made_in"].reindex(rows.index)
    rows["missed"] = 1.0
    known = rows[rows["made_in"].notna()]
    largest = rows.groupby("step")["cur_amax"].max()
    if len(known):
        between = largest.index.searchsorted(known[["made_in", "step"]].to_numpy().ravel())
        since = np.maximum.reduceat(largest.to_numpy(), between)[::2] / known["made_by"]
        rows.loc[known.index, "missed"] = since.where(since > 1.0 + ROUNDING, 1.0)
    return rows


def _rounded(amaxes: pd.Series) -> pd.Series:
    """Equal for amaxes that are equal but for rounding, nearly always."""
    logs = np.log2(amaxes.where(np.isfinite(amaxes) & (amaxes > 0)))
    found: pd.Series = (logs / ROUNDING).round().fillna(-1).astype("int64")
    return found


def _onset(rows: pd.DataFrame, first: pd.Series) -> int:
    """The step of a scale that is apart; of one that missed an amax, the step after that amax."""
    if first["ratio"] == first["apart"]:
        return int(first["step"])
    of_site = rows[rows["site"] == first["site"]]
    between = (of_site["step"] >= first["made_in"]) & (of_site["step"] < first["step"])
    by = HARMFUL if first["missed"] > HARMFUL else 1.0 + ROUNDING
    missed = of_site[between & (of_site["cur_amax"] > by * first["made_by"])]
    return int(rows.loc[rows["step"] > missed["step"].min(), "step"].min())


def _judge(rows: pd.DataFrame) -> Finding:
    apart = rows[rows["apart"] > SAME]
    wide = apart[apart["apart"] > HARMFUL]
    # A product is recorded before all operands, and runs where down's input does.
    in_order = (wide if len(wide) else apart).assign(late=rows["site"].str.endswith(":product"))
    first = in_order.sort_values(["step", "late"], kind="stable").iloc[0]
    worst = apart.nlargest(1, "apart").iloc[0]
    summary = (
        f"{apart['rank'].nunique()} processes scale {apart['site'].nunique()} operands apart, or "
        f"miss each other's amaxes, by up to {worst['apart']:.3g} times"
    )
    evidence = [_evidence(first), _evidence(worst)]
    held = apart["staleness"] / apart[["held", "missed"]].max(axis=1)
    avoidable = apart[(apart["staleness"] > CLIPPED_STALENESS) & (held <= CLIPPED_STALENESS)]
    if len(avoidable):
        clipped = avoidable.nlargest(1, "staleness").iloc[0]
        summary += (
            f"; in {avoidable['step'].nunique()} steps one clipped what a scale of all would have "
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
    return Finding(
        cause="rank_local_amax",
        summary=summary,
        severity="high" if len(avoidable) else "medium",
        confidence="high",
        site=str(first["site"]),
        since=_onset(rows, first),
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude=(
            "that the processes hold different layers under one name (experts, pipeline stages) "
            "whose weights are not recorded: then each has its own amax by right"
        ),
    )


def _evidence(row: pd.Series) -> Evidence:
    is_scale = row["ratio"] >= row["missed"]
    scales = "largest scale / smallest, of all processes"
    amaxes = "largest amax of all processes since the amax that made the scale / that amax"
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity=scales if is_scale else amaxes,
        value=float(row["apart"]),
        threshold=SAME,
        source="reduced amaxes give equal scales, which hold them all",
    )
