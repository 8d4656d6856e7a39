"""Pictures of where in a model it happens: layers by step, channels by step, the rows of a channel.

As in `pictures`, each function is one picture: rows in, a drawn figure out, or what is missing.
A model may have a hundred layers and a run ten thousand steps: a map has at most `MAP_COLUMNS`
columns, each the largest of its steps, and a page's height has an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8lab.report.drawing import (
    ARM_STYLES,
    BLUE,
    FAINT,
    INK,
    QUIET,
    RED,
    handles,
    legend,
    line,
    log_axis,
    mark,
    new_figure,
    plain,
    points,
    power_of_ten,
    say_if_empty,
    step_axis,
    track,
)
from fp8lab.report.story import Place, Seen

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_COLUMNS = 240
EVEN = 8.0  # a map whose values are all within this factor is pale
HOT_CHANNELS = 5
LABELLED = 28  # of more layers, not every one is named
# Whose large values are the bad ones, in the order in which they are looked for.
_TELLING = ("staleness", "cur_amax")
_ALSO_TELLING = ("flushed", "saturated", "bulk_error", "token_ratio", "gemm_error", *_TELLING)


def telling_statistic(run: Seen) -> str | None:
    """The statistic of the products that the worst finding rests on, if it has one for all of them;
    else staleness, else amax; None if no product was recorded."""
    named = [one.quantity for found in run.diagnosis.findings for one in found.evidence]
    for name in [name for name in named if name in _ALSO_TELLING] + list(_TELLING):
        if name in run.products and run.products[name].notna().any():
            return name
    return None


def map_of(run: Seen, statistic: str) -> tuple[list[str], Any, Any]:
    """Sites [sites], the first step of each column [columns + 1, the last one its end], and the
    largest value of the column's steps [sites, columns], NaN where none was recorded."""
    rows = run.products[["step", "site", statistic]].dropna()
    steps, at = np.unique(rows["step"].to_numpy(np.int64), return_inverse=True)
    sites = list(dict.fromkeys(run.products["site"]))
    columns = min(MAP_COLUMNS, len(steps))
    group = np.arange(len(steps)) * columns // max(1, len(steps))
    values = np.full((len(sites), columns), np.nan)
    row_of = rows["site"].map({site: row for row, site in enumerate(sites)}).to_numpy(np.int64)
    np.fmax.at(values, (row_of, group[at]), rows[statistic].to_numpy(float))
    starts = steps[np.searchsorted(group, np.arange(columns))]
    gap = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    return sites, np.append(starts, steps[-1:] + gap), values


def heat(run: Seen, statistic: str) -> Figure | str:
    """One statistic of the product, layer by step, dark where it is large; findings are marked."""
    from matplotlib.colors import LogNorm
    from seaborn import color_palette

    sites, edges, values = map_of(run, statistic)
    if np.isnan(values).all():
        return f"{statistic} was not recorded"
    finite, infinite = values[np.isfinite(values)], np.isposinf(values)
    figure = new_figure(_height(len(sites), 0.22) + 0.9)
    axes = figure.subplots()
    positive = finite[finite > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    top = max(high, EVEN * low)
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(sites) + 1),
        np.where(infinite, 2.0 * top, np.clip(values, low, high)),
        cmap=color_palette("rocket_r", as_cmap=True).with_extremes(over=BLUE),
        norm=LogNorm(low, top),
        rasterized=True,
    )
    axes.patch.set(facecolor="#ffffff", hatch="////", edgecolor=FAINT)
    bar = figure.colorbar(mesh, ax=axes, aspect=12 + 0.6 * len(sites), pad=0.01)
    bar.outline.set_visible(False)
    log_axis(bar.ax.yaxis, [low, top])
    also = ", blue is infinite" if infinite.any() else ""
    axes.set_title(f"{statistic} of every gate product, by step: darker is larger{also}")
    axes.set_ylim(len(sites), 0)
    _name_sites(axes, sites, 0.5)
    axes.set_xlabel("step")
    step_axis(axes)
    axes.grid(False)
    _mark_findings(axes, run, sites)
    return figure


def _mark_findings(axes: Axes, run: Seen, sites: Sequence[str]) -> None:
    """Where and since when, of findings above "low"."""
    marks = {
        (finding.since, sites.index(finding.site) + 0.5)
        for finding in run.diagnosis.findings
        if finding.site in sites and finding.since is not None and finding.severity != "low"
    }
    if marks:
        x, y = zip(*sorted(marks), strict=True)
        mark(axes, x, y, "v")
        legend(axes, {"a finding, from there on": (INK, "", "v")})


