"""The pictures: rows in, a drawn figure out, or one line that says what is missing.

Each function is one picture and picks its own columns; what they share, from the palette to the
log axis, is in `drawing`. All of them are called under `drawing.style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8lab import formats
from fp8lab.record import CLIPPED_STALENESS
from fp8lab.report.drawing import (
    ARM_STYLES,
    BLUE,
    FAINT,
    INK,
    LONG,
    ORANGE,
    QUIET,
    RED,
    handles,
    legend,
    line,
    log_axis,
    new_figure,
    plain,
    points,
    power_of_ten,
    say_if_empty,
    wrapped,
)
from fp8lab.report.story import Arm, Part, Place, Seen, superscript
from fp8lab.sketch import bin_edge

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOST = 30.0  # a loss beyond this multiple of where it started is drawn at the top


def losses(part: Part) -> Figure | str:
    """Loss of every run, a panel an arm; the same training in high precision lies behind it."""
    arms = [arm for arm in part.arms if any(len(_loss(run)[0]) for run in arm.runs)]
    if not arms:
        return "no finite loss was recorded"
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = new_figure(2.2 * rows + 0.7)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    curves = {run.label: _loss(run) for run in part.runs}
    values = [curve for _, curve in curves.values() if len(curve)]
    start = max(float(curve[0]) for curve in values)
    top = LOST * start if start > 0 else np.inf
    for axes, arm in zip(grid.flat, arms, strict=False):
        axes.set_title(wrapped(arm.title), fontsize=9)
        reference = part.reference_of(arm)
        for run in reference.runs if reference is not None else ():
            line(axes, *curves[run.label], color=FAINT, linewidth=0.5)
        for run in arm.runs:
            x, curve = curves[run.label]
            lost = run.diverged_at is not None
            colour = RED if lost else BLUE if run.decided else ORANGE
            line(axes, x, np.minimum(curve, top), color=colour, linewidth=0.7)
            if lost and len(x):
                end = min(float(curve[-1]), top)
                axes.plot(x[-1], end, "X", color=RED, markersize=6.5, clip_on=False, zorder=5)
    log_axis(grid[0, 0].yaxis, np.minimum(np.concatenate(values), top))
    for axes in list(grid.flat)[len(arms) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=9.5)
    figure.supylabel(_loss_name(part.runs), fontsize=9.5)
    keys = {"survived": (BLUE, "-", ""), "diverged, × its end": (RED, "-", "X")}
    if any(not run.decided for run in part.runs):
        keys["not finished"] = (ORANGE, "-", "")
    if any(part.reference_of(arm) is not None for arm in arms):
        keys["the same in high precision"] = (FAINT, "-", "")
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=4)
    return figure


def _loss_name(runs: Sequence[Seen]) -> str:
    common = all("common_loss" in run.steps for run in runs if len(run.steps))
    return "common_loss" if common else "loss"


def _loss(run: Seen) -> tuple[Any, Any]:
    name = _loss_name([run])
    return points(run.steps, name) if name in run.steps else (np.array([]), np.array([]))


def timeline(run: Seen, place: Place) -> Figure | str:
    """One run on one clock: alignment, product, staleness, gradient norm, loss."""
    rows = run.products[run.products["site"] == place.site]
    if rows.empty:
        return f"{run.label} has no row of {place.site}"
    figure = new_figure(8.6)
    heights = [0.3, 1.0, 1.25, 1.0, 0.9, 0.9]
    grid = figure.subplots(6, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    strip, panels = grid[0], grid[1:]
    _alignment_panel(panels[0], run, place)
    _product_panel(panels[1], rows)
    _staleness_panel(panels[2], rows)
    _growth_panel(panels[3], run, "Gradient norm", {"grad_norm": INK})
    looks = {"loss": INK} | ({"common_loss": ORANGE} if "common_loss" in run.steps else {})
    _growth_panel(panels[4], run, "Loss", looks)
    panels[-1].set_xlabel("step")
    steps = run.steps["step"]
    margin = 0.5 + 0.008 * float(steps.max() - steps.min())
    panels[-1].set_xlim(float(steps.min()) - margin, float(steps.max()) + margin)
    _mark_alarms(strip, panels, run)
    for axes in panels:
        axes.yaxis.set_label_coords(-0.055, 0.5)
    return figure


def _alignment_panel(axes: Axes, run: Seen, place: Place) -> None:
    rows = run.channels[
        (run.channels["site"] == place.module) & (run.channels["channel"] == place.channel)
    ]
    axes.set_title(f"Alignment of channel {place.channel}: |cos(gate row, up row)|")
    axes.set_ylim(0, 1.02)
    x, values = points(rows, "alignment")
    line(axes, x, np.abs(values), color=BLUE, linewidth=1.3, marker="o", markersize=2.5)
    control = points(rows, "permuted_alignment")
    line(axes, control[0], np.abs(control[1]), color=QUIET, linewidth=1.0, linestyle="--")
    axes.set_ylabel("|cosine|")
    say_if_empty(axes, values)
    control_key = (QUIET, "--", "")
    legend(
        axes,
        {f"channel {place.channel}": (BLUE, "-", "o"), "another up row (control)": control_key},
    )


def _product_panel(axes: Axes, rows: pd.DataFrame) -> None:
    x, amax = points(rows, "cur_amax")
    axes.set_title("Largest gate product, and what the scale in force allowed")
    axes.set_ylabel("amax")
    log_axis(axes.yaxis, amax)
    line(axes, x, amax, color=BLUE, linewidth=0.7)
    scaled = rows[rows["staleness"] > 0]
    allowed = scaled["cur_amax"] / scaled["staleness"]
    axes.step(scaled["step"], allowed, where="mid", color=ORANGE, linewidth=1.6, zorder=3)
    clipped = scaled["staleness"] > CLIPPED_STALENESS
    at, peak = scaled["step"][clipped], scaled["cur_amax"][clipped]
    axes.vlines(at, allowed[clipped], peak, color=RED, linewidth=1.6, zorder=4)
    axes.plot(at, peak, "v", color=RED, markersize=5, zorder=5)
    say_if_empty(axes, amax)
    cut_off = (RED, "-", "v")
    legend(
        axes, {"amax": (BLUE, "-", ""), "allowed": (ORANGE, "-", ""), "cut off beyond 2×": cut_off}
    )


def _staleness_panel(axes: Axes, rows: pd.DataFrame) -> None:
    x, values = points(rows, "staleness")
    axes.set_title("Staleness: amax now / the amax that made the scale")
    axes.set_ylabel("ratio")
    log_axis(axes.yaxis, np.append(values, CLIPPED_STALENESS))
    beyond = values > CLIPPED_STALENESS
    rasterized = len(x) > LONG
    axes.plot(x[~beyond], values[~beyond], ".", color=QUIET, markersize=2, rasterized=rasterized)
    axes.plot(x[beyond], values[beyond], "v", color=RED, markersize=5, zorder=5)
    axes.axhline(CLIPPED_STALENESS, color=INK, linewidth=0.9, linestyle="--")
    say_if_empty(axes, values, "no scale: the product is not cast to FP8, or was not recorded")
    threshold = f"threshold {CLIPPED_STALENESS:g}"
    legend(
        axes, {"within": (QUIET, "", "."), "clipped": (RED, "", "v"), threshold: (INK, "--", "")}
    )


def _growth_panel(axes: Axes, run: Seen, title: str, looks: Mapping[str, str]) -> None:
    """Columns of the steps on a log axis; what explodes leaves it at the top, and is named."""
    axes.set_title(title)
    curves = {column: points(run.steps, column) for column in looks}
    alarm = run.diagnosis.loss_alarm
    before = [v[x < alarm] if alarm is not None else v for x, v in curves.values()]
    calm = np.concatenate(before)
    top = LOST * float(calm.max()) if len(calm) else np.inf
    everything = np.concatenate([v for _, v in curves.values()])
    log_axis(axes.yaxis, np.minimum(everything, top))
    for colour, (x, values) in zip(looks.values(), curves.values(), strict=True):
        line(axes, x, values, color=colour, linewidth=0.8)
    if len(everything) and everything.max() > top > 0:
        axes.set_ylim(0.7 * float(everything[everything > 0].min()), top)
        axes.set_title(f"{title} (up to {power_of_ten(everything.max())}, beyond the axis)")
    say_if_empty(axes, everything)
    if len(looks) > 1:
        legend(axes, {column: (colour, "-", "") for column, colour in looks.items()})


def _mark_alarms(strip: Axes, panels: Any, run: Seen) -> None:
    """Vertical lines through all panels, named in a strip above them, a row each."""
    strip.set_axis_off()
    strip.set_ylim(0, 1)
    low, high = panels[-1].get_xlim()
    diagnosis = run.diagnosis
    for step, name, colour, dash, height in (
        (diagnosis.first_alarm, "first alarm", ORANGE, "--", 0.8),
        (diagnosis.loss_alarm, "the loss's own alarm", RED, "-", 0.2),
    ):
        if step is None:
            continue
        for axes in panels:
            axes.axvline(step, color=colour, linewidth=1.2, linestyle=dash, zorder=2)
        strip.plot([step, step], [0, height], color=colour, linewidth=1.2, linestyle=dash)
        on_the_left = step > low + 0.6 * (high - low)
        strip.annotate(
            f"{name}, step {step}",
            (step, height),
            xytext=(-4 if on_the_left else 4, 0),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            va="center",
            fontweight="bold",
        )


def weights(run: Seen, rows: Sequence[pd.Series]) -> Figure:
    """Gate row against up row of one channel, at one or two recorded steps."""
    figure = new_figure(3.9, width=3.7 * len(rows) + 0.2)
    grid = figure.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
    limit = 1.08 * max(
        float(np.abs(row[name]).max()) for row in rows for name in ("gate_weights", "up_weights")
    )
    limit = limit if np.isfinite(limit) and limit > 0 else 1.0
    for axes, row, marker in zip(grid, rows, ("o", "D"), strict=False):
        axes.axline((0, 0), slope=1, color=FAINT, linewidth=0.8, zorder=0)
        axes.axline((0, 0), slope=-1, color=FAINT, linewidth=0.8, zorder=0)
        axes.scatter(
            row["gate_weights"],
            row["up_weights"],
            s=16,
            marker=marker,
            color=BLUE,
            linewidths=0,
            alpha=0.7,
        )
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.locator_params(nbins=5)
        alignment = f", cosine {row['alignment']:.2f}" if np.isfinite(row["alignment"]) else ""
        axes.set_title(f"{run.when(int(row['step']))}{alignment}")
        axes.set_xlabel("weight in the gate row")
        axes.grid(False)
    grid[0].set_ylabel("weight in the up row")
    return figure


def layers(runs: Sequence[tuple[str, Seen]], early: int, late: int) -> Figure | str:
    """Product amax of every layer at two steps, a panel a run."""
    sites = list(dict.fromkeys(site for _, run in runs for site in run.products["site"]))
    if not sites:
        return "no gate product was recorded"
    figure = new_figure(1.2 + 0.28 * len(sites))
    grid = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    amaxes = []
    for axes, (title, run) in zip(grid, runs, strict=True):
        axes.set_title(plain(title))
        rows = run.products
        ends = [
            rows[rows["step"] == step].set_index("site")["cur_amax"].to_dict()
            for step in (early, late)
        ]
        for position, site in enumerate(sites):
            pair = [float(end.get(site, np.nan)) for end in ends]
            amaxes += pair
            axes.plot(pair, [position] * 2, color=FAINT, linewidth=2, zorder=1)
            axes.plot(pair[0], position, "o", color=QUIET, markersize=6)
            axes.plot(pair[1], position, "D", color=RED, markersize=6)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlabel("amax of the product")
        axes.grid(True, axis="x")
    grid[0].set_yticks(range(len(sites)), [plain(site) for site in sites])
    log_axis(grid[0].xaxis, np.array(amaxes))
    first = runs[0][1]
    keys = {first.when(early): (QUIET, "", "o"), first.when(late): (RED, "", "D")}
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=2)
    return figure


def doses(part: Part, site: str) -> Figure:
    """Loss, gradient cosine, bulk error and flushed share against the amplification, by arm."""
    import pandas as pd

    figure = new_figure(6.2)
    grid = figure.subplots(2, 2, sharex=True)
    arms = [arm for arm in part.arms if any(run.doses for run in arm.runs)]
    results, casts = [], []
    for arm in arms:
        for run in arm.runs:
            results.append(pd.DataFrame(run.doses).assign(arm=arm.name, run=run.label))
            rows = run.products[run.products["site"] == site]
            steps = run.steps.reindex(columns=["step", "dose"])  # a damaged run may lack them
            joined = rows.merge(steps.dropna(), on="step") if len(rows) else rows
            casts.append(joined.assign(arm=arm.name, run=run.label))
    measured, cast = pd.concat(results), pd.concat(casts)
    for axes, frame, column, title in (
        (grid[0, 0], measured, "loss", "Loss"),
        (grid[0, 1], measured, "gradient_cosine", "Gradient: cosine with the exact one"),
        (grid[1, 0], cast, "bulk_error", "Relative error of the cast, outlier channel left out"),
        (grid[1, 1], cast, "flushed", "Share of the product that became zero"),
    ):
        axes.set_title(title)
        _dose_panel(axes, arms, frame, column)
    exponents = sorted(set(measured["dose"]))
    for axes in grid[1]:
        axes.set_xticks(exponents, [f"2{superscript(int(k))}" for k in exponents])
        axes.set_xlabel("amplification of one channel")
    grid[0, 0].set_ylabel("nats per byte")
    grid[0, 1].set_ylabel("cosine")
    log_axis(grid[1, 0].yaxis, cast["bulk_error"].to_numpy(float))
    grid[1, 0].set_ylabel("relative l2 error")
    grid[1, 1].set_ylabel("share of elements")
    keys = {plain(arm.title): ARM_STYLES[i % len(ARM_STYLES)] for i, arm in enumerate(arms)}
    figure.legend(
        handles(keys),
        list(keys),
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _dose_panel(axes: Axes, arms: Sequence[Arm], frame: pd.DataFrame, column: str) -> None:
    """Faint lines are runs, bold ones the mean over an arm's. Where arms coincide the later are
    the thinner, so that all of them show."""
    import seaborn

    for position, arm in enumerate(arms):
        colour, dash, marker = ARM_STYLES[position % len(ARM_STYLES)]
        rows = frame[frame["arm"] == arm.name].dropna(subset=column)
        look = {"x": "dose", "y": column, "color": colour, "errorbar": None, "legend": False}
        for run in rows["run"].unique():
            one = rows[rows["run"] == run]
            seaborn.lineplot(one, **look, linewidth=0.6, alpha=0.35, ax=axes)
        if len(rows):
            thinner = position / max(1, len(arms) - 1)
            axes_look = {"linestyle": dash, "marker": marker, "markeredgewidth": 0}
            seaborn.lineplot(
                rows,
                **look,
                **axes_look,
                ax=axes,
                linewidth=2.6 - 1.6 * thinner,
                markersize=8.5 - 4.0 * thinner,
            )
    axes.set(xlabel="", ylabel="")


def ranges(shown: Sequence[tuple[str, pd.Series]]) -> Figure:
    """Histograms of products by magnitude, over what the format could hold of them."""
    figure = new_figure(2.5 * len(shown) + 0.3)
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (title, row) in zip(grid, shown, strict=True):
        axes.set_title(plain(title, 110))
        _range_panel(axes, row)
    grid[-1].set_xlabel("magnitude of an element of the product")
    return figure


def _range_panel(axes: Axes, row: pd.Series) -> None:
    format_ = getattr(formats, str(row["format"]))
    counts = np.asarray(row["histogram"], dtype=float)
    start = int(row["histogram_start"])
    edges = np.log2([max(bin_edge(start + i), 2.0**-140) for i in range(len(counts) + 1)])
    bounds = np.log2(
        np.array([format_.smallest_subnormal / 2, format_.smallest_normal, format_.max])
        / float(row["scale"])
    )
    low = max(min(edges[0], bounds[0] - 4), bounds[0] - 36)
    high = max(edges[-1], bounds[2] + 0.09 * (bounds[2] - low)) + 0.5
    floor = 0.7
    axes.stairs(
        np.maximum(counts, floor),
        edges,
        baseline=floor,
        fill=True,
        color=BLUE,
        linewidth=0,
        zorder=2,
    )
    axes.set_yscale("log")
    axes.set_ylim(floor, counts.max() * 20)
    axes.set_xlim(low, high)
    starts = (low, bounds[0], bounds[1], bounds[2])
    for left, right, name, column, shade in zip(
        starts,
        (*starts[1:], high),
        ("becomes 0", "subnormal", "normal", "saturated"),
        ("flushed", "subnormal", None, "saturated"),
        ("#f3d9b1", "#f9eedb", "#ffffff", "#f2c4bc"),
        strict=True,
    ):
        axes.axvspan(left, right, color=shade, linewidth=0, zorder=0)
        share = "" if column is None or not np.isfinite(row[column]) else _percent(row[column])
        axes.text(
            (left + right) / 2,
            counts.max() * 15,
            f"{name}\n{share}",
            ha="center",
            va="top",
            fontsize=7.5,
        )
    for bound in bounds:
        axes.axvline(bound, color=INK, linewidth=0.8, linestyle="--", zorder=3)
    apart = next(octaves for octaves in (1, 2, 4, 8) if (high - low) / octaves < 18)
    ticks = np.arange(np.ceil(low / apart) * apart, high, apart)
    axes.set_xticks(ticks, [f"2{superscript(int(k))}" for k in ticks])
    log_axis(axes.yaxis, counts)
    axes.set_ylabel("elements")


def _percent(share: float) -> str:
    percent = 100.0 * share
    return f"{percent:.3g} %" if percent >= 1 else f"{percent:.2g} %"
