"""Another document: the arms of some runs beside each other, their seeds as bands.

A page about one run asks what went wrong in it; this one asks which arm is the better, by losses at
the same step, or after the same tokens where steps differ in size, and by the table that
`fp8lab compare` prints. Verdicts, findings, limits and provenance are those of the report, taken
from its document whole: that draws pictures that are not shown, a few seconds, and cannot tell of
the same runs something else. The numbers are `comparison`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8lab.comparison import (
    QUARTILES_FROM,
    Band,
    By,
    arms_of,
    band_of,
    curve_of,
    loss_name,
    side_by_side,
)
from fp8lab.report import sections
from fp8lab.report.blocks import Block, Document, Note, Picture, Section
from fp8lab.report.drawing import (
    BLUE,
    FAINT,
    INK,
    LONG,
    RED,
    handles,
    line,
    log_axis,
    new_figure,
    plain,
    wrapped,
)
from fp8lab.report.pictures import ceiling
from fp8lab.report.story import Part, Story
from fp8lab.report.tables import Cell, Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8lab.runs import Run

_ALSO = ("outcomes", "findings", "limits", "provenance")


def document_of(story: Story, by: By, against: str) -> Document:
    """The comparison; to be called under `drawing.style`. Raises ValueError as `curve_of` does."""
    trained = [part for part in story.parts if not part.is_dose_response]
    losses: list[Block] = [_losses(part, by, against) for part in trained]
    missing = Note("Not shown: no training run is here.", missing=True)
    whole = sections.document_of(story)
    compared = [
        Section("bands", f"Loss of every arm by {by}", losses or [missing]),
        Section("arms", "Arms beside each other", _arms(story, by, against)),
    ]
    kept = [section for section in whole.sections if section.anchor in _ALSO]
    return replace(whole, answer=None, headline=whole.counts, sections=compared + kept)


def _losses(part: Part, by: By, against: str) -> Picture | Note:
    drawn = bands(part, by, against)
    if isinstance(drawn, str):
        return Note(f"Not shown: {part.title}: {drawn}.", missing=True)
    return Picture(
        name="bands",
        figure=drawn,
        alt=f"Median loss of every arm of {part.title} by {by}, a band over its runs, "
        f"{drawn.axes[0].get_yscale()} scale",
        caption=f"{part.title}. A panel an arm: the median of its runs, over the band between the "
        f"lowest and the highest, or from {QUARTILES_FROM} runs on between the quartiles. From "
        "where a run diverged its loss counts as infinite; a × is where the median is lost.",
    )


def bands(part: Part, by: By, against: str) -> Figure | str:
    """The losses of a part, a panel an arm, or one line that says what is missing."""
    loss = loss_name(run.steps for run in part.runs)
    found = [(arm, band_of([curve_of(run.run, by, loss) for run in arm.runs])) for arm in part.arms]
    told = [(arm, band) for arm, band in found if band is not None]
    if not told:
        return "no finite loss was recorded"
    columns = min(4, len(told))
    rows = -(-len(told) // columns)
    figure = new_figure(2.2 * rows + 0.9)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    finite = np.concatenate([each[np.isfinite(each)] for _, band in told for each in band[1:]])
    lowest, top = float(finite.min()), ceiling(float(band.middle[0]) for _, band in told)
    top = min(float(finite.max()), top)
    beyond = max(10.0 * top, top + 10.0 * (top - lowest or 1.0))
    for axes, (arm, band) in zip(grid.flat, told, strict=False):
        axes.set_title(wrapped(arm.title), fontsize=9)
        for other, behind in told:
            is_reference = other.name == against
            colour, dash = (INK, "--") if is_reference else (FAINT, "-")
            if other is not arm:
                look = {"color": colour, "linestyle": dash, "zorder": 1.9 + 0.05 * is_reference}
                _median(axes, behind, top, linewidth=0.7, **look)
        _band(axes, band, top, beyond)
    log_axis(grid[0, 0].yaxis, np.minimum(finite, top))
    # What is infinite goes beyond the upper edge.
    if grid[0, 0].get_yscale() == "log":
        grid[0, 0].set_ylim(0.8 * float(finite[finite > 0].min()), 1.3 * top)
    else:
        grid[0, 0].set_ylim(lowest - 0.01 * (beyond - top), top + 0.01 * (beyond - top))
    for axes in list(grid.flat)[len(told) :]:
        axes.set_visible(False)
    figure.supxlabel({"step": "step", "tokens": "tokens seen"}[by], fontsize=9.5)
    figure.supylabel(loss, fontsize=9.5)
    keys: dict[str, tuple[str, Any, str]] = {"median": (BLUE, "-", "")}
    if any(np.isinf(band.middle).any() for _, band in told):
        keys["median that is lost"] = (RED, "-", "X")
    if any(arm.name == against for arm, _ in told):
        keys[f"median of {plain(against)}"] = (INK, "--", "")
    if len(told) > 1:
        keys["of the other arms"] = (FAINT, "-", "")
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=4)
    return figure


def _band(axes: Axes, band: Band, top: float, beyond: float) -> None:
    colour = RED if np.isinf(band.middle).any() else BLUE
    low, high = (np.where(np.isinf(each), beyond, each) for each in (band.low, band.high))
    is_long = len(band.positions) > LONG
    axes.fill_between(
        band.positions, low, high, color=colour, alpha=0.2, linewidth=0.0, rasterized=is_long
    )
    _median(axes, band, top, color=colour, linewidth=1.1)
    if colour == RED:
        there = np.isfinite(band.middle)
        last = np.flatnonzero(there)[-1] if there.any() else 0
        height = min(float(band.middle[last]), top)
        axes.plot(band.positions[last], height, "X", color=RED, markersize=6.5, clip_on=False)


def _median(axes: Axes, band: Band, top: float, **look: Any) -> None:
    there = np.isfinite(band.middle)
    line(axes, band.positions[there], np.minimum(band.middle[there], top), **look)


def _arms(story: Story, by: By, against: str) -> list[Block]:
    titles: dict[Run, str] = {}
    for part in story.parts:
        for arm in part.arms:
            title = arm.title if len(story.parts) == 1 else f"{part.title}: {arm.title}"
            for run in arm.runs:
                is_alone = not {"part", "arm"} <= set(run.config)
                titles[run.run] = run.label if is_alone else title
    runs = [run.run for run in story.runs]
    rows = side_by_side(runs, against, by)
    names = [titles[members[0]] for _, members in arms_of(runs)]
    if not rows:
        return [Note("Not shown: no run is here.", missing=True)]
    partly = ", the last three of the steps recorded in full" * ("in_full" in rows[0])
    return [
        Table(
            head=tuple(name.replace("_", " ") for name in rows[0]),
            rows=[_cells(name, row) for name, row in zip(names, rows, strict=True)],
            note=f"Losses and speeds are medians over runs, final losses over those that "
            f"finished; the aligned loss is that at the furthest {by} that every arm reached with "
            f"a run that did not diverge; staleness, saturated, flushed and bulk error are the "
            f"largest recorded at a product{partly}. Gap and ratio are to the arm {against} "
            f"of the same part, seed by seed.",
        )
    ]


def _cells(arm: str, row: Mapping[str, Any]) -> tuple[Cell, ...]:
    cells = [Cell(arm)]
    for name, value in row.items():
        if name != "arm":
            is_bad = name in ("diverged", "unfinished") and bool(value)
            cells.append(Cell(_shown(value), "bad" if is_bad else ""))
    return tuple(cells)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "diverged" if value == float("inf") else number(value)