def _height(sites: int, each: float) -> float:
    """Inches for a row a layer, and no more than a page for any number of them."""
    return min(0.5 + each * sites, 8.0)


def _name_sites(axes: Axes, sites: Sequence[str], offset: float) -> None:
    """Every layer's name; of many layers, names far enough apart to be read."""
    apart = -(-len(sites) // LABELLED)
    named = range(0, len(sites), apart)
    axes.set_yticks([place + offset for place in named], [plain(sites[place]) for place in named])


def channels(run: Seen, place: Place) -> Figure | str:
    """The largest product and the alignment of a layer's hot channels, by step."""
    rows = run.channels[run.channels["site"] == place.module].dropna(subset="product_amax")
    if rows.empty:
        return f"no channel of {place.module} was recorded"
    figure = new_figure(5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    keys: dict[str, tuple[str, Any, str]] = {"median channel": (FAINT, "-", "")}
    typical = rows.assign(median=rows["product_amax"] / rows["channel_ratio"])
    medians = typical.groupby("step")["median"].first().reset_index()
    line(upper, *points(medians, "median"), color=FAINT, linewidth=2.5)
    for position, channel in enumerate(hot_channels(rows, place.channel)):
        mine = rows[rows["channel"] == channel]
        colour, dash, marker = ARM_STYLES[position % len(ARM_STYLES)]
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker}
        look |= {"markersize": 3.5, "markevery": max(1, len(mine) // 16)}
        look |= {"linewidth": 1.0 if position else 2.0}
        line(upper, *track(mine, "product_amax", rows["step"]), **look)
        x, cosines = track(mine, "alignment", rows["step"])
        line(lower, x, np.abs(cosines), **look)
        keys[f"channel {channel}"] = (colour, dash, marker)
    log_axis(upper.yaxis, rows["product_amax"].to_numpy(float))
    upper.set_title(f"Largest product in the hot channels of {plain(place.module, 60)}")
    upper.set_ylabel("amax of the channel")
    lower.set_title("Their alignment: |cos(gate row, up row)|")
    lower.set(ylabel="|cosine|", xlabel="step", ylim=(0, 1.02))
    step_axis(lower)
    say_if_empty(lower, points(rows, "alignment")[1])
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=len(keys))
    return figure


def hot_channels(rows: pd.DataFrame, first: int) -> list[int]:
    """The channel that a run is looked at, then those with the largest products."""
    largest = rows.groupby("channel")["product_amax"].max().sort_values(ascending=False)
    return list(dict.fromkeys([first, *map(int, largest.index)]))[:HOT_CHANNELS]


def weights(run: Seen, rows: Sequence[pd.Series], peak: pd.DataFrame) -> Figure:
    """Gate row against up row of one channel, at one or two recorded steps; then, where there are
    `peak` rows, the channels of the step of its largest product: gate amax against up amax."""
    panels = len(rows) + bool(len(peak))
    figure = new_figure(4.0, width=min(9.6, 3.7 * panels + 0.2))
    grid = figure.subplots(1, panels, squeeze=False)[0]
    limit = 1.08 * max(
        (float(np.abs(row[name]).max()) for row in rows for name in ("gate_weights", "up_weights")),
        default=1.0,
    )
    limit = limit if np.isfinite(limit) and limit > 0 else 1.0
    for axes, row, marker in zip(grid, rows, ("o", "D"), strict=False):
        _weights_panel(axes, row, marker, limit)
        alignment = f", cosine {row['alignment']:.2f}" if np.isfinite(row["alignment"]) else ""
        axes.set_title(f"{run.when(int(row['step']))}{alignment}", fontsize=9.5)
    if len(rows):
        grid[0].set_ylabel("weight in the up row")
    if len(peak):
        _peak_panel(grid[-1], run, peak)
    return figure


def _weights_panel(axes: Axes, row: pd.Series, marker: str, limit: float) -> None:
    """A point an input dimension; the one that adds most to both rows' product has a ring."""
    gate, up = np.asarray(row["gate_weights"], float), np.asarray(row["up_weights"], float)
    axes.axline((0, 0), slope=1, color=FAINT, linewidth=0.8, zorder=0)
    axes.axline((0, 0), slope=-1, color=FAINT, linewidth=0.8, zorder=0)
    axes.scatter(gate, up, s=16, marker=marker, color=BLUE, linewidths=0, alpha=0.7)
    strongest = int(np.argmax(np.abs(gate * up)))
    axes.scatter(gate[strongest], up[strongest], s=110, facecolors="none", edgecolors=RED, zorder=5)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.locator_params(nbins=5)
    axes.set_xlabel("weight in the gate row")
    axes.grid(False)


def _peak_panel(axes: Axes, run: Seen, peak: pd.DataFrame) -> None:
    """A point a recorded channel; the first row is the one looked at, on its own product's line.

    A channel whose gate and up are largest in the same token lies near the line of its product,
    as far as the activation is the identity; one whose are not lies beyond it.
    """
    hot, largest = peak.iloc[0], peak.iloc[int(peak["product_amax"].to_numpy(float).argmax())]
    gate, up = peak["gate_amax"].to_numpy(float), peak["up_amax"].to_numpy(float)
    wide, high = ((values.min() / 2, values.max() * 2) for values in (gate, up))
    log_axis(axes.xaxis, wide)
    log_axis(axes.yaxis, high)
    axes.scatter(gate[1:], up[1:], s=16, marker="o", color=QUIET, linewidths=0)
    for row, marker, colour in ((largest, "D", INK), (hot, "X", RED)):
        at = float(row["gate_amax"]), float(row["up_amax"])
        axes.plot(*at, marker, color=colour, markersize=8, zorder=5)
        axes.annotate(
            f"{int(row['channel'])}", at, xytext=(7, 3), textcoords="offset points", zorder=6
        )
    ends = np.array(wide)
    axes.plot(ends, hot["product_amax"] / ends, color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=wide, ylim=high)
    product = power_of_ten(float(f"{hot['product_amax']:.3g}"))
    axes.set_title(f"{run.when(int(hot['step']))}, product {product}", fontsize=9.5)
    axes.set_xlabel("largest gate of a channel")
    axes.set_ylabel("largest up of a channel")
    axes.grid(False)


def peak_rows(run: Seen, place: Place) -> pd.DataFrame:
    """The channels of the place's layer in the step of its channel's largest product, that channel
    first; empty where none was recorded with its gate and up."""
    import pandas as pd

    rows: pd.DataFrame = run.channels[run.channels["site"] == place.module]
    amaxes = rows[["product_amax", "gate_amax", "up_amax"]].to_numpy(float)
    known: pd.DataFrame = rows[(np.isfinite(amaxes) & (amaxes > 0)).all(axis=1)]
    mine = known["channel"] == place.channel
    if not mine.any():
        return known.iloc[:0]
    there = known["step"].eq(known.loc[mine].nlargest(1, "product_amax")["step"].iloc[0])
    return pd.concat([known[there & mine].iloc[:1], known[there & ~mine]])


def layers(runs: Sequence[tuple[str, Seen]], early: int, late: int) -> Figure | str:
    """Product amax of every layer at two steps, a panel a run."""
    sites = list(dict.fromkeys(site for _, run in runs for site in run.products["site"]))
    if not sites:
        return "no gate product was recorded"
    figure = new_figure(_height(len(sites), 0.28) + 0.9)
    grid = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    amaxes: list[float] = []
    for axes, (title, run) in zip(grid, runs, strict=True):
        axes.set_title(plain(title))
        amaxes += _layers_panel(axes, run, sites, (early, late))
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlabel("amax of the product")
        axes.grid(True, axis="x")
    _name_sites(grid[0], sites, 0.0)
    log_axis(grid[0].xaxis, np.array(amaxes))
    first = runs[0][1]
    keys = {first.when(early): (QUIET, "", "o"), first.when(late): (RED, "", "D")}
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=2)
    return figure


def _layers_panel(
    axes: Axes, run: Seen, sites: Sequence[str], steps: tuple[int, int]
) -> Iterable[float]:
    """A line a layer, from the early step to the late one; returns all that it drew."""
    rows, drawn = run.products, []
    ends = [rows[rows["step"] == step].set_index("site")["cur_amax"].to_dict() for step in steps]
    size = 6.0 if len(sites) <= LABELLED else 3.5
    for position, site in enumerate(sites):
        pair = [float(end.get(site, np.nan)) for end in ends]
        drawn += pair
        axes.plot(pair, [position] * 2, color=FAINT, linewidth=2, zorder=1)
        axes.plot(pair[0], position, "o", color=QUIET, markersize=size)
        axes.plot(pair[1], position, "D", color=RED, markersize=size)
    return drawn
