"""Pictures of what casting does to a product: its magnitudes over a format's range, and doses.

As in `pictures`, each function is one picture: rows in, a drawn figure out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fp8lab import formats
from fp8lab.report.drawing import (
    ARM_STYLES,
    BLUE,
    INK,
    handles,
    log_axis,
    new_figure,
    plain,
)
from fp8lab.report.story import Arm, superscript
from fp8lab.sketch import bin_edge

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8lab.report.picked import DoseRows


def doses(found: DoseRows) -> Figure:
    """Loss, gradient cosine, bulk error and flushed share against the amplification, by arm."""
    figure = new_figure(6.2)
    grid = figure.subplots(2, 2, sharex=True)
    _, arms, measured, cast = found
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
