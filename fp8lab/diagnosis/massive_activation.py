"""Cause: a massive activation in the residual stream: one channel, for no scale's doing.

A row of down that is colinear with a left singular direction u_i of up makes a large output of
ordinary inputs, y = sum_i s_i (w . u_i)(v_i . x) (TWEO, 2511.23225), and the residual stream hands
it on to every later layer. Massive is what is above 100 and at least about 1000 times the median
magnitude (2402.17762). In FP8 such a channel takes the range of every operand made of the stream.

Seen: the largest magnitude of a block's output against its median, which the row's histogram tells
to a quarter of an octave. The first layer, in the model's order, in which the stream is massive is
the place; the later ones have it from there. The onset is where the amax left the ordinary: that of
the block's feed-forward if its output is as large, else that of the stream.

What contradicts: a stream that is large as a whole; one that is large in single steps, when a rare
token comes; another channel every time. Nor is every massive activation harmful: models
use a few as fixed biases (2503.22329), so without a loss that went wrong it is no more than medium.
"""

from __future__ import annotations

from glob import escape
from typing import Any

import numpy as np
import pandas as pd

from fp8lab.diagnosis.growth import departure
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding
from fp8lab.sketch import bin_edge

MASSIVE = 100.0  # 2402.17762
TIMES_MEDIAN = 1000.0  # the same: "at least or around 1000 times the median"

LASTS = 5  # steps; a rare token's are one in many, and a run that blows up ends sooner
MOST = 0.5  # of the steps from the first one on

COUNTS = ("count", "zeros", "histogram_start", "histogram")
COLUMNS = ("cur_amax", "hot_channel", *COUNTS)
REMEDY = (
    "TWEO's loss on block outputs, or a layer norm after the feed-forward; block or row-wise "
    "scales for what reads the stream"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding, for the first layer whose output is massive."""
    rows = run.tensors(("cur_amax", "hot_channel"), sites="*:residual")
    rows = rows[(rows["rank"] >= 0) & rows["cur_amax"].notna()]
    large = rows.loc[rows["cur_amax"] > MASSIVE, "site"].unique()
    if not len(large):
        return []
    # The histograms, which are most of a row, of those sites alone.
    massive = run.tensors(COLUMNS, sites=tuple(escape(site) for site in large))
    massive = massive[(massive["rank"] >= 0) & (massive["cur_amax"] > MASSIVE)]
    columns = zip(*(massive[name] for name in COUNTS), strict=True)
    medians = np.array([_median(*counts) for counts in columns])
    massive = massive.assign(ratio=massive["cur_amax"].to_numpy(float) / medians)
    massive = massive[massive["ratio"] >= TIMES_MEDIAN]
    lasting = [str(name) for name, of in massive.groupby("site", observed=True) if _lasts(of, rows)]
    if not lasting:
        return []
    site = min(lasting, key=in_order)
    crossed = massive[massive["site"] == site]
    maker = _maker(run, site, crossed.iloc[0])
    series = rows[rows["site"] == site] if maker is None else maker
    return [_finding(run, crossed, series, maker)]


def _lasts(massive: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Whether the stream stays massive, in one channel as far as that is known."""
    steps = rows.loc[rows["step"] >= massive["step"].iloc[0], "step"].nunique()
    channels = massive["hot_channel"].dropna().value_counts()
    same = massive["step"].nunique() if channels.empty else channels.iloc[0]
    return len(massive) >= LASTS and bool(same >= MOST * steps)


def _maker(run: Rows, site: str, crossed: pd.Series) -> pd.DataFrame | None:
    """The rows of the feed-forward in the block whose output has the size, if one has."""
    block = site.removesuffix(":residual")
    outputs = run.tensors("cur_amax", sites=f"{block}.*:output")
    outputs = outputs[outputs["rank"] >= 0]
    there = outputs[outputs["step"] == crossed["step"]]
    made = there[there["cur_amax"] > crossed["cur_amax"] / 2]
    return None if made.empty else outputs[outputs["site"] == made["site"].iloc[0]]


def _finding(
    run: Rows, massive: pd.DataFrame, series: pd.DataFrame, maker: pd.DataFrame | None
) -> Finding:
    crossed, worst = massive.iloc[0], massive.nlargest(1, "ratio").iloc[0]
    amax = series.groupby("step")["cur_amax"].max().dropna()
    place = int(np.searchsorted(amax.index.to_numpy(), crossed["step"]))
    alarm = loss_alarm(run)
    # Most large models have one, and train well with it: what counts is one that comes.
    was_there = crossed["step"] == amax.index[0]
    told = f"the residual stream reached {worst['cur_amax']:.3g}, {worst['ratio']:.3g} times its "
    told += "median magnitude"
    told += "" if maker is None else f"; {maker['site'].iloc[0]} made it"
    return Finding(
        cause="massive_activation",
        summary=told,
        severity="high" if alarm is not None else "low" if was_there else "medium",
        confidence="high",
        site=str(crossed["site"]),
        channel=None if pd.isna(worst["hot_channel"]) else int(worst["hot_channel"]),
        since=int(amax.index[departure(amax.to_numpy(float), place)]),
        evidence=tuple(_evidence(row) for row in (crossed, worst)),
        remedy=REMEDY,
        cannot_exclude=(
            "that the model needs it, as a fixed bias; down's rows against the singular directions "
            "of up tell whether the weights make it of ordinary inputs"
        ),
    )


def _median(count: float, zeros: float, start: float, histogram: Any) -> float:
    """Upper edge of the bin in which half of the elements are reached; infinite where unknown."""
    if histogram is None or len(histogram) == 0 or pd.isna(count):
        return float("inf")
    reached = zeros + np.cumsum(histogram)
    inside = int(np.searchsorted(reached, count / 2))
    return bin_edge(int(start) + min(inside, len(reached) - 1) + 1)


def in_order(site: str) -> list[tuple[bool, int, str]]:
    """A key that sorts sites as the model has them: layers.2 before layers.10."""
    parts = site.replace(":", ".").split(".")
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="amax / median magnitude",
        value=float(row["ratio"]),
        threshold=TIMES_MEDIAN,
        source="2402.17762",
    )
